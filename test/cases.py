"""What is tested: one row per feature and per odd shape, shared by the tests of every kernel.

A row is a description, without a device or a dtype; ``make`` builds the tensors. Whatever no kernel may read (rows
of no sequence, the rest of a page, the gaps of a sliced tensor) holds NaN, so that reading it shows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn_plus.schemas import Variant, Varlen

NAN = float("nan")


class Problem(NamedTuple):
    """The arguments of one call: dense where ``varlen`` is None."""

    q: Tensor
    k: Tensor
    v: Tensor
    variant: Variant
    varlen: Varlen | None

    def differentiable(self) -> dict[str, Tensor]:
        """The inputs that have a gradient, by name."""
        inputs = {"q": self.q, "k": self.k, "v": self.v, "sink": self.variant.sink, "bias": self.variant.attn_bias}
        return {name: x for name, x in inputs.items() if x is not None and x.is_floating_point()}


@dataclass(frozen=True)
class Case:
    """One problem. A packed batch is described by ``lengths``: (seqlen_q, seqlen_k) of each sequence."""

    name: str
    batch: int = 2
    seqlen_q: int = 67
    seqlen_k: int = 67
    heads: int = 2
    heads_k: int = 2
    dim: int = 32
    dim_v: int | None = None
    softmax_scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    diagonal: int | None = None
    softcap: float = 0.0
    alibi: str = ""  # "h" or "bh": the axes that it has
    sink: str = ""  # "h" or "bh"
    bias: str = ""  # one letter of "bhqk" per axis, 1 where it broadcasts: "bhqk", "1h1k", ...
    bias_values: str = "float"  # or "bool", or "-inf": a float with scattered -inf and whole rows of it
    dropout_p: float = 0.0
    options_dtype: torch.dtype | None = None  # of sink and bias, where it is not that of q
    # Of q, k and v: or "transposed", "sliced", "packed" (in one qkv tensor), "every_other" (strides in the last axis).
    layout: str = "contiguous"

    lengths: tuple[tuple[int, int], ...] | None = None
    padding: tuple[int, int] = (0, 0)  # rows of q and of k past the last sequence
    unused_q: tuple[int, ...] | None = None  # per sequence: rows of its segment that seqused_q leaves out
    unused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None
    page_size: int = 0  # 0 is not paged
    max_seqlen: tuple[int, int] | None = None  # default: the longest segment

    @property
    def forward_only(self) -> bool:
        return self.page_size > 0

    def __str__(self) -> str:
        return self.name

    def make(self, device: str = "cpu", dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Problem:
        """The same values on every device, and up to rounding in every dtype."""
        maker = _Maker(self.name, device, dtype)
        problem = self._dense(maker) if self.lengths is None else self._packed(maker)
        if requires_grad:
            for tensor in problem.differentiable().values():
                tensor.requires_grad_()
        return problem

    def _dense(self, maker: _Maker) -> Problem:
        dim_v = self.dim if self.dim_v is None else self.dim_v
        if self.layout == "packed":
            q, k, v = maker.normal(self.batch, self.seqlen_q, 3, self.heads, self.dim).unbind(2)
        else:
            q = maker.laid_out(self.layout, self.batch, self.seqlen_q, self.heads, self.dim)
            k = maker.laid_out(self.layout, self.batch, self.seqlen_k, self.heads_k, self.dim)
            v = maker.laid_out(self.layout, self.batch, self.seqlen_k, self.heads_k, dim_v)
        return Problem(q, k, v, self._variant(maker, self.batch, self.seqlen_q, self.seqlen_k), None)

    def _packed(self, maker: _Maker) -> Problem:
        dim_v = self.dim if self.dim_v is None else self.dim_v
        batch = len(self.lengths)
        lengths_q, lengths_k = [n for n, _ in self.lengths], [n for _, n in self.lengths]
        starts_q, starts_k = [0, *accumulate(lengths_q)], [0, *accumulate(lengths_k)]
        used_q = [n - u for n, u in zip(lengths_q, self.unused_q or [0] * batch, strict=True)]
        used_k = [n - u for n, u in zip(lengths_k, self.unused_k or [0] * batch, strict=True)]
        skipped = self.leftpad_k or [0] * batch
        live_q = [(start, start + n) for start, n in zip(starts_q, used_q, strict=False)]
        live_k = [(start + s, start + n) for start, s, n in zip(starts_k, skipped, used_k, strict=False)]

        layout = self.layout if self.layout != "packed" else "contiguous"
        q = maker.laid_out(layout, starts_q[-1] + self.padding[0], self.heads, self.dim)
        k = maker.laid_out(layout, starts_k[-1] + self.padding[1], self.heads_k, self.dim)
        v = maker.laid_out(layout, starts_k[-1] + self.padding[1], self.heads_k, dim_v)
        for tensor, live in ((q, live_q), (k, live_k), (v, live_k)):
            dead = torch.ones(tensor.shape[0], dtype=torch.bool, device=tensor.device)
            for start, end in live:
                dead[start:end] = False
            tensor[dead] = NAN

        block_table = None
        if self.page_size:
            (k, v), block_table = maker.paged((k, v), live_k, self.page_size)
        max_q, max_k = self.max_seqlen or (max(lengths_q, default=0), max(lengths_k, default=0))
        varlen = Varlen(
            maker.int32(starts_q),
            maker.int32(starts_k),
            max_q,
            max_k,
            seqused_q=None if self.unused_q is None else maker.int32(used_q),
            seqused_k=None if self.unused_k is None else maker.int32(used_k),
            leftpad_k=None if self.leftpad_k is None else maker.int32(skipped),
            block_table=block_table,
        )
        return Problem(q, k, v, self._variant(maker, batch, max_q, max_k), varlen)

    def _variant(self, maker: _Maker, batch: int, seqlen_q: int, seqlen_k: int) -> Variant:
        sizes = {"b": batch, "h": self.heads, "q": seqlen_q, "k": seqlen_k, "1": 1}
        alibi = sink = bias = rng_state = None
        if self.alibi:
            # Slopes of the size that trained models have, a different one for every head.
            alibi = 2.0 ** (-4.0 * maker.uniform(*(sizes[axis] for axis in self.alibi)).float())
        if self.sink:
            sink = maker.normal(*(sizes[axis] for axis in self.sink)).to(self.options_dtype or maker.dtype)
        if self.bias:
            bias = maker.normal(*(sizes[axis] for axis in self.bias)).to(self.options_dtype or maker.dtype)
            if self.bias_values != "float":
                drawn = maker.uniform(*bias.shape)
                hidden = drawn < 0.25
                hidden[..., 2::17, :] = True  # rows that see no key
                bias = ~hidden if self.bias_values == "bool" else bias.masked_fill(hidden, float("-inf"))
        if self.dropout_p:
            # A seed of more than 32 bits and an offset that is not 0: every word of the key and counter counts.
            rng_state = torch.tensor([0x1234_5678_9ABC + len(self.name), 7], device=maker.device)
        return Variant(
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_left=self.window[0],
            window_right=self.window[1],
            diagonal=self.diagonal,
            softcap=self.softcap,
            alibi_slopes=alibi,
            attn_bias=bias,
            sink=sink,
            dropout_p=self.dropout_p,
            rng_state=rng_state,
        )


class _Maker:
    """Random tensors that depend on the name alone: drawn on the CPU in fp64, then moved and rounded."""

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def int32(self, values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def laid_out(self, layout: str, *shape: int) -> Tensor:
        """(..., seqlen, heads, dim) with the strides that ``layout`` names; what lies between is NaN."""
        values = self.normal(*shape)
        *batch, seqlen, heads, dim = shape
        if layout == "transposed":
            holder = values.new_full((*batch, heads, seqlen, dim), NAN).transpose(-2, -3)
        elif layout == "sliced":
            holder = values.new_full((*batch, seqlen + 1, heads + 1, dim + 5), NAN)[..., 1:, :heads, 3 : 3 + dim]
        elif layout == "every_other":
            holder = values.new_full((*batch, seqlen, heads, 2 * dim), NAN)[..., ::2]
        else:
            return values
        return holder.copy_(values)

    def paged(self, pools, live, page_size: int) -> tuple[list[Tensor], Tensor]:
        """Packed tensors moved to shuffled pages, and the table (batch, max_pages) that finds them.

        Page 0 belongs to nobody and holds NaN; unused entries of the table point to it.
        """
        counts = [-(-(end - start) // page_size) for start, end in live]
        order = (torch.randperm(sum(counts), generator=self.generator) + 1).split(counts)
        table = torch.zeros(len(live), max(counts, default=0) + 1, dtype=torch.int32)
        for row, pages in zip(table, order, strict=True):
            row[: len(pages)] = pages
        moved = []
        for pool in pools:
            pages_of_pool = pool.new_full((sum(counts) + 1, page_size, *pool.shape[1:]), NAN)
            for (start, end), pages in zip(live, order, strict=True):
                for n, page in enumerate(pages.tolist()):
                    rows = pool[start + n * page_size : min(end, start + (n + 1) * page_size)]
                    pages_of_pool[page, : len(rows)] = rows
            moved.append(pages_of_pool)
        return moved, table.to(self.device)


EVERYTHING = {
    "heads": 4,
    "heads_k": 2,
    "dim": 24,
    "dim_v": 40,
    "softmax_scale": 0.3,
    "causal": True,
    "window": (40, -1),
    "softcap": 3.0,
    "alibi": "bh",
    "bias": "1hqk",
    "bias_values": "-inf",
    "sink": "bh",
    "dropout_p": 0.2,
    "layout": "sliced",
}

SHAPES = [
    Case("plain"),
    Case("plain_block_multiple", seqlen_q=128, seqlen_k=128, dim=64),
    Case("more_keys", seqlen_q=33, seqlen_k=150),
    Case("more_queries", seqlen_q=150, seqlen_k=33),
    Case("one_query", seqlen_q=1, seqlen_k=97),
    Case("one_key", seqlen_q=97, seqlen_k=1),
    Case("one_by_one", seqlen_q=1, seqlen_k=1),
    Case("no_queries", seqlen_q=0),
    Case("no_keys", seqlen_k=0),
    Case("no_keys_sink_bias", seqlen_k=0, sink="h", bias="1h1k"),
    Case("no_queries_no_keys", seqlen_q=0, seqlen_k=0),
    Case("batch_0", batch=0, sink="h", bias="1hqk"),
    Case("gqa", heads=6, heads_k=2),
    Case("mqa", heads=5, heads_k=1, causal=True),
    Case("wider_v", dim=32, dim_v=80),
    Case("narrower_v", dim=80, dim_v=16),
    # Unaligned: k and v go through one buffer in shared memory.
    Case("narrower_v_sliced", dim=64, dim_v=32, layout="sliced"),
    Case("narrow_v_sliced", dim=60, dim_v=10, layout="sliced", causal=True),
    Case("wider_v_sliced", dim=24, dim_v=200, layout="sliced"),
    Case("dim_1", dim=1),
    Case("dim_59", dim=59, causal=True),
    Case("dim_111", dim=111),
    Case("dim_256", dim=256, seqlen_q=40, seqlen_k=40),
    Case("transposed", layout="transposed", causal=True),
    Case("sliced", layout="sliced", heads=4, dim=40),
    Case("packed_qkv", layout="packed", causal=True),
    Case("every_other", layout="every_other"),
    # Contiguous by PyTorch's account, whatever the strides: there is nothing to stride over.
    Case("every_other_no_keys", layout="every_other", seqlen_k=0),
    Case("every_other_dim_1", layout="every_other", dim=1),
    Case("scale_0", softmax_scale=0.0),
    Case("scale_negative", softmax_scale=-0.2),
    # A mask that is applied before the scale turns over, or into NaN.
    Case("scale_0_causal", softmax_scale=0.0, causal=True),
    Case("scale_negative_causal", softmax_scale=-0.2, causal=True),
    Case("scale_negative_softcap", softmax_scale=-0.2, softcap=1.0, causal=True, seqlen_q=30),
]

MASKS = [
    Case("causal", causal=True),
    Case("causal_more_keys", causal=True, seqlen_q=35, seqlen_k=140),
    Case("causal_more_queries", causal=True, seqlen_q=140, seqlen_k=35),
    Case("causal_one_query", causal=True, seqlen_q=1, seqlen_k=75),
    Case("window_left", window=(20, -1), seqlen_q=100, seqlen_k=100),
    Case("window_right", window=(-1, 9), seqlen_q=100, seqlen_k=90),
    Case("window_both", window=(17, 5), seqlen_q=90, seqlen_k=110),
    Case("window_0", window=(0, 0)),
    Case("window_causal", window=(30, 30), causal=True, seqlen_q=130, seqlen_k=130),
    Case("window_beyond", window=(1000, 1000)),
    Case("window_more_queries", window=(4, 3), seqlen_q=120, seqlen_k=40),
    # The last rows look past the last key, by whole blocks of rows.
    Case("window_past_the_keys", window=(3, 3), diagonal=2, seqlen_q=150, seqlen_k=6, heads=2, heads_k=1),
    Case("diagonal_top_left", causal=True, diagonal=0, seqlen_q=50, seqlen_k=90),
    Case("diagonal_negative", causal=True, diagonal=-30),
    Case("diagonal_beyond", causal=True, diagonal=-200),
    Case("diagonal_ring", window=(70, 70), diagonal=67),
    Case("diagonal_window", window=(10, 4), diagonal=20, seqlen_q=70, seqlen_k=110),
]

SCORES = [
    Case("softcap", softcap=2.0),
    Case("softcap_causal", softcap=5.0, causal=True, softmax_scale=1.0),
    Case("alibi", alibi="h", seqlen_q=60, seqlen_k=90),
    Case("alibi_per_batch", alibi="bh", causal=True, seqlen_q=90, seqlen_k=60),
    Case("alibi_diagonal", alibi="h", diagonal=11),
    Case("bias_full", bias="bhqk"),
    Case("bias_over_batch", bias="1hqk"),
    Case("bias_over_heads", bias="b1qk", heads=4, heads_k=2),
    Case("bias_over_queries", bias="bh1k"),
    Case("bias_over_keys", bias="bhq1"),
    Case("bias_scalar", bias="1111"),
    Case("bias_minus_inf", bias="bhqk", bias_values="-inf"),
    Case("bias_minus_inf_over_queries", bias="b11k", bias_values="-inf", causal=True),
    Case("bias_bool", bias="bhqk", bias_values="bool"),
    Case("bias_bool_broadcast", bias="b11k", bias_values="bool", causal=True),
    Case("sink", sink="h"),
    Case("sink_per_batch", sink="bh", causal=True),
    Case("sink_rows_without_keys", sink="h", causal=True, seqlen_q=80, seqlen_k=30, bias="1hqk", bias_values="-inf"),
    Case("sink_and_bias_in_float32", sink="h", bias="1hqk", options_dtype=torch.float32, causal=True),
    Case("dropout", dropout_p=0.17),
    Case("dropout_softcap", dropout_p=0.5, softcap=2.0, causal=True),
    Case("dropout_gqa", dropout_p=0.3, heads=4, heads_k=2, seqlen_q=50, seqlen_k=91),
    Case("dropout_sink", dropout_p=0.3, sink="h", causal=True),
    Case("everything", seqlen_q=130, seqlen_k=110, **EVERYTHING),
]

RAGGED = ((37, 37), (1, 80), (70, 5), (64, 64))
EMPTY = ((0, 0), (20, 0), (0, 31), (33, 33), (0, 0))

VARLEN = [
    Case("varlen", lengths=RAGGED),
    Case("varlen_causal", lengths=RAGGED, causal=True),
    Case("varlen_single", lengths=((50, 60),)),
    Case("varlen_empty", lengths=EMPTY),
    Case("varlen_empty_causal_sink", lengths=EMPTY, causal=True, sink="bh"),
    Case("varlen_all_empty", lengths=((0, 0), (0, 0)), sink="h"),
    Case("varlen_no_sequences", lengths=()),
    Case("varlen_padding", lengths=RAGGED, padding=(13, 9), causal=True),
    Case("varlen_padding_sink", lengths=RAGGED, padding=(5, 0), sink="h"),
    Case("varlen_seqused", lengths=RAGGED, unused_q=(7, 0, 70, 1), unused_k=(0, 11, 5, 30), causal=True),
    Case("varlen_seqused_k", lengths=RAGGED, unused_k=(37, 0, 1, 2)),
    Case("varlen_leftpad", lengths=RAGGED, leftpad_k=(3, 80, 0, 20), causal=True),
    Case("varlen_leftpad_seqused", lengths=RAGGED, unused_k=(4, 10, 1, 40), leftpad_k=(3, 20, 4, 5), padding=(2, 2)),
    Case("varlen_max_seqlen_larger", lengths=RAGGED, max_seqlen=(100, 111), causal=True),
    Case("varlen_gqa", lengths=RAGGED, heads=6, heads_k=3, dim=40, dim_v=24, layout="sliced"),
    Case("varlen_transposed", lengths=RAGGED, layout="transposed"),
    Case("varlen_window", lengths=RAGGED, window=(11, 3)),
    Case("varlen_diagonal", lengths=RAGGED, causal=True, diagonal=2),
    Case("varlen_softcap", lengths=RAGGED, softcap=2.0),
    Case("varlen_alibi", lengths=RAGGED, alibi="h", causal=True),
    Case("varlen_alibi_per_batch", lengths=RAGGED, alibi="bh"),
    Case("varlen_bias", lengths=RAGGED, bias="bhqk"),
    Case("varlen_bias_broadcast", lengths=RAGGED, bias="1hq1", padding=(3, 3)),
    Case("varlen_bias_minus_inf", lengths=RAGGED, bias="b11k", bias_values="-inf", causal=True),
    Case("varlen_bias_bool", lengths=RAGGED, bias="bhqk", bias_values="bool"),
    Case("varlen_sink", lengths=RAGGED, sink="h", causal=True),
    Case("varlen_dropout", lengths=RAGGED, dropout_p=0.25),
    Case(
        "varlen_everything", lengths=RAGGED, padding=(4, 6), unused_q=(1, 0, 9, 0), unused_k=(2, 0, 1, 3), **EVERYTHING
    ),
]

PAGED = [
    Case("paged", lengths=RAGGED, page_size=16),
    Case("paged_odd", lengths=RAGGED, page_size=7, causal=True, heads=4, heads_k=2),
    Case("paged_one", lengths=((3, 9), (5, 2)), page_size=1, causal=True),
    Case("paged_larger_than_sequence", lengths=RAGGED, page_size=100, unused_k=(3, 0, 1, 20)),
    Case("paged_empty", lengths=EMPTY, page_size=5, sink="h"),
    Case("paged_everything", lengths=RAGGED, page_size=13, **{**EVERYTHING, "layout": "contiguous"}),
]

DENSE_CASES = [*SHAPES, *MASKS, *SCORES]
VARLEN_CASES = [*VARLEN, *PAGED]
CASES = [*DENSE_CASES, *VARLEN_CASES]
BY_NAME = {case.name: case for case in CASES}
