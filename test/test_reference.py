"""The oracle against facts that do not come from it: other code, hand-computed numbers, published vectors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_close_to_oracle, rounding_floor
from cases import BY_NAME, CASES, DENSE_CASES, VARLEN_CASES, Case
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_plus.reference import (
    attention,
    combine,
    dropout_keep_mask,
    merge_states,
    philox,
    s_dmask,
    varlen_attention,
    varlen_s_dmask,
)
from flash_attn_plus.schemas import Variant, Varlen

INF = float("inf")


def random_qkv(seqlen_q=5, seqlen_k=7, heads=2, heads_k=2, dim=4, dim_v=4, batch=2, requires_grad=False):
    shapes = (seqlen_q, heads, dim), (seqlen_k, heads_k, dim), (seqlen_k, heads_k, dim_v)
    return tuple(torch.randn(batch, *s, dtype=torch.float64, requires_grad=requires_grad) for s in shapes)


def visible_keys(seqlen_q, seqlen_k, **options):
    """Which keys each query sees, read off the output: with one-hot values, out is the probabilities."""
    q, k = torch.zeros(1, seqlen_q, 1, 1), torch.zeros(1, seqlen_k, 1, 1)
    out, _ = attention(q, k, torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k), Variant(**options))
    return ["".join("x" if p > 0 else "." for p in row) for row in out[0, :, 0]]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


class TestAgainstScaledDotProductAttention:
    """PyTorch's own attention, where it computes the same."""

    @staticmethod
    def sdpa(q, k, v, mask=None, **options):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, **options).transpose(
                1, 2
            )

    @pytest.mark.parametrize("scale", [None, 0.0, -0.7])
    @pytest.mark.parametrize("dim_v", [3, 4, 9])
    def test_plain(self, scale, dim_v):
        q, k, v = random_qkv(dim_v=dim_v)
        out, lse = attention(q, k, v, Variant(softmax_scale=scale))
        torch.testing.assert_close(out, self.sdpa(q, k, v, scale=scale))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * (0.5 if scale is None else scale)
        torch.testing.assert_close(lse, scores.logsumexp(-1))

    def test_causal_with_equal_lengths(self):
        q, k, v = random_qkv(6, 6)
        torch.testing.assert_close(attention(q, k, v, Variant(causal=True))[0], self.sdpa(q, k, v, is_causal=True))

    @pytest.mark.parametrize("heads, heads_k", [(6, 2), (4, 1)])
    def test_grouped_heads(self, heads, heads_k):
        q, k, v = random_qkv(heads=heads, heads_k=heads_k)
        torch.testing.assert_close(attention(q, k, v)[0], self.sdpa(q, k, v, enable_gqa=True))

    @pytest.mark.parametrize("shape", [(2, 2, 5, 7), (1, 2, 5, 7), (2, 1, 1, 7), (1, 1, 5, 1)])
    @pytest.mark.parametrize("boolean", [False, True])
    def test_bias(self, shape, boolean):
        q, k, v = random_qkv()
        bias = torch.randn(shape, dtype=torch.float64)
        bias = bias > -0.5 if boolean else bias
        if boolean:
            bias[..., 0] = True  # SDPA gives NaN to a row that sees no key
        torch.testing.assert_close(attention(q, k, v, Variant(attn_bias=bias))[0], self.sdpa(q, k, v, bias))

    def test_gradients(self):
        q, k, v = random_qkv(heads=4, requires_grad=True)
        bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
        inputs, dout = (q, k, v, bias), torch.randn(2, 5, 4, 4, dtype=torch.float64)
        ours = torch.autograd.grad(attention(q, k, v, Variant(attn_bias=bias))[0], inputs, dout)
        theirs = torch.autograd.grad(self.sdpa(q, k, v, bias, enable_gqa=True), inputs, dout)
        torch.testing.assert_close(ours, theirs)


