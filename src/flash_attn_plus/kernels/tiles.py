"""Where a sequence, a row, a page lies in memory: the only code that multiplies by strides.

A dense batch is a packed one whose offsets are computed: ``query_tile`` says which rows of which sequence a program
owns, whatever the layout, and everything behind it is the same.

Offsets are 64-bit wherever the number of a batch, a head or a first row is multiplied by a stride. Inside one tile they
stay 32-bit, which takes half the registers, unless the launcher found strides so large that a tile spans 2**31 elements
(WIDE). A tile whose keys lie in several pages spans all pages of the pool (FAR).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Layout(NamedTuple):
    """How the sequences of a batch (at least one) lie. Dense where ``cu_seqlens_q_ptr`` is None.

    ``rows_q`` and ``rows_k`` are seqlen_q and seqlen_k of a dense batch, and the total rows of a packed one. The keys
    are in pages where ``block_table_ptr`` is not None. The first three vary from call to call.
    """

    batch: tl.tensor
    rows_q: tl.tensor
    rows_k: tl.tensor
    heads: tl.tensor
    cu_seqlens_q_ptr: tl.tensor | None = None
    cu_seqlens_k_ptr: tl.tensor | None = None
    seqused_q_ptr: tl.tensor | None = None
    seqused_k_ptr: tl.tensor | None = None
    leftpad_k_ptr: tl.tensor | None = None
    block_table_ptr: tl.tensor | None = None  # (batch, max_pages)
    max_pages: tl.tensor | None = None
    stride_table: tl.tensor | None = None
    num_pages: tl.tensor | None = None
    page_size: tl.tensor | None = None
    # Of a batch of equally many queries and the caches of their keys, which are used from leftpad_k_ptr to
    # seqused_k_ptr + seqlen_new.
    num_caches: tl.tensor | None = None
    cache_batch_ptr: tl.tensor | None = None  # (batch,); None: each its own
    seqlen_new: tl.tensor | None = None


class Sequence(NamedTuple):
    """One sequence of a batch."""

    index: tl.tensor  # its number
    batch: tl.tensor  # its number on the batch axis of q, k, v and out: 0 where they are packed
    query_start: tl.tensor  # its first row of q
    query_rows: tl.tensor  # rows of q and out that it owns
    seqlen_q: tl.tensor  # those that are queries; the rest gets out 0, lse -inf
    key_start: tl.tensor  # its first row of k and v
    seqlen_k: tl.tensor
    key_batch: tl.tensor | None = None  # its number on the batch axis of k and v


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _first_tile(start, segment, BLOCK_M: tl.constexpr):
    """The first tile of the segment (numbered from 0) that starts at row ``start`` of a packed batch.

    As floor(a + b) >= floor(a) + floor(b), this leaves every segment at least the ceil(rows / BLOCK_M) tiles that it
    needs and at most one more: the grid needs no prefix sum over the sequences and no length on the host.
    """
    return start // BLOCK_M + segment


def packed_tiles(rows: int, batch: int, block: int) -> int:
    """Tiles of a packed batch, whatever its lengths: what ``_first_tile`` gives behind the last segment."""
    return rows // block + batch + 2


@triton.jit
def _segment_of(tile, starts_ptr, batch, total, BLOCK: tl.constexpr, ENTRIES: tl.constexpr = 128):
    """The segment that owns ``tile``: as many as begin at or before it, beside segment 0.

    Segment 0 are the rows before the first sequence, segment b + 1 is sequence b, and the last one the rows behind the
    last sequence: rows of no sequence are written too.
    """
    segment = 0
    for base in range(0, batch + 1, ENTRIES):
        entries = base + tl.arange(0, ENTRIES)
        exist = entries <= batch
        starts = clamp(tl.load(starts_ptr + entries, mask=exist, other=0), 0, total)
        segment += tl.sum((exist & (_first_tile(starts, entries + 1, BLOCK) <= tile)).to(tl.int32), 0)
    return segment


@triton.jit
def _segment_start(segment, starts_ptr, batch, total):
    """Its first row: inside the tensor, whatever the offsets hold."""
    entry = clamp(segment - 1, 0, batch)
    start = clamp(tl.load(starts_ptr + entry), 0, total)
    start = tl.where(segment == 0, 0, start)
    return tl.where(segment > batch + 1, total, start)


@triton.jit
def packed_tile(tile, starts_ptr, batch, total, BLOCK: tl.constexpr):
    """(number of its sequence, whether that exists, first row and rows of its segment, first row of the tile in it)."""
    segment = _segment_of(tile, starts_ptr, batch, total, BLOCK)
    start = _segment_start(segment, starts_ptr, batch, total)
    rows = tl.maximum(_segment_start(segment + 1, starts_ptr, batch, total) - start, 0)
    first_row = (tile - _first_tile(start, segment, BLOCK)) * BLOCK
    first_row = tl.where(first_row < 0, rows, first_row)  # offsets that fall: the segment is not the tile's
    exists = (segment >= 1) & (segment <= batch)
    return tl.where(exists, segment - 1, 0), exists, start, rows, first_row


@triton.jit
def _used_queries(index, rows, layout):
    """Those of a sequence's rows that are queries."""
    if layout.seqused_q_ptr is not None:
        return clamp(tl.load(layout.seqused_q_ptr + index), 0, rows)
    else:
        return rows


