"""The KV cache: appending bit by bit, decoding against the oracle, errors, traces, the public function, the drop-in.

A decoding is compared with the dense reference of each sequence by itself, its keys gathered from the cache in Python.
Everything that it may not read holds NaN: rows behind the length and before the padding, other pages, other caches, the
gaps of a sliced tensor. An append is compared by the bits of the caches' whole memory, which holds random ones.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import cases
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from assertions import assert_close_to_oracle, oracle_results, same_dtype_results
from graphs import operator_nodes
from test_opcheck import on_meta, significant_strides
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export, load, save
from torch.library import opcheck

import flash_attn_plus as fap
from flash_attn_plus import as_flash_attn, cache, cpu, library, rowblocks
from flash_attn_plus.schemas import Cache, New, Variant

OPS = torch.ops.flash_attn_plus
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
UNUSED_PAGES = (-1, 10**6, 2**31 - 1, -(2**31))  # what a table may hold where no key is
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Decoding(NamedTuple):
    """The arguments of one ``decode``."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache: Cache
    variant: Variant
    num_splits: int = 0

    def options(self) -> dict[str, Any]:
        """What stands behind the tensors, by name: an option that a later release appends goes to the end."""
        return {**self.cache._asdict(), **self.variant._asdict(), "num_splits": self.num_splits}


class Appending(NamedTuple):
    """The arguments of one ``append_kv``."""

    k_cache: Tensor
    v_cache: Tensor
    k: Tensor
    v: Tensor
    new: New


