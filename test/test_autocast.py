"""Autocast: q, k and v follow the active dtype, everything else stays."""

from __future__ import annotations

import pytest
import torch

import flash_attn_plus

ops = torch.ops.flash_attn_plus


def inputs(dtype=torch.float32):
    return (torch.randn(2, 9, 4, 16, dtype=dtype, requires_grad=True) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_q_k_v_to_the_active_dtype(dtype):
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = flash_attn_plus.flash_attn_func(q, k, v, causal=True, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected = flash_attn_plus.flash_attn_func(*(x.to(dtype) for x in (q, k, v)), causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_mixed_inputs_become_one_dtype():
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_plus.flash_attn_func(q.bfloat16(), k, v.half())
    assert out.dtype == torch.bfloat16


def test_options_keep_their_dtype():
    """A float32 bias of 1e-3 steps would be lost in bfloat16 beside a large offset."""
    q, k, v = (torch.zeros(1, 1, 1, 8), torch.zeros(1, 64, 1, 8), torch.randn(1, 64, 1, 8))
    bias = 100.0 + torch.arange(64.0).mul(1e-2).view(1, 1, 1, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse = ops.fwd(q, k, v, attn_bias=bias, sink=torch.tensor([-1e4]))
        slopes = torch.rand(1)
        flash_attn_plus.flash_attn_func(q, k, v, alibi_slopes=slopes)  # would raise if it were cast
    torch.testing.assert_close(lse.view(()), bias.logsumexp(-1).view(()))


def test_float64_stays():
    q, k, v = inputs(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn_plus.flash_attn_func(q, k, v).dtype == torch.float64


def test_varlen_and_nested_autocast():
    q, k, v = (x[0].detach() for x in inputs())
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_plus.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5)
        assert out.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            out = flash_attn_plus.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 5, 5)
            assert out.dtype == torch.float32
