"""What attention.py measures: ours, and the peers, each called as its own users call it.

Every implementation gets contiguous tensors in the layout of its own interface, so that nobody pays for another's:
ours, fa4 and everything packed (tokens, heads, head_dim), SDPA, FlexAttention and flag_gems' dense function
(batch, heads, seqlen, head_dim). What is made once for a shape (offsets, FlexAttention's block mask) is made
before the clock starts.

Blank on purpose: SDPA takes no packed sequences, so cuDNN has no varlen. The backward of flag_gems 5.0.2 always masks
causally, so it runs for causal problems only; and of its configs it may choose among those that write every row of dq
(docs/flaggems_analysis_report_en.md). Its packed attention has no backward.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn_plus as fap

if TYPE_CHECKING:
    from attention import Problem


@dataclass(frozen=True)
class Call:
    """One way to call an implementation: ``prepare(problem, device)`` gives the function of (q, k, v)."""

    prepare: Callable[[Problem, str], Callable]
    heads_first: bool = False  # (batch, heads, seqlen, head_dim); packed sequences become a batch of one
    backward: bool = True
    select: Callable = nullcontext  # entered around the measurement, so that entering it is not part of a call


@dataclass(frozen=True)
class Peer:
    name: str
    dense: Call
    varlen: Call | None = None
    module: str | None = None  # optional: without it the peer is absent
    gpu_only: bool = True
    full_backward: bool = True  # whether its backward can do without a causal mask

    def call(self, problem: Problem) -> Call | None:
        call = self.varlen if problem.varlen else self.dense
        if call and not problem.causal and not self.full_backward:
            call = replace(call, backward=False)
        return call

    def absence(self) -> str | None:
        """Why it cannot be imported here; None where it can."""
        try:
            if self.module:
                importlib.import_module(self.module)
        except Exception as error:  # flag_gems raises RuntimeError where it finds no device
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def _ours(problem: Problem, device: str) -> Callable:
    return functools.partial(fap.flash_attn_func, causal=problem.causal)


def _ours_varlen(problem: Problem, device: str) -> Callable:
    offsets, longest = problem.offsets(device), max(problem.lengths)

    def run(q, k, v):
        return fap.flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=problem.causal)

    return run


def _sdpa(problem: Problem, device: str) -> Callable:
    options = {"enable_gqa": True} if problem.heads != problem.heads_k else {}
    return functools.partial(F.scaled_dot_product_attention, is_causal=problem.causal, **options)


def _fa2_varlen(problem: Problem, device: str) -> Callable:
    """SDPA's flash kernels with packed sequences; their backward is registered as this operator's gradient."""
    offsets, longest = problem.offsets(device), max(problem.lengths)

    def run(q, k, v):
        lengths = (offsets, offsets, longest, longest)
        return torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, problem.causal, False)[0]

    return run


def _causal(batch, head, row, column):
    return row >= column


def _flex(problem: Problem, device: str) -> Callable:
    """FlexAttention, compiled for exactly this shape; packed sequences are a mask of sequence numbers."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # a backward that is timed runs many times over one graph
    torch._dynamo.reset()  # past its recompile limit it would run, and be timed, without compiling
    mask_mod = _causal if problem.causal else None
    if problem.varlen:
        lengths = torch.tensor(problem.lengths, device=device)
        sequence = torch.repeat_interleave(torch.arange(len(problem.lengths), device=device), lengths)

        def mask_mod(batch, head, row, column):
            same = sequence[row] == sequence[column]
            return same & (row >= column) if problem.causal else same

    length = sum(problem.lengths) if problem.varlen else problem.lengths[0]
    mask = create_block_mask(mask_mod, None, None, length, length, device=device) if mask_mod else None
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return functools.partial(compiled, block_mask=mask, enable_gqa=problem.heads != problem.heads_k)


def _fa4(problem: Problem, device: str) -> Callable:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=problem.causal)[0]


def _fa4_varlen(problem: Problem, device: str) -> Callable:
    from flash_attn.cute import flash_attn_varlen_func

    offsets, longest = problem.offsets(device), max(problem.lengths)
    lengths = dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest, max_seqlen_k=longest)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, **lengths, causal=problem.causal)[0]


def _gems(problem: Problem, device: str) -> Callable:
    """Lengths are equal here: its causal mask, top-left, is ours."""
    import flag_gems

    backward = getattr(sys.modules.get("flag_gems.ops.attention"), "_attn_bwd", None)
    if backward is not None:
        tiles = ((config, config.kwargs) for config in backward.fn.configs)
        backward.fn.configs = [config for config, tile in tiles if tile["BLOCK_M2"] == tile["BLOCK_N1"]]
    options = dict(is_causal=problem.causal, enable_gqa=problem.heads != problem.heads_k)
    return functools.partial(flag_gems.scaled_dot_product_attention, **options)


def _gems_varlen(problem: Problem, device: str) -> Callable:
    import flag_gems

    offsets, longest = problem.offsets(device), max(problem.lengths)
    lengths = dict(max_seqlen_q=longest, cu_seqlens_q=offsets, max_seqlen_k=longest, cu_seqlens_k=offsets)
    return lambda q, k, v: flag_gems.flash_attn_varlen_func(q, k, v, **lengths, causal=problem.causal)


if torch.version.cuda:
    os.environ.setdefault("GEMS_VENDOR", "nvidia")  # else its import runs every vendor's command-line tool
# It keeps what it tuned, for any program: here it tunes itself, among the configs that are left to it.
os.environ.setdefault("FLAGGEMS_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"flag_gems_{os.getpid()}"))

_flash = functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
_cudnn = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)

OURS = Peer("ours", Call(_ours), Call(_ours_varlen), gpu_only=False)
FA2 = Peer("fa2", Call(_sdpa, heads_first=True, select=_flash), Call(_fa2_varlen), gpu_only=False)
PEERS = {
    peer.name: peer
    for peer in (
        OURS,
        FA2,
        Peer("cuDNN", Call(_sdpa, heads_first=True, select=_cudnn)),
        Peer("flex", Call(_flex, heads_first=True), Call(_flex, heads_first=True)),
        Peer("fa4", Call(_fa4), Call(_fa4_varlen), module="flash_attn.cute"),
        Peer(
            "gems",
            Call(_gems, heads_first=True),
            Call(_gems_varlen, backward=False),
            module="flag_gems",
            full_backward=False,
        ),
    )
}
