"""What ``python -m flash_attn_plus.conformance`` holds a device to: attention (selfcheck.Check), the KV cache, rotary
embedding, and states that are added up. One row here is one row there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flash_attn_plus

from . import reference
from .schemas import Variant
from .selfcheck import Check, Outcome, laid_out, measure, page_table
from .tolerance import Results

_STRETCHES = (1.0, 1.3, 0.7)  # see selfcheck
_UNUSED = 1000.0  # in rows of a cache that nobody may read: no error of rounding is as large


def _draws(dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(2)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class CacheCheck(NamedTuple):
    """One step with a KV cache: new keys are appended, and queries see what is there then. ``lengths`` are those
    before; heads are 4 and key heads 2.
    """

    name: str
    dtype: torch.dtype
    lengths: tuple[int, ...] = (19, 0, 37)
    seqlen_q: int = 1
    seqlen_new: int = 1
    capacity: int = 48
    head_dim: int = 64
    page_size: int = 0
    numbered: bool = False  # by cache_batch_idx
    leftpad: bool = False
    causal: bool = True
    window_left: int = -1
    softcap: float = 0.0
    rotary_dim: int = 0
    interleaved: bool = True
    num_splits: int = 0
    loud: int = 0  # of so many keys the first and the last have large scores, and so has the newest key: none may lack
    layout: str = "contiguous"  # of the caches

    @property
    def shape(self) -> str:
        of_pages = f", pages of {self.page_size}" if self.page_size else ""
        keys = "+".join(map(str, self.lengths))
        return f"({self.seqlen_q} x {keys}), {self.seqlen_new} new, 4:2 heads, d {self.head_dim}{of_pages}"

    def run(self, device: torch.device, again: bool = False) -> Outcome:
        exact = ("new v", "other rows") + (() if self.rotary_dim else ("new k",))
        return measure(lambda: self._ours(device), self._expected, self.dtype, again, exact)

    def _inputs(self) -> dict[str, Any]:
        draw, batch = _draws(self.dtype), len(self.lengths)
        rows = (batch + 2 if self.numbered else batch, self.capacity)
        table = None
        if self.page_size:
            table, pages = page_table(tuple(n + self.seqlen_new for n in self.lengths), self.page_size)
            rows = (pages, self.page_size)
        inputs = {"q": draw(batch, self.seqlen_q, 4, self.head_dim)}
        inputs |= {name: draw(batch, self.seqlen_new, 2, self.head_dim) for name in ("k", "v")}
        angles = draw(max(self.capacity, max(self.lengths) + self.seqlen_new), self.rotary_dim // 2).double() * 3
        inputs |= {"cos": angles.cos().to(self.dtype), "sin": angles.sin().to(self.dtype)} if self.rotary_dim else {}
        inputs |= {"lengths": torch.tensor(self.lengths, dtype=torch.int32), "table": table}
        inputs["numbers"] = torch.arange(batch, 0, -1, dtype=torch.int32) if self.numbered else None
        inputs["leftpad"] = torch.tensor([n // 3 for n in self.lengths], dtype=torch.int32) if self.leftpad else None
        for name in ("k_cache", "v_cache"):
            inputs[name] = torch.full((*rows, 2, self.head_dim), _UNUSED, dtype=self.dtype)
            for b, length in enumerate(self.lengths):
                at = self._places(inputs, b, range(length))
                inputs[name][at] = draw(length, 2, self.head_dim)
        if self.loud:
            of_queries = (
                inputs["q"][:, 0].unflatten(1, (2, 2)).mean(2) * 0.75
            )  # a score of 4 where others have one of 1
            for b, length in enumerate(self.lengths):
                loud = [n for n in range(length) if n % self.loud in (0, self.loud - 1)]
                inputs["k_cache"][self._places(inputs, b, loud)] = of_queries[b]
            inputs["k"][:, -1] = of_queries
        return inputs

    def _places(self, inputs: dict[str, Any], b: int, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(caches or pages, rows in them) of keys of sequence b."""
        at = torch.tensor([*positions], dtype=torch.long)
        if self.page_size:
            return inputs["table"][b].long()[at // self.page_size], at % self.page_size
        return torch.full_like(at, b if inputs["numbers"] is None else int(inputs["numbers"][b])), at

    def _ours(self, device: torch.device) -> Results:
        host = self._inputs()
        on = {name: None if x is None else x.to(device) for name, x in host.items()}
        k_cache, v_cache = (laid_out(on[name], self.layout) for name in ("k_cache", "v_cache"))
        out, lse = flash_attn_plus.flash_attn_with_kvcache(
            *(on["q"], k_cache, v_cache, on["k"], on["v"], on.get("cos"), on.get("sin"), on["lengths"], on["numbers"]),
            *(on["leftpad"], on["table"], None, self.causal, (self.window_left, -1), self.softcap, self.interleaved),
            num_splits=self.num_splits,
            return_softmax_lse=True,
        )
        return {"out": out, "lse": lse, **self._written(host, k_cache.cpu(), v_cache.cpu())}

    def _written(self, inputs: dict[str, Any], k_cache: Tensor, v_cache: Tensor) -> Results:
        """The new rows of the caches, and all others."""
        others, new = torch.stack([k_cache, v_cache]), []
        for b, length in enumerate(self.lengths):
            caches, rows = self._places(inputs, b, range(length, length + self.seqlen_new))
            new.append(torch.stack([k_cache, v_cache])[:, caches, rows])
            others[:, caches, rows] = 0.0
        new_k, new_v = torch.stack(new, dim=1)
        return {"new k": new_k, "new v": new_v, "other rows": others}

    def _expected(self) -> tuple[Results, list[Results]]:
        return self._plain(torch.float64, 1.0), [self._plain(self.dtype, stretch) for stretch in _STRETCHES]

    def _plain(self, dtype: torch.dtype, stretch: float) -> Results:
        """Sequence by sequence, in ``dtype``."""
        inputs = self._inputs()
        wide = {name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
        variant = Variant(
            softmax_scale=self.head_dim**-0.5 / stretch,
            causal=self.causal,
            window_left=self.window_left,
            softcap=self.softcap,
        )
        k_cache, v_cache, outs, lses = wide["k_cache"].clone(), wide["v_cache"].clone(), [], []
        for b, length in enumerate(self.lengths):
            q, k, end = wide["q"][b], wide["k"][b], length + self.seqlen_new
            if self.rotary_dim:
                tables = wide["cos"], wide["sin"]
                by_row = self.causal or self.window_left >= 0  # else all queries have the first one's angles
                at = torch.arange(length, length + self.seqlen_q) if by_row else torch.full((self.seqlen_q,), length)
                q = rotated(q, *tables, at, self.interleaved)
                k = rotated(k, *tables, torch.arange(length, end), self.interleaved)
            at = self._places(wide, b, range(length, end))
            k_cache[at], v_cache[at] = k, wide["v"][b]
            first = 0 if wide["leftpad"] is None else int(wide["leftpad"][b])
            at = self._places(wide, b, range(first, end))
            out, lse = reference.attention(q[None] * stretch, k_cache[at][None], v_cache[at][None], variant, dtype=None)
            outs.append(out)
            lses.append(lse)
        return {"out": torch.cat(outs), "lse": torch.cat(lses), **self._written(wide, k_cache, v_cache)}


class RotaryCheck(NamedTuple):
    """A rotation and, unless it is in place, its gradient. ``lengths`` are those of a packed batch; heads are 3."""

    name: str
    dtype: torch.dtype
    head_dim: int = 64
    rotary_dim: int = 64
    seqlen: int = 33
    lengths: tuple[int, ...] = ()
    offsets: tuple[int, ...] = (0, 0)  # of each sequence
    interleaved: bool = False
    in_place: bool = False
    layout: str = "contiguous"

    @property
    def shape(self) -> str:
        rows = "+".join(map(str, self.lengths)) if self.lengths else f"{len(self.offsets)} x {self.seqlen}"
        return f"({rows}), 3 heads, d {self.head_dim}, {self.rotary_dim} rotated"

    def run(self, device: torch.device, again: bool = False) -> Outcome:
        return measure(lambda: self._ours(device), self._expected, self.dtype, again)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        draw = _draws(self.dtype)
        rows = (sum(self.lengths),) if self.lengths else (len(self.offsets), self.seqlen)
        angles = draw(max((*self.lengths, self.seqlen)) + max(self.offsets), self.rotary_dim // 2).double() * 3
        x, dout = (draw(*rows, 3, self.head_dim) for _ in range(2))
        return x, dout, angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _ours(self, device: torch.device) -> Results:
        x, dout, cos, sin = (x.to(device) for x in self._inputs())
        x, packed = laid_out(x, self.layout).requires_grad_(not self.in_place), {}
        if self.lengths:
            starts = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)
            packed = dict(cu_seqlens=starts, max_seqlen=max(self.lengths))
        offsets = torch.tensor(self.offsets, dtype=torch.int32, device=device) if any(self.offsets) else 0
        out = flash_attn_plus.apply_rotary_emb(x, cos, sin, self.interleaved, self.in_place, offsets, **packed)
        if self.in_place:
            return {"out": x}
        return {"out": out.detach(), "dx": torch.autograd.grad((out * dout).sum(), x)[0]}

    def _expected(self) -> tuple[Results, list[Results]]:
        return self._plain(torch.float64), [self._plain(self.dtype)]

    def _plain(self, dtype: torch.dtype) -> Results:
        x, dout, cos, sin = (x.to(dtype) for x in self._inputs())
        x.requires_grad_(not self.in_place)
        sequences = x.split(self.lengths) if self.lengths else x.unbind()
        positions = [torch.arange(len(rows)) + at for rows, at in zip(sequences, self.offsets, strict=True)]
        turned = [rotated(rows, cos, sin, at, self.interleaved) for rows, at in zip(sequences, positions, strict=True)]
        out = torch.cat(turned) if self.lengths else torch.stack(turned)
        if self.in_place:
            return {"out": out}
        return {"out": out.detach(), "dx": torch.autograd.grad((out * dout).sum(), x)[0]}


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """(rows, heads, head_dim) by the angles of ``positions``: (a cos - b sin, a sin + b cos) of each pair."""
    half = cos.shape[1]
    cos, sin = cos[positions, None], sin[positions, None]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.split(half, -1)
    pair = a * cos - b * sin, a * sin + b * cos
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


class CombineCheck(NamedTuple):
    """Parts of attention added up; row 0 was seen by no part, row 1 by the last one alone."""

    name: str
    dtype: torch.dtype
    parts: int = 3
    head_dim: int = 64

    @property
    def shape(self) -> str:
        return f"{self.parts} parts, 2 x 33, 4 heads, d {self.head_dim}"

    def run(self, device: torch.device, again: bool = False) -> Outcome:
        return measure(lambda: self._ours(device), self._expected, self.dtype, again)

    def _inputs(self) -> tuple[Tensor, Tensor]:
        outs, lses = (
            _draws(self.dtype)(self.parts, 2, 33, 4, self.head_dim),
            _draws(torch.float32)(self.parts, 2, 4, 33),
        )
        lses[:, :, :, 0] = lses[:-1, :, :, 1] = -torch.inf
        return outs, lses

    def _ours(self, device: torch.device) -> Results:
        outs, lses = (x.to(device) for x in self._inputs())
        if self.parts == 2:
            out, lse = flash_attn_plus.merge_states(outs[0], lses[0], outs[1], lses[1])
        else:
            out, lse = flash_attn_plus.flash_attn_combine(outs, lses)
        return {"out": out, "lse": lse}

    def _expected(self) -> tuple[Results, list[Results]]:
        outs, lses = self._inputs()
        weights = lses.softmax(0).nan_to_num(0.0)  # of a row that no part has seen: 0 / 0
        out = (weights.transpose(-1, -2).unsqueeze(-1).to(self.dtype) * outs).sum(0)
        return dict(zip(("out", "lse"), reference.combine(outs, lses), strict=True)), [
            {"out": out, "lse": lses.logsumexp(0)}
        ]


AnyCheck = Check | CacheCheck | RotaryCheck | CombineCheck


def of_every_dtype(dtype: torch.dtype) -> list[AnyCheck]:
    """What differs most from dtype to dtype in a compiler: products, reductions, conversions, every pass."""
    return [
        Check("causal", dtype),
        Check("several blocks", dtype, head_dim=128, seqlen_q=200, seqlen_k=333, causal=False),
        Check("head_dim 59, one key head", dtype, head_dim=59, seqlen_q=70, seqlen_k=70, heads_k=1),
        Check("one query", dtype, head_dim=128, seqlen_q=1, seqlen_k=200),
        Check("window, softcap", dtype, window_left=20, window_right=5, causal=False, softcap=8.0),
        Check("packed sequences", dtype, lengths=(17, 0, 70, 33)),
        CacheCheck("cache: append, rotate, decode", dtype, rotary_dim=64),
        CacheCheck("cache in pages", dtype, page_size=16, rotary_dim=32, interleaved=False),
        RotaryCheck("rotary", dtype),
        RotaryCheck("rotary in place, packed", dtype, lengths=(9, 0, 24), offsets=(0,) * 3, in_place=True),
        CombineCheck("combine", dtype),
    ]


def of_one_dtype(dtype: torch.dtype) -> list[AnyCheck]:
    """Shapes, strides and options. They run in float32 too, by whose bounds less is lost."""
    small = dict(seqlen_q=50, seqlen_k=70)
    many = dict(lengths=(600, 700), capacity=768, head_dim=128, num_splits=3, loud=64)  # splits end where tiles do
    return [
        Check("as many key heads", dtype, heads_k=4),
        Check("head_dim 32", dtype, head_dim=32, **small),
        Check("head_dim 96", dtype, head_dim=96, **small),
        Check("head_dim 256", dtype, head_dim=256, **small),
        Check("other head_dim of v", dtype, head_dim=40, head_dim_v=72, **small),
        Check("more queries than keys", dtype, seqlen_q=130, seqlen_k=50),
        Check("no keys", dtype, seqlen_k=0),
        Check("no queries", dtype, seqlen_q=0),
        Check("batch 0", dtype, batch=0),
        Check("one row, one key", dtype, seqlen_q=1, seqlen_k=1),
        Check("window of a causal mask", dtype, window_left=20),
        Check("window past all keys", dtype, seqlen_q=90, seqlen_k=20, window_left=3, window_right=0, causal=False),
        Check("gradient through lse", dtype, options="lse", **small),
        Check("ALiBi", dtype, options="alibi", **small),
        Check("sink", dtype, options="sink", seqlen_q=70, seqlen_k=50),
        Check("bias", dtype, options="bias lse", **small),
        Check("dropout", dtype, options="dropout", **small),
        Check("all options", dtype, options="alibi sink bias dropout lse", window_left=30, softcap=5.0, **small),
        Check("sliced tensors", dtype, layout="sliced", **small),
        Check("heads before rows", dtype, layout="heads first", **small),
        Check("every other column", dtype, layout="every other", **small),
        Check("q, k, v in one tensor", dtype, heads_k=4, layout="packed"),
        Check("packed, other key lengths", dtype, lengths=(17, 40, 3), lengths_k=(0, 70, 33), options="lse"),
        Check("packed, sliding window", dtype, lengths=(17, 130), window_left=20, softcap=8.0),
        Check("packed, in one tensor", dtype, heads_k=4, lengths=(17, 0, 70), layout="packed"),
        Check("packed, dropout", dtype, lengths=(17, 0, 70), options="dropout sink"),
        Check("packed, keys in pages", dtype, lengths=(5, 1, 9), lengths_k=(70, 0, 33), page_size=16, backward=False),
        CacheCheck("cache: many keys, split", dtype, **many),
        CacheCheck("cache: one sequence", dtype, lengths=(500,), capacity=512),
        CacheCheck("cache: several queries", dtype, seqlen_q=5, seqlen_new=5, rotary_dim=64),
        CacheCheck("cache: queries see all", dtype, seqlen_q=5, seqlen_new=5, rotary_dim=32, causal=False),
        CacheCheck("cache: more than 64 queries", dtype, seqlen_q=70, seqlen_new=70, capacity=120, rotary_dim=64),
        CacheCheck("cache: numbered, left padding", dtype, numbered=True, leftpad=True),
        CacheCheck("cache: sliced, softcap", dtype, layout="sliced", softcap=1.0, head_dim=128),
        CacheCheck("pages of 5 rows", dtype, page_size=5, seqlen_q=3, seqlen_new=3, head_dim=59),
        RotaryCheck("rotary: interleaved, offsets", dtype, interleaved=True, offsets=(7, 2), rotary_dim=32),
        RotaryCheck("rotary: sliced, d 59", dtype, head_dim=59, rotary_dim=32, layout="sliced"),
        CombineCheck("merge_states", dtype, parts=2),
    ]
