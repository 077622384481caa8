"""How flag_gems is called, with one config of those that it ships, and what is handed to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from flag_gems_evidence import LN2, NotHereError, Problem, Results
from torch import Tensor

LENGTHS = (17, 70, 128)  # of packed sequences
FORWARDS = ("scaled_dot_product_attention_forward", "flash_attention_forward", "flash_attn_varlen_func")
FUSED = ("flash_mla", "flash_mla_sparse_fwd", "sparse_attn_triton", "apply_rotary_pos_emb")
# All that flag_gems has for attention.
PRESENT = (
    *FORWARDS,
    *FUSED,
    *("flash_attn_varlen_opt_func", "scaled_dot_product_attention", "scaled_dot_product_attention_backward"),
    *("reshape_and_cache", "reshape_and_cache_flash"),
)


def kernel(gems: ModuleType, module: str, name: str) -> Any:
    """One of its kernels, behind libentry; raises where there is none."""
    found = getattr(sys.modules.get(f"flag_gems.ops.{module}"), name, None)
    if not hasattr(found, "kernel_cache"):
        raise NotHereError(f"flag_gems has no {name} behind libentry here")
    return found


def shipped(entry: Any) -> list:
    """The configs of a kernel, whatever ``choose`` has left of them."""
    return vars(entry).setdefault("shipped", list(entry.fn.configs))


def choose(gems: ModuleType, module: str, name: str, stages: int = 2, **values: int) -> None:
    """Leaves it one config of those that it ships; nothing is tuned, nor remembered."""
    try:
        entry = kernel(gems, module, name)
    except NotHereError:
        return  # of a stand-in
    for config in shipped(entry):
        if (config.num_warps, config.num_stages) == (4, stages) and values.items() <= config.kwargs.items():
            entry.fn.configs = [config]
            break
    else:
        raise NotHereError(f"{name} ships no config with {values}")
    for cache in entry.kernel_cache:
        cache.clear()


SDPA_TILE = dict(BLOCK_M=128, BLOCK_N=32)
FULL_ROWS = dict(BLOCK_M1=32, BLOCK_N1=128, BLOCK_M2=128, BLOCK_N2=32)
HALF_ROWS = (
    dict(BLOCK_M1=64, BLOCK_N1=128, BLOCK_M2=64, BLOCK_N2=64),
    dict(BLOCK_M1=64, BLOCK_N1=128, BLOCK_M2=64, BLOCK_N2=32),
)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def sdpa(
    gems: ModuleType,
    problem: Problem,
    mask: Tensor | None = None,
    causal: bool = False,
    tile: dict = SDPA_TILE,
) -> Results:
    """scaled_dot_product_attention_forward: (b, h, s, d); its second result is in base 2."""
    choose(gems, "attention", "_attn_fwd", **tile)
    q, k, v = map(heads_first, problem[:3])
    gqa = q.shape[1] != k.shape[1]
    out, lse = gems.scaled_dot_product_attention_forward(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    return {"out": out.transpose(1, 2), "lse": lse * LN2}


def sdpa_backward(
    gems: ModuleType,
    problem: Problem,
    causal: bool,
    mask: Tensor | None = None,
    dout: Tensor | None = None,
    tile: dict | None = FULL_ROWS,
) -> Results:
    if tile is not None:
        choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
        choose(gems, "attention", "_attn_bwd", **tile)
    q, k, v, do = map(heads_first, (*problem[:3], problem.dout))
    options = dict(attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    out, lse = gems.scaled_dot_product_attention_forward(q, k, v, **options)
    do = do if dout is None else dout
    grads = gems.scaled_dot_product_attention_backward(do, q, k, v, out, lse, **options)
    return {name: x.transpose(1, 2) for name, x in zip(("dq", "dk", "dv"), grads, strict=True)}


def flash(
    gems: ModuleType,
    problem: Problem,
    split: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> Results:
    """flash_attention_forward: (b, s, h, d), aten's arguments."""
    if not split:
        choose(gems, "flash_kernel", "flash_fwd_kernel", BLOCK_M=128, BLOCK_N=32)
    q, k, v, variant = problem[:4]
    out, lse, *_ = gems.flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], dropout, variant.causal, False),
        scale=scale,
        softcap=variant.softcap,
        alibi_slopes=variant.alibi_slopes,
        disable_splitkv=not split,
        **options,
    )
    return {"out": out, "lse": lse}


def flash_again(gems: ModuleType, problem: Problem) -> Results:
    """By the config that is chosen, and what is compiled for it."""
    q, k, v = problem[:3]
    arguments = (q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False)
    out, lse, *_ = gems.flash_attention_forward(*arguments, disable_splitkv=True)
    return {"out": out, "lse": lse}


def varlen(gems: ModuleType, problem: Problem, **options: Any) -> Results:
    """flash_attn_varlen_func: vLLM's arguments."""
    q, k, v, variant, layout, _ = problem
    if layout.block_table is None:
        keys = dict(cu_seqlens_k=layout.cu_seqlens_k)
    else:
        keys = dict(seqused_k=layout.seqused_k, block_table=layout.block_table)
    window = (variant.window_left, variant.window_right)
    out, lse = gems.flash_attn_varlen_func(
        *(q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k),
        **keys,
        softmax_scale=variant.softmax_scale,
        causal=variant.causal,
        window_size=None if window == (-1, -1) else window,
        softcap=variant.softcap,
        alibi_slopes=variant.alibi_slopes,
        return_softmax_lse=True,
        **options,
    )
    return {"out": out, "lse": lse}


def band(problem: Problem, visible: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A bool mask (1, 1, sq, sk) from rows and columns."""
    sq, sk = problem.q.shape[-3], problem.k.shape[-3]
    rows, columns = torch.arange(sq)[:, None], torch.arange(sk)
    return visible(rows, columns)[None, None]


def reread(x: Tensor, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """The memory of x as a kernel reads it that takes it to have the strides of another."""
    return torch.as_strided(x, shape or x.shape, like.stride(), x.storage_offset())


def launches(entry: Any, call: Callable) -> list[tuple[tuple, dict]]:
    """The arguments of each launch of this kernel while it is called, and the options: its constexprs and the grid."""
    seen: list[tuple[tuple, dict]] = []
    run = type(entry).run

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if self is entry:
            seen.append((arguments, options))
        return run(self, *arguments, **options)

    with mock.patch.object(type(entry), "run", watched):
        call()
    return seen


def slopes(device: torch.device) -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a fresh one, with these variables of the environment."""
    done = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=done, check=False)


def last_line(done: subprocess.CompletedProcess) -> str:
    """What it says of the error that ended it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith(" ") and "Error" in line]
    return (errors or lines or [""])[-1][:160]
