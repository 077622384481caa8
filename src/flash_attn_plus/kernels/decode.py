"""Few queries against a cache: one Triton kernel that reads every key once, split among as many programs as it takes.

A program owns a part of one sequence's keys (splits.py) and all query heads of a key head, whose queries are the rows
of one tile. What several parts of a sequence came to, combine.py adds up. Dao et al.: "Flash-Decoding for long-context
inference" (2023). Many queries go to the kernel of forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, plan
from ..schemas import Cache, New, Variant
from ..strides import contiguous_rows, has_contiguous_rows
from . import arguments, combine, early, scores, softmax, splits, tiles
from .forward import Forward
from .launch import Launch, Prepared
from .relaunch import Relaunch

if TYPE_CHECKING:
    from ..eager import Step
    from .append import Append


class Rows(NamedTuple):
    """The rows of a tile."""

    first: tl.tensor  # the number of the first one
    exist: tl.tensor  # (BLOCK_M,), as all below
    heads_q: tl.tensor
    queries: tl.tensor
    to_out: tl.tensor  # rows of out from the sequence's first one


@triton.jit(
    do_not_specialize=[
        *("batch", "rows_q", "capacity", "seqlen_new", "parts", "shares"),
        *("diagonal", "window_left", "window_right"),
    ],
)
def decode_kernel(
    q_ptr,  # (batch, rows_q, heads, HEAD_DIM)
    k_ptr,  # (caches, capacity, heads_k, HEAD_DIM), or (pages, PAGE_SIZE, heads_k, HEAD_DIM)
    v_ptr,
    out_ptr,  # contiguous
    lse_ptr,  # float32, contiguous
    parts_ptr,  # float32 (batch, rows_q, heads, parts, row of combine.py); a line's (parts, rows_q, heads, row); None
    cache_seqlens_ptr,
    cache_batch_ptr,
    leftpad_ptr,
    block_table_ptr,
    strides_q,  # of (batch, row, head)
    strides_k,
    strides_v,
    pages,  # (max_pages, stride_table, num_pages)
    num_caches,
    heads_k,
    batch,
    rows_q,
    capacity,
    seqlen_new,
    parts,  # for splits.py
    shares,
    diagonal,
    window_left,
    window_right,
    variant,  # the rest of a Variant
    GROUP: tl.constexpr,  # query heads that share a key head
    PAGE_SIZE: tl.constexpr,  # None: not in pages
    FAR: tl.constexpr,  # see tiles.block_ptrs
    PAIRS: tl.constexpr,  # see tiles.table_entries
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SHORTEST: tl.constexpr,
    ENTRIES: tl.constexpr,
    ALIKE: tl.constexpr,  # k and v have the same strides
    SUMS: tl.constexpr,  # of a row's weights: see softmax.in_sums
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EARLY: tl.constexpr,  # see early.py
    AHEAD: tl.constexpr,  # keys are asked for before the kernel in front has ended
):
    heads = heads_k * GROUP
    if ALIKE:  # offsets are then computed once
        strides_v = strides_k
    layout = tiles.Layout(
        *(batch, rows_q, capacity, heads, None, None, None, cache_seqlens_ptr, leftpad_ptr, block_table_ptr),
        *(pages[0], pages[1], pages[2], PAGE_SIZE, num_caches, cache_batch_ptr, seqlen_new),
    )
    variant = scores.Variant(diagonal, window_left, window_right, *variant)
    # Heads next to each other: their keys lie side by side.
    row_tiles = tl.cdiv(rows_q * GROUP, BLOCK_M)
    program = tl.program_id(0)
    first_row = program % row_tiles * BLOCK_M
    head_k = program // row_tiles % heads_k
    slot = program // row_tiles // heads_k
    if AHEAD:
        early.let_next_start(EARLY)
        _ask_for_keys(
            splits.first_part(slot, parts, layout, variant, shares, SHORTEST, BLOCK_N, ENTRIES, True),
            *(head_k, k_ptr, v_ptr, strides_k, strides_v, layout, PAGE_SIZE, FAR, PAIRS),
            *(HEAD_DIM, HEAD_DIM_V, BLOCK_N, WIDE),
        )
    # Rows are the queries' heads: GROUP of one query, then GROUP of the next.
    rows = first_row + tl.arange(0, BLOCK_M)
    queries, heads_q = rows // GROUP, head_k * GROUP + rows % GROUP
    of = Rows(first_row, rows < rows_q * GROUP, heads_q, queries, (queries * heads + heads_q).to(tl.int64))
    # (BLOCK_M, BLOCK_D)
    q_rows = queries.to(tl.int64) * strides_q[1] + heads_q.to(tl.int64) * strides_q[2]
    q_ptrs = q_ptr + q_rows[:, None] + tl.arange(0, BLOCK_D)[None, :]
    of_part = combine.row_of_part(HEAD_DIM_V)
    early.wait(q_rows + slot, EARLY)
    if not AHEAD:
        early.let_next_start(EARLY)
    if parts is not None:
        # q before any length is known: both are on their way together.
        q_ptrs += tl.cast(slot // parts, tl.int64) * strides_q[0]
        q = tiles.load(q_ptrs, rows, rows_q * GROUP, HEAD_DIM, BLOCK_D, True)
        part = splits.equal_part(slot, parts, layout, variant, BLOCK_N)
        values, maximum, total = _attend(
            *(part, q, of, head_k, k_ptr, v_ptr, strides_k, strides_v, layout, variant, GROUP, SUMS),
            *(PAGE_SIZE, FAR, PAIRS, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, WIDE),
        )
        if parts_ptr is None:
            _write(part, values, maximum, total, of, out_ptr, lse_ptr, layout, variant, HEAD_DIM_V, BLOCK_DV)
        else:
            row = (tl.cast(part.index, tl.int64) * rows_q * heads + of.to_out) * parts + part.number
            row_ptr = parts_ptr + row * of_part
            _keep(values, maximum, total, of, row_ptr, HEAD_DIM_V, BLOCK_DV)
    else:
        on = splits.line(layout, variant, shares, SHORTEST, BLOCK_N, ENTRIES)
        first, behind, start = splits.sequences_of(slot, on)
        for index in tl.range(first, behind):
            part, start = splits.part_of(slot, index, start, on, layout, variant, BLOCK_N)
            of_sequence = tl.cast(index, tl.int64) * strides_q[0]
            q = tiles.load(q_ptrs + of_sequence, rows, rows_q * GROUP, HEAD_DIM, BLOCK_D, True)
            values, maximum, total = _attend(
                *(part, q, of, head_k, k_ptr, v_ptr, strides_k, strides_v, layout, variant, GROUP, SUMS),
                *(PAGE_SIZE, FAR, PAIRS, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, WIDE),
            )
            if part.count == 1:
                _write(part, values, maximum, total, of, out_ptr, lse_ptr, layout, variant, HEAD_DIM_V, BLOCK_DV)
            else:
                row = tl.cast(slot + index, tl.int64) * rows_q * heads + of.to_out
                row_ptr = parts_ptr + row * of_part
                _keep(values, maximum, total, of, row_ptr, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def _ask_for_keys(
    part,
    head_k,
    k_ptr,
    v_ptr,
    strides_k,
    strides_v,
    layout,
    PAGE_SIZE: tl.constexpr,
    FAR: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Brings the first block of a part into the L2 cache, by what lengths and table are now. The kernel in front may be
    about to change these, and the keys: what it writes passes through the same cache.
    """
    sequence = tiles.sequence_of(part.index, layout, True)
    k_ptr = tiles.start_of(k_ptr, sequence.key_batch, head_k, sequence.key_start, strides_k)
    v_ptr = tiles.start_of(v_ptr, sequence.key_batch, head_k, sequence.key_start, strides_v)
    k_offsets = tiles.tile_offsets(strides_k, BLOCK_N, 1, WIDE)
    v_offsets = tiles.tile_offsets(strides_v, BLOCK_N, 1, WIDE)
    pages = 0
    if PAGE_SIZE is not None:
        entries = tiles.table_entries(part.begin, layout.rows_k, sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N, True)
        pages = tiles.pages_of(entries, layout)
    k_ptrs = tiles.block_ptrs(k_ptr, pages, part.begin, strides_k, k_offsets, PAGE_SIZE, FAR, BLOCK_N)
    v_ptrs = tiles.block_ptrs(v_ptr, pages, part.begin, strides_v, v_offsets, PAGE_SIZE, FAR, BLOCK_N)
    keys = part.begin + tl.arange(0, BLOCK_N)
    # Within the cache even if its padding changes between the two times that it was read.
    exist = ((keys < part.end) & (sequence.key_start + keys < layout.rows_k))[:, None]
    # (BLOCK_N, 1)
    early.ask(k_ptrs, exist, HEAD_DIM)
    early.ask(v_ptrs, exist, HEAD_DIM_V)


