"""What the arguments of an operator are to a kernel: named tuples of numbers and pointers, strides, a plan."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from .. import device, plan
from ..schemas import Cache, Variant, Varlen, band
from ..strides import has_contiguous_rows, strides_of
from . import scores, tiles

_is_deterministic = getattr(torch._C, "_get_deterministic_algorithms", torch.are_deterministic_algorithms_enabled)

# Farther than any row is from any column, and small enough that three of them add up in 32 bits.
_FARTHEST = 1 << 29


class Result:
    """A contiguous tensor that a kernel fills, on the current device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, on: torch.device) -> None:
        shape = tuple(shape)  # not a torch.Size, which the quick function does not take
        strides = torch.empty(shape, dtype=dtype, device="meta").stride()
        self.slowly = functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=on)
        quick = device.quick_empty(on)
        self.quickly = functools.partial(quick, shape, strides, dtype) if quick else self.slowly


def empty(*results: Result | None) -> list[Tensor | None]:
    # PyTorch's own function fills with NaN where it is told to.
    if _is_deterministic():
        return [None if result is None else result.slowly() for result in results]
    return [None if result is None else result.quickly() for result in results]


class Common:
    """What all kernels of a call take, from ``group`` to ``bias``. Made anew in every call where tensors are in it."""

    def __init__(
        self, q: Tensor, k: Tensor, variant: Variant, varlen: Varlen | None, cache: Cache | None = None
    ) -> None:
        self.group = q.shape[-2] // k.shape[-2]
        # Rows and columns of a bias that is full.
        self.longest = (q.shape[1], k.shape[1]) if varlen is None else (varlen.max_seqlen_q, varlen.max_seqlen_k)
        self.layout = self._layout(q, k, None, None) if varlen is None and cache is None else None
        self.options = None if any(isinstance(x, Tensor) for x in variant) else self._options(q, variant)
        # All of it, where no tensor is in it.
        self.fixed = (self.group, *self.layout, *self.options) if self.layout and self.options else None

    def __call__(
        self, q: Tensor, k: Tensor, variant: Variant, varlen: Varlen | None, cache: Cache | None = None
    ) -> tuple:
        layout = self.layout or self._layout(q, k, varlen, cache)
        return self.group, *layout, *(self.options or self._options(q, variant))

    def after(self, strides: tuple) -> tuple | None:
        """Everything behind a kernel's tensors, where it is the same in every call: then in one and the same tuple."""
        return None if self.fixed is None else (*strides, *self.fixed)

    def _layout(self, q: Tensor, k: Tensor, varlen: Varlen | None, cache: Cache | None) -> tuple:
        of_batch = _layout(q, k, varlen) if cache is None else _cached_layout(q, k, cache)
        return *of_batch[:3], tuple(of_batch[3:])

    def _options(self, q: Tensor, variant: Variant) -> tuple:
        of_call, bias = launched(q, variant), variant.attn_bias
        if bias is not None:
            bias = scores.Bias(bias, *strides_of(bias, (0, 1, 2, 3)), *self.longest)
        return *of_call[:3], tuple(of_call[3:]), bias


