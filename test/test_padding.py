"""padding.py: what is packed comes back, gradients follow, and every odd batch has a defined result."""

from __future__ import annotations

import pytest
import torch

from flash_attn_plus.padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


@pytest.mark.parametrize("trailing", [(), (8,), (2, 4), (3, 2, 4)], ids=len)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32])
def test_round_trip_restores_tokens_and_zeroes_padding(trailing, dtype):
    hidden = torch.randn(3, 4, *trailing)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, MASK.to(dtype))
    assert packed.shape == (5, *trailing)
    assert indices.tolist() == [0, 1, 2, 9, 11] and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 3, 5] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 3 and type(max_seqlen) is int
    assert seqused.tolist() == [3, 0, 2] and seqused.dtype == torch.int32
    restored = pad_input(packed, indices, 3, 4)
    mask = MASK.bool()
    torch.testing.assert_close(restored[mask], hidden[mask], rtol=0, atol=0)
    assert restored[~mask].count_nonzero() == 0


def test_mask_values_above_one_count_once():
    _, _, cu_seqlens, max_seqlen, _ = unpad_input(torch.randn(1, 4), torch.tensor([[7, 0, 2, 0]]))
    assert cu_seqlens.tolist() == [0, 2] and max_seqlen == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_unused_positions_are_allocated_and_not_used(dtype):
    hidden = torch.randn(2, 4, 3)
    attention = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=dtype)
    unused = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]], dtype=dtype)  # position (0, 1) is in both masks
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, attention, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5]
    assert cu_seqlens.tolist() == [0, 3, 5]
    assert max_seqlen == 3
    assert seqused.tolist() == [2, 1]
    torch.testing.assert_close(packed, hidden.flatten(0, 1)[indices], rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch, seqlen, fill", [(2, 3, 0), (2, 3, 1), (0, 3, 1), (2, 0, 1)], ids=["all padding", "none", "b 0", "s 0"]
)
def test_extreme_batches_have_a_defined_result(batch, seqlen, fill):
    hidden = torch.randn(batch, seqlen, 5, requires_grad=True)
    mask = torch.full((batch, seqlen), fill)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask)
    lengths = [seqlen * fill] * batch
    assert packed.shape == (sum(lengths), 5) and indices.shape == (sum(lengths),)
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(batch + 1)]
    assert max_seqlen == max(lengths, default=0)
    assert seqused.tolist() == lengths
    padded = pad_input(packed, indices, batch, seqlen)
    torch.testing.assert_close(padded, hidden * fill, rtol=0, atol=0)
    padded.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.full_like(hidden, fill), rtol=0, atol=0)


