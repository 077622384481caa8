"""The public functions: signatures, packing, normalisation, results, random state, and what explain() says."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
import torch
from expecttest import TestCase

import flash_attn_plus as fap
from flash_attn_plus import interface, reference
from flash_attn_plus.schemas import Variant, Varlen

FUNCTIONS = [
    fap.flash_attn_func,
    fap.flash_attn_kvpacked_func,
    fap.flash_attn_qkvpacked_func,
    fap.flash_attn_varlen_func,
    fap.flash_attn_varlen_kvpacked_func,
    fap.flash_attn_varlen_qkvpacked_func,
    fap.flash_attn_combine,
    fap.merge_states,
]


class Signatures(TestCase):
    maxDiff = None

    def test_are_flash_attn_2_8_3_and_keyword_only_additions(self):
        lines = []
        for function in FUNCTIONS:
            parameters = inspect.signature(function).parameters.values()
            shown = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
            kinds = [p.kind is p.KEYWORD_ONLY for p in parameters]
            names = list(shown)
            if True in kinds:
                names.insert(kinds.index(True), "*")
            lines.append(f"{function.__name__}({', '.join(names)})")
        self.assertExpectedInline(
            "\n".join(lines),
            """\
flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *, attn_bias=None, sink=None, return_lse=False, backend=None)
flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *, attn_bias=None, sink=None, return_lse=False, backend=None)
flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *, attn_bias=None, sink=None, return_lse=False, backend=None)
flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None, *, attn_bias=None, sink=None, return_lse=False, seqused_q=None, seqused_k=None, leftpad_k=None, backend=None)
flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *, attn_bias=None, sink=None, return_lse=False, backend=None)
flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *, attn_bias=None, sink=None, return_lse=False, backend=None)
flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None)
merge_states(out1, lse1, out2, lse2)""",
        )


@pytest.mark.parametrize("function", [*FUNCTIONS, fap.explain], ids=lambda f: f.__name__)
def test_functions_are_plain_and_documented(function):
    assert inspect.isfunction(function)
    assert pickle.loads(pickle.dumps(function)) is function
    assert "{" not in function.__doc__
    documented = function.__doc__ + fap.flash_attn_func.__doc__ + fap.flash_attn_varlen_func.__doc__
    for name in inspect.signature(function).parameters:
        assert name in documented, name


def tensors(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


OPTIONS = [
    dict(),
    dict(causal=True),
    dict(softmax_scale=0.3, window_size=(3, 1)),
    dict(softcap=2.0, sink=torch.tensor([0.5, -0.5])),
    dict(alibi_slopes=torch.tensor([0.5, 0.25]), causal=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
class TestPacking:
    def test_dense(self, options):
        (qkv,) = tensors((2, 7, 3, 2, 8))
        q, k, v = qkv.unbind(2)
        expected = fap.flash_attn_func(q, k, v, **options, return_lse=True)
        torch.testing.assert_close(fap.flash_attn_qkvpacked_func(qkv, **options, return_lse=True), expected)
        kv = qkv[:, :, 1:]
        torch.testing.assert_close(fap.flash_attn_kvpacked_func(q, kv, **options, return_lse=True), expected)

    def test_varlen(self, options):
        (qkv,) = tensors((9, 3, 2, 8))
        q, k, v = qkv.unbind(1)
        cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
        layout = (cu_seqlens, cu_seqlens, 5, 5)
        expected = fap.flash_attn_varlen_func(q, k, v, *layout, **options, return_lse=True)
        packed = fap.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 5, **options, return_lse=True)
        torch.testing.assert_close(packed, expected)
        packed = fap.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], *layout, **options, return_lse=True)
        torch.testing.assert_close(packed, expected)
        out, lse = expected
        for start, end in ((0, 4), (4, 9)):
            one = fap.flash_attn_func(*(x[None, start:end] for x in (q, k, v)), **options, return_lse=True)
            torch.testing.assert_close((out[None, start:end], lse[None, :, start:end]), one)


class TestNormalisation:
    @pytest.mark.parametrize(
        "window", [(2, 1), [2, 1], (torch.tensor(2), torch.tensor(1)), (np.int64(2), np.int32(1))], ids=repr
    )
    def test_windows_come_in_many_forms(self, window):
        q, k, v = tensors(*[(1, 6, 1, 4)] * 3)
        expected = reference.attention(q, k, v, Variant(window_left=2, window_right=1))[0]
        torch.testing.assert_close(fap.flash_attn_func(q, k, v, window_size=window), expected)

    @pytest.mark.parametrize("window", [(-1, -1), (-7, -3), (None, None)])
    def test_negative_windows_are_unlimited(self, window):
        q, k, v = tensors(*[(1, 6, 1, 4)] * 3)
        torch.testing.assert_close(
            fap.flash_attn_func(q, k, v, window_size=window), fap.flash_attn_func(q, k, v), rtol=0, atol=0
        )

    def test_causal_clamps_the_right_window(self):
        q, k, v = tensors(*[(1, 6, 1, 4)] * 3)
        torch.testing.assert_close(
            fap.flash_attn_func(q, k, v, causal=True, window_size=(2, 2)),
            fap.flash_attn_func(q, k, v, window_size=(2, 0)),
        )

    def test_equal_options_are_one_object(self, monkeypatch):
        """What a call is compared with by identity (memory.py); of options that are only equal, each is what it was."""
        monkeypatch.setattr(interface, "_known_variants", {})
        monkeypatch.setattr(interface, "_MOST_KNOWN_VARIANTS", 4)

        def variant(scale=0.5, causal=True, window=(2, 1), softcap=1.0, dropout_p=0.0, deterministic=True, bias=None):
            return interface._variant(scale, causal, window, softcap, None, bias, None, dropout_p, None, deterministic)

        assert variant() is variant(scale=1.0 / 2, window=(3 - 1, 1))
        others = [dict(causal=1), dict(window=[2, 1]), dict(window=(2, True)), dict(softcap=1), dict(deterministic=1)]
        for other in (*others, dict(dropout_p=0), dict(dropout_p=False)):
            assert variant() == variant(**other) and variant() is not variant(**other)
        assert variant(scale=1).softmax_scale.__class__ is int and variant(scale=1.0).softmax_scale.__class__ is float
        with pytest.raises(TypeError, match="window_size"):
            variant(window=(2.0, 1))
        bias = torch.zeros(2, 2)
        assert variant(bias=bias) is not variant(bias=bias)
        for scale in range(9):
            assert variant(scale=float(scale)).softmax_scale == scale
        assert len(interface._known_variants) <= 4
        # A compiled graph is not guarded by what is known.
        compiled = torch.compile(variant, backend="eager", fullgraph=True)
        assert compiled() == variant() and compiled(softcap=3.0).softcap == 3.0
        assert all(known.softcap == 1.0 for known in interface._known_variants.values())

    @pytest.mark.parametrize("wrong", [-0.5, 1.0, float("nan")])
    def test_a_wrong_probability_is_one_every_time_and_no_other(self, wrong, monkeypatch):
        monkeypatch.setattr(interface, "_known_variants", {})
        q, k, v = tensors(*[(1, 6, 1, 4)] * 3, dtype=torch.bfloat16)
        expected = fap.flash_attn_func(q, k, v)
        for options in ({}, {"softcap": 2.0}):
            for function in (fap.explain, fap.flash_attn_func, fap.flash_attn_func):
                with pytest.raises(ValueError, match="dropout_p"):
                    function(q, k, v, dropout_p=wrong, **options)
                function(q, k, v, **options)
        assert torch.equal(fap.flash_attn_func(q, k, v, dropout_p=0), expected)

    def test_max_seqlen_may_be_a_tensor(self):
        q, k, v = tensors(*[(6, 1, 4)] * 3)
        cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
        longest = torch.tensor(4)
        torch.testing.assert_close(
            fap.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest),
            fap.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4),
        )

    @pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (1, 1, 1, 6), (2, 1, 5, 1)])
    def test_bias_broadcasts(self, shape):
        q, k, v, bias = tensors((2, 5, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4), shape)
        bias.requires_grad_()
        out = fap.flash_attn_func(q, k, v, attn_bias=bias)
        full = bias.detach().expand(2, 2, 5, 6) if len(shape) != 3 else bias.detach()[None].expand(2, 2, 5, 6)
        torch.testing.assert_close(out, reference.attention(q, k, v, Variant(attn_bias=full))[0])
        out.sum().backward()
        assert bias.grad.shape == shape

    def test_last_dimension_that_is_not_contiguous(self):
        q, k, v = (x.transpose(2, 3) for x in tensors(*[(2, 5, 8, 2)] * 3))
        expected = fap.flash_attn_func(*(x.contiguous() for x in (q, k, v)), causal=True)
        torch.testing.assert_close(fap.flash_attn_func(q, k, v, causal=True), expected)

    def test_expanded_inputs(self):
        q, k, v = tensors((2, 5, 4, 8), (2, 5, 1, 8), (2, 5, 1, 8))
        expected = fap.flash_attn_func(q, k, v, causal=True)
        wide = (x.expand(2, 5, 4, 8) for x in (k, v))
        torch.testing.assert_close(fap.flash_attn_func(q, *wide, causal=True), expected)

    def test_inputs_are_not_modified(self):
        q, k, v, bias = tensors((2, 5, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4), (1, 1, 5, 6))
        before = [x.clone() for x in (q, k, v, bias)]
        leaves = [x.requires_grad_() for x in (q, k, v, bias)]
        fap.flash_attn_func(*leaves[:3], attn_bias=bias, softcap=2.0, dropout_p=0.2).sum().backward()
        for x, saved in zip(leaves, before, strict=True):
            assert torch.equal(x.detach(), saved)

    def test_windows_are_integers(self):
        q, k, v = tensors(*[(1, 6, 1, 4)] * 3)
        with pytest.raises(TypeError, match="window_size: expected two integers"):
            fap.flash_attn_func(q, k, v, window_size=(1.0, 0))


class TestResults:
    def test_outputs_are_contiguous(self):
        q, k, v = (x.transpose(1, 2) for x in tensors(*[(2, 3, 70, 8)] * 3, dtype=torch.float32))
        for options in OPTIONS[:3]:
            out, lse = fap.flash_attn_func(q, k, v, **options, return_lse=True)
            assert out.is_contiguous()
            assert lse.is_contiguous()

    def test_one_two_or_three(self):
        q, k, v = tensors(*[(1, 5, 1, 4)] * 3)
        assert isinstance(fap.flash_attn_func(q, k, v), torch.Tensor)
        assert len(fap.flash_attn_func(q, k, v, return_lse=True)) == 2
        out, lse, s_dmask = fap.flash_attn_func(q, k, v, return_attn_probs=True)
        assert s_dmask.numel() == 0
        assert (out.shape, lse.shape) == ((1, 5, 1, 4), (1, 1, 5))

    def test_s_dmask_explains_the_output(self):
        q, k, v = tensors((2, 70, 2, 8), (2, 150, 2, 8), (2, 150, 2, 8))
        out, _, s_dmask = fap.flash_attn_func(q, k, v, dropout_p=0.3, causal=True, return_attn_probs=True)
        assert s_dmask.shape == (2, 2, 128, 256)
        weights = s_dmask[..., :70, :150]
        probabilities = weights.abs() / weights.abs().sum(-1, keepdim=True)
        kept = torch.where(weights > 0, probabilities / 0.7, 0.0)
        torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", kept, v))

    def test_s_dmask_of_packed_sequences(self):
        q, k, v = tensors(*[(9, 2, 8)] * 3)
        cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
        out, _, s_dmask = fap.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, 5, 5, dropout_p=0.3, return_attn_probs=True
        )
        assert s_dmask.shape == (2, 2, 128, 128)
        weights = s_dmask[1, :, :5, :5]
        kept = torch.where(weights > 0, weights.abs() / weights.abs().sum(-1, keepdim=True) / 0.7, 0.0)
        torch.testing.assert_close(out[4:], torch.einsum("hqk,khd->qhd", kept, v[4:]))


class TestDropout:
    def run(self, seed, **options):
        q, k, v = (torch.linspace(-1, 1, 2 * 33 * 2 * 8).view(2, 33, 2, 8) for _ in range(3))
        torch.manual_seed(seed)
        return fap.flash_attn_func(q, k, v, dropout_p=0.3, **options)

    def test_reproducible_by_seed(self):
        assert torch.equal(self.run(1), self.run(1))
        assert not torch.equal(self.run(1), self.run(2))

    def test_two_calls_differ(self):
        first = self.run(1)
        q, k, v = (torch.linspace(-1, 1, 2 * 33 * 2 * 8).view(2, 33, 2, 8) for _ in range(3))
        assert not torch.equal(first, fap.flash_attn_func(q, k, v, dropout_p=0.3))

    def test_draws_nothing_without_dropout(self):
        q, k, v = tensors(*[(1, 5, 1, 4)] * 3)
        state = torch.get_rng_state()
        fap.flash_attn_func(q, k, v, dropout_p=0.0)
        assert torch.equal(state, torch.get_rng_state())

    def test_the_mean_of_many_patterns_is_attention(self):
        q, k, v = tensors(*[(1, 16, 1, 4)] * 3)
        runs = torch.stack([fap.flash_attn_func(q, k, v, dropout_p=0.5) for _ in range(400)])
        error = (runs.mean(0) - fap.flash_attn_func(q, k, v)).abs()
        assert (error <= 5 * runs.std(0) / 400**0.5).all()  # five standard errors of the mean

    def test_works_with_softcap_and_backward_replays_the_pattern(self):
        q, k, v = (x.requires_grad_() for x in tensors(*[(1, 9, 2, 4)] * 3))
        rng_state = torch.tensor([11, 5])

        def ours(q, k, v):
            return torch.ops.flash_attn_plus.fwd(q, k, v, softcap=1.5, dropout_p=0.4, rng_state=rng_state)[0]

        assert torch.autograd.gradcheck(ours, (q, k, v))


class Explanations(TestCase):
    maxDiff = None

    def test_every_implementation_says_why(self):
        q, k, v = (torch.zeros(1, 64, 2, 16) for _ in range(3))
        packed = (x[0] for x in (q, k, v))
        cu_seqlens = torch.tensor([0, 20, 64], dtype=torch.int32)
        double = (x.double() for x in (q, k, v))
        meta = (x.to("meta") for x in (q, k, v))
        calls = {
            "softcap": fap.explain(q, k, v, softcap=3.0),
            "float64": fap.explain(*double, causal=True),
            "packed ALiBi": fap.explain(
                *packed,
                alibi_slopes=torch.ones(2),
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=44,
                max_seqlen_k=44,
            ),
            "another device": fap.explain(*meta),
        }
        found = "\n".join(f"[{name}]\n{text.split(chr(10) + 'native library')[0]}" for name, text in calls.items())
        self.assertExpectedInline(
            found,
            """\