@triton.jit
def _attend(
    part,
    q,  # (BLOCK_M, BLOCK_D)
    of,
    head_k,
    k_ptr,
    v_ptr,
    strides_k,
    strides_v,
    layout,
    variant,
    GROUP: tl.constexpr,
    SUMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FAR: tl.constexpr,
    PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sum of values, the maximum of scores and the sum of weights over the keys of a part."""
    sequence = tiles.sequence_of(part.index, layout)
    # (BLOCK_M, 1): the slopes of each row
    head = scores.head_of(sequence, of.heads_q[:, None], layout.heads, variant, None)
    k_ptr = tiles.start_of(k_ptr, sequence.key_batch, head_k, sequence.key_start, strides_k)
    v_ptr = tiles.start_of(v_ptr, sequence.key_batch, head_k, sequence.key_start, strides_v)

    maximum, total = softmax.start(
        scores.sink_of(sequence, of.heads_q, variant), variant.unit, variant.sink_ptr is not None, BLOCK_M
    )
    if variant.sink_ptr is not None:  # only the first part has it
        maximum = tl.where(part.number == 0, maximum, float("-inf"))
        total = tl.where(part.number == 0, total, 0.0)
    sums = softmax.in_sums(total, SUMS)
    values = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    pages = 0
    COUNT: tl.constexpr = 1 if PAGE_SIZE is None else tiles.pages_of_block(PAGE_SIZE, BLOCK_N)
    MASKED: tl.constexpr = COUNT is not None and COUNT > 2  # to look for the last key in each page takes longer
    if PAGE_SIZE is not None:  # three blocks ahead: the first keys wait for the table once, all together
        # With an entry for each key, those past the last key must be of its page. Else all up to the capacity are read,
        # which is known before lengths are.
        end = part.end if COUNT is None else layout.rows_k
        pages = tiles.table_entries(part.begin, end, sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
        second = tiles.table_entries(part.begin + part.step, end, sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
        third = tiles.table_entries(part.begin + 2 * part.step, end, sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
        pages, second = tiles.pages_of(pages, layout), tiles.clamp_each(second, 0, None)
    for start in tl.range(part.begin, part.end, part.step):
        columns = start + tl.arange(0, BLOCK_N)
        if PAGE_SIZE is not None and SUMS > 1:  # here: below, ptxas would put it behind the copies of keys
            fourth = tiles.table_entries(start + 3 * part.step, end, sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
        last = None if MASKED else part.end - 1 - start
        k_offsets = tiles.tile_offsets(strides_k, BLOCK_N, BLOCK_D, WIDE, last)
        v_offsets = tiles.tile_offsets(strides_v, BLOCK_N, BLOCK_DV, WIDE, last)
        k_ptrs = tiles.block_ptrs(k_ptr, pages, start, strides_k, k_offsets, PAGE_SIZE, FAR, BLOCK_N, last)
        v_ptrs = tiles.block_ptrs(v_ptr, pages, start, strides_v, v_offsets, PAGE_SIZE, FAR, BLOCK_N, last)
        if PAGE_SIZE is not None:
            # Clamped on the way, one side in each turn: Triton starts no load early whose address was only passed on.
            pages = tiles.clamp_each(second, None, layout.num_pages - 1)
            second = tiles.clamp_each(third, 0, None)
            if SUMS > 1:
                third = fourth
            else:
                third = tiles.table_entries(start + 3 * part.step, end, sequence, layout, PAGE_SIZE, PAIRS, BLOCK_N)
        # (BLOCK_N, BLOCK_D)
        k = tiles.load(k_ptrs, columns, part.end, HEAD_DIM, BLOCK_D, MASKED)
        # (BLOCK_M, BLOCK_N)
        if BLOCK_D > 128 and q.dtype == tl.float32 and PRECISION == "ieee":
            # Such a product is one chain of roundings, and so long a one errs several times as much as two.
            q_halves, k_halves = tiles.halves(q), tiles.halves(k)
            products = tl.dot(q_halves[0], k_halves[0].T, input_precision=PRECISION)
            products = tiles.matmul_add(products, q_halves[1], k_halves[1].T, PRECISION)
        else:
            products = tl.dot(q, k.T, input_precision=PRECISION)
        s = scores.scale_and_cap(products, variant, q.dtype == tl.float32)
        s = scores.scores(s, of.first, start, sequence, head, variant, None, True, BLOCK_M, BLOCK_N, WIDE, GROUP=GROUP)
        weights, factor, maximum = softmax.update(s, variant.unit, maximum, True)
        sums = softmax.add(sums, factor, weights, SUMS)
        # (BLOCK_N, BLOCK_DV)
        v = tiles.load(v_ptrs, columns, part.end, HEAD_DIM_V, BLOCK_DV, MASKED)
        values = tiles.matmul_add(values * factor[:, None], weights.to(v.dtype), v, PRECISION)

    return values, maximum, softmax.total_of(sums, SUMS)


@triton.jit
def _write(
    part,
    values,
    maximum,
    total,
    of,
    out_ptr,
    lse_ptr,
    layout,
    variant,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A sequence of one part."""
    factor, lse = softmax.finish(maximum, total, variant.unit)
    first = tl.cast(part.index, tl.int64) * layout.rows_q * layout.heads
    dims = tl.arange(0, BLOCK_DV)
    out_ptrs = out_ptr + (first + of.to_out)[:, None] * HEAD_DIM_V + dims[None, :]
    mask = of.exist[:, None] & (dims < HEAD_DIM_V)[None, :]
    tl.store(out_ptrs, (values * factor[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + first + of.heads_q * layout.rows_q + of.queries, lse, mask=of.exist)


@triton.jit
def _keep(values, maximum, total, of, row_ptr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr):
    """A part as it is, for combine.py: a log-sum-exp would be rounded."""
    maximum = tl.where(total == total, maximum, float("nan"))  # which the maximum of NaN scores is not
    dims = tl.arange(0, BLOCK_DV)
    tl.store(row_ptr[:, None] + dims[None, :], values, mask=of.exist[:, None] & (dims < HEAD_DIM_V)[None, :])
    tl.store(row_ptr + combine.maximum_of_part(HEAD_DIM_V), maximum, mask=of.exist)
    tl.store(row_ptr + combine.sum_of_part(HEAD_DIM_V), total, mask=of.exist)


def _sums(arch: str, block_m: int, tile: plan.DecodePlan, page_size: int | None, line: bool) -> int:
    """Sums that a program keeps of each row's weights. Its warps compute so many columns of a product side by side (of
    16 bits, from Ampere on): with a sum for each, a thread only adds up its own. Beside more than 32 rows these do not
    fit. One sum was faster for blocks that lie in one page, and on lines of many small pages; and there is one where
    nothing was measured: on other devices, and in pages that blocks are no multiples of.
    """
    if page_size is not None:
        count = tiles.pages_of_block(page_size, tile.BLOCK_N)
        if count is None or count == 1 or (line and count > 2):
            return 1
    if not arch.startswith("sm_") or block_m > 32:
        return 1
    return min(8 * tile.num_warps, tile.BLOCK_N)


def prepare(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, variant: Variant, num_splits: int) -> Callable:
    """What computes ``decode`` for arguments of this signature."""
    if q.shape[1] <= plan.SHORT:
        return Decode(q, k_cache, v_cache, cache, variant, num_splits)
    run = Forward(q, k_cache, v_cache, variant, None, cache)
    return lambda q, k_cache, v_cache, cache, variant, num_splits: run(q, k_cache, v_cache, variant, None, cache)


class Decode(Prepared):
    """The operator ``decode``, of arguments of one signature, where queries are few."""

    def __init__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, variant: Variant, num_splits: int
    ) -> None:
        super().__init__(q.device)
        batch, rows_q, heads, head_dim = q.shape
        heads_k, head_dim_v = k_cache.shape[2], v_cache.shape[3]
        group = heads // heads_k
        out = arguments.Result((batch, rows_q, heads, head_dim_v), q.dtype, q.device)
        lse = arguments.Result((batch, heads, rows_q), torch.float32, q.device)
        self.results = out, lse
        self.empty = 0 in (batch, rows_q)
        if self.empty:
            return
        self.copies = not all(map(has_contiguous_rows, (q, k_cache, v_cache)))
        self.gathers = not arguments.all_contiguous(*cache[:1], *cache[2:])
        strides = tuple(arguments.strides(x) for x in (q, k_cache, v_cache))
        capacity, pages, page_size = arguments.room(k_cache, cache)
        self.paged = page_size is not None and capacity > 0

        arch = device.architecture(q.device)
        row = plan.decode(arch, q.element_size(), max(head_dim, head_dim_v))
        if any(dim * q.element_size() % 16 for dim in (head_dim, head_dim_v)):
            # Not copied straight into shared memory: it takes registers.
            row = plan.DecodeRow(*(tile._replace(BLOCK_N=min(tile.BLOCK_N, 32)) for tile in row))
        block_m = min(
            max(16, triton.next_power_of_2(rows_q * group)),
            plan.most_rows_of_decode(q.element_size(), max(head_dim, head_dim_v)),
        )
        block_d, block_dv = plan.block_dims(head_dim, head_dim_v)
        programs = -(-rows_q * group // block_m) * heads_k  # that share a slot
        of_call = self._variant(q, variant)
        seen = splits.most_seen(capacity, rows_q, *of_call[:3], row.split.BLOCK_N)
        full = cache.cache_seqlens is None and cache.cache_leftpad is None
        room = row.split.programs * device.processors(q.device)
        # Windows that are short beside the cache are about as long in all sequences.
        self.cut = cut = plan.splits(row, room, programs, batch, seen, num_splits, full or 4 * seen <= capacity)
        chosen = row.tiles(cut)
        slots = cut.shares if cut.parts is None else batch * cut.parts
        entries = max(16, triton.next_power_of_2(batch)) if cut.parts is None else 16  # lengths that splits.py reads

        ahead = (
            early.allowed(q.device)
            and cut.parts != 1  # programs whose turn comes late would only begin later
            and plan.is_alone(chosen, (block_d + block_dv) * q.element_size())
            and arguments.all_aligned(k_cache, v_cache)
        )
        parts = None
        if cut.parts != 1:
            # Rows of a part, in an order in which combining, or the line's loop, computes least. A line's parts are
            # numbered through.
            of_row = combine.row_of_part(head_dim_v)
            if cut.parts is None:
                shape = (splits.most_parts(batch, cut.shares), rows_q, heads, of_row)
                strides_of_parts = (rows_q * heads, 0, heads, 1)
            else:
                shape = (batch, rows_q, heads, cut.parts, of_row)
                strides_of_parts = (1, rows_q * heads * cut.parts, heads * cut.parts, cut.parts)
            parts = arguments.Result(shape, torch.float32, q.device)
            self.rest_of_combine = (
                *(strides_of_parts, None),
                *(batch, rows_q, heads, cut.parts, (capacity, cache.seqlen_new, cut.shares), of_call[:3]),
            )
            most = cut.parts or min(cut.shares, -(-seen // chosen.BLOCK_N))  # of a sequence
            self.combine = combine.launch(
                q.device,
                batch * rows_q,
                heads,
                head_dim_v,
                most,
                UNIT=None if arguments.launched(q, variant).unit is None else 1.0,
                SHORTEST=chosen.shortest,
                BLOCK_N=chosen.BLOCK_N,
                ENTRIES=entries,
                FIRST=ahead,
            )

        self.results = out, lse, parts

        self.head = (*strides, pages if self.paged else (None, None, None), k_cache.shape[0], heads_k, batch, rows_q)
        self.head += (capacity, cache.seqlen_new, *cut)
        without_tensors = not any(isinstance(x, Tensor) for x in variant)
        self.rest = (*self.head, *of_call) if without_tensors else None
        self.only_launches = not (self.copies or self.gathers)
        paging = arguments.paging(k_cache, v_cache, cache.block_table if self.paged else None, chosen.BLOCK_N)
        self.launch = Launch(
            decode_kernel,
            slots * programs,
            constants={
                "GROUP": group,
                **paging,
                "HEAD_DIM": head_dim,
                "HEAD_DIM_V": head_dim_v,
                "BLOCK_M": block_m,
                "BLOCK_N": chosen.BLOCK_N,
                "BLOCK_D": block_d,
                "BLOCK_DV": block_dv,
                "SHORTEST": chosen.shortest,
                "ENTRIES": entries,
                "ALIKE": strides[1] == strides[2],
                "SUMS": _sums(arch, block_m, chosen, paging["PAGE_SIZE"], cut.parts is None),
                "PRECISION": arguments.precision(q),
                "WIDE": arguments.is_wide(variant, 0, *strides),
                "EARLY": early.allowed(q.device),
                "AHEAD": ahead,
            },
            options={"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, **early.options(q.device)},
        )

    @staticmethod
    def _variant(q: Tensor, variant: Variant) -> tuple:
        of_call = arguments.launched(q, variant)
        return *of_call[:3], tuple(of_call[3:])

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, variant: Variant, num_splits: int
    ) -> tuple[Tensor, Tensor]:
        if self.current_index() != self.index:
            return self.elsewhere(q, k_cache, v_cache, cache, variant, num_splits)
        if self.empty:
            return tuple(arguments.empty(*self.results))
        out, lse, parts = arguments.empty(*self.results)
        if self.copies:
            q, k_cache, v_cache = map(contiguous_rows, (q, k_cache, v_cache))
        if self.gathers:
            cache = Cache(*(arguments.contiguous(x) if isinstance(x, Tensor) else x for x in cache))
        rest = self.rest or (*self.head, *self._variant(q, variant))
        for launch, tensors, others in self.launches(q, k_cache, v_cache, cache, out, lse, parts, rest):
            launch(tensors, others)
        return out, lse

    def launches(
        self, q, k_cache, v_cache, cache: Cache, out, lse, parts, rest: tuple | None
    ) -> list[tuple[Launch, tuple, tuple | None]]:
        """Each with its tensors, or what stands for them, and its other arguments."""
        seqlens, _, batch_idx, leftpad, table = cache
        if not self.paged:
            table = None
        launches = [(self.launch, (q, k_cache, v_cache, out, lse, parts, seqlens, batch_idx, leftpad, table), rest)]
        if parts is not None:
            launches.append((self.combine, (out, lse, parts, None, seqlens, leftpad), self.rest_of_combine))
        return launches

    def relaunch(self, append: Append | None, at: Step, seqlen_new: int, count: int) -> Relaunch | None:
        """A whole step, ``append`` in front of this. ``at``: its arguments, with numbers below ``count`` for its
        tensors. None where a call does more than launch kernels.
        """
        if not all(getattr(run, "only_launches", False) for run in (self, append) if run is not None):
            return None
        launches = []
        if append is not None:
            new = New(at.cache_seqlens, at.cache_batch_idx, at.block_table)
            launches += append.launches(at.k_cache, at.v_cache, at.k, at.v, new)
        cache = Cache(at.cache_seqlens, seqlen_new, at.cache_batch_idx, at.cache_leftpad, at.block_table)
        results = [None if x is None else count + i for i, x in enumerate(self.results)]
        launches += self.launches(at.q, at.k_cache, at.v_cache, cache, *results, self.rest)
        try:
            return Relaunch(self, self.results, launches)
        except NotImplementedError:
            return None