class TestAlignment:
    """Rule: query i sees key j iff i + diagonal - left <= j <= i + diagonal + right."""

    def test_causal_is_bottom_right(self):
        assert visible_keys(3, 5, causal=True) == ["xxx..", "xxxx.", "xxxxx"]
        assert visible_keys(5, 3, causal=True) == ["...", "...", "x..", "xx.", "xxx"]

    def test_windows(self):
        assert visible_keys(3, 5, window_left=1, window_right=0) == [".xx..", "..xx.", "...xx"]
        assert visible_keys(4, 4, window_left=0, window_right=1) == ["xx..", ".xx.", "..xx", "...x"]
        assert visible_keys(4, 4, window_left=1) == ["xxxx", "xxxx", ".xxx", "..xx"]
        assert visible_keys(4, 4, window_right=1) == ["xx..", "xxx.", "xxxx", "xxxx"]

    def test_causal_overrides_the_right_window(self):
        assert visible_keys(3, 3, causal=True, window_left=1, window_right=1) == ["x..", "xx.", ".xx"]

    def test_any_negative_window_is_unlimited(self):
        assert visible_keys(2, 3, window_left=-7, window_right=-2) == ["xxx", "xxx"]

    def test_diagonal(self):
        assert visible_keys(3, 5, causal=True, diagonal=0) == ["x....", "xx...", "xxx.."]
        assert visible_keys(3, 3, causal=True, diagonal=-1) == ["...", "x..", "xx."]
        assert visible_keys(2, 4, window_left=0, window_right=0, diagonal=1) == [".x..", "..x."]


class TestScores:
    def test_alibi_is_symmetric_about_the_diagonal(self):
        q, k, v = (torch.zeros(1, s, 2, 1) for s in (2, 3, 3))
        slopes = torch.tensor([1.0, 0.5])
        _, lse = attention(q, k, v, Variant(alibi_slopes=slopes))
        for h, slope in enumerate((1.0, 0.5)):
            # sk - sq = 1: query 0 stands at key 1, query 1 at key 2.
            expected = [math.log(sum(math.exp(-slope * n) for n in far)) for far in ((1, 0, 1), (2, 1, 0))]
            assert lse[0, h].tolist() == pytest.approx(expected, abs=1e-12)
        per_batch, _ = attention(q, k, v, Variant(alibi_slopes=slopes[None]))
        torch.testing.assert_close(per_batch, attention(q, k, v, Variant(alibi_slopes=slopes))[0], rtol=0, atol=0)

    def test_alibi_follows_the_diagonal(self):
        q, k, v = (torch.zeros(1, 1, 1, 1) for _ in range(3))
        _, lse = attention(q, k, v, Variant(alibi_slopes=torch.tensor([2.0]), diagonal=3))
        assert lse.item() == -6.0

    def test_softcap_comes_before_the_bias(self):
        q, k, v = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1)
        bias = torch.full((1, 1, 1, 1), 10.0)
        _, lse = attention(q, k, v, Variant(softmax_scale=0.5, softcap=4.0, attn_bias=bias))
        assert lse.item() == pytest.approx(4 * math.tanh(3 / 4) + 10, abs=1e-12)

    def test_sink_is_a_key_with_a_zero_value(self):
        q, k, v = random_qkv(requires_grad=True)
        sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
        out, lse = attention(q, k, v, Variant(sink=sink, causal=True))

        bias = (
            torch.zeros(5, 7, dtype=torch.float64).masked_fill(torch.ones(5, 7).tril(2) == 0, -INF).expand(2, 2, 5, 7)
        )
        column = sink.view(1, 2, 1, 1).expand(2, 2, 5, 1)
        k1, v1 = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        plain = attention(q, k1, v1, Variant(attn_bias=torch.cat([bias, column], -1)))
        torch.testing.assert_close((out, lse), plain)
        grads, expected = (
            torch.autograd.grad(sum(x.cos().sum() for x in y), (q, k, v, sink)) for y in ((out, lse), plain)
        )
        torch.testing.assert_close(grads, expected)

        per_batch = attention(q, k, v, Variant(sink=sink.expand(2, 2), causal=True))
        torch.testing.assert_close((out, lse), per_batch, rtol=0, atol=0)