@triton.jit
def _queries_of(index, layout):
    """First row and rows of a sequence, and the number of its queries."""
    start = _segment_start(index + 1, layout.cu_seqlens_q_ptr, layout.batch, layout.rows_q)
    end = _segment_start(index + 2, layout.cu_seqlens_q_ptr, layout.batch, layout.rows_q)
    rows = tl.maximum(end - start, 0)
    return start, rows, _used_queries(index, rows, layout)


@triton.jit
def _keys_of(index, layout):
    """First row and number of a sequence's keys: inside the tensor, whatever the offsets hold."""
    start = tl.load(layout.cu_seqlens_k_ptr + index)
    length = tl.load(layout.cu_seqlens_k_ptr + index + 1) - start
    if layout.block_table_ptr is not None:
        # Pages have no segments: what is used of them may be more.
        start *= 0
        room = tl.minimum(tl.cast(layout.max_pages, tl.int64) * layout.page_size, 2**30).to(tl.int32)
        if layout.seqused_k_ptr is not None:
            length = tl.load(layout.seqused_k_ptr + index)
    else:
        start = clamp(start, 0, layout.rows_k)
        room = layout.rows_k - start
        if layout.seqused_k_ptr is not None:
            length = tl.minimum(tl.load(layout.seqused_k_ptr + index), length)
    length = clamp(length, 0, room)
    if layout.leftpad_k_ptr is not None:
        pad = clamp(tl.load(layout.leftpad_k_ptr + index), 0, length)
        start += pad
        length -= pad
    return start, length


