"""Compiles the rows of plan.py for one target and prints what each takes, as JSON. Run by test_compile_gate.py.

python test/compile_gate.py sm_90 causal options
"""

from __future__ import annotations

import json
import sys

import offline
import torch
from torch import Tensor

from flash_attn_plus import plan
from flash_attn_plus.kernels import arguments, forward
from flash_attn_plus.schemas import Variant, Varlen

SEQLEN, HEADS = 1024, 2

KINDS = ("causal", "window", "options", "bias", "short", "varlen", "tf32")


def problem(kind: str, dtype: torch.dtype, dim: int) -> tuple[Tensor, Tensor, Tensor, Variant, Varlen | None]:
    q, k, v = (torch.empty(1, SEQLEN, HEADS, dim, dtype=dtype) for _ in range(3))
    bias = torch.empty(1, HEADS, SEQLEN, SEQLEN, dtype=dtype)
    slopes, rng_state = torch.empty(HEADS), torch.zeros(2, dtype=torch.int64)
    offsets = torch.zeros(3, dtype=torch.int32)
    variant = {
        "window": Variant(window_left=100, window_right=5, sink=slopes),
        "options": Variant(causal=True, softcap=3.0, alibi_slopes=slopes, dropout_p=0.1, rng_state=rng_state),
        "bias": Variant(attn_bias=bias),
    }.get(kind, Variant(causal=True))
    if kind == "short":
        return q[:, : plan.SHORT], k, v, variant, None
    if kind == "varlen":
        return q[0], k[0], v[0], variant, Varlen(offsets, offsets, SEQLEN, SEQLEN)
    return q, k, v, variant, None


def main(arch: str, kinds: list[str]) -> None:
    offline.install(arch)
    for itemsize, dim in plan.FORWARD[arch]:
        dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
        for kind in kinds:
            if kind == "tf32" and itemsize != 4:
                continue
            torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
            arguments_of_call = problem(kind, dtype, dim)
            forward.Forward(*arguments_of_call)(*arguments_of_call)
            [taken] = offline.compiled_kernels(forward.forward_kernel)
            q, _, v, variant, varlen = arguments_of_call
            tiles = plan.forward(arguments.problem(q, v, variant, varlen))
            row = {"itemsize": itemsize, "dim": dim, "kind": kind, "plan": list(tiles), **taken._asdict()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(KINDS))
