"""What benchmark/decode.py measures: problems, caches, and calls with what each must come to."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import reading
import torch
import torch.nn.functional as F
from torch import Tensor

import flash_attn_plus as fap

DIM = 128
ITEMSIZE = 2  # bfloat16
AWAY = 200e6  # bytes that pass before the same keys are read again: four times the L2 cache of an H100
SHORTEST = 4  # random lengths are at least a fourth of the cache
WINDOW = 1024
SOFTCAP = 2.0  # so low that leaving it out is wrong by more than the tolerance
PAGES = (16, 64, 256)


def launches_until_again(size: float) -> int:
    """Launches that each read other keys, so many bytes, until the first one's keys may be read again."""
    return math.ceil(AWAY / size)


@dataclass(frozen=True)
class Row:
    batch: int
    heads: int
    heads_k: int
    keys: int

    @property
    def name(self) -> str:
        return f"b{self.batch} h{self.heads}/{self.heads_k} k{self.keys}"

    def bytes(self, keys: int) -> int:
        """Of so many keys and their values, all heads."""
        return 2 * keys * self.heads_k * DIM * ITEMSIZE

    @property
    def copies(self) -> int:
        """Caches to go through, so that AWAY passes even where lengths are the shortest."""
        return launches_until_again(self.bytes(self.batch * self.keys) / SHORTEST)


@dataclass(frozen=True)
class Option:
    """What one column of the table adds to a plain decoding."""

    page: int | None = None
    random_lengths: bool = False
    window: int | None = None
    keys: int | None = None  # caches that have no more; contiguous
    softcap: float = 0.0
    sink: bool = False


OPTIONS = {
    "contiguous": Option(),
    **{f"page {page}": Option(page=page) for page in PAGES},
    "lengths": Option(random_lengths=True),
    "page 16, lengths": Option(page=16, random_lengths=True),
    f"window {WINDOW}": Option(window=WINDOW),
    f"{WINDOW} keys": Option(keys=WINDOW),
    "softcap": Option(softcap=SOFTCAP),
    "sink": Option(sink=True),
}


def reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, softcap: float = 0.0, sink: Tensor | None = None
) -> Tensor:
    """q (rows, h, d), k and v (n, hk, d), visible (rows, n) bool -> (rows, h, d) in float32."""
    q, k, v = q.float(), k.float(), v.float()
    S = torch.einsum("rkgd,nkd->kgrn", q.unflatten(1, (k.shape[1], -1)), k) * DIM**-0.5
    if softcap:
        S = softcap * torch.tanh(S / softcap)
    if visible is not None:
        S = S.masked_fill(~visible, -torch.inf)
    if sink is not None:  # one more column, which has no value
        column = sink.float().view(*S.shape[:2], 1, 1).expand(*S.shape[:3], 1)
        S = torch.cat((S, column), -1)
    P = S.softmax(-1)[..., : len(k)]
    return torch.einsum("kgrn,nkd->rkgd", P, v).flatten(1, 2)


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result.float() - expected).norm() / expected.norm()).item()


