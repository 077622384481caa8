"""Compiles the rows of plan.py for one target and prints what each takes, as JSON. Run by test_compile_gate.py.

python test/compile_gate.py sm_90 forward 2 causal
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

import offline
import torch
from torch import Tensor

from flash_attn_plus import device, plan
from flash_attn_plus.kernels import append, arguments, backward, combine, decode, forward, rotary
from flash_attn_plus.kernels.launch import Launch
from flash_attn_plus.schemas import Cache, New, Rotation, Variant, Varlen

SEQLEN, HEADS = 1024, 2

PASSES = ("queries", "keys", "values", "bias", "sink")  # of the backward


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
    if kind in ("paged", "small_pages"):
        size = 16 if kind == "small_pages" else 256
        table = torch.zeros(2, SEQLEN // size, dtype=torch.int32)
        layout = Varlen(offsets, offsets, SEQLEN, SEQLEN, block_table=table)
        return q[0], k.view(-1, size, HEADS, dim), v.view(-1, size, HEADS, dim), variant, layout
    return q, k, v, variant, None


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant, varlen: Varlen | None
) -> Iterator[tuple[str, plan.Plan | None, Launch]]:
    prepared = forward.Forward(q, k, v, variant, varlen)
    for _ in range(2):
        prepared(q, k, v, variant, varlen)
    yield "forward", plan.forward(arguments.problem(q, v, variant, varlen)), prepared.launch


def backward_launches(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant, varlen: Varlen | None
) -> Iterator[tuple[str, plan.Plan | None, Launch]]:
    dout, out, lse = v, v, torch.empty(q.shape[:-1])
    arguments_of_call = (dout, q, k, v, out, lse, None, variant, True, True, True, varlen)
    prepared = backward.Backward(*arguments_of_call)
    for _ in range(2):
        prepared(*arguments_of_call)
    row = plan.backward(arguments.problem(q, v, variant, varlen))
    for name in PASSES:
        launch = getattr(prepared, name)
        if launch is not None:
            yield name, getattr(row, name, None), launch


# (head_dim, rotary_dim)
ROTATED = ((64, 64), (128, 128), (192, 64), (59, 32))


def rotation_launches(kind: str, dtype: torch.dtype, dims: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """Pairs of halves and interleaved ones. ``kind`` is "dense" or "varlen"."""
    head_dim, rotary_dim = dims
    x, table = torch.empty(2, SEQLEN, HEADS, head_dim, dtype=dtype), torch.empty(SEQLEN, rotary_dim // 2, dtype=dtype)
    options = {}
    if kind == "varlen":
        x, options = x[0], {"cu_seqlens": torch.zeros(3, dtype=torch.int32), "seqlen_offsets": torch.zeros(2).long()}
    for interleaved in (False, True):
        for in_place in (False, True):
            rotation = Rotation(table, table, interleaved=interleaved, conjugate=in_place, **options)
            prepared = rotary.Rotary(x, rotation, in_place)
            for _ in range(2):
                prepared(x, rotation)
            how = ("interleaved" if interleaved else "halves") + (" in place" if in_place else "")
            yield f"{rotary_dim} rotated, {how}", prepared.launch


def decode_launches(kind: str, dtype: torch.dtype, dim: int) -> Iterator[tuple[str, NamedTuple | None, Launch]]:
    """One query, or many rows in one tile, against a cache in pages or not, of lengths that are known on the device;
    and new keys into it."""
    batch, heads, capacity = 3, 8, 65536
    slopes, sink = torch.empty(heads), torch.empty(heads)
    rows = {"rows": 16}.get(kind, 1)
    q, new = torch.empty(batch, rows, heads, dim, dtype=dtype), torch.empty(batch, 1, 1, dim, dtype=dtype)
    caches = torch.empty(batch, capacity, 1, dim, dtype=dtype)
    lengths, table = torch.zeros(batch, dtype=torch.int32), None
    page_size = {"paged": 256, "small_pages": 16, "pages_64": 64}.get(kind)
    if page_size is not None:
        caches = caches.view(-1, page_size, 1, dim)
        table = torch.zeros(batch, capacity // page_size, dtype=torch.int32)
    variant = {
        "window": Variant(causal=True, window_left=30000),
        "options": Variant(causal=True, softcap=3.0, alibi_slopes=slopes, sink=sink),
    }.get(kind, Variant())
    arguments_of_call = (q, caches, caches, Cache(lengths, 1, block_table=table), variant, 0)
    prepared = decode.Decode(*arguments_of_call)
    assert prepared.cut.parts is None, prepared.cut
    for _ in range(2):
        prepared(*arguments_of_call)
    row = plan.decode(device.architecture(q.device), q.element_size(), dim)
    yield "decode", row.tiles(prepared.cut), prepared.launch
    yield "combine", None, prepared.combine
    for name, parts in (("decode, equal", 5), ("decode, whole", 1)):
        in_parts = (*arguments_of_call[:5], parts)
        prepared = decode.Decode(*in_parts)
        assert prepared.cut.parts == parts, prepared.cut
        for _ in range(2):
            prepared(*in_parts)
        yield name, row.tiles(prepared.cut), prepared.launch
        if parts > 1:
            yield "combine, equal", None, prepared.combine
    for cos in (None, torch.empty(capacity, dim // 2, dtype=dtype)):
        arguments_of_call = (caches, caches, new, new, New(lengths, None, table, cos, cos, kind != "paged"))
        prepared = append.Append(*arguments_of_call)
        for _ in range(2):
            prepared(*arguments_of_call)
        yield "append" if cos is None else "append, rotated", None, prepared.launch


def combine_launches(kind: str, dtype: torch.dtype, dim: int) -> Iterator[tuple[str, None, Launch]]:
    parts, lse = torch.empty(5, 2, 3, HEADS, dim, dtype=dtype), torch.empty(5, 2, HEADS, 3)
    prepared = combine.Combine(parts, lse, None)
    for _ in range(2):
        prepared(parts, lse, None)
    yield "combine", None, prepared.launch


def given_again(launch: Launch) -> bool:
    """Whether the second call went through PyTorch's launcher and gave the kernel what Triton's own would have given
    it, in the types of its PTX.
    """
    [(letters, given, expected)] = offline.launched.pop(launch.compiled, [("", (), ())])
    return list(given) == expected and letters.replace("l", "O") == offline.parameters(launch.compiled)


def main(arch: str, direction: str, size: int, kind: str) -> None:
    offline.install(arch)
    dtype = {2: torch.bfloat16, 4: torch.float32}[size]

    def report(dim: int, name: str, tiles: NamedTuple | None, launch: Launch) -> None:
        row = {"itemsize": size, "dim": dim, "kind": kind, "pass": name, "plan": tiles}
        row["constants"] = dict(zip(launch.function.arg_names[-len(launch.constants) :], launch.constants, strict=True))
        if arch.startswith("sm_"):
            row["again"] = given_again(launch)
        print(json.dumps({**row, **offline.measure(launch.compiled)._asdict()}), flush=True)

    if direction == "rotary":
        for dims in ROTATED:
            for name, launch in rotation_launches(kind, dtype, dims):
                report(dims[0], name, None, launch)
        return
    if direction in ("decode", "combine"):
        launches = {"decode": decode_launches, "combine": combine_launches}[direction]
        for dim in (64, 128, 256):
            for name, tiles, launch in launches(kind, dtype, dim):
                report(dim, name, tiles, launch)
        return
    launches = {"forward": forward_launches, "backward": backward_launches}[direction]
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    for itemsize, dim in plan.FORWARD[arch]:
        if itemsize == size:
            for name, tiles, launch in launches(*problem(kind, dtype, dim)):
                report(dim, name, tiles, launch)


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4])