@pytest.mark.parametrize("batch, seqlen, fill", [(2, 3, 0), (0, 3, 0), (2, 0, 0)])
def test_concatenated_extreme_batches_have_a_defined_result(batch, seqlen, fill):
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        torch.randn(batch, seqlen, 5), torch.full((batch, seqlen), fill)
    )
    assert packed.shape == (0, 5) and indices.shape == (0,)
    assert cu_seqlens.tolist() == [0] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_concatenated_rows_give_one_sequence_per_length(dtype):
    hidden = torch.randn(3, 6, 2, 4)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]], dtype=dtype)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(hidden, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and cu_seqlens.dtype == torch.int32
    assert max_seqlen == 6 and type(max_seqlen) is int
    restored = pad_input(packed, indices, 3, 6)
    torch.testing.assert_close(restored[2], hidden[2], rtol=0, atol=0)
    torch.testing.assert_close(restored[:2, :5], hidden[:2, :5], rtol=0, atol=0)
    assert restored[:2, 5].count_nonzero() == 0


@pytest.mark.parametrize("trailing", [(), (3,), (2, 2)], ids=len)
def test_gradients_of_every_order(trailing):
    x = torch.randn(3, 4, *trailing, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[2, 1, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    indices = torch.tensor([4, 0, 2])
    functions = [
        lambda t: unpad_input(t, MASK)[0],
        lambda t: unpad_input_for_concatenated_sequences(t, lengths)[0],
        lambda t: index_put_first_axis(t, indices, 6),
        lambda t: pad_input(t, indices, 2, 3),
        lambda t: index_first_axis(t, torch.tensor([2, 0, 2])),  # a repeated row adds up
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda t, function=function: function(t).sin(), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values_dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_indices_and_values_of_every_dtype(dtype, values_dtype):
    x = torch.arange(12).view(4, 3).to(values_dtype)
    indices = torch.tensor([3, 1], dtype=dtype)
    rows = index_first_axis(x, indices)
    assert torch.equal(rows, x[[3, 1]]) and rows.is_contiguous()
    put = index_put_first_axis(rows, indices, 4)
    assert torch.equal(put[[3, 1]], rows) and put[[0, 2]].count_nonzero() == 0 and put.is_contiguous()


def test_strided_hidden_states_and_inputs_left_unmodified():
    hidden = torch.randn(4, 3, 5).transpose(0, 1)
    before, mask_before = hidden.clone(), MASK.clone()
    packed, indices, *_ = unpad_input(hidden, MASK)
    pad_input(packed, indices, 3, 4).add_(1)
    packed.add_(1)
    assert torch.equal(hidden, before) and torch.equal(MASK, mask_before)


def test_round_trip_compiles_to_one_graph():
    def round_trip(hidden, mask):
        packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden, mask)
        return pad_input(packed * 2, indices, *mask.shape), cu_seqlens, max_seqlen

    config = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with config:
        compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
        for mask in (MASK, MASK.roll(1, dims=1), MASK * 0):
            hidden = torch.randn(3, 4, 2, requires_grad=True)
            out, cu_seqlens, max_seqlen = compiled(hidden, mask)
            expected_out, expected_cu_seqlens, expected_max_seqlen = round_trip(hidden, mask)
            torch.testing.assert_close(out, expected_out, rtol=0, atol=0)
            assert torch.equal(cu_seqlens, expected_cu_seqlens) and max_seqlen == expected_max_seqlen
            (grad,) = torch.autograd.grad(out.sum(), hidden)
            torch.testing.assert_close(grad, 2.0 * mask[..., None].expand(3, 4, 2), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: unpad_input(torch.zeros(4), torch.ones(4)),
            ValueError,
            r"hidden_states: expected \(batch, seqlen, \.\.\.\), got shape \(4,\)",
        ),
        (
            lambda: unpad_input(torch.zeros(2, 4, 8), torch.ones(2, 5)),
            ValueError,
            r"attention_mask: expected shape \(2, 4\), .* got \(2, 5\)",
        ),
        (
            lambda: unpad_input(torch.zeros(2, 4, 8), torch.ones(2, 4), torch.ones(4, 2)),
            ValueError,
            r"unused_mask: expected shape \(2, 4\), .* got \(4, 2\)",
        ),
        (
            lambda: unpad_input(torch.zeros(2, 4, 8), torch.ones(2, 4, device="meta")),
            ValueError,
            r"attention_mask: expected device cpu as hidden_states, got meta",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(torch.zeros(1, 4, 8), torch.zeros(4, dtype=torch.int64)),
            ValueError,
            r"attention_mask_in_length: expected shape \(1, 4\), .* got \(4,\)",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(torch.zeros(1, 4, 8), torch.ones(1, 4)),
            TypeError,
            r"attention_mask_in_length: expected int32 or int64 lengths, got torch.float32",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(torch.zeros(1, 4, 8), torch.tensor([[3, 2, 0, 0]])),
            ValueError,
            r"attention_mask_in_length: expected the lengths .* at most seqlen = 4, got 5",
        ),
        (
            lambda: pad_input(torch.zeros(3, 8), torch.arange(4), 2, 4),
            ValueError,
            r"hidden_states: expected one row for each of the 4 indices, got shape \(3, 8\)",
        ),
        (
            lambda: index_put_first_axis(torch.zeros(()), torch.arange(4), 4),
            ValueError,
            r"values: expected one row for each of the 4 indices, got shape \(\)",
        ),
        (
            lambda: index_first_axis(torch.zeros(3, 8), torch.zeros(1, 2, dtype=torch.int64)),
            ValueError,
            r"indices: expected one dimension, got shape \(1, 2\)",
        ),
        (
            lambda: index_first_axis(torch.zeros(3, 8), torch.zeros(2)),
            TypeError,
            r"indices: expected int32 or int64, got torch.float32",
        ),
        (
            lambda: index_first_axis(torch.zeros(()), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"input: expected \(rows, \.\.\.\), got a 0-d tensor",
        ),
    ],
)
def test_errors_name_the_argument_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