class TestRowsWithoutKeys:
    @pytest.mark.parametrize(
        "options, empty",
        [
            ({"causal": True}, [True, True, False, False]),
            ({"attn_bias": torch.tensor([0.0, -INF, 0.0, -INF]).view(1, 1, 4, 1)}, [False, True, False, True]),
            ({"attn_bias": torch.tensor([False, True, False, True]).view(1, 1, 4, 1)}, [True, False, True, False]),
        ],
    )
    def test_out_0_lse_minus_inf_gradients_0(self, options, empty):
        q, k, v = random_qkv(4, 2, requires_grad=True)
        out, lse = attention(q, k, v, Variant(**options))
        empty = torch.tensor(empty)
        assert torch.equal(out[:, empty], torch.zeros_like(out[:, empty]))
        assert torch.equal(lse[..., empty], torch.full_like(lse[..., empty], -INF))
        assert out[:, ~empty].ne(0).all() and lse[..., ~empty].isfinite().all()
        # A loss whose derivative at -inf is infinite must not reach the inputs either.
        dq, dk, dv = torch.autograd.grad((out.sum() + lse.square().sum()), (q, k, v))
        assert torch.equal(dq[:, empty], torch.zeros_like(dq[:, empty]))
        for grad in (dq, dk, dv):
            assert grad.isfinite().all()

    def test_with_a_sink_lse_is_the_sink(self):
        q, k, v = random_qkv(4, 2, requires_grad=True)
        sink = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
        out, lse = attention(q, k, v, Variant(causal=True, sink=sink))
        assert torch.equal(lse[..., :2], sink.view(1, 2, 1).expand(2, 2, 2))
        assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
        assert torch.equal(torch.autograd.grad(lse[..., 0].sum(), sink)[0], torch.full((2,), 2.0, dtype=torch.float64))

    @pytest.mark.parametrize("seqlen_q, seqlen_k, batch", [(0, 3, 2), (3, 0, 2), (0, 0, 2), (3, 3, 0)])
    def test_empty_shapes_are_differentiable(self, seqlen_q, seqlen_k, batch):
        q, k, v = random_qkv(seqlen_q, seqlen_k, batch=batch, dim_v=3, requires_grad=True)
        out, lse = attention(q, k, v)
        assert out.shape == (batch, seqlen_q, 2, 3) and lse.shape == (batch, 2, seqlen_q)
        assert (out == 0).all() and (lse == -INF).all()
        grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        assert all((grad == 0).all() for grad in grads)