def _layout(q: Tensor, k: Tensor, varlen: Varlen | None) -> tiles.Layout:
    if varlen is None:
        return tiles.Layout(q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    table = varlen.block_table
    lists = (varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.seqused_q, varlen.seqused_k, varlen.leftpad_k, table)
    pages = ()
    if table is not None:  # no pages: no table, whatever it holds
        pages = (table.shape[1] if k.shape[0] else 0, table.shape[1], k.shape[0], k.shape[1])
    batch = varlen.cu_seqlens_q.shape[0] - 1
    return tiles.Layout(batch, q.shape[0], k.shape[0], q.shape[1], *map(contiguous, lists), *pages)


def room(k_cache: Tensor, cache: Cache) -> tuple[int, tuple[int | None, int | None, int | None], int | None]:
    """The keys that a cache has room for, (max_pages, elements of a row of the table, num_pages), and the page size."""
    count, rows, table = k_cache.shape[0], k_cache.shape[1], cache.block_table
    if table is None:
        return rows if count else 0, (None, None, None), None
    max_pages = table.shape[1] if count else 0  # no pages: no table, whatever it holds
    return max_pages * rows, (max_pages, table.shape[1], count), rows


def _cached_layout(q: Tensor, k_cache: Tensor, cache: Cache) -> tiles.Layout:
    capacity, pages, page_size = room(k_cache, cache)
    seqlens, seqlen_new, *others = cache
    seqlens, batch_idx, leftpad, table = map(contiguous, (seqlens, *others))
    return tiles.Layout(
        *(q.shape[0], q.shape[1], capacity, q.shape[2], None, None, None, seqlens, leftpad, table),
        *(*pages, page_size, k_cache.shape[0], batch_idx, seqlen_new),
    )


def launched(q: Tensor, variant: Variant) -> scores.Variant:
    """The options of a call as kernels take them."""
    scale = q.shape[-1] ** -0.5 if variant.softmax_scale is None else variant.softmax_scale
    unit = math.log2(math.e) * scale
    # A scale that is not positive turns a maximum over; one that vanishes in float32 makes NaN of -inf.
    explicit = _bends(variant) or not ctypes.c_float(unit).value > 0.0
    left, right, _ = band(variant, 0, 0)
    diagonal = 0 if variant.diagonal is None else variant.diagonal
    near = _distance(diagonal)
    slopes, sink, dropout_p = variant.alibi_slopes, variant.sink, variant.dropout_p
    dropout = {}
    if dropout_p > 0.0:
        threshold = int(dropout_p * 2**32)
        dropout = dict(
            rng_state_ptr=variant.rng_state.contiguous(),
            # The same 32 bits as a signed number: its type does not depend on its value.
            dropout_threshold=threshold - ((threshold >> 31) << 32),
            dropout_scale=1.0 / (1.0 - dropout_p),
        )
    return scores.Variant(
        scale=scale if explicit else None,
        unit=None if explicit else unit,
        diagonal=None if variant.diagonal is None else near,
        # Where the window ends is what counts: clamped together with the diagonal, and told as a distance from it.
        window_left=near - _distance(diagonal - left) if left >= 0 else None,
        window_right=_distance(diagonal + right) - near if right >= 0 else None,
        softcap=variant.softcap if variant.softcap > 0.0 else None,
        slopes_ptr=contiguous(slopes),
        stride_slopes_batch=_per_batch(slopes),
        sink_ptr=contiguous(sink),
        stride_sink_batch=_per_batch(sink),
        **dropout,
    )


def _bends(variant: Variant) -> bool:
    """Whether anything but the scale stands between the products and the softmax."""
    return variant.softcap > 0.0 or variant.alibi_slopes is not None or variant.attn_bias is not None


def _distance(value: int) -> int:
    return max(-_FARTHEST, min(value, _FARTHEST))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def all_contiguous(*lists: Tensor | None) -> bool:
    return all(x is None or x.is_contiguous() for x in lists)


def all_aligned(*tensors: Tensor) -> bool:
    """Whether every row is a whole number of 16 bytes that lie at a multiple of as many."""
    return all(
        has_contiguous_rows(x)
        and x.data_ptr() % 16 == 0
        and all(elements * x.element_size() % 16 == 0 for elements in (*x.stride()[:-1], x.shape[-1]))
        for x in tensors
    )


def _per_batch(tensor: Tensor | None) -> int | None:
    """Elements of (h,) or (b, h) from one sequence to the next."""
    return None if tensor is None else tensor.shape[1] if tensor.dim() == 2 else 0


def problem(q: Tensor, v: Tensor, variant: Variant, varlen: Varlen | None) -> plan.Problem:
    return plan.Problem(
        arch=device.architecture(q.device),
        itemsize=q.element_size(),
        head_dim=max(q.shape[-1], v.shape[-1]),
        seqlen_q=q.shape[1] if varlen is None else varlen.max_seqlen_q,
        options=_bends(variant) or variant.dropout_p > 0.0,
    )


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of (batch or page, row, head), of the copy that is made of a tensor without contiguous rows; a packed tensor has
    no batch.
    """
    if not has_contiguous_rows(x):
        x = x.new_empty(x.shape, device="meta")
    return strides_of(x, (0, 1, 2)) if x.dim() == 4 else (0, *strides_of(x, (0, 1)))


def precision(q: Tensor) -> str:
    """Of float32 products."""
    return "tf32" if q.dtype == torch.float32 and device.has_tf32(q.device) and device.allows_tf32() else "ieee"


def is_wide(variant: Variant, stride_out: int, *of_tensors: tuple[int, int, int]) -> bool:
    """Whether offsets inside a tile, of its last row and its last column, may leave 32 bits."""
    inside = [stride_out, *(row for _, row, _ in of_tensors)]
    if variant.attn_bias is not None:
        inside += strides_of(variant.attn_bias, (2, 3))
    return max(inside) >= 2**31 // (2 * plan.MOST_ROWS)


def paging(k: Tensor, v: Tensor, table: Tensor | None, block_n: int) -> dict[str, int | bool | None]:
    """Constants that tell how keys lie in pages: see tiles.py. The same ones wherever they make no difference, so that
    no kernel is compiled anew for a table of another width.
    """
    if table is None:
        return {"PAGE_SIZE": None, "FAR": False, "PAIRS": False}
    page_size = max(1, k.shape[1])
    count = tiles.pages_of_block(page_size, block_n)
    several = count is not None and count > 1
    return {"PAGE_SIZE": page_size, "FAR": count != 1 and are_far(k, v), "PAIRS": several and has_pairs(table)}


def are_far(*caches: Tensor) -> bool:
    """Whether offsets in pages may leave 32 bits, counted from the first one."""
    for x in caches:
        of_page, of_row, _ = strides(x)
        if x.shape[0] * of_page + x.shape[1] * of_row + x.shape[3] >= 2**31:
            return True
    return False


def has_pairs(table: Tensor) -> bool:
    """Whether the rows of a block table are pairs of entries at multiples of 8 bytes. Of rows that are not contiguous a
    copy is made.
    """
    return table.shape[1] % 2 == 0 and (table.data_ptr() % 8 == 0 or not table.is_contiguous())