@triton.jit
def query_tile(program, layout, BLOCK_M: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(sequence, head, first row) of a program of a one-dimensional grid. A first row past query_rows owns nothing.

    Programs that run together share a head's keys and values, which then come from the cache. LAST_FIRST starts with
    the last rows: under a causal mask they have the most keys, and the short tiles fill the end of the launch.
    """
    if layout.cu_seqlens_q_ptr is None:
        tiles = tl.cdiv(layout.rows_q, BLOCK_M)
    else:
        tiles = _first_tile(layout.rows_q, layout.batch + 2, BLOCK_M)  # of all segments
    tile = program % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    if layout.cu_seqlens_q_ptr is None:
        head = (program // tiles) % layout.heads
        sequence = sequence_of(program // tiles // layout.heads, layout)
        first_row = tile * BLOCK_M
    else:
        head = program // tiles
        index, exists, start, rows, first_row = packed_tile(
            tile, layout.cu_seqlens_q_ptr, layout.batch, layout.rows_q, BLOCK_M
        )
        seqlen_q = _used_queries(index, tl.where(exists, rows, 0), layout)
        key_start, seqlen_k = _keys_of(index, layout)
        sequence = Sequence(index, index * 0, start, rows, seqlen_q, key_start, seqlen_k, index * 0)
    return sequence, head, first_row


@triton.jit
def cached_keys(index, layout, exist=True, CHANGING: tl.constexpr = False):
    """First row and number of the keys that sequences have in their caches: inside of these, whatever the lists hold.

    ``index`` is one number, or a block of them of which those exist that ``exist`` says. CHANGING, here and below: what
    is read may be about to change, and must not stay in the processor's own cache.
    """
    end = layout.rows_k + index * 0
    if layout.seqused_k_ptr is not None:
        end = tl.load(layout.seqused_k_ptr + index, mask=exist, other=0, cache_modifier=".cg" if CHANGING else "")
        # Not added to what is near the end of 32 bits.
        end = tl.minimum(tl.maximum(end, 0), layout.rows_k - layout.seqlen_new) + layout.seqlen_new
    start = index * 0
    if layout.leftpad_k_ptr is not None:
        start = tl.load(layout.leftpad_k_ptr + index, mask=exist, other=0, cache_modifier=".cg" if CHANGING else "")
        start = tl.minimum(tl.maximum(start, 0), end)
    return start, end - start


@triton.jit
def sequence_of(index, layout, CHANGING: tl.constexpr = False):
    """A sequence of a batch whose keys are not in pages, unless these are its cache."""
    if layout.cu_seqlens_q_ptr is not None:
        query_start, query_rows, seqlen_q = _queries_of(index, layout)
        key_start, seqlen_k = _keys_of(index, layout)
        return Sequence(index, index * 0, query_start, query_rows, seqlen_q, key_start, seqlen_k, index * 0)
    elif layout.num_caches is None:
        return Sequence(index, index, 0, layout.rows_q, layout.rows_q, 0, layout.rows_k, index)
    else:
        key_start, seqlen_k = cached_keys(index, layout, True, CHANGING)
        if layout.block_table_ptr is not None:
            key_batch = index * 0
        elif layout.cache_batch_ptr is not None:
            key_batch = tl.load(layout.cache_batch_ptr + index, cache_modifier=".cg" if CHANGING else "")
            key_batch = clamp(key_batch, 0, layout.num_caches - 1)
        else:
            key_batch = index
        return Sequence(index, index, 0, layout.rows_q, layout.rows_q, key_start, seqlen_k, key_batch)


@triton.jit
def key_tile(program, layout, heads_k, BLOCK_N: tl.constexpr):
    """(sequence, key head, first key, end of the keys that the program owns): ``query_tile`` of k and v, not in pages.

    Keys are counted from the sequence's first one. Rows of k that belong to no sequence are owned too; what lies before
    leftpad_k or behind seqused_k is owned by nobody.
    """
    if layout.cu_seqlens_k_ptr is None:
        tiles = tl.cdiv(layout.rows_k, BLOCK_N)
        head = (program // tiles) % heads_k
        sequence = sequence_of(program // tiles // heads_k, layout)
        return sequence, head, (program % tiles) * BLOCK_N, layout.rows_k
    else:
        tiles = _first_tile(layout.rows_k, layout.batch + 2, BLOCK_N)
        index, exists, start, rows, first_key = packed_tile(
            program % tiles, layout.cu_seqlens_k_ptr, layout.batch, layout.rows_k, BLOCK_N
        )
        found = sequence_of(index, layout)
        seqlen_k = tl.where(exists, found.seqlen_k, 0)
        key_start = tl.where(exists, found.key_start, start)
        sequence = Sequence(
            index, index * 0, found.query_start, found.query_rows, found.seqlen_q, key_start, seqlen_k, index * 0
        )
        return sequence, program // tiles, first_key, tl.where(exists, seqlen_k, rows)


@triton.jit
def head_start(ptr, batch, head, strides):
    """Pointer to row 0 of a head. ``strides`` are those of (batch, row, head); batch is 0 where rows are in pages."""
    return ptr + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[2]


@triton.jit
def row_start(ptr, row, strides):
    return ptr + tl.cast(row, tl.int64) * strides[1]


@triton.jit
def start_of(ptr, batch, head, row, strides):
    """Pointer to a row of a head."""
    return row_start(head_start(ptr, batch, head, strides), row, strides)


@triton.jit
def tile_offsets(strides, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, last=None):
    """(ROWS, BLOCK_D), from the first row of a tile on. Rows past ``last`` repeat it, and need no mask: of tiles that
    are copied into shared memory, a mask takes more instructions than the copy.
    """
    rows = tl.arange(0, ROWS)
    if last is not None:
        rows = tl.minimum(rows, last)
    if WIDE:
        rows = rows.to(tl.int64)
    return rows[:, None] * strides[1] + tl.arange(0, BLOCK_D)[None, :]


@triton.constexpr_function
def pages_of_block(page_size: int, block: int) -> int | None:
    """Of a block of keys: it lies in one page, or has a few. None: it has many, or begins anywhere in a page."""
    if page_size % block == 0:
        return 1
    return block // page_size if block % page_size == 0 and block // page_size <= 8 else None


@triton.jit
def table_entries(
    start,
    end,
    sequence,
    layout,
    PAGE_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHANGING: tl.constexpr = False,
):
    """What the table holds for a block of keys: a tuple of the entries of its pages where ``pages_of_block`` tells how
    many, else of one tensor, with that of each key. Behind ``end``: one of the table's row, or 0 where there is no key,
    and may be no table; with an entry for each key, that of the last key. PAIRS: there are several, and
    rows of the table are pairs of entries at multiples of their size, which are read so.

    To be read at least one turn of a loop before ``pages_of`` is used in it: Triton starts no load early whose address
    waits for another load of its turn.
    """
    COUNT: tl.constexpr = pages_of_block(PAGE_SIZE, BLOCK_N)
    table_ptr = layout.block_table_ptr + tl.cast(sequence.index, tl.int64) * layout.stride_table
    last = tl.minimum((tl.maximum(end, 1) - 1) // PAGE_SIZE, layout.max_pages - 1)
    keys = start
    if COUNT is None:
        keys += tl.arange(0, BLOCK_N)
    first, exist = keys // PAGE_SIZE, end > 0
    entries = ()
    if PAIRS:
        pairs_ptr = table_ptr.to(tl.pointer_type(tl.int64))
        for i in tl.static_range(0, COUNT, 2):
            pair = _entry(pairs_ptr, (first + i) // 2, last // 2, exist, CHANGING)
            entries += (pair.to(tl.int32), (pair >> 32).to(tl.int32))
    else:
        for i in tl.static_range(1 if COUNT is None else COUNT):
            entries += (_entry(table_ptr, first + i, last, exist, CHANGING),)
    return entries


@triton.jit
def _entry(table_ptr, number, last, exist, CHANGING: tl.constexpr):
    return tl.load(table_ptr + tl.minimum(number, last), mask=exist, other=0, cache_modifier=".cg" if CHANGING else "")


@triton.jit
def clamp_each(entries, least, most):
    """Of a tuple. None: no bound on that side."""
    clamped = ()
    for i in tl.static_range(len(entries)):
        entry = entries[i]
        if least is not None:
            entry = tl.maximum(entry, least)
        if most is not None:
            entry = tl.minimum(entry, most)
        clamped += (entry,)
    return clamped


@triton.jit
def pages_of(entries, layout):
    """Pages: for a number outside of the pool, one inside."""
    return clamp_each(entries, 0, layout.num_pages - 1)


@triton.jit
def block_ptrs(
    ptr,
    pages,
    start,
    strides,
    offsets,
    PAGE_SIZE: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    last=None,
):
    """Pointers (BLOCK_N, columns) to a block of a sequence's keys, whose first row is at ``ptr``, or which lies in
    pages (PAGE_SIZE is not None). ``offsets`` and ``last`` are those of ``tile_offsets``.

    FAR: rows lie 2**31 elements or more behind the first page's.
    """
    if PAGE_SIZE is None:
        return row_start(ptr, start, strides) + offsets
    else:
        return _paged_ptrs(ptr, pages, start, strides, offsets, PAGE_SIZE, FAR, BLOCK_N, last)


@triton.jit
def _paged_ptrs(
    ptr, pages, start, strides, offsets, PAGE_SIZE: tl.constexpr, FAR: tl.constexpr, BLOCK_N: tl.constexpr, last
):
    COUNT: tl.constexpr = pages_of_block(PAGE_SIZE, BLOCK_N)
    if COUNT == 1:
        row = tl.cast(start % PAGE_SIZE, tl.int64)
        return ptr + (tl.cast(pages[0], tl.int64) * strides[0] + row * strides[1]) + offsets
    else:
        rows = tl.arange(0, BLOCK_N)
        of_rows = tl.zeros([BLOCK_N], tl.int64 if FAR else tl.int32) + _page_start(pages[0], strides, FAR)
        if COUNT is None:
            if last is not None:
                rows = tl.minimum(rows, last)
            rows = (start + rows) % PAGE_SIZE
        else:
            page_of_row, rows = rows // PAGE_SIZE, rows % PAGE_SIZE
            if last is not None:
                ends = rows * 0 + last
            for i in tl.static_range(1, COUNT):
                page = pages[i]
                if last is not None:  # a page that has no keys: the first one in its place
                    has_keys = last >= i * PAGE_SIZE
                    page = tl.where(has_keys, page, pages[0])
                    ends = tl.where(page_of_row == i, tl.where(has_keys, last - i * PAGE_SIZE, last), ends)
                # Which page a thread's rows lie in, the compiler knows.
                of_rows = tl.where(page_of_row == i, _page_start(page, strides, FAR), of_rows)
            if last is not None:
                rows = tl.minimum(rows, ends)
        of_rows += rows.to(of_rows.dtype) * tl.cast(strides[1], of_rows.dtype)
        return ptr + (of_rows[:, None] + tl.arange(0, offsets.shape[1])[None, :])


@triton.jit
def _page_start(page, strides, FAR: tl.constexpr):
    OFFSET: tl.constexpr = tl.int64 if FAR else tl.int32  # of 32 bits, addresses are half as many instructions
    return tl.cast(page, OFFSET) * tl.cast(strides[0], OFFSET)


@triton.jit
def matmul_add(total, a, b, PRECISION: tl.constexpr):
    """total + a @ b. Exact float32 products are summed by themselves: one chain of roundings through all blocks of a
    long sequence errs twice as much. Not written as a sum, which Triton would fold back into the accumulator.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return tl.fma(total, tl.full(total.shape, 1.0, tl.float32), tl.dot(a, b, input_precision=PRECISION))
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def halves(x):
    """(rows, columns) -> the first and the last half of the columns."""
    rows: tl.constexpr = x.shape[0]
    half: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [rows, 2, half]), (0, 2, 1)))


@triton.jit
def _inside(rows, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    if DIM == BLOCK_D:
        return (rows < end)[:, None]
    elif MASK_ROWS:
        return (rows < end)[:, None] & (dims < DIM)[None, :]
    else:
        return (dims < DIM)[None, :]


@triton.jit
def load(ptrs, rows, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A tile (rows, BLOCK_D): 0 past the head dimension and, where MASK_ROWS, from row ``end`` on."""
    if MASK_ROWS or DIM != BLOCK_D:
        return tl.load(ptrs, mask=_inside(rows, end, DIM, BLOCK_D, MASK_ROWS), other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store(ptrs, value, rows, end, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    tl.store(ptrs, value, mask=_inside(rows, end, DIM, BLOCK_D, True))
