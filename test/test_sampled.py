"""What sampled.py takes out of a problem is that part of the whole: by the oracle itself, on every case."""

from __future__ import annotations

import pytest
import torch
from assertions import run_reference
from cases import CASES
from sampled import MINUS_INF, Sample, assert_no_nan, check_samples, lengths, part, results, samples

NOT_EMPTY = [case for case in CASES if any(seqlen_q for seqlen_q, _ in lengths(case.make()))]


@pytest.mark.parametrize("case", NOT_EMPTY, ids=str)
def test_a_sample_is_a_part_of_the_whole(case):
    problem = case.make(dtype=torch.float64)
    whole = run_reference(problem, torch.float64)
    for sample in samples(problem, count=16)[:: 2 if len(samples(problem)) > 4 else 1]:
        actual = dict(zip(("out", "lse"), run_reference(part(problem, sample), torch.float64), strict=True))
        torch.testing.assert_close(actual, results(problem, *whole, sample), msg=lambda text: f"{sample}: {text}")  # noqa: B023


def test_samples_reach_both_ends_of_everything():
    problem = next(case for case in CASES if case.name == "varlen_everything").make()
    taken = samples(problem._replace(variant=problem.variant._replace(dropout_p=0.0)), count=8)
    found = lengths(problem)
    assert {sample.sequence for sample in taken} >= {0, len(found) - 1}
    assert {sample.head for sample in taken} >= {0, problem.q.shape[-2] - 1}
    assert Sample(0, 0, slice(0, 8)) in taken
    assert Sample(0, 0, slice(found[0][0] - 8, found[0][0])) in taken


@pytest.mark.parametrize("name", ["plain", "gqa", "bias_full", "varlen_padding", "varlen_seqused", "paged_odd"])
def test_check_samples_accepts_the_operator(name):
    case = next(case for case in CASES if case.name == name)
    check_samples(case.make(), name, count=16)


@pytest.mark.parametrize("name", ["plain", "varlen", "dropout_gqa"])
def test_check_samples_notices_a_lost_key(name, monkeypatch):
    problem = next(case for case in CASES if case.name == name).make()
    variant = problem.variant._replace(softmax_scale=4.0 * problem.q.shape[-1] ** -0.5)
    problem = problem._replace(variant=variant)
    hidden = torch.ones(1, 1, 1, max(seqlen_k for _, seqlen_k in lengths(problem)), dtype=torch.bool)
    hidden[..., 3] = False
    import sampled

    run = sampled.run_op
    lost = problem._replace(variant=variant._replace(attn_bias=hidden))
    monkeypatch.setattr(sampled, "run_op", lambda _: run(lost))
    with pytest.raises(AssertionError, match="> bound"):
        check_samples(problem, name)


def test_check_samples_notices_rows_that_are_not_padding(monkeypatch):
    problem = next(case for case in CASES if case.name == "varlen_padding").make()
    import sampled

    out, lse = sampled.run_op(problem)
    assert (lse[:, -13:] == MINUS_INF).all()
    lse[:, -1] = 0.0
    monkeypatch.setattr(sampled, "run_op", lambda _: (out, lse))
    with pytest.raises(AssertionError, match="row of no sequence"):
        check_samples(problem, "padding")


def test_nan_is_found_wherever_it_is():
    x = torch.zeros(3, 5)
    assert_no_nan(x, "x")
    x[2, 3] = float("nan")
    with pytest.raises(AssertionError, match="first at element 13"):
        assert_no_nan(x, "x")