class TestDropout:
    @pytest.mark.parametrize(
        "counter, key, words",
        [
            ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_known_answers(self, counter, key, words):
        drawn = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(word.item() for word in drawn) == words

    def test_keep_mask_is_the_rule_written_in_python_integers(self):
        seed, offset, p = -0x1234_5678_9ABC_DEF1, 0x1_0000_0003, 0.4
        mask = dropout_keep_mask(torch.tensor([seed, offset]), p, 2, 3, 4, 6, batch_start=5)
        key = tuple(torch.tensor(word) for word in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
        assert mask.shape == (2, 3, 4, 6) and mask.dtype == torch.bool
        for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 4), (1, 0, 1, 3)]:
            counter = tuple(torch.tensor(word) for word in (j // 4, i, (5 + b) * 3 + h, 3))
            assert mask[b, h, i, j].item() == (philox(counter, key)[j % 4].item() >= math.floor(p * 2**32))

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_fraction(self, p):
        mask = dropout_keep_mask(torch.tensor([123, 0]), p, 2, 4, 100, 101)
        assert abs((~mask).double().mean().item() - p) < 0.01
        assert abs((~mask).double().mean((2, 3)) - p).max() < 0.02  # no head stands out

    def test_seed_and_offset_both_count(self):
        masks = [
            dropout_keep_mask(torch.tensor(s), 0.5, 1, 1, 64, 64) for s in ([1, 0], [1 + 2**32, 0], [1, 1], [2, 0])
        ]
        for n, mask in enumerate(masks):
            assert all((mask == other).double().mean() < 0.6 for other in masks[:n])

    def test_pattern_does_not_depend_on_the_lengths(self):
        state = torch.tensor([5, 6])
        large = dropout_keep_mask(state, 0.3, 2, 3, 40, 50)
        small = dropout_keep_mask(state, 0.3, 1, 3, 17, 9, batch_start=1)
        assert torch.equal(large[1:, :, :17, :9], small)
        heads = dropout_keep_mask(state, 0.3, 2, 2, 40, 50, total_heads=3)
        assert torch.equal(large[:, :2], heads)

    def test_kept_probabilities_are_scaled_and_lse_is_not(self):
        q, k, _ = random_qkv(6, 8)
        v = torch.eye(8, dtype=torch.float64).view(1, 8, 1, 8).expand(2, 8, 2, 8)
        state = torch.tensor([11, 2])
        probs, lse = attention(q, k, v)
        dropped, same_lse = attention(q, k, v, Variant(dropout_p=0.25, rng_state=state))
        keep = dropout_keep_mask(state, 0.25, 2, 2, 6, 8).transpose(1, 2)
        torch.testing.assert_close(dropped, probs * keep / 0.75)
        assert torch.equal(lse, same_lse)

    def test_no_rng_state_raises(self):
        with pytest.raises(ValueError, match="rng_state"):
            attention(*random_qkv(), Variant(dropout_p=0.5))


class TestGradients:
    """The oracle's gradients are PyTorch's; what is checked is that nothing in it breaks the graph."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": True, "softcap": 1.5},
            {"window_left": 1, "window_right": 2, "alibi_slopes": torch.tensor([0.5, 0.25])},
            {"dropout_p": 0.3, "rng_state": torch.tensor([3, 4])},
        ],
        ids=lambda options: "_".join(options) or "plain",
    )
    def test_gradcheck(self, options):
        q, k, v = random_qkv(3, 4, heads=2, heads_k=1, dim=3, dim_v=2, batch=1, requires_grad=True)
        sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)

        def run(q, k, v, sink, bias):
            return attention(q, k, v, Variant(sink=sink, attn_bias=bias, **options))

        assert torch.autograd.gradcheck(run, (q, k, v, sink, bias))

    def test_gradcheck_varlen(self):
        q, k, v = (torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (6, 7, 7))
        sink = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        varlen = Varlen(int32(0, 2, 5), int32(0, 3, 7), 3, 4, leftpad_k=int32(1, 0))

        def run(q, k, v, sink):
            out, lse = varlen_attention(q, k, v, varlen, Variant(sink=sink))
            return out, lse[:, :5]  # the row past the end has lse -inf, which has no finite difference

        assert torch.autograd.gradcheck(run, (q, k, v, sink))


class TestVarlen:
    def test_is_dense_attention_of_each_sequence(self):
        q, k, v = (torch.randn(n, h, 4) for n, h in ((9, 4), (12, 2), (12, 2)))
        bias, slopes, sink = torch.randn(3, 4, 5, 6), torch.rand(3, 4), torch.randn(3, 4)
        state = torch.tensor([1, 2])
        variant = Variant(causal=True, alibi_slopes=slopes, attn_bias=bias, sink=sink, dropout_p=0.3, rng_state=state)
        out, lse = varlen_attention(q, k, v, Varlen(int32(0, 3, 3, 8), int32(0, 6, 6, 10), 5, 6), variant)
        for b, (rows, keys) in enumerate(
            [(slice(0, 3), slice(0, 6)), (slice(3, 3), slice(6, 6)), (slice(3, 8), slice(6, 10))]
        ):
            sq, sk = rows.stop - rows.start, keys.stop - keys.start
            # Dropout counts sequences: the same sequence as element b of a dense batch of b + 1 has its pattern.
            batch = [x[None].expand(b + 1, *x.shape) for x in (q[rows], k[keys], v[keys])]
            alone = variant._replace(alibi_slopes=slopes[b], sink=sink[b], attn_bias=bias[b : b + 1, :, :sq, :sk])
            out_b, lse_b = attention(*batch, alone)
            torch.testing.assert_close((out[rows], lse[:, rows]), (out_b[b], lse_b[b]), rtol=0, atol=0)
        assert (out[8:] == 0).all() and (lse[:, 8:] == -INF).all()

    def test_seqused_and_leftpad_select_rows(self):
        q, k, v = (torch.randn(n, 2, 4) for n in (6, 9, 9))
        varlen = Varlen(
            int32(0, 4, 6), int32(0, 5, 9), 4, 5, seqused_q=int32(3, 2), seqused_k=int32(4, 4), leftpad_k=int32(1, 2)
        )
        out, lse = varlen_attention(q, k, v, varlen, Variant(causal=True))
        for rows, keys in [(slice(0, 3), slice(1, 4)), (slice(4, 6), slice(7, 9))]:
            out_b, lse_b = attention(q[None, rows], k[None, keys], v[None, keys], Variant(causal=True))
            torch.testing.assert_close((out[rows], lse[:, rows]), (out_b[0], lse_b[0]), rtol=0, atol=0)
        assert (out[3] == 0).all() and (lse[:, 3] == -INF).all()

    def test_pages_hold_the_same_keys(self):
        q, k, v = (torch.randn(n, 2, 4) for n in (5, 7, 7))
        varlen = Varlen(int32(0, 2, 5), int32(0, 3, 7), 3, 4)
        pools = [torch.full((5, 2, 2, 4), float("nan")) for _ in range(2)]
        for pool, x in zip(pools, (k, v), strict=True):
            pool[3], pool[1, :1], pool[4], pool[2] = x[0:2], x[2:3], x[3:5], x[5:7]
        paged = varlen._replace(block_table=int32(3, 1, 0, 4, 2, 0).view(2, 3))
        assert all(map(torch.equal, varlen_attention(q, *pools, paged), varlen_attention(q, k, v, varlen)))

    @pytest.mark.parametrize("case", VARLEN_CASES, ids=str)
    def test_rows_of_no_sequence_are_zero_and_never_read(self, case):
        problem = case.make(dtype=torch.float64, requires_grad=not case.forward_only)
        out, lse = varlen_attention(problem.q, problem.k, problem.v, problem.varlen, problem.variant)
        assert not out.isnan().any() and not lse.isnan().any()  # they hold NaN
        starts, used = problem.varlen.cu_seqlens_q.tolist(), problem.varlen.seqused_q
        live = torch.zeros(len(out), dtype=torch.bool)
        for b, start in enumerate(starts[:-1]):
            live[start : starts[b + 1] if used is None else start + int(used[b])] = True
        assert (out[~live] == 0).all() and (lse[:, ~live] == -INF).all()
        if not case.forward_only:
            inputs = tuple(problem.differentiable().values())
            grads = torch.autograd.grad(
                (out.sum(), lse[:, live].sum()), inputs, allow_unused=True, materialize_grads=True
            )
            assert (grads[0][~live] == 0).all() and not any(grad.isnan().any() for grad in grads)


class TestStates:
    def test_merging_halves_gives_the_whole(self):
        q, k, v = random_qkv(5, 8, requires_grad=True)
        whole = attention(q, k, v)
        parts = [attention(q, k[:, s], v[:, s]) for s in (slice(0, 3), slice(3, 8))]
        merged = merge_states(*parts[0], *parts[1])
        torch.testing.assert_close(merged, whole)
        grads = [torch.autograd.grad(sum(x.sin().sum() for x in state), (q, k, v)) for state in (merged, whole)]
        torch.testing.assert_close(*grads)

    def test_combine_takes_any_number_and_packed_states(self):
        out, lse = torch.randn(3, 7, 2, 4), torch.randn(3, 2, 7)
        combined = combine(out, lse)
        step = merge_states(*merge_states(out[0], lse[0], out[1], lse[1]), out[2], lse[2])
        torch.testing.assert_close(combined, step)

    def test_empty_states(self):
        out, lse = torch.randn(2, 3, 1, 4, dtype=torch.float64), torch.randn(2, 1, 3, dtype=torch.float64)
        nothing = torch.full_like(out, float("nan")), torch.full_like(lse, -INF)
        for merged in (merge_states(out, lse, *nothing), merge_states(*nothing, out, lse)):
            torch.testing.assert_close(merged, (out, lse))
        merged_out, merged_lse = merge_states(*nothing, *nothing)
        assert (merged_out == 0).all() and (merged_lse == -INF).all()


class TestSDmask:
    STATE = torch.tensor([9, 1])

    @pytest.mark.parametrize("block_n", [None, 3])
    def test_reproduces_the_output(self, block_n):
        q, k, v = random_qkv(5, 8, heads=4)
        variant = Variant(causal=True, softcap=2.0, dropout_p=0.4, rng_state=self.STATE)
        mask = s_dmask(q, k, variant, block_n)
        assert mask.shape == (2, 4, 128, 128) and mask.dtype == q.dtype
        assert (mask[..., 5:, :] == 0).all() and (mask[..., 8:] == 0).all()
        signed = mask[..., :5, :8]
        # Undo the running maximum, block by block from the right, as the tests of flash-attn do.
        scores = attention(
            q, k, torch.eye(8, dtype=q.dtype).view(1, 8, 1, 8).expand(2, 8, 2, 8), variant._replace(dropout_p=0.0)
        )[0]
        scores = scores.transpose(1, 2).log()
        width = block_n or 8
        shift = torch.stack([scores[..., j // width * width :].amax(-1) for j in range(8)], -1)
        weights = (signed.abs() * (shift - scores.amax(-1, keepdim=True)).exp()).nan_to_num(0.0)
        probs = weights / weights.sum(-1, keepdim=True)
        values = v.repeat_interleave(2, dim=2).transpose(1, 2)
        out = (probs.masked_fill(signed.signbit(), 0.0) / 0.6) @ values
        torch.testing.assert_close(out.transpose(1, 2), attention(q, k, v, variant)[0])

    def test_sign_is_dropout_and_magnitude_peaks_at_1(self):
        q, k, _ = random_qkv(6, 7)
        mask = s_dmask(q, k, Variant(dropout_p=0.5, rng_state=self.STATE))[..., :6, :7]
        assert torch.equal(~mask.signbit(), dropout_keep_mask(self.STATE, 0.5, 2, 2, 6, 7))
        assert torch.equal(mask.abs().amax(-1), torch.ones(2, 2, 6, dtype=q.dtype))
        masked = s_dmask(q, k, Variant(dropout_p=0.5, rng_state=self.STATE, causal=True, diagonal=-3))
        assert (masked[..., :3, :] == 0).all() and not masked[..., :3, :].signbit().any()

    def test_varlen_is_per_sequence(self):
        q, k = torch.randn(7, 4, 8), torch.randn(9, 2, 8)
        varlen = Varlen(int32(0, 3, 3, 7), int32(0, 4, 5, 9), 130, 4)
        variant = Variant(dropout_p=0.3, rng_state=self.STATE)
        mask = varlen_s_dmask(q, k, varlen, variant)
        assert mask.shape == (3, 4, 256, 128)
        torch.testing.assert_close(mask[:1, :, :128], s_dmask(q[None, :3], k[None, :4], variant), rtol=0, atol=0)
        assert (mask[1] == 0).all()
        keep = dropout_keep_mask(self.STATE, 0.3, 1, 4, 4, 4, batch_start=2)
        assert torch.equal(~mask[2:, :, :4, :4].signbit(), keep)


class TestTestedDtype:
    """dtype=None is what tolerances are derived from: its error has to be that of the inputs' dtype."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_error_is_of_the_size_of_the_dtype(self, dtype):
        q, k, v = (x.to(dtype) for x in random_qkv(32, 48, dim=16, dim_v=16))
        out, lse = attention(q, k, v, dtype=None)
        assert out.dtype == lse.dtype == dtype
        error = (out.double() - attention(q, k, v)[0]).abs().max().item()
        assert 0.01 * torch.finfo(dtype).eps < error < 4 * torch.finfo(dtype).eps

    def test_16_bit_emulation_is_as_accurate_as_torch_in_16_bits(self):
        q, k, v = (x.bfloat16() for x in random_qkv(32, 48, dim=16, dim_v=16))
        exact = attention(q, k, v)[0]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25
        torch_out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        torch_error = (torch_out.double() - exact).abs().mean()
        emulated_error = (attention(q, k, v, dtype=None)[0].double() - exact).abs().mean()
        assert 0.5 < emulated_error / torch_error < 2

    @pytest.mark.parametrize("case", DENSE_CASES, ids=str)
    def test_rows_without_keys_agree_with_the_oracle(self, case):
        problem = case.make(dtype=torch.bfloat16)
        exact = attention(problem.q, problem.k, problem.v, problem.variant)[1]
        rounded = attention(problem.q, problem.k, problem.v, problem.variant, dtype=None)[1]
        assert torch.equal(exact == -INF, rounded == -INF)


class TestTolerance:
    """The rule that everything is judged by can fail."""

    ORACLE = torch.tensor([1.0, -2.0, -INF], dtype=torch.float64)
    PLAIN = torch.tensor([1.0, -2.001, -INF])

    def test_accepts_up_to_the_factor(self):
        assert_close_to_oracle(torch.tensor([1.0019, -2.0, -INF]), self.ORACLE, self.PLAIN, 2)
        with pytest.raises(AssertionError, match=r"scores: error 0.0021 > bound 0.002 = 2 x 0.001 .* worst at \(0,\)"):
            assert_close_to_oracle(torch.tensor([1.0021, -2.0, -INF]), self.ORACLE, self.PLAIN, 2, "scores")

    @pytest.mark.parametrize("wrong", [[1.0, -2.0, -1e30], [-INF, -2.0, -INF], [1.0, math.nan, -INF], [1.0, -2.0, INF]])
    def test_infinities_stand_where_the_oracle_has_them(self, wrong):
        with pytest.raises(AssertionError, match="not finite"):
            assert_close_to_oracle(torch.tensor(wrong), self.ORACLE, self.PLAIN)

    def test_shape_counts(self):
        with pytest.raises(AssertionError, match="shape"):
            assert_close_to_oracle(torch.zeros(2), torch.zeros(1), torch.zeros(1))

    def test_empty_tensors_are_equal(self):
        assert_close_to_oracle(*torch.zeros(3, 0))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_floor_bounds_the_literal_formula(self, dtype):
        for magnitude in (0.1, 1.0, 30.0):
            ref = (torch.randn(10_000) * magnitude).to(dtype)
            literal = 2 * (ref + 0.3 - 0.3 - ref).abs().max().item()
            assert literal <= rounding_floor(ref, dtype) <= 4 * literal


def test_case_names_are_unique():
    assert len(BY_NAME) == len(CASES)


def test_cases_do_not_depend_on_the_dtype():
    case = Case("any", alibi="h", sink="bh", bias="bhqk", layout="sliced", dropout_p=0.1)
    single, half = case.make(dtype=torch.float32), case.make(dtype=torch.bfloat16)
    assert torch.equal(single.q.bfloat16(), half.q) and torch.equal(
        single.variant.alibi_slopes, half.variant.alibi_slopes
    )
    assert single.q.stride(-1) == 1 and not single.q.is_contiguous()


def test_uninitialised_memory_is_nan_during_tests():
    assert torch.empty(7).isnan().all() and torch.ones(3).new_empty(2, 2).isnan().all()