@dataclass(frozen=True)
class Case:
    """One cache, and what is done with it. Lengths are those before the new keys."""

    name: str
    lengths: tuple[int, ...] | None = (19, 0, 37)  # None: all of the cache
    seqlen_q: int = 1
    seqlen_new: int = 0
    batch: int = 3  # where there are no lengths
    capacity: int = 40  # of a cache; of pages, the table has as many as this takes, and one more
    caches: int | None = None  # None: the batch
    batch_idx: tuple[int, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    page_size: int = 0  # 0 is not paged
    shared_pages: int = 0  # the first pages of all sequences are the same ones
    heads: int = 4
    heads_k: int = 2
    dim: int = 32
    dim_v: int | None = None
    # Of the caches: or "heads_first", "sliced", "layer" (of a buffer of all layers), "joint" (k and v in one buffer),
    # "every_other" (strides in the last axis).
    layout: str = "contiguous"
    layout_new: str = "contiguous"  # of q, k and v: the same ones
    softmax_scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    diagonal: int | None = None
    softcap: float = 0.0
    alibi: str = ""  # "h" or "bh": the axes that it has
    sink: str = ""  # "h" or "bh"
    num_splits: int = 0
    rotary_dim: int = 0  # 0: without tables
    interleaved: bool = True
    tables: torch.dtype | None = None  # None: k's

    def __str__(self) -> str:
        return self.name

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def pages(self) -> int:
        """In a row of the table."""
        return -(-self.capacity // self.page_size) + (self.lengths is not None)

    def decoding(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoding:
        """The same values on every device, and up to rounding in every dtype."""
        draw, cache, shape = self._places(device)
        q = self._filled(self.layout_new, draw(self.sequences, self.seqlen_q, self.heads, self.dim), device, dtype)
        caches = self._caches(shape, device, dtype)
        for x in caches:
            x.fill_(NAN)  # gaps are NaN already
            for b in range(self.sequences):
                at = places_of(x, cache, b)
                x[at] = draw(len(at[0]), *x.shape[2:]).to(device, dtype)
        sizes = {"b": self.sequences, "h": self.heads}
        slopes = sink = None
        if self.alibi:
            slopes = (2.0 ** (-4.0 * draw(*(sizes[axis] for axis in self.alibi)).sigmoid())).to(device, torch.float32)
        if self.sink:
            sink = draw(*(sizes[axis] for axis in self.sink)).to(device, dtype)
        variant = Variant(
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_left=self.window[0],
            window_right=self.window[1],
            diagonal=self.diagonal,
            softcap=self.softcap,
            alibi_slopes=slopes,
            sink=sink,
        )
        return Decoding(q, *caches, cache, variant, self.num_splits)

    def appending(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Appending:
        """Caches and values of random bits; keys too, unless they are computed with."""
        draw, cache, shape = self._places(device)
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        caches = self._caches(shape, device, dtype)
        for whole in memory_of(caches).values():
            whole.copy_(random_bits(whole.shape, dtype, generator))
        cos = sin = None
        shape_k = (self.sequences, self.seqlen_new, self.heads_k, self.dim)
        shape_v = (*shape_k[:3], caches[1].shape[3])
        if self.rotary_dim:
            angles = 3 * draw(self.page_size * self.pages if self.page_size else self.capacity, self.rotary_dim // 2)
            cos, sin = (table.to(device, self.tables or dtype) for table in (angles.cos(), angles.sin()))
            k = self._filled(self.layout_new, draw(*shape_k), device, dtype)
        else:
            k = self._filled(self.layout_new, random_bits(shape_k, dtype, generator), device, dtype)
        v = self._filled(self.layout_new, random_bits(shape_v, dtype, generator), device, dtype)
        new = New(cache.cache_seqlens, cache.cache_batch_idx, cache.block_table, cos, sin, self.interleaved)
        return Appending(*caches, k, v, new)

    def _places(self, device: str) -> tuple[Callable[..., Tensor], Cache, tuple[int, int]]:
        """Where sequences lie, and (caches, capacity) or (pages, page size)."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731

        def ints(values: Any) -> Tensor | None:
            return None if values is None else torch.as_tensor(values, dtype=torch.int32).to(device)

        table, shape = None, (self.sequences if self.caches is None else self.caches, self.capacity)
        if self.page_size:
            ends = [self.page_size * self.pages] * self.sequences
            if self.lengths is not None:
                ends = [length + self.seqlen_new for length in self.lengths]
            used = [-(-end // self.page_size) for end in ends]
            order = iter((torch.randperm(sum(used) + 1, generator=generator) + 1).tolist())
            shared = [next(order) for _ in range(min(self.shared_pages, sum(used)))]
            # Page 0 belongs to nobody, and one more.
            rows = [[*shared[:n], *(next(order) for _ in range(n - len(shared)))] for n in used]
            filler = [UNUSED_PAGES[i % len(UNUSED_PAGES)] for i in range(self.pages)]
            table = torch.tensor([[*row, *filler][: self.pages] for row in rows]).view(self.sequences, self.pages)
            shape = (sum(used) + 2, self.page_size)
        return (
            draw,
            Cache(*(ints(self.lengths), self.seqlen_new), *map(ints, (self.batch_idx, self.leftpad, table))),
            shape,
        )

    def _caches(self, shape: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dim_v = self.dim if self.dim_v is None else self.dim_v
        if self.layout == "joint":
            whole = torch.full((*shape, 2, self.heads_k, self.dim), NAN, device=device, dtype=dtype)
            return whole[:, :, 0], whole[:, :, 1]
        rooms = [room(self.layout, *shape, self.heads_k, dim, device=device, dtype=dtype) for dim in (self.dim, dim_v)]
        return rooms[0], rooms[1]

    @staticmethod
    def _filled(layout: str, values: Tensor, device: str, dtype: torch.dtype) -> Tensor:
        if layout == "expanded":  # all heads are one
            return values[:, :, :1].to(device, dtype).expand_as(values)
        into = room(layout, *values.shape, device=device, dtype=dtype)
        # By their bits where they are bits: a conversion to the same dtype is none.
        return into.copy_(values.to(device, dtype))


def room(layout: str, batch: int, rows: int, heads: int, dim: int, **where: Any) -> Tensor:
    """(batch, rows, heads, dim) with the strides that ``layout`` names; NaN, also between its elements."""
    full = functools.partial(torch.full, fill_value=NAN, **where)
    if layout == "heads_first":
        return full((batch, heads, rows, dim)).transpose(1, 2)
    if layout == "sliced":
        return full((batch + 1, rows + 2, heads + 1, dim + 5))[1:, 1:-1, :heads, 3 : 3 + dim]
    if layout == "layer":
        return full((3, batch, rows, heads, dim))[1]
    if layout == "every_other":
        return full((batch, rows, heads, 2 * dim))[..., ::2]
    assert layout == "contiguous"
    return full((batch, rows, heads, dim))


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits: numbers, infinities and NaN of every kind. Quiet ones, which no conversion changes, are not enough."""
    bits = _BITS[dtype.itemsize]
    return torch.randint(-(2**62), 2**62, shape, generator=generator).to(bits).view(dtype)


def memory_of(tensors: tuple[Tensor, ...]) -> dict[int, Tensor]:
    """The whole memory behind them, flat, by its address: once, where they share it."""
    wholes = {}
    for x in tensors:
        storage = x.untyped_storage()
        whole = torch.empty(0, dtype=x.dtype, device=x.device)
        wholes[storage.data_ptr()] = whole.set_(storage, 0, (len(storage) // x.element_size(),))
    return wholes


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(_BITS[x.element_size()])


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


def places_of(x: Tensor, cache: Cache, b: int) -> tuple[list[int], list[int]]:
    """(caches or pages, rows in them) of the keys that sequence ``b`` sees, in order."""
    table, numbers, pads = cache.block_table, cache.cache_batch_idx, cache.cache_leftpad
    end = x.shape[1] * (1 if table is None else table.shape[1])
    if cache.cache_seqlens is not None:
        end = int(cache.cache_seqlens[b]) + cache.seqlen_new
    positions = range(0 if pads is None else int(pads[b]), end)
    if table is None:
        return [b if numbers is None else int(numbers[b])] * len(positions), list(positions)
    row, size = table[b].tolist(), x.shape[1]
    return [row[j // size] for j in positions], [j % size for j in positions]


def sequences_of(problem: Decoding) -> Iterator[cases.Problem]:
    """Each sequence by itself, as the reference takes it."""

    def of_sequence(x: Tensor | None, b: int) -> Tensor | None:
        return x if x is None or x.dim() == 1 else x[b]

    q, k_cache, v_cache, cache, variant, _ = problem
    for b in range(q.shape[0]):
        k, v = (x[places_of(x, cache, b)][None] for x in (k_cache, v_cache))
        of_b = {name: of_sequence(getattr(variant, name), b) for name in ("alibi_slopes", "sink")}
        yield cases.Problem(q[b : b + 1], k, v, variant._replace(**of_b), None)


def run_decode(problem: Decoding) -> tuple[Tensor, Tensor]:
    return OPS.decode(*problem[:3], **problem.options())


def check_decoding(problem: Decoding, name: str, run: Callable[[Decoding], tuple[Tensor, Tensor]] = run_decode) -> None:
    """out and lse against the oracle. lse is computed in float32, and held to that in 16 bits too, except where the CPU
    ran PyTorch's own kernel, which takes a faster exp there.
    """
    q, _, v_cache, *_ = problem
    (batch, seqlen_q, heads, _), dtype = q.shape, q.dtype
    with mock.patch.object(cpu, "choose_forward", wraps=cpu.choose_forward) as choose:
        out, lse = run(problem)
    of_pytorch = any(cpu.choose_forward(*call.args).implementation == "aten" for call in choose.call_args_list)
    lse_maths = None if dtype == torch.float32 or of_pytorch else torch.float32
    assert out.dtype == dtype and out.shape == (batch, seqlen_q, heads, v_cache.shape[3])
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (batch, heads, seqlen_q)
    assert out.is_contiguous() and lse.is_contiguous(), f"{name}: expected contiguous results"
    if batch == 0:
        return
    expected, plain = [], []
    for one in sequences_of(problem):
        expected.append(oracle_results(one, None))
        plain.append(same_dtype_results(one, None, expected[-1], lse_maths))
    for result, actual in (("out", out), ("lse", lse)):
        of_all = [torch.cat([results[result] for results in each]) for each in (expected, plain)]
        assert_close_to_oracle(actual, *of_all, name=f"{name}, {dtype}: {result}")
    sees_no_key = torch.cat([results["lse"] for results in expected]) == -INF
    assert (out[sees_no_key.transpose(1, 2)] == 0).all(), f"{name}: not exactly 0 where lse is -inf"


def run_append(problem: Appending) -> None:
    assert OPS.append_kv(*problem[:4], **problem.new._asdict()) is None


def rotated(problem: Appending) -> Tensor:
    """The new keys, by the operator that rotates."""
    new = problem.new
    if new.rotary_cos is None:
        return problem.k
    return OPS.rotary(
        *(problem.k, new.rotary_cos, new.rotary_sin, 0, new.cache_seqlens), interleaved=new.rotary_interleaved
    )


def check_appending(
    problem: Appending,
    name: str,
    run: Callable[[Appending], None] = run_append,
    rotate: Callable[[Appending], Tensor] = rotated,
) -> None:
    """Rows of the caches are the new keys, rotated, and the new values, bit by bit; nothing else has changed. Rows that
    have no place are expected nowhere.
    """
    k_cache, v_cache, k, v, new = problem
    wholes = memory_of((k_cache, v_cache))
    expected = {address: whole.clone() for address, whole in wholes.items()}
    inputs = {"k": k, "v": v, **{n: x for n, x in new._asdict().items() if isinstance(x, Tensor)}}
    before = {n: x.clone() for n, x in inputs.items()}
    for x, rows in ((k_cache, rotate(problem)), (v_cache, v)):
        into = expected[x.untyped_storage().data_ptr()].as_strided(x.shape, x.stride(), x.storage_offset())
        capacity = x.shape[1] if new.block_table is None else x.shape[1] * new.block_table.shape[1]
        for b in range(k.shape[0]):
            length = int(new.cache_seqlens[b])
            seen = [j for j in range(k.shape[1]) if 0 <= length + j < capacity]
            # The places of the new rows alone.
            first, end = (length + seen[0], length + seen[-1] + 1) if seen else (0, 0)
            window = Cache(torch.full_like(new.cache_seqlens, end), 0, new.cache_batch_idx, None, new.block_table)
            for j, number, row in zip(seen, *(at[first:] for at in places_of(x, window, b)), strict=True):
                if 0 <= number < x.shape[0]:
                    into[number, row] = rows[b, j]
    versions = k_cache._version, v_cache._version
    run(problem)
    for address, whole in wholes.items():
        different = bits(whole) != bits(expected[address])
        assert not different.any(), f"{name}: {int(different.sum())} of {whole.numel()} elements of memory are wrong"
    assert k_cache._version > versions[0] and v_cache._version > versions[1], f"{name}: versions of the caches"
    for argument, x in inputs.items():
        assert same_bits((x,), (before[argument],)), f"{name}: {argument} has changed"


SHAPES = [
    Case("plain"),
    Case("one_key", lengths=(1,)),
    Case("no_keys", lengths=(0, 0)),
    Case("no_keys_sink", lengths=(0, 0), sink="h"),
    Case("capacity_0", lengths=(0, 0), capacity=0),
    Case("capacity_0_whole", lengths=None, capacity=0, batch=2, sink="bh"),
    Case("whole", lengths=None),
    Case("full", lengths=(40, 40, 40)),
    Case("full_one_by_one", lengths=(39, 40), seqlen_q=2, causal=True),
    Case("batch_0", lengths=()),
    Case("batch_0_of_many_caches", lengths=(), caches=3, batch_idx=()),
    Case("no_queries", seqlen_q=0),
    Case("one_head", heads=1, heads_k=1),
    Case("as_many_heads", heads=3, heads_k=3),
    Case("mqa", heads=5, heads_k=1),
    Case("group_3", heads=6, heads_k=2),
    Case("group_7", heads=7, heads_k=1),
    Case("group_7_causal", heads=14, heads_k=2, seqlen_q=3, causal=True),
    Case("group_20", heads=20, heads_k=1, seqlen_q=2),
    Case("dim_1", dim=1),
    Case("dim_59", dim=59, heads=7, heads_k=1),
    Case("dim_256", dim=256, heads=2, heads_k=1),
    Case("wider_v", dim=24, dim_v=40),
    Case("narrower_v", dim=80, dim_v=16),
    Case("latent", dim=192, dim_v=128, heads=3, heads_k=1),
    Case("queries_2", seqlen_q=2),
    Case("queries_5", seqlen_q=5, lengths=(5, 4, 6), causal=True),
    Case("queries_33", seqlen_q=33, lengths=(40, 33, 7), causal=True),
    Case("more_queries_than_keys", seqlen_q=20, lengths=(5, 0, 19), causal=True),
    Case("more_queries_than_keys_sink", seqlen_q=20, lengths=(5, 0, 19), causal=True, sink="bh"),
    Case("prefill", seqlen_q=65, lengths=(70, 0, 65), capacity=90, causal=True),
    Case("prefill_not_causal", seqlen_q=70, lengths=(70, 1, 33), capacity=90, dim=59),
    Case("heads_first", layout="heads_first"),
    Case("sliced", layout="sliced", dim=40),
    Case("layer", layout="layer"),
    Case("joint", layout="joint"),
    Case("every_other", layout="every_other", dim=24),
    Case("sliced_queries", layout_new="sliced", seqlen_q=3),
    Case("heads_first_queries", layout_new="heads_first", seqlen_q=3, causal=True),
    Case("every_other_queries", layout_new="every_other", seqlen_q=2),
    Case("expanded_queries", layout_new="expanded", seqlen_q=2),
]

PLACES = [
    Case("new_keys", seqlen_new=3),
    Case("new_keys_up_to_the_end", lengths=(35, 0), seqlen_new=5, seqlen_q=5, causal=True),
    Case("new_keys_into_nothing", lengths=(0, 0, 0), seqlen_new=4, seqlen_q=4, causal=True),
    Case("batch_idx", batch_idx=(2, 0, 1)),
    Case("batch_idx_of_more", batch_idx=(4, 0, 3), caches=6, seqlen_q=2, causal=True),
    Case("batch_idx_of_fewer", batch_idx=(1, 1, 0), caches=2),
    Case("batch_idx_whole", lengths=None, batch_idx=(3, 1, 2), caches=5),
    Case("leftpad", leftpad=(3, 0, 36)),
    Case("leftpad_all", leftpad=(19, 0, 37), sink="h"),
    Case("leftpad_whole", lengths=None, leftpad=(3, 0, 40)),
    Case("leftpad_new_keys", lengths=(3, 0, 11), seqlen_new=2, leftpad=(5, 1, 7), seqlen_q=2, causal=True),
    Case("leftpad_batch_idx", leftpad=(3, 0, 30), batch_idx=(4, 0, 3), caches=6, layout="sliced"),
    Case("leftpad_window", leftpad=(3, 0, 10), window=(9, -1), seqlen_q=3),
    Case("leftpad_alibi", leftpad=(3, 0, 10), alibi="bh", seqlen_q=2, causal=True),
    Case("leftpad_prefill", lengths=(80, 0, 66), capacity=90, leftpad=(7, 0, 3), seqlen_q=66, causal=True),
    *(Case(f"paged_{size}", lengths=(37, 64, 0, 49), capacity=64, page_size=size) for size in (1, 3, 16, 48, 64)),
    Case("paged_one_key", lengths=(1,), page_size=16),
    Case("paged_empty", lengths=(0, 0), page_size=16, sink="h"),
    Case("paged_no_pages", lengths=None, batch=2, capacity=0, page_size=16, sink="h"),
    Case("paged_batch_0", lengths=(), page_size=16),
    Case("paged_whole", lengths=None, capacity=48, page_size=16),
    Case("paged_new_keys", lengths=(13, 0, 31), seqlen_new=5, seqlen_q=5, page_size=16, causal=True),
    Case("paged_shared", lengths=(40, 33, 64), capacity=64, page_size=16, shared_pages=2),
    Case("paged_sliced", layout="sliced", page_size=3, dim=40, seqlen_q=2),
    Case("paged_joint", layout="joint", page_size=16),
    Case("paged_heads_first", layout="heads_first", page_size=16, heads=6, heads_k=2),
    Case("paged_every_other", layout="every_other", page_size=3),
    Case("paged_window", page_size=16, lengths=(100, 3, 50), capacity=100, window=(20, -1)),
    Case("paged_prefill", lengths=(80, 0, 66), capacity=90, page_size=3, seqlen_q=66, causal=True),
]  # fmt: skip

SCORES = [
    Case("causal", causal=True),
    Case("causal_3", causal=True, seqlen_q=3),
    Case("window_left", window=(7, -1)),
    Case("window_left_3", window=(7, -1), seqlen_q=3),
    Case("window_left_causal", window=(7, 7), seqlen_q=3, causal=True),
    Case("window_right", window=(-1, 0), seqlen_q=4),
    Case("window_right_2", window=(-1, 2), seqlen_q=6),
    Case("window_both", window=(7, 1), seqlen_q=4),
    Case("window_0", window=(0, 0), seqlen_q=3),
    Case("window_0_one_query", window=(0, 0)),
    Case("window_beyond", window=(1000, 1000), seqlen_q=2),
    Case("window_prefill", window=(20, 3), seqlen_q=66, lengths=(80, 0, 30), capacity=90),
    Case("diagonal", causal=True, diagonal=5, seqlen_q=3),
    Case("diagonal_one_query", causal=True, diagonal=5),
    Case("diagonal_0", causal=True, diagonal=0, seqlen_q=5),
    Case("diagonal_negative", causal=True, diagonal=-2, seqlen_q=5),
    Case("diagonal_beyond", causal=True, diagonal=-9, seqlen_q=5, sink="h"),
    Case("diagonal_past_the_keys", window=(4, 4), diagonal=100, seqlen_q=2),
    Case("diagonal_window", window=(4, 2), diagonal=10),
    Case("softcap", softcap=2.0),
    Case("softcap_causal", softcap=2.0, seqlen_q=3, causal=True, softmax_scale=1.0),
    Case("alibi", alibi="h"),
    Case("alibi_per_batch", alibi="bh"),
    Case("alibi_queries", alibi="bh", seqlen_q=4),
    Case("alibi_causal", alibi="h", seqlen_q=4, causal=True),
    Case("alibi_diagonal", alibi="h", seqlen_q=2, diagonal=11),
    Case("alibi_window", alibi="bh", window=(9, -1)),
    Case("sink", sink="h"),
    Case("sink_per_batch", sink="bh", seqlen_q=3, causal=True),
    Case("scale", softmax_scale=0.7),
    Case("scale_0", softmax_scale=0.0),
    Case("scale_negative", softmax_scale=-0.2),
    # A mask that is applied before the scale turns over, or into NaN.
    Case("scale_0_causal", softmax_scale=0.0, causal=True, seqlen_q=4),
    Case("scale_negative_causal", softmax_scale=-0.2, causal=True, seqlen_q=4, lengths=(3, 0, 11)),
    Case("scale_negative_softcap", softmax_scale=-0.2, softcap=1.0),
]

_LONG = {"lengths": (140, 0, 7, 60), "capacity": 150}
EVERYTHING = {
    "seqlen_new": 2,
    "seqlen_q": 3,
    "heads": 6,
    "heads_k": 2,
    "dim": 24,
    "dim_v": 40,
    "softmax_scale": 0.3,
    "causal": True,
    "window": (60, -1),
    "softcap": 3.0,
    "alibi": "bh",
    "sink": "bh",
    "layout": "sliced",
    "layout_new": "sliced",
    **_LONG,
}
SPLITS = [
    *(Case(f"splits_{n}", num_splits=n, **_LONG) for n in (1, 2, 7, 100)),
    # A split that has no key beside one that has: the sink belongs to one of them, and NaN is weighed by nothing.
    Case("splits_sink", num_splits=7, sink="bh", **_LONG),
    Case("splits_causal", num_splits=7, seqlen_q=3, causal=True, **_LONG),
    Case("splits_window", num_splits=5, window=(40, -1), **_LONG),
    Case("splits_right", num_splits=5, window=(-1, 0), diagonal=20, **_LONG),
    Case("splits_more_than_keys", num_splits=100, lengths=(3, 0, 1)),
    Case("splits_no_keys", num_splits=3, lengths=(0, 0), capacity=0, sink="h"),
    Case("splits_no_queries", num_splits=3, seqlen_q=0),
    Case("splits_batch_0", num_splits=3, lengths=()),
    Case("splits_paged", num_splits=4, page_size=48, heads=7, heads_k=1, **_LONG),
    Case("splits_paged_1", num_splits=2, page_size=1, lengths=(70, 0, 7), capacity=80),
    Case("splits_leftpad", num_splits=4, leftpad=(90, 0, 7, 3), **_LONG),
    Case("splits_prefill", num_splits=2, seqlen_q=66, causal=True, **_LONG),
    Case("everything", **EVERYTHING),
    Case("everything_splits", num_splits=3, leftpad=(9, 0, 7, 30), batch_idx=(3, 0, 4, 1), caches=5, **EVERYTHING),
    Case("everything_paged", num_splits=2, page_size=16, **EVERYTHING),
]
DECODE_CASES = [*SHAPES, *PLACES, *SCORES, *SPLITS]
DECODE_BY_NAME = {case.name: case for case in DECODE_CASES}

APPEND_CASES = [
    Case("append", seqlen_new=3),
    Case("append_one", seqlen_new=1),
    Case("append_nothing", seqlen_new=0),
    Case("append_up_to_the_end", lengths=(35, 0, 39), seqlen_new=1),
    Case("append_all", lengths=(0, 0), capacity=12, seqlen_new=12),
    Case("append_into_nothing", lengths=(0, 0), capacity=0),
    Case("append_batch_0", lengths=(), seqlen_new=3),
    Case("append_batch_0_of_many_caches", lengths=(), caches=3, batch_idx=(), seqlen_new=2),
    Case("append_dims", seqlen_new=3, dim=59, dim_v=17, heads_k=3),
    Case("append_dim_1", seqlen_new=3, dim=1, heads_k=1),
    Case("append_dim_256", seqlen_new=2, dim=256, dim_v=200),
    Case("append_many_heads", seqlen_new=2, heads_k=13, dim=8),
    Case("append_long", lengths=(100, 0), capacity=300, seqlen_new=150, dim=8),
    *(Case(f"append_{x}", seqlen_new=3, layout=x, dim=24) for x in ("heads_first", "sliced", "layer", "joint")),
    Case("append_every_other", seqlen_new=3, layout="every_other", dim=24),
    *(Case(f"append_of_{x}", seqlen_new=3, layout_new=x) for x in ("heads_first", "sliced", "every_other", "expanded")),
    Case("append_batch_idx", seqlen_new=3, batch_idx=(2, 0, 1)),
    Case("append_batch_idx_of_more", seqlen_new=3, batch_idx=(4, 0, 3), caches=6, layout="layer"),
    *(
        Case(f"append_paged_{size}", lengths=(13, 0, 47, 31), capacity=60, seqlen_new=9, page_size=size)
        for size in (1, 3, 16, 48, 64)
    ),
    Case("append_paged_at_a_boundary", lengths=(16, 32, 15, 0), seqlen_new=1, page_size=16),
    Case("append_paged_nothing", seqlen_new=0, page_size=16),
    Case("append_paged_batch_0", lengths=(), seqlen_new=2, page_size=16),
    Case("append_paged_sliced", seqlen_new=5, page_size=3, layout="sliced", dim=40),
    Case("append_paged_joint", seqlen_new=5, page_size=16, layout="joint"),
    Case("append_paged_every_other", seqlen_new=5, page_size=16, layout="every_other", layout_new="heads_first"),
]
APPEND_ROTARY_CASES = [
    Case("rotary", seqlen_new=3, rotary_dim=32),
    Case("rotary_halves", seqlen_new=3, rotary_dim=32, interleaved=False),
    Case("rotary_part", seqlen_new=3, rotary_dim=16, dim=59, dim_v=40),
    Case("rotary_part_halves", seqlen_new=3, rotary_dim=16, dim=59, interleaved=False),
    Case("rotary_2", seqlen_new=1, rotary_dim=2, dim=2),
    Case("rotary_odd_half", seqlen_new=2, rotary_dim=96, dim=192, interleaved=False),
    Case("rotary_nothing", seqlen_new=0, rotary_dim=16),
    Case("rotary_batch_0", lengths=(), seqlen_new=2, rotary_dim=16),
    Case("rotary_into_nothing", lengths=(0, 0), capacity=0, rotary_dim=16),
    Case("rotary_float32_tables", seqlen_new=3, rotary_dim=16, tables=torch.float32),
    Case("rotary_float16_tables", seqlen_new=3, rotary_dim=16, tables=torch.float16, interleaved=False),
    Case("rotary_up_to_the_end", lengths=(37, 0, 36), seqlen_new=3, rotary_dim=32),
    Case("rotary_batch_idx", seqlen_new=3, rotary_dim=32, batch_idx=(4, 0, 3), caches=6),
    Case("rotary_sliced", seqlen_new=3, rotary_dim=16, dim=40, layout="sliced", layout_new="sliced"),
    Case("rotary_joint", seqlen_new=3, rotary_dim=32, layout="joint", interleaved=False),
    Case("rotary_every_other", seqlen_new=3, rotary_dim=16, layout="every_other", layout_new="every_other"),
    Case("rotary_heads_first", seqlen_new=3, rotary_dim=16, layout="heads_first", layout_new="heads_first"),
    Case("rotary_of_expanded", seqlen_new=3, rotary_dim=16, layout_new="expanded"),
    Case("rotary_paged", lengths=(13, 0, 47), capacity=60, seqlen_new=9, rotary_dim=16, page_size=16),
    Case("rotary_paged_3", lengths=(13, 0, 31), seqlen_new=9, rotary_dim=32, page_size=3, interleaved=False),
    Case("rotary_paged_1", lengths=(13, 0, 31), seqlen_new=4, rotary_dim=16, page_size=1, layout="sliced"),
]
APPEND_BY_NAME = {case.name: case for case in (*APPEND_CASES, *APPEND_ROTARY_CASES)}


class TestDecode:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("case", DECODE_CASES, ids=str)
    def test_agrees_with_the_oracle(self, case: Case, dtype: torch.dtype, device: str) -> None:
        check_decoding(case.decoding(device, dtype), case.name)

    def test_the_oracle_tells_what_is_not_to_be_read(self) -> None:
        """One key too many, or one of another cache, is NaN, or there are other numbers: these tests can fail."""
        for name in ("plain", "paged_16", "leftpad", "batch_idx_of_more"):
            problem = DECODE_BY_NAME[name].decoding()
            cache = problem.cache
            lengths = cache.cache_seqlens.clone()
            lengths[0] += 1
            moved = [cache._replace(cache_seqlens=lengths)]
            if cache.cache_leftpad is not None:
                moved.append(cache._replace(cache_leftpad=torch.tensor([2, 0, 36], dtype=torch.int32)))
            if cache.cache_batch_idx is not None:
                moved.append(cache._replace(cache_batch_idx=torch.tensor([5, 0, 3], dtype=torch.int32)))
            for wrong in moved:
                assert run_decode(problem._replace(cache=wrong))[0][0, -1].isnan().all()

    @pytest.mark.parametrize("name", ["plain", "paged_16", "sink_per_batch", "everything_splits"])
    def test_nothing_is_written_into(self, name: str, device: str) -> None:
        problem = DECODE_BY_NAME[name].decoding(device)
        tensors = [x for x in (*problem[:3], *problem.cache, *problem.variant) if isinstance(x, Tensor)]
        before = [(x.clone(), x._version) for x in tensors]
        run_decode(problem)
        for x, (values, version) in zip(tensors, before, strict=True):
            assert same_bits((x,), (values,)) and x._version == version

    @pytest.mark.parametrize("name", ["plain", "splits_7", "everything_paged", "prefill"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_reruns_are_bit_equal(self, name: str, dtype: torch.dtype, device: str) -> None:
        problem = DECODE_BY_NAME[name].decoding(device, dtype)
        first = run_decode(problem)
        assert all(same_bits(run_decode(problem), first) for _ in range(3))

    def test_nothing_is_kept_of_an_earlier_call_but_what_its_shapes_decide(self, device: str) -> None:
        """Lengths, numbers of caches and pages, and values: a signature does not say them."""
        for name, changes in (
            ("batch_idx_of_more", {"lengths": (1, 40, 11), "batch_idx": (0, 5, 2)}),
            ("leftpad", {"lengths": (40, 7, 37), "leftpad": (39, 3, 0)}),
            ("paged_16", {"lengths": (3, 40, 64, 49)}),
            ("splits_7", {"lengths": (7, 150, 60, 1)}),
        ):
            one, two = DECODE_BY_NAME[name], replace(DECODE_BY_NAME[name], name=f"other_{name}", **changes)
            first, second = one.decoding(device), two.decoding(device)
            if one.page_size:  # pages that as many sequences have, in all: as many as both need
                count = max(x.k_cache.shape[0] for x in (first, second))
                first, second = (x._replace(**_padded_pages(x, count)) for x in (first, second))
            for problem in (first, second, first, second):
                check_decoding(problem, name)

    def test_alibi_counts_from_the_diagonal_of_each_length(self, device: str) -> None:
        """With one query and no other mask: the closest key is the last one."""
        q, k = torch.zeros(2, 1, 1, 8, device=device), torch.zeros(2, 9, 1, 8, device=device)
        lengths = torch.tensor([9, 4], dtype=torch.int32, device=device)
        _, lse = OPS.decode(q, k, k, lengths, alibi_slopes=torch.ones(1, device=device))
        expected = [torch.arange(n, dtype=torch.float64).neg().logsumexp(0).item() for n in (9, 4)]
        torch.testing.assert_close(lse.flatten().cpu().double(), torch.tensor(expected, dtype=torch.float64))

    def test_a_sink_of_another_dtype(self, device: str) -> None:
        problem = DECODE_BY_NAME["sink"].decoding(device, torch.bfloat16)
        sink = problem.variant.sink.float() + 0.001
        check_decoding(problem._replace(variant=problem.variant._replace(sink=sink)), "sink")


def _padded_pages(problem: Decoding, count: int) -> dict[str, Tensor]:
    missing = count - problem.k_cache.shape[0]
    return {
        name: torch.cat([x, torch.full((missing, *x.shape[1:]), NAN, dtype=x.dtype, device=x.device)])
        for name, x in (("k_cache", problem.k_cache), ("v_cache", problem.v_cache))
    }


class TestAppend:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("case", [*APPEND_CASES, *APPEND_ROTARY_CASES], ids=str)
    def test_bit_by_bit(self, case: Case, dtype: torch.dtype, device: str) -> None:
        check_appending(case.appending(device, dtype), case.name)

    def test_rotation_is_by_the_row_of_the_cache(self) -> None:
        """Without the operator that rotates: row p of a sequence is turned by the angles of p."""
        for name in ("rotary_part", "rotary_part_halves", "rotary_paged"):
            case = APPEND_BY_NAME[name]
            problem = case.appending(dtype=torch.float64)
            cos, sin = (problem.new.rotary_cos, problem.new.rotary_sin)
            run_append(problem)
            cache = Cache(problem.new.cache_seqlens, case.seqlen_new, None, None, problem.new.block_table)
            half = case.rotary_dim // 2
            first, second = slice(0, half), slice(half, 2 * half)
            if case.interleaved:
                first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
            for b, length in enumerate(case.lengths):
                kept = problem.k_cache[places_of(problem.k_cache, cache, b)][length:]
                for j, row in enumerate(kept):
                    x, p = problem.k[b, j], length + j
                    torch.testing.assert_close(row[:, first], x[:, first] * cos[p] - x[:, second] * sin[p])
                    torch.testing.assert_close(row[:, second], x[:, first] * sin[p] + x[:, second] * cos[p])
                    assert torch.equal(row[:, 2 * half :], x[:, 2 * half :])

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_notes_that_the_caches_were_written_into(self, context: Callable) -> None:
        problem = APPEND_BY_NAME["rotary"].appending()
        tensors = [x for x in (*problem[:4], *problem.new) if isinstance(x, Tensor)]
        versions = [x._version for x in tensors]
        with context():
            run_append(problem)
        changes = [x._version - version for x, version in zip(tensors, versions, strict=True)]
        assert changes == [1, 1, *[0] * (len(tensors) - 2)]

    def test_what_was_saved_is_noticed(self) -> None:
        for place in range(2):
            problem = APPEND_BY_NAME["append"].appending()
            product = torch.ones_like(problem[place], requires_grad=True) * problem[place]
            run_append(problem)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()

    def test_a_cache_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            problem = APPEND_BY_NAME["append"].appending()
            expected = problem.k_cache.clone()
            run_append(problem)
            assert not same_bits((problem.k_cache,), (expected,))
        with pytest.raises(RuntimeError, match="inference tensor"):
            run_append(problem)

    def test_appended_one_by_one_is_appended_at_once(self, device: str) -> None:
        case = APPEND_BY_NAME["rotary_paged"]
        at_once, one_by_one = case.appending(device), case.appending(device)
        run_append(at_once)
        for j in range(case.seqlen_new):
            new = one_by_one.new._replace(cache_seqlens=one_by_one.new.cache_seqlens + j)
            run_append(one_by_one._replace(k=one_by_one.k[:, j : j + 1], v=one_by_one.v[:, j : j + 1], new=new))
        assert same_bits(one_by_one[:2], at_once[:2])

    def test_keys_that_lie_in_the_cache_themselves(self) -> None:
        """Rows of another place of the same memory."""
        cache = torch.randn(2, 10, 2, 8)
        k, v = cache[:, :3], cache[:, 3:6]
        v_cache = torch.zeros(2, 10, 2, 8)
        expected = cache.clone()
        expected[:, 6:9] = k
        OPS.append_kv(cache, v_cache, k, v, torch.tensor([6, 6], dtype=torch.int32))
        assert torch.equal(cache, expected) and torch.equal(v_cache[:, 6:9], v)


# Errors: (what is changed, type, the argument that is named).


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_call(**changes: Any) -> dict[str, Any]:
    shapes = {"q": (2, 3, 4, 8), "k_cache": (2, 10, 2, 8), "v_cache": (2, 10, 2, 6)}
    tensors = {name: torch.zeros(changes.pop(name)) if isinstance(changes.get(name), tuple) else torch.zeros(shape)
               for name, shape in shapes.items()}  # fmt: skip
    return {**tensors, "cache_seqlens": ints(4, 9), **changes}


def append_call(**changes: Any) -> dict[str, Any]:
    shapes = {"k_cache": (2, 10, 2, 8), "v_cache": (2, 10, 2, 6), "k": (2, 3, 2, 8), "v": (2, 3, 2, 6)}
    tensors = {name: torch.zeros(changes.pop(name)) if isinstance(changes.get(name), tuple) else torch.zeros(shape)
               for name, shape in shapes.items()}  # fmt: skip
    return {**tensors, "cache_seqlens": ints(4, 7), **changes}


_PAGES = {"k_cache": (5, 4, 2, 8), "v_cache": (5, 4, 2, 6), "block_table": ints([0, 1, 2], [3, 4, 0])}
_TABLES = {"rotary_cos": torch.zeros(10, 3), "rotary_sin": torch.zeros(10, 3)}
DECODE_ERRORS = {
    "q with 3 dimensions": (dict(q=(3, 4, 8)), ValueError, "q"),
    "q of integers": (dict(q=torch.zeros(2, 3, 4, 8, dtype=torch.int32)), TypeError, "q"),
    "k_cache with 3 dimensions": (dict(k_cache=(10, 2, 8)), ValueError, "k_cache"),
    "v_cache with 5 dimensions": (dict(v_cache=(1, 2, 10, 2, 6)), ValueError, "v_cache"),
    "k_cache of another dtype": (dict(k_cache=torch.zeros(2, 10, 2, 8).half()), TypeError, "k_cache"),
    "v_cache of another dtype": (dict(v_cache=torch.zeros(2, 10, 2, 6).double()), TypeError, "v_cache"),
    "sparse k_cache": (dict(k_cache=torch.zeros(2, 10, 2, 8).to_sparse()), TypeError, "k_cache"),
    "other head_dim": (dict(k_cache=(2, 10, 2, 16)), ValueError, "k_cache"),
    "v_cache of another capacity": (dict(v_cache=(2, 11, 2, 6)), ValueError, "v_cache"),
    "v_cache of other heads": (dict(v_cache=(2, 10, 4, 6)), ValueError, "v_cache"),
    "more caches in v_cache": (dict(v_cache=(3, 10, 2, 6)), ValueError, "v_cache"),
    "heads do not divide": (dict(k_cache=(2, 10, 3, 8), v_cache=(2, 10, 3, 6)), ValueError, "q"),
    "head_dim 257": (dict(q=(2, 3, 4, 257), k_cache=(2, 10, 2, 257)), NotImplementedError, "(q|k_cache)"),
    "head_dim_v 257": (dict(v_cache=(2, 10, 2, 257)), NotImplementedError, "v_cache"),
    "other batch": (dict(k_cache=(3, 10, 2, 8), v_cache=(3, 10, 2, 6)), ValueError, "k_cache"),
    "cache_seqlens in int64": (dict(cache_seqlens=torch.tensor([4, 9])), TypeError, "cache_seqlens"),
    "cache_seqlens of another batch": (dict(cache_seqlens=ints(4, 9, 0)), ValueError, "cache_seqlens"),
    "cache_seqlens with 2 dimensions": (dict(cache_seqlens=ints([4, 9])), ValueError, "cache_seqlens"),
    "seqlen_new negative": (dict(seqlen_new=-1), ValueError, "seqlen_new"),
    "cache_batch_idx in int64": (dict(cache_batch_idx=torch.tensor([0, 1])), TypeError, "cache_batch_idx"),
    "cache_batch_idx of another batch": (dict(cache_batch_idx=ints(0)), ValueError, "cache_batch_idx"),
    "cache_batch_idx beside pages": (dict(cache_batch_idx=ints(0, 1), **_PAGES), ValueError, "cache_batch_idx"),
    "cache_leftpad in int64": (dict(cache_leftpad=torch.tensor([0, 1])), TypeError, "cache_leftpad"),
    "cache_leftpad of another batch": (dict(cache_leftpad=ints(0)), ValueError, "cache_leftpad"),
    "cache_leftpad beside pages": (dict(cache_leftpad=ints(0, 1), **_PAGES), NotImplementedError, "cache_leftpad"),
    "block_table in int64": ({**_PAGES, "block_table": _PAGES["block_table"].long()}, TypeError, "block_table"),
    "block_table with 1 dimension": ({**_PAGES, "block_table": ints(0, 1)}, ValueError, "block_table"),
    "block_table of another batch": ({**_PAGES, "block_table": ints([0, 1, 2])}, ValueError, "block_table"),
    "page_size 0": ({**_PAGES, "k_cache": (5, 0, 2, 8), "v_cache": (5, 0, 2, 6)}, ValueError, "k_cache"),
    "attn_bias": (dict(attn_bias=torch.zeros(1, 1, 3, 10)), NotImplementedError, "attn_bias"),
    "dropout": (dict(dropout_p=0.5, rng_state=torch.zeros(2, dtype=torch.int64)), NotImplementedError, "dropout_p"),
    "dropout without a state": (dict(dropout_p=0.5), NotImplementedError, "dropout_p"),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap"),
    "slopes in half precision": (dict(alibi_slopes=torch.zeros(4).half()), TypeError, "alibi_slopes"),
    "slopes of the wrong length": (dict(alibi_slopes=torch.zeros(2)), ValueError, "alibi_slopes"),
    "sink of the wrong batch": (dict(sink=torch.zeros(3, 4)), ValueError, "sink"),
    "num_splits negative": (dict(num_splits=-1), ValueError, "num_splits"),
}  # fmt: skip
APPEND_ERRORS = {
    "k_cache with 3 dimensions": (dict(k_cache=(10, 2, 8)), ValueError, "k_cache"),
    "v_cache with 3 dimensions": (dict(v_cache=(10, 2, 6)), ValueError, "v_cache"),
    "v_cache of another capacity": (dict(v_cache=(2, 11, 2, 6)), ValueError, "v_cache"),
    "k_cache of integers": (dict(k_cache=torch.zeros(2, 10, 2, 8, dtype=torch.int32)), TypeError, "k_cache"),
    "v_cache of another dtype": (dict(v_cache=torch.zeros(2, 10, 2, 6).half()), TypeError, "v_cache"),
    "k of another dtype": (dict(k=torch.zeros(2, 3, 2, 8).half()), TypeError, "k"),
    "v of another dtype": (dict(v=torch.zeros(2, 3, 2, 6).double()), TypeError, "v"),
    "k with 3 dimensions": (dict(k=(3, 2, 8)), ValueError, "k"),
    "k of other heads": (dict(k=(2, 3, 4, 8)), ValueError, "k"),
    "k of one head": (dict(k=(2, 3, 1, 8)), ValueError, "k"),
    "k of another head_dim": (dict(k=(2, 3, 2, 16)), ValueError, "k"),
    "v with 5 dimensions": (dict(v=(1, 2, 3, 2, 6)), ValueError, "v"),
    "v of another length": (dict(v=(2, 4, 2, 6)), ValueError, "v"),
    "v of another batch": (dict(v=(1, 3, 2, 6)), ValueError, "v"),
    "v of another head_dim": (dict(v=(2, 3, 2, 8)), ValueError, "v"),
    "v of other heads": (dict(v=(2, 3, 1, 6)), ValueError, "v"),
    "other batch": (dict(k=(3, 3, 2, 8), v=(3, 3, 2, 6), cache_seqlens=ints(0, 0, 0)), ValueError, "k_cache"),
    "cache_seqlens in int64": (dict(cache_seqlens=torch.tensor([4, 7])), TypeError, "cache_seqlens"),
    "cache_seqlens of another batch": (dict(cache_seqlens=ints(4)), ValueError, "cache_seqlens"),
    "cache_batch_idx in int64": (dict(cache_batch_idx=torch.tensor([0, 1])), TypeError, "cache_batch_idx"),
    "cache_batch_idx of another batch": (dict(cache_batch_idx=ints(0)), ValueError, "cache_batch_idx"),
    "cache_batch_idx beside pages": (dict(cache_batch_idx=ints(0, 1), **_PAGES), ValueError, "cache_batch_idx"),
    "block_table in int64": ({**_PAGES, "block_table": _PAGES["block_table"].long()}, TypeError, "block_table"),
    "block_table of another batch": ({**_PAGES, "block_table": ints([0, 1, 2])}, ValueError, "block_table"),
    "page_size 0": ({**_PAGES, "k_cache": (5, 0, 2, 8), "v_cache": (5, 0, 2, 6)}, ValueError, "k_cache"),
    "rotary_cos alone": (dict(rotary_cos=torch.zeros(10, 3)), ValueError, "rotary_(cos|sin)"),
    "rotary_sin alone": (dict(rotary_sin=torch.zeros(10, 3)), ValueError, "rotary_(cos|sin)"),
    "rotary_sin of another shape": (dict(_TABLES, rotary_sin=torch.zeros(10, 2)), ValueError, "rotary_sin"),
    "rotary_cos with 1 dimension": (
        dict(rotary_cos=torch.zeros(3), rotary_sin=torch.zeros(3)), ValueError, "rotary_cos"
    ),
    "rotary_cos of integers": (dict(_TABLES, rotary_cos=torch.zeros(10, 3).int()), TypeError, "rotary_cos"),
    "rotary_dim past head_dim": (
        dict(rotary_cos=torch.zeros(10, 5), rotary_sin=torch.zeros(10, 5)), ValueError, "rotary_cos"
    ),
    "rotary_dim 0": (dict(rotary_cos=torch.zeros(10, 0), rotary_sin=torch.zeros(10, 0)), ValueError, "rotary_cos"),
    # Of flash-attn too: a position without angles is a mistake that no one would see.
    "tables shorter than the cache": (
        dict(rotary_cos=torch.zeros(9, 3), rotary_sin=torch.zeros(9, 3)), ValueError, "rotary_cos"
    ),
    "expanded k_cache": (dict(k_cache=torch.zeros(2, 10, 1, 8).expand(2, 10, 2, 8)), ValueError, "k_cache"),
    "expanded v_cache": (dict(v_cache=torch.zeros(1, 10, 2, 6).expand(2, 10, 2, 6)), ValueError, "v_cache"),
}  # fmt: skip
DECODE_DEVICES = ("k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "sink")
APPEND_DEVICES = ("v_cache", "k", "v", "cache_seqlens", "cache_batch_idx", "block_table", "rotary_cos", "rotary_sin")

# What the host can read on a CPU.
DECODE_VALUES = {
    "length past the capacity": (dict(cache_seqlens=ints(4, 11)), "cache_seqlens"),
    "new keys past the capacity": (dict(cache_seqlens=ints(4, 9), seqlen_new=2), "cache_seqlens"),
    "negative length": (dict(cache_seqlens=ints(4, -1)), "cache_seqlens"),
    "negative length with new keys": (dict(cache_seqlens=ints(4, -1), seqlen_new=2), "cache_seqlens"),
    "largest length": (dict(cache_seqlens=ints(4, 2**31 - 1), seqlen_new=1), "cache_seqlens"),
    "cache that does not exist": (dict(cache_batch_idx=ints(0, 2)), "cache_batch_idx"),
    "negative cache": (dict(cache_batch_idx=ints(-1, 0)), "cache_batch_idx"),
    "negative padding": (dict(cache_leftpad=ints(0, -1)), "cache_leftpad"),
    "padding past the keys": (dict(cache_leftpad=ints(5, 0)), "cache_leftpad"),
    "padding past the capacity": (dict(cache_seqlens=None, cache_leftpad=ints(0, 11)), "cache_leftpad"),
    "page that does not exist": ({**_PAGES, "block_table": ints([5, 0, 2], [3, 4, 0])}, "block_table"),
    "negative page": ({**_PAGES, "block_table": ints([0, 1, 2], [3, 4, -1])}, "block_table"),
    "too few pages": ({**_PAGES, "cache_seqlens": ints(4, 13)}, "(cache_seqlens|block_table)"),
}
APPEND_VALUES = {
    "length past the capacity": (dict(cache_seqlens=ints(4, 8)), "cache_seqlens"),
    "negative length": (dict(cache_seqlens=ints(-1, 4)), "cache_seqlens"),
    "largest length": (dict(cache_seqlens=ints(4, 2**31 - 1)), "cache_seqlens"),
    "cache that does not exist": (dict(cache_batch_idx=ints(0, 2)), "cache_batch_idx"),
    "negative cache": (dict(cache_batch_idx=ints(-1, 0)), "cache_batch_idx"),
    "page that does not exist": ({**_PAGES, "block_table": ints([0, 5, 2], [3, 4, 0])}, "block_table"),
    "negative page": ({**_PAGES, "block_table": ints([0, 1, 2], [3, 4, -1])}, "block_table"),
    "too few pages": ({**_PAGES, "cache_seqlens": ints(4, 10)}, "(cache_seqlens|block_table)"),
}
CALLS = {"decode": decode_call, "append_kv": append_call}
ERRORS = [("decode", name, *row) for name, row in DECODE_ERRORS.items()]
ERRORS += [("append_kv", name, *row) for name, row in APPEND_ERRORS.items()]
VALUES = [("decode", name, *row) for name, row in DECODE_VALUES.items()]
VALUES += [("append_kv", name, *row) for name, row in APPEND_VALUES.items()]
DEVICES = [("decode", name) for name in DECODE_DEVICES] + [("append_kv", name) for name in APPEND_DEVICES]


class TestErrors:
    @pytest.mark.parametrize(
        "op, name, changes, error, argument", ERRORS, ids=lambda x: x if isinstance(x, str) else ""
    )
    def test_sentences_name_the_argument(self, op: str, name: str, changes: dict, error: type, argument: str) -> None:
        """From a device's kernel, and in the same words from the fake."""
        call = CALLS[op](**changes)
        with pytest.raises(error, match=rf"^{argument}: ") as raised:
            getattr(OPS, op)(**call)
        assert type(raised.value) is error
        if any(isinstance(x, Tensor) and x.layout is not torch.strided for x in call.values()):
            return
        with pytest.raises(error) as of_fake:
            getattr(OPS, op)(**{name: on_meta(value) for name, value in call.items()})
        assert str(of_fake.value) == str(raised.value)

    @pytest.mark.parametrize("op, argument", DEVICES)
    def test_other_devices_are_named(self, op: str, argument: str) -> None:
        call = CALLS[op]()
        of_argument = {
            "block_table": {**_PAGES, "block_table": _PAGES["block_table"].to("meta")},
            "cache_batch_idx": {argument: ints(0, 1).to("meta")},
            "cache_leftpad": {argument: ints(0, 0).to("meta")},
            "sink": {argument: torch.zeros(4, device="meta")},
        }
        changes = of_argument.get(argument)
        if argument.startswith("rotary"):
            changes = {**_TABLES, argument: torch.zeros(10, 3, device="meta")}
        changes = {argument: call[argument].to("meta")} if changes is None else changes
        with pytest.raises(ValueError, match=rf"^{argument}: expected device cpu"):
            getattr(OPS, op)(**CALLS[op](**changes))

    @pytest.mark.parametrize("op, name, changes, argument", VALUES, ids=lambda x: x if isinstance(x, str) else "")
    def test_values_that_the_host_can_read(self, op: str, name: str, changes: dict, argument: str) -> None:
        """Told before anything is written."""
        call = CALLS[op](**changes)
        for x in ("k", "v"):
            if x in call:
                call[x] += 1
        with pytest.raises(ValueError, match=rf"^{argument}: "):
            getattr(OPS, op)(**call)
        assert not call["k_cache"].any() and not call["v_cache"].any()

    def test_the_limits_of_values_are_right(self) -> None:
        """What is just inside is not told: the tests above are of what is just outside."""
        for changes in (
            dict(cache_seqlens=ints(0, 10)),
            dict(cache_seqlens=ints(0, 9), seqlen_new=1),
            dict(cache_batch_idx=ints(1, 1)),
            dict(cache_leftpad=ints(4, 9)),
            dict(cache_seqlens=None, cache_leftpad=ints(10, 0)),
            {**_PAGES, "cache_seqlens": ints(12, 8), "block_table": ints([0, 1, 4], [3, 2, -1])},
        ):
            OPS.decode(**decode_call(**changes))
        for changes in (
            dict(cache_seqlens=ints(0, 7)),
            dict(cache_batch_idx=ints(1, 0)),
            # Pages that nothing is written into do not count.
            {**_PAGES, "cache_seqlens": ints(9, 5), "block_table": ints([0, 1, 4], [3, 2, -1])},
        ):
            OPS.append_kv(**append_call(**changes))


class TestGradients:
    @pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "sink"])
    def test_decode_has_none(self, name: str) -> None:
        call = decode_call(sink=torch.zeros(4))
        call[name].requires_grad_()
        out, lse = OPS.decode(**call)
        for result in (out, lse):
            assert result.requires_grad
            with pytest.raises(NotImplementedError, match="decode"):
                result.sum().backward(retain_graph=True)
        with torch.no_grad():
            assert not OPS.decode(**call)[0].requires_grad

    @pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v"])
    def test_append_is_not_recorded(self, name: str) -> None:
        call = append_call()
        call["k"], call["v"] = call["k"] + 1, call["v"] + 1
        call[name].requires_grad_()
        with pytest.raises(NotImplementedError, match=r"torch\.no_grad\(\)"):
            OPS.append_kv(**call)
        assert not call["k_cache"].any() and not call["v_cache"].any()
        with torch.no_grad():
            OPS.append_kv(**call)
        assert (call["k_cache"][0, 4:7] == 1).all() and (call["v_cache"][1, 7:] == 1).all()
        assert call[name].requires_grad and call[name].grad_fn is None

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_modes_without_gradients(self, context: Callable, device: str) -> None:
        problem = DECODE_BY_NAME["splits_7"].decoding(device)
        expected = run_decode(problem)
        with context():
            assert same_bits(run_decode(problem._replace(q=problem.q.clone().requires_grad_())), expected)


def finite(problem: Decoding | Appending) -> Decoding | Appending:
    """Tools compare with ==: no NaN, no infinity."""
    clean = [x.nan_to_num(0.0, 0.0, 0.0) if isinstance(x, Tensor) else x for x in problem]
    return type(problem)(*clean)


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED_DECODE = ["plain", "queries_5", "paged_16", "batch_idx_of_more", "leftpad", "batch_0", "everything_splits"]
TRACED_APPEND = [
    "append",
    "append_paged_16",
    "append_batch_idx_of_more",
    "rotary_part",
    "rotary_paged",
    "append_batch_0",
]


class TestWhatPyTorchAsks:
    @pytest.mark.parametrize("case", DECODE_CASES, ids=str)
    def test_decode(self, case: Case) -> None:
        problem = finite(case.decoding())
        args, kwargs = (problem.q.requires_grad_(), *problem[1:3]), problem.options()
        assert set(opcheck(OPS.decode.default, args, kwargs, test_utils=OPCHECK).values()) == {"SUCCESS"}

    @pytest.mark.parametrize("case", [*APPEND_CASES, *APPEND_ROTARY_CASES], ids=str)
    def test_append(self, case: Case) -> None:
        problem = finite(case.appending())
        if case.layout == "joint":  # which opcheck's copies do not keep
            problem = problem._replace(k_cache=problem.k_cache.clone(), v_cache=problem.v_cache.clone())
        result = opcheck(OPS.append_kv.default, problem[:4], problem.new._asdict(), test_utils=OPCHECK)
        assert set(result.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("name", TRACED_DECODE)
    def test_decode_traces_with_symbolic_sizes(self, name: str) -> None:
        problem = finite(DECODE_BY_NAME[name].decoding())
        result = opcheck(OPS.decode.default, problem[:3], problem.options(), test_utils=("test_aot_dispatch_dynamic",))
        assert set(result.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("name", TRACED_APPEND)
    def test_append_traces_with_symbolic_sizes(self, name: str) -> None:
        problem = finite(APPEND_BY_NAME[name].appending())
        result = opcheck(
            OPS.append_kv.default, problem[:4], problem.new._asdict(), test_utils=("test_aot_dispatch_dynamic",)
        )
        assert set(result.values()) == {"SUCCESS"}

    @pytest.mark.parametrize("kind", ["meta", "fake"])
    @pytest.mark.parametrize("case", DECODE_CASES, ids=str)
    def test_decode_without_values(self, case: Case, kind: str) -> None:
        problem = case.decoding(dtype=torch.bfloat16)
        expected = run_decode(problem)
        with FakeTensorMode() as mode:
            moved = on_meta if kind == "meta" else lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x
        tensors, options = map(moved, problem[:3]), {name: moved(x) for name, x in problem.options().items()}
        if kind == "meta":
            promised = OPS.decode(*tensors, **options)
        else:
            with mode:
                promised = OPS.decode(*tensors, **options)
        for real, fake in zip(expected, promised, strict=True):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert significant_strides(fake) == significant_strides(real)
            assert fake.is_meta == (kind == "meta")

    @pytest.mark.parametrize("case", [*APPEND_CASES, *APPEND_ROTARY_CASES], ids=str)
    def test_append_without_values(self, case: Case) -> None:
        problem = case.appending()
        new = {name: on_meta(x) for name, x in problem.new._asdict().items()}
        assert OPS.append_kv(*map(on_meta, problem[:4]), **new) is None


class Step(NamedTuple):
    """The arguments of one call of the public function: a step of a decoder."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor
    v: Tensor
    cache_seqlens: Tensor

    def copy(self) -> Step:
        return Step(*(x.clone() for x in self))


def step(
    batch: int = 2, seqlen: int = 1, capacity: int = 37, lengths: tuple[int, ...] = (5, 30), device: str = "cpu"
) -> Step:
    make = functools.partial(torch.randn, device=device)
    return Step(
        *(make(batch, seqlen, 4, 32), make(batch, capacity, 2, 32), make(batch, capacity, 2, 32)),
        *(make(batch, seqlen, 2, 32), make(batch, seqlen, 2, 32)),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def attend(q, k_cache, v_cache, k, v, cache_seqlens, **options):
    return fap.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True, **options)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


ALLOCATION = re.compile(r"empty_strided\w*\(\(([^)]*)\)")
COPY = re.compile(r"copy_|clone|\.contiguous\(")


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    def inductor(self, function: Callable, *arguments: Any) -> tuple[Any, str]:
        """The results, and the code of the one graph."""
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        results, codes = run_and_get_code(compiled, *arguments)
        assert len(codes) == 1
        return results, codes[0]

    @staticmethod
    def assert_nothing_but_operators(code: str, calls: dict[str, int], cache_numel: int) -> None:
        """No kernel of the compiler's own, no copy, and nothing made that is as large as a cache."""
        for name, count in calls.items():
            assert len(re.findall(rf"flash_attn_plus\.{name}\.default\(", code)) == count
        assert not re.search(r"cpp_fused|triton_\w+fused|extern_kernels\.", code), code
        assert not COPY.search(code), code
        for shape in ALLOCATION.findall(code):
            numel = 1
            for size in filter(None, shape.replace(" ", "").split(",")):
                numel *= int(size)
            assert numel < cache_numel, code

    @pytest.mark.no_poison
    def test_inductor_copies_no_cache(self, device: str) -> None:
        arguments = step(device=device)
        expected = arguments.copy()
        out = attend(*expected)
        actual, code = self.inductor(attend, *arguments)
        assert same_bits((actual, *arguments), (out, *expected))
        self.assert_nothing_but_operators(code, {"append_kv": 1, "decode": 1}, arguments.k_cache.numel())

    @pytest.mark.no_poison
    def test_inductor_copies_no_buffer_of_layers(self, device: str) -> None:
        """Caches of all layers, keys and values in one tensor; pages."""
        buffer = torch.randn(2, 2, 9, 16, 2, 32, device=device)
        table = torch.tensor([[4, 0, 8], [1, 7, 3]], dtype=torch.int32, device=device)
        q, _, _, k, v, lengths = step(lengths=(15, 30), device=device)

        def layers(q, k, v, buffer, lengths):
            for keys, values in ((buffer[0, 0], buffer[0, 1]), (buffer[1, 0], buffer[1, 1])):
                q = fap.flash_attn_with_kvcache(
                    q, keys, values, k, v, cache_seqlens=lengths, block_table=table, causal=True
                )
            return q

        expected = buffer.clone()
        out = layers(q, k, v, expected, lengths)
        actual, code = self.inductor(layers, q, k, v, buffer, lengths)
        assert same_bits((actual, buffer), (out, expected))
        self.assert_nothing_but_operators(code, {"append_kv": 2, "decode": 2}, buffer[0, 0].numel())

    def test_one_compile_for_all_lengths(self, device: str) -> None:
        graphs = AotEagerAndRecordGraphs()
        compiled = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=True)
        for batch, seqlen, capacity, lengths in (
            # All sizes differ: the compiler takes equal ones for one.
            (5, 3, 37, (5, 30, 0, 34, 7)),
            (5, 3, 37, (34, 0, 1, 2, 3)),
            (3, 6, 40, (1, 2, 3)),
            (7, 2, 99, (97, 9, 0, 50, 1, 2, 3)),
        ):
            arguments = step(batch, seqlen, capacity, lengths, device)
            expected = arguments.copy()
            out = attend(*expected)
            actual = compiled(*arguments)
            assert same_bits((actual, *arguments), (out, *expected))
        assert len(graphs.fw_graphs) == 1
        targets = [str(node.target) for node in graphs.fw_graphs[0].graph.nodes if node.op == "call_function"]
        assert targets.count("flash_attn_plus.decode.default") == 1

    def test_few_compiles_for_lengths_as_numbers(self, device: str) -> None:
        graphs = AotEagerAndRecordGraphs()
        compiled = torch.compile(attend, backend=graphs, fullgraph=True, dynamic=True)
        arguments = step(seqlen=3, device=device)
        expected = arguments.copy()
        for length in (5, 8, 11, 30, 34):
            actual, out = compiled(*arguments[:5], length), attend(*expected[:5], length)
            assert same_bits((actual, *arguments), (out, *expected))
        assert len(graphs.fw_graphs) <= 2

    def test_rotary_and_the_other_options(self, device: str) -> None:
        q, k_cache, v_cache, k, v, lengths = step(seqlen=2, device=device)
        angles = torch.randn(37, 8, device=device)
        options = dict(
            rotary_cos=angles.cos(),
            rotary_sin=angles.sin(),
            rotary_interleaved=False,
            cache_batch_idx=torch.tensor([1, 0], dtype=torch.int32, device=device),
            cache_leftpad=torch.tensor([1, 4], dtype=torch.int32, device=device),
            softmax_scale=0.3,
            window_size=(9, -1),
            softcap=5.0,
            alibi_slopes=torch.full((4,), 0.25, device=device),
            num_splits=2,
            return_softmax_lse=True,
            sink=torch.zeros(4, device=device),
        )
        run = functools.partial(attend, **options)
        expected = Step(q, k_cache, v_cache, k, v, lengths).copy()
        results = run(*expected)
        actual = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k_cache, v_cache, k, v, lengths)
        assert same_bits((*actual, k_cache, v_cache), (*results, *expected[1:3]))

    def test_the_sentence_of_eager_mode(self) -> None:
        arguments = step()._replace(cache_seqlens=torch.tensor([5, 30]))
        with pytest.raises(TypeError) as eager:
            attend(*arguments)
        with pytest.raises((torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported)) as compiled:
            torch.compile(attend, backend="eager", fullgraph=True)(*arguments)
        assert "cache_seqlens: expected dtype torch.int32" in str(eager.value)
        assert str(eager.value) in str(compiled.value)


class Decoder(torch.nn.Module):
    """Its caches are buffers."""

    def __init__(self, batch: int = 2, capacity: int = 37) -> None:
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, capacity, 2, 32))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> Tensor:
        return attend(q, self.k_cache, self.v_cache, k, v, cache_seqlens)


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_caches_are_buffers_that_are_mutated(self, strict: bool, tmp_path) -> None:
        model = Decoder()
        q, _, _, k, v, _ = step(seqlen=3)
        lengths = ints(0, 4)
        free = {1: Dim("seqlen", min=1, max=37)}
        shapes = {"q": free, "k": free, "v": free, "cache_seqlens": None}
        program = export(model, (q, k, v, lengths), dynamic_shapes=shapes, strict=strict)
        assert operator_nodes(program.graph_module) == {"append_kv": 1, "decode": 1}
        functional = program.run_decompositions()
        mutated = functional.graph_signature.buffers_to_mutate.values()
        assert set(mutated) == {"k_cache", "v_cache"}
        save(program, tmp_path / "decoder.pt2")
        again = load(tmp_path / "decoder.pt2")
        for exported in (program, functional, again):
            model, run = Decoder(), exported.module()
            lengths = ints(0, 4)
            for seqlen in (3, 1, 7):
                q, _, _, k, v, _ = step(seqlen=seqlen)
                out = run(q, k, v, lengths)
                torch.testing.assert_close(out, model(q, k, v, lengths))
                lengths = lengths + seqlen
            caches = dict(run.named_buffers())
            assert same_bits((caches["k_cache"], caches["v_cache"]), (model.k_cache, model.v_cache))
            assert model.k_cache[0, :11].abs().sum() > 0 and not model.k_cache[0, 11:].any()

    def test_one_node_of_a_symbolic_trace(self) -> None:
        traced = torch.fx.symbolic_trace(lambda q, k_cache, v_cache, k, v, n: attend(q, k_cache, v_cache, k, v, n))
        function = fap.flash_attn_with_kvcache
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
        arguments = step(seqlen=2)
        expected = arguments.copy()
        out = attend(*expected)
        assert same_bits((pickle.loads(pickle.dumps(traced))(*arguments), *arguments), (out, *expected))


SIGNATURE = (
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
    "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False, *, sink=None"
)


def rotated_queries(case: Case, problem: Appending, q: Tensor) -> Tensor:
    """Row i at cache_seqlens + i where positions differ; else all at cache_seqlens. One row at a time."""
    cos, sin, interleaved = problem.new[3:]
    if cos is None:
        return q
    moves = case.causal or max(case.window) >= 0
    rows = [
        fap.apply_rotary_emb(
            q[:, i : i + 1], cos, sin, interleaved, seqlen_offsets=problem.new.cache_seqlens + i * moves
        )
        for i in range(q.shape[1])
    ]
    return torch.cat(rows, 1) if rows else q


PUBLIC = [
    Case("public", seqlen_new=1),
    Case("public_nothing_new", seqlen_new=0),
    Case("public_more", seqlen_new=3, seqlen_q=3, causal=True, rotary_dim=32),
    Case("public_rotary_together", seqlen_new=3, seqlen_q=3, rotary_dim=16, interleaved=False),
    Case("public_rotary_left", seqlen_new=3, seqlen_q=3, rotary_dim=16, window=(9, -1)),
    Case("public_rotary_right", seqlen_new=3, seqlen_q=3, rotary_dim=16, window=(-1, 2), interleaved=False),
    Case("public_rotary_one", seqlen_new=1, rotary_dim=32, causal=True),
    Case("public_fewer_new", seqlen_new=2, seqlen_q=5, rotary_dim=32, causal=True, lengths=(19, 3, 30)),
    Case("public_more_new", seqlen_new=5, seqlen_q=2, rotary_dim=32, causal=True, lengths=(19, 0, 30)),
    Case("public_paged", lengths=(13, 0, 31), seqlen_new=5, seqlen_q=5, page_size=16, causal=True, rotary_dim=16),
    Case("public_batch_idx", seqlen_new=1, batch_idx=(4, 0, 3), caches=6, rotary_dim=32, leftpad=(3, 0, 20)),
    Case("public_prefill", lengths=(3, 0), seqlen_new=66, seqlen_q=66, capacity=80, causal=True, rotary_dim=32),
    Case("public_batch_0", lengths=(), seqlen_new=1, rotary_dim=32),
    Case(
        *("public_options",),
        **EVERYTHING | {"layout_new": "heads_first", "rotary_dim": 8, "num_splits": 3, "leftpad": (9, 0, 7, 30)},
    ),
]


class TestPublicFunction:
    def test_signature(self) -> None:
        signature = inspect.signature(fap.flash_attn_with_kvcache)
        told = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(told)) == f"({SIGNATURE})"
        assert inspect.isfunction(fap.flash_attn_with_kvcache) and "flash_attn_with_kvcache" in fap.__all__
        assert pickle.loads(pickle.dumps(fap.flash_attn_with_kvcache)) is fap.flash_attn_with_kvcache

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", PUBLIC, ids=str)
    def test_is_append_then_decode(self, case: Case, dtype: torch.dtype, device: str) -> None:
        decoding = finite(case.decoding(device, dtype))
        appended = finite(case.appending(device, dtype))
        # The caches of the one, what is new of the other.
        problem = appended._replace(k_cache=decoding.k_cache, v_cache=decoding.v_cache)
        k_cache, v_cache = (x.clone() for x in decoding[1:3])
        cos, sin = problem.new[3:5]
        cache, variant = decoding.cache, decoding.variant
        results = fap.flash_attn_with_kvcache(
            *(decoding.q, k_cache, v_cache, problem.k, problem.v, cos, sin),
            *(cache.cache_seqlens, cache.cache_batch_idx, cache.cache_leftpad, cache.block_table),
            *(variant.softmax_scale, variant.causal, (variant.window_left, variant.window_right), variant.softcap),
            *(case.interleaved, variant.alibi_slopes, case.num_splits, True),
            sink=variant.sink,
        )
        run_append(problem)
        expected = run_decode(decoding._replace(q=rotated_queries(case, problem, decoding.q)))
        assert isinstance(results, tuple) and len(results) == 2
        assert same_bits(results, expected)
        assert same_bits((k_cache, v_cache), problem[:2])

    def test_returns_out_alone(self, device: str) -> None:
        q, k_cache, v_cache, *_, lengths = step(device=device)
        out = fap.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths)
        assert torch.equal(out, OPS.decode(q, k_cache, v_cache, lengths)[0])
        whole = fap.flash_attn_with_kvcache(q, k_cache, v_cache)
        torch.testing.assert_close(whole, fap.flash_attn_func(q, k_cache, v_cache))

    @pytest.mark.parametrize("seqlen", [1, 3])
    def test_a_length_as_a_number_is_that_of_all(self, seqlen: int, device: str) -> None:
        arguments = step(seqlen=seqlen, lengths=(30, 30), device=device)
        expected = arguments.copy()
        results = attend(*expected, return_softmax_lse=True)
        actual = attend(*arguments[:5], 30, return_softmax_lse=True)
        assert same_bits((*actual, *arguments), (*results, *expected))
        q, k_cache, v_cache, *_ = arguments
        out = fap.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=9)
        torch.testing.assert_close(out, fap.flash_attn_func(q, k_cache[:, :9], v_cache[:, :9]))

    def test_a_whole_generation(self, device: str) -> None:
        """Prompt, then token by token, with rotary embedding: as attention over all tokens at once."""
        batch, length, heads, dim = 2, 23, 4, 32
        q = torch.randn(batch, length, heads, dim, device=device)
        k, v = torch.randn(2, batch, length, 2, dim, device=device)
        angles = torch.randn(32, 8, device=device)
        cos, sin = angles.cos(), angles.sin()
        expected = fap.flash_attn_func(
            *(fap.apply_rotary_emb(x, cos, sin, interleaved=True) for x in (q, k)), v, causal=True
        )
        caches = tuple(torch.full((15, 4, 2, dim), NAN, device=device) for _ in range(2))
        table = [[3, 8, 1, 0, 6, 5], [2, 7, 4, 12, 14, 9]]
        table = torch.tensor(table, dtype=torch.int32, device=device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        outs, first = [], 0
        for n in (9, *[1] * 14):
            new = [x[:, first : first + n] for x in (q, k, v)]
            outs.append(
                fap.flash_attn_with_kvcache(
                    new[0], *caches, *new[1:], cos, sin, lengths, block_table=table, causal=True
                )
            )
            lengths += n
            first += n
        assert first == length
        torch.testing.assert_close(torch.cat(outs, 1), expected)

    def test_windows_as_tensors_and_causal_in_one_query(self) -> None:
        q, k_cache, v_cache, *_, lengths = step()
        run = functools.partial(fap.flash_attn_with_kvcache, q, k_cache, v_cache, cache_seqlens=lengths)
        assert torch.equal(run(window_size=(torch.tensor(4), torch.tensor(0))), run(window_size=(4, 0)))
        torch.testing.assert_close(run(causal=True), run())

    def test_new_keys_may_require_gradients(self) -> None:
        """They are appended without history, which no loss notices but by its backward."""
        q, k_cache, v_cache, k, v, lengths = step()
        expected = Step(q, k_cache, v_cache, k, v, lengths).copy()
        out = attend(*expected)
        for x in (q, k, v):
            x.requires_grad_()
        actual = attend(q, k_cache, v_cache, k, v, lengths)
        assert torch.equal(actual, out)
        assert not k_cache.requires_grad and not v_cache.requires_grad
        assert same_bits((k_cache, v_cache), expected[1:3])
        with pytest.raises(NotImplementedError, match="decode"):
            actual.sum().backward()
        with torch.no_grad():
            assert not attend(q, k_cache, v_cache, k, v, lengths).requires_grad

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_modes_without_gradients(self, context: Callable, device: str) -> None:
        arguments = step(device=device)
        expected = arguments.copy()
        out = attend(*expected)
        with context():
            assert same_bits((attend(*arguments), *arguments), (out, *expected))

    @pytest.mark.parametrize(
        "sentence, error, changes",
        [
            ("cache_seqlens: ", ValueError, {"cache_seqlens": None}),
            ("v: ", ValueError, {"v": None}),
            ("k: ", ValueError, {"k": None}),
            ("rotary_(cos|sin): ", ValueError, {"rotary_cos": torch.zeros(37, 8)}),
            ("rotary_(cos|sin): ", ValueError, {"rotary_sin": torch.zeros(37, 8)}),
            (
                "rotary_cos",
                ValueError,
                {"k": None, "v": None, "rotary_cos": torch.zeros(37, 8), "rotary_sin": torch.zeros(37, 8)},
            ),
            ("window_size: ", ValueError, {"window_size": (1, 2, 3)}),
            ("cache_seqlens: ", ValueError, {"cache_seqlens": 37}),
            ("cache_seqlens: ", ValueError, {"cache_seqlens": -1}),
            ("cache_seqlens: ", TypeError, {"cache_seqlens": torch.tensor([5, 6])}),
            ("sink: ", ValueError, {"sink": torch.zeros(3)}),
            ("cache_batch_idx: ", ValueError, {"cache_batch_idx": torch.zeros(3, dtype=torch.int32)}),
            ("cache_leftpad: ", ValueError, {"cache_leftpad": torch.zeros(3, dtype=torch.int32)}),
            ("cache_leftpad: ", ValueError, {"cache_leftpad": torch.tensor([0, 37], dtype=torch.int32)}),
            ("num_splits: ", TypeError, {"num_splits": 1.5}),
            ("num_splits: ", ValueError, {"num_splits": 2**70}),
            ("softmax_scale: ", TypeError, {"softmax_scale": "1"}),
            ("softcap: ", TypeError, {"softcap": None}),
            ("window_left: ", ValueError, {"window_size": (2**70, 0)}),
            ("window_left: ", TypeError, {"window_size": ("a", 1)}),
            ("cache_seqlens: ", ValueError, {"cache_seqlens": 2**40}),
            ("cache_seqlens: ", TypeError, {"cache_seqlens": 3.0}),
            ("k: ", ValueError, {"k": torch.zeros(4), "v": torch.zeros(4), "cache_seqlens": 3}),
            ("k: ", TypeError, {"k": [1.0]}),
            ("k_cache: ", TypeError, {"k_cache": None}),
        ],
    )
    @pytest.mark.parametrize("again", [False, True])
    def test_errors_come_before_anything_is_written(
        self, sentence: str, error: type, changes: dict, again: bool
    ) -> None:
        """Of decode's arguments too, though it runs second, and where such a call was right before."""
        arguments = step()._asdict()
        if again:
            fap.flash_attn_with_kvcache(**arguments)
        before = [arguments[name].clone() for name in ("k_cache", "v_cache")]
        with pytest.raises(error, match=f"^{sentence}"):
            fap.flash_attn_with_kvcache(**{**arguments, **changes})
        assert same_bits((arguments["k_cache"], arguments["v_cache"]), tuple(before))

    def test_a_tangent_is_refused_before_anything_is_written(self) -> None:
        q, k_cache, *rest = step()
        before = k_cache.clone()
        with forward_ad.dual_level():
            q = forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(NotImplementedError, match=r"^q: expected no tangent"):
                attend(q, k_cache, *rest)
        assert torch.equal(k_cache, before)

    @pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
    def test_versions_of_the_caches(self, context: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every call raises them, also past the dispatcher and where the kernel does not, as those of a GPU."""
        monkeypatch.setattr("flash_attn_plus.cpu.append_kv", lambda *args: None)
        library.memory_of("append_kv").clear()
        try:
            arguments = step()
            for _ in range(3):
                before = [x._version for x in arguments[1:3]]
                with context():
                    attend(*arguments)
                assert [x._version for x in arguments[1:3]] == [version + 1 for version in before]
        finally:
            library.memory_of("append_kv").clear()

    def test_a_hint_that_is_negative(self) -> None:
        arguments = step()
        assert torch.equal(attend(*arguments.copy(), num_splits=-1), attend(*arguments))

    def test_a_length_that_does_not_fit_in_a_compiled_graph(self) -> None:
        q, k_cache, v_cache, k, v, _ = step()
        compiled = torch.compile(
            lambda n: fap.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=n), backend="eager"
        )
        for length in (3, 4, 5):
            compiled(length)
        with pytest.raises(ValueError, match=r"^cache_seqlens: expected a length"):
            compiled(k_cache.shape[1])


@pytest.mark.parametrize("lengths", [(5, 3), (-7, 2**31 - 1)])
@pytest.mark.parametrize("seqlen_new", [0, 3])
def test_plain_pytorch_reads_nothing_outside_either(lengths: tuple[int, int], seqlen_new: int) -> None:
    """Where it stands for kernels, on other devices and for float64, nothing checks lengths and numbers before."""
    int32 = functools.partial(torch.tensor, dtype=torch.int32)
    q, caches, used = torch.randn(2, 1, 4, 16), torch.randn(3, 8, 2, 16), int32(lengths)

    def finite(k_cache: Tensor, *where: Any) -> None:
        given = Cache(used, seqlen_new, *where)
        out, _ = cache.decode(q, k_cache, k_cache, given, Variant(), 0, rowblocks.forward)
        assert out.isfinite().all()

    for pads in (None, int32((1, -4)), int32((99, 2))):
        finite(caches[:2], None, pads)
        for numbers in ((0, 2), (-3, 99)):
            finite(caches, int32(numbers), pads)
    for table in ([[0, 1], [2, 0]], [[-5, 77], [2, 0]]):
        finite(caches, None, None, int32(table))
    if seqlen_new == 0:
        finite(caches[:0], int32((0, 0)))
        finite(caches[:0], None, None, int32([[0], [0]]))


class TestDropIn:
    @pytest.fixture(autouse=True)
    def served(self):
        as_flash_attn.serve(replace=True)
        self.flash_attn = importlib.import_module("flash_attn")
        self.extension = importlib.import_module("flash_attn_2_cuda")

    def test_signatures(self) -> None:
        signature = inspect.signature(self.flash_attn.flash_attn_with_kvcache)
        told = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(told)) == f"({SIGNATURE.replace('sink', 's_aux')})"
        assert " ".join(inspect.signature(self.extension.fwd_kvcache).parameters) == (
            "q kcache vcache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k block_table alibi_slopes "
            "out softmax_scale is_causal window_size_left window_size_right softcap is_rotary_interleaved num_splits"
        )

    @pytest.mark.parametrize("options", [{}, {"window_size": (9, 0), "softcap": 3.0, "num_splits": 2}], ids=str)
    def test_the_public_function(self, options: dict) -> None:
        arguments = step(seqlen=2)
        expected = arguments.copy()
        results = attend(*expected, return_softmax_lse=True, sink=torch.ones(4), **options)
        q, k_cache, v_cache, k, v, lengths = arguments
        actual = self.flash_attn.flash_attn_with_kvcache(
            *(q, k_cache, v_cache, k, v, None, None, lengths),
            **{"causal": True, "return_softmax_lse": True, "s_aux": torch.ones(4), **options},
        )
        assert same_bits((*actual, *arguments), (*results, *expected))
        alone = self.flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)
        assert torch.equal(alone, fap.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7))

    @pytest.mark.parametrize("given", [False, True])
    def test_the_extension(self, given: bool) -> None:
        arguments = step(seqlen=2)
        expected = arguments.copy()
        angles, slopes = torch.randn(37, 8), torch.full((4,), 0.25)
        tables = angles.cos(), angles.sin()
        pads, numbers = ints(1, 4), ints(1, 0)
        results = fap.flash_attn_with_kvcache(
            *(*expected[:5], *tables, expected.cache_seqlens, numbers, pads, None, 0.3, True, (9, 0), 2.0, False),
            *(slopes, 2, True),
        )
        q, k_cache, v_cache, k, v, lengths = arguments
        out = torch.empty_like(q) if given else None
        actual = self.extension.fwd_kvcache(
            *(q, k_cache, v_cache, k, v, lengths, *tables, numbers, pads, None, slopes, out),
            *(0.3, True, 9, 0, 2.0, False, 2),
        )
        assert isinstance(actual, list) and len(actual) == 2
        assert same_bits((*actual, *arguments), (*results, *expected))
        assert not given or actual[0] is out

    def test_the_extension_in_pages_without_new_keys(self) -> None:
        problem = DECODE_BY_NAME["paged_16"].decoding()
        cache = problem.cache
        actual = self.extension.fwd_kvcache(
            *(*problem[:3], None, None, cache.cache_seqlens, None, None, None, None, cache.block_table, None, None),
            *(32**-0.5, False, -1, -1, 0.0, True, 0),
        )
        assert same_bits(tuple(actual), run_decode(problem))