class Store:
    """The caches of a row, and queries; how an option sees them, and what it must come to."""

    def __init__(self, row: Row, queries: int = 1, copies: int | None = None, device: str = "cuda") -> None:
        self.row = row
        make = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
        torch.manual_seed(0)
        shape = (copies or row.copies, row.batch, row.keys, row.heads_k, DIM)
        self.k, self.v = make(shape), make(shape)
        self.q = make(row.batch, queries, row.heads, DIM)
        self.new = [make(row.batch, 1, row.heads_k, DIM) for _ in range(2)]
        # About half of all weight is the sink's.
        self.sink = torch.randn(row.heads, device=device) + math.log(row.keys)
        self.full = self.lengths([row.keys] * row.batch)
        least = max(1, row.keys // SHORTEST)
        drawn = torch.randint(least, row.keys + 1, (row.batch,), generator=torch.Generator().manual_seed(0))
        self.random = self.lengths(drawn.tolist())
        self.tables: dict[int, Tensor] = {}
        self.copies = range(len(self.k))
        self.whole = range(min(len(self.k), launches_until_again(row.bytes(row.batch * row.keys))))  # of whole caches
        self.sampled = sorted({0, row.batch - 1})

    def lengths(self, lengths: list[int]) -> Tensor:
        return torch.tensor(lengths, dtype=torch.int32, device=self.k.device)

    def table(self, page: int) -> Tensor:
        """(batch, pages of a sequence): all pages of a cache, in no order."""
        if page not in self.tables:
            count = self.row.batch * self.row.keys // page
            order = torch.randperm(count, generator=torch.Generator().manual_seed(page))
            self.tables[page] = order.int().view(self.row.batch, -1).to(self.k.device)
        return self.tables[page]

    def caches(self, copy: int, page: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """k_cache, v_cache and block_table."""
        k, v = self.k[copy], self.v[copy]
        if page is None:
            return k, v, None
        return *(x.view(-1, page, *x.shape[2:]) for x in (k, v)), self.table(page)

    def keys_of(self, copy: int, page: int | None, entry: int) -> list[Tensor]:
        """k and v (keys, heads_k, d) of one sequence."""
        *caches, table = self.caches(copy, page)
        return [x[entry] if table is None else x[table[entry].long()].flatten(0, 1) for x in caches]

    def heads_first(self, copy: int) -> list[Tensor]:
        """k and v (batch, heads_k, keys, d): the same memory, read as SDPA would have it."""
        row = self.row
        return [x[copy].view(row.batch, row.heads_k, row.keys, DIM) for x in (self.k, self.v)]


@dataclass
class Case:
    """What is timed: launches that differ in the memory that they read alone, and how a result is judged."""

    calls: list[Callable[[], Tensor]]
    error: Callable[[int, Tensor], float]  # of call i and its result
    bytes: float = 0.0  # of keys and values, of one call
    flops: float = 0.0
    select: Callable = nullcontext  # entered around the first calls and the capture


def ours(store: Store, option: Option) -> Case:
    row = store.row
    lengths, rows = [store.random if option.random_lengths else store.full], [slice(None)]
    seen = int(lengths[0].sum())
    if option.window is not None:  # the windows of other lengths lie elsewhere: fewer caches are enough
        ends = range(option.window, row.keys + 1, option.window)
        lengths, seen = [store.lengths([end] * row.batch) for end in ends], row.batch * option.window
    if option.keys is not None:  # so do the caches that a long one is cut into
        starts = range(0, row.keys - option.keys + 1, option.keys)
        rows = [slice(start, start + option.keys) for start in starts]
        lengths, seen = [store.lengths([option.keys] * row.batch)], row.batch * option.keys
    places = list(itertools.product(store.copies, lengths, rows))[: launches_until_again(row.bytes(seen))]
    options = {"softcap": option.softcap, "sink": store.sink if option.sink else None, "causal": True}
    if option.window is not None:
        options["window_size"] = (option.window - 1, 0)

    def call(copy: int, cache_seqlens: Tensor, part: slice) -> Tensor:
        k, v, table = store.caches(copy, option.page)
        if option.keys is not None:
            k, v = k[:, part], v[:, part]
        return fap.flash_attn_with_kvcache(store.q, k, v, cache_seqlens=cache_seqlens, block_table=table, **options)

    def error(i: int, out: Tensor) -> float:
        copy, cache_seqlens, part = places[i]
        errors = []
        for entry in store.sampled:
            end = int(cache_seqlens[entry])
            keys = slice(0 if option.window is None else max(0, end - option.window), end)
            k, v = (x[part][keys] for x in store.keys_of(copy, option.page, entry))
            expected = reference(store.q[entry], k, v, None, option.softcap, options["sink"])
            errors.append(relative(out[entry], expected))
        return torch.tensor(errors).max().item()  # unlike max(), keeps a NaN

    return Case([functools.partial(call, *place) for place in places], error, row.bytes(seen))


def sdpa(store: Store) -> Case:
    row = store.row
    gqa = {"enable_gqa": True} if row.heads != row.heads_k else {}
    views = [store.heads_first(copy) for copy in store.whole]

    def call(copy: int) -> Tensor:
        out = F.scaled_dot_product_attention(store.q.transpose(1, 2), *views[copy], **gqa)
        return out.transpose(1, 2)

    def error(i: int, out: Tensor) -> float:
        k, v = views[i]
        pairs = ((out[b], reference(store.q[b], k[b].transpose(0, 1), v[b].transpose(0, 1))) for b in store.sampled)
        return torch.tensor([relative(*pair) for pair in pairs]).max().item()

    calls = [functools.partial(call, copy) for copy in store.whole]
    return Case(calls, error, row.bytes(row.batch * row.keys))


def copy_of(store: Store) -> Case:
    """Reads the keys and writes as many bytes: altogether as many as the keys and values have."""
    other = torch.empty_like(store.k[: len(store.whole)])

    def error(i: int, out: Tensor) -> float:
        return 0.0 if torch.equal(out, store.k[i]) else math.nan

    calls = [functools.partial(other[copy].copy_, store.k[copy]) for copy in store.whole]
    return Case(calls, error, store.row.bytes(store.row.batch * store.row.keys))


def read(store: Store, shape: reading.Shape, keys: int | None = None) -> Case:
    """Adds up as many bytes as so many keys and their values have; None: those of the row."""
    row = store.row
    keys = keys or row.batch * row.keys
    size = keys * row.heads_k * DIM
    count = min(store.k.numel() // size, launches_until_again(row.bytes(keys)))
    places = [[x.view(-1)[i * size : (i + 1) * size] for x in (store.k, store.v)] for i in range(count)]

    def error(i: int, out: Tensor) -> float:
        return 0.0 if torch.equal(out, reading.expected(*places[i])) else math.nan

    return Case([functools.partial(reading.add_up, *place, shape) for place in places], error, row.bytes(keys))


def our_step(store: Store, page: int | None) -> Case:
    """Append the key and value of the last token, then attend to all."""
    last = store.full - 1
    k_new, v_new = store.new

    def call(k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        cache = {"cache_seqlens": last, "block_table": table, "causal": True}
        return fap.flash_attn_with_kvcache(store.q, k, v, k_new, v_new, **cache)

    def error(i: int, out: Tensor) -> float:
        k, v = store.keys_of(i, page, 0)
        if not (torch.equal(k[-1], k_new[0, 0]) and torch.equal(v[-1], v_new[0, 0])):
            return math.nan
        return relative(out[0], reference(store.q[0], k, v))

    calls = [functools.partial(call, *store.caches(copy, page)) for copy in store.whole]
    return Case(calls, error, store.row.bytes(store.row.batch * store.row.keys))


def sdpa_step(store: Store) -> Case:
    """The same with what PyTorch has: two index_copy_, then SDPA, which has to see the whole cache."""
    attention = sdpa(store)
    views = [store.heads_first(copy) for copy in store.whole]
    new = [x.transpose(1, 2) for x in store.new]
    place = store.full[:1].long() - 1

    def call(copy: int) -> Tensor:
        for x, row in zip(views[copy], new, strict=True):
            x.index_copy_(2, place, row)
        return attention.calls[copy]()

    def error(i: int, out: Tensor) -> float:
        appended = all(torch.equal(x[:, :, -1:], row) for x, row in zip(views[i], new, strict=True))
        return attention.error(i, out) if appended else math.nan

    return Case([functools.partial(call, copy) for copy in store.whole], error, attention.bytes)


def step_cases(store: Store) -> dict[str, Callable[[], Case]]:
    return {
        "contiguous": lambda: our_step(store, None),
        "page 16": lambda: our_step(store, 16),
        "index_copy_ + SDPA": lambda: sdpa_step(store),
    }


def prefill_case(store: Store, page: int | None, call: Callable[[], Tensor]) -> Case:
    """Many queries, the last of which sees all keys; the first and the last 16 are judged."""
    row, queries = store.row, store.q.shape[1]
    pairs = queries * row.keys - queries * (queries - 1) // 2
    rows = torch.tensor([*range(16), *range(queries - 16, queries)], device=store.q.device)
    visible = torch.arange(row.keys, device=rows.device) <= rows[:, None] + row.keys - queries

    def error(i: int, out: Tensor) -> float:
        keys = {b: store.keys_of(0, page, b) for b in store.sampled}
        errors = [relative(out[b, rows], reference(store.q[b, rows], *keys[b], visible)) for b in store.sampled]
        return torch.tensor(errors).max().item()

    return Case([call], error, flops=4 * row.batch * row.heads * pairs * DIM)


def our_prefill(store: Store, page: int | None) -> Case:
    k, v, table = store.caches(0, page)
    cache = {"cache_seqlens": store.full, "block_table": table, "causal": True}
    return prefill_case(store, page, functools.partial(fap.flash_attn_with_kvcache, store.q, k, v, **cache))


def dense(store: Store, page: None) -> Case:
    """flash_attn_func on the same keys."""
    k, v, _ = store.caches(0, page)
    return prefill_case(store, page, functools.partial(fap.flash_attn_func, store.q, k, v, causal=True))