[softcap]
forward:  row blocks: only they compute softcap
backward: row blocks: only they compute softcap
[float64]
forward:  aten: PyTorch's CPU flash kernel computes exactly this (native: it has no float64)
backward: aten: PyTorch's CPU flash kernel computes exactly this
[packed ALiBi]
forward:  row blocks: only they compute alibi_slopes
backward: row blocks: only they compute alibi_slopes
[another device]
forward:  row blocks in plain PyTorch: there are no kernels for device type 'meta' yet
backward: row blocks in plain PyTorch: there are no kernels for device type 'meta' yet""",
        )


def test_explain_computes_and_draws_nothing():
    q, k, v = tensors(*[(1, 5, 1, 4)] * 3)
    state = torch.get_rng_state()
    fap.explain(q, k, v, dropout_p=0.5)
    assert torch.equal(state, torch.get_rng_state())


def test_explain_of_packed_sequences_checks_as_the_call_does():
    q, k, v = tensors(*[(5, 1, 4)] * 3)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    offsets = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with pytest.raises(ValueError, match="max_seqlen_q: expected a value"):
        fap.explain(q, k, v, **offsets)
    with pytest.raises(ValueError, match="max_seqlen_k: expected at least the longest"):
        fap.explain(q, k, v, **offsets, max_seqlen_q=5, max_seqlen_k=4)
    pages = {"block_table": torch.tensor([[0]], dtype=torch.int32)}
    text = fap.explain(q, k[None], v[None], **offsets, max_seqlen_q=5, max_seqlen_k=5, **pages)
    assert "backward: none: the backward of paged keys is not implemented" in text


def test_explain_checks_its_arguments():
    q, k, v = tensors(*[(1, 5, 1, 4)] * 3)
    with pytest.raises(ValueError, match="sink"):
        fap.explain(q, k, v, sink=torch.zeros(3))


def test_zero_lengths_are_defined():
    for batch, seqlen_q, seqlen_k in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)):
        q, k, v = tensors((batch, seqlen_q, 2, 4), (batch, seqlen_k, 2, 4), (batch, seqlen_k, 2, 4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = fap.flash_attn_func(*leaves, causal=True, return_lse=True)
        assert out.shape == (batch, seqlen_q, 2, 4)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        out.sum().backward()
        assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in leaves)


def test_varlen_layout_fields_are_the_functions_arguments():
    names = list(inspect.signature(fap.flash_attn_varlen_func).parameters)
    assert set(Varlen._fields) <= set(names)
