"""Any shape with any combination of options agrees with the oracle on the CPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from assertions import check_case
from cases import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flash_attn_plus  # noqa: F401  (registers the operators)

bounded = settings(
    derandomize=True,
    deadline=None,
    max_examples=120,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
WINDOW = st.one_of(st.just(-1), st.integers(0, 60))


def broadcast(axes: str) -> st.SearchStrategy[str]:
    """Each axis there or broadcast."""
    return st.tuples(*(st.sampled_from([axis, "1"]) for axis in axes)).map("".join)


@st.composite
def any_variant(draw, **where) -> Case:
    heads_k = draw(st.integers(1, 3))
    return Case(
        # The values depend on the name, so different names are different draws.
        name=f"drawn_{draw(st.integers(0, 999))}",
        heads_k=heads_k,
        heads=heads_k * draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 40)),
        dim_v=draw(st.one_of(st.none(), st.integers(1, 40))),
        softmax_scale=draw(st.one_of(st.none(), st.sampled_from([0.0, -0.25, 0.5, 1.0]))),
        causal=draw(st.booleans()),
        window=(draw(WINDOW), draw(WINDOW)),
        diagonal=draw(st.one_of(st.none(), st.integers(-60, 60))),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 20.0])),
        alibi=draw(st.sampled_from(["", "", "h", "bh"])),
        sink=draw(st.sampled_from(["", "", "h", "bh"])),
        bias=draw(st.one_of(st.just(""), broadcast("bhqk"))),
        bias_values=draw(st.sampled_from(["float", "bool", "-inf"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.2, 0.8])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "every_other"])),
        **where,
    )


@st.composite
def dense_cases(draw) -> Case:
    lengths = st.integers(0, 70)
    where = {"batch": draw(st.integers(0, 3)), "seqlen_q": draw(lengths), "seqlen_k": draw(lengths)}
    return draw(any_variant(**where))


@st.composite
def varlen_cases(draw) -> Case:
    lengths = tuple(draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4)))

    def part_of(sizes):
        return tuple(draw(st.integers(0, size)) for size in sizes)

    optional, paged = st.booleans(), draw(st.integers(0, 3)) == 0
    unused_q = part_of(q for q, _ in lengths) if draw(optional) else None
    unused_k = part_of(k for _, k in lengths) if draw(optional) else None
    used_k = [k - u for (_, k), u in zip(lengths, unused_k or [0] * len(lengths), strict=True)]
    leftpad_k = part_of(used_k) if draw(optional) and not paged else None
    case = draw(any_variant(lengths=lengths, unused_q=unused_q, unused_k=unused_k, leftpad_k=leftpad_k))
    return replace(
        case,
        padding=(draw(st.integers(0, 5)), draw(st.integers(0, 5))),
        page_size=draw(st.integers(1, 20)) if paged else 0,
    )


@bounded
@given(dense_cases(), DTYPES)
def test_dense(case, dtype):
    check_case(case, "cpu", dtype)


@bounded
@given(varlen_cases(), DTYPES)
def test_varlen(case, dtype):
    check_case(case, "cpu", dtype)
