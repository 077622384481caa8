"""The backward of dense and packed attention: up to five launches, none of which reads lengths on the host.

With P = exp(scores - lse), the dropped and rescaled P', dP = dropped and rescaled dout v^T, and
delta = rowsum(dout * out) - dlse:

    dv = P'^T dout,  dS = P * (dP - delta),  dq = scale * dS k,  dk = scale * dS^T q,
    dbias = dS before the softcap's slope,  dsink = -sum over rows of exp(sink - lse) * delta

(Dao: "FlashAttention-2", 2023, section 2.3.2). dq and what others need of each row come from programs that own rows
(backward_q.py), dk and dv from programs that own keys (backward_kv.py), in one pass or in one each; dsink and dbias
from sums of their own (backward_options.py). Scores are computed anew in each pass; in return nothing is added up
atomically: reruns are bit-equal, and beside the gradients only four numbers for each row are allocated (statistics.py).
Stateless: any ``out`` and ``lse`` will do: the global ones of a ring give this block's part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import plan
from ..schemas import Variant, Varlen
from ..strides import contiguous_rows, has_contiguous_rows
from . import arguments, tiles
from .backward_kv import key_gradient_kernel
from .backward_options import bias_gradient_kernel, sink_gradient_kernel
from .backward_q import query_gradient_kernel
from .launch import Launch, Prepared
from .statistics import WIDTH

# Programs that a sum over rows is dealt out to, where the bias alone gives fewer.
_BIAS_PROGRAMS = 512


class BackwardInto(Prepared):
    """The backward of arguments of one signature: all that follows from it, decided once. Dense where varlen is None.

    Calling it with checked arguments of that signature fills dq, dk and dv, each where it is not None, and returns
    dsink and dbias: None for what does not exist or is not needed.
    """

    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        variant: Variant,
        need_dbias: bool,
        varlen: Varlen | None = None,
    ) -> None:
        super().__init__(q.device)
        batch = q.shape[0] if varlen is None else varlen.cu_seqlens_q.shape[0] - 1
        heads, heads_k = q.shape[-2], k.shape[-2]
        bias = variant.attn_bias
        need_dbias = need_dbias and bias is not None and bias.is_floating_point()
        self.dsink = None
        if variant.sink is not None:
            self.dsink = arguments.Result((batch, heads), torch.float32, q.device)
        self.statistics = arguments.Result((*lse.shape, WIDTH.value), torch.float32, q.device)
        self.copies = not all(map(has_contiguous_rows, (dout, q, k, v, out)))
        self.copies_back = not all(x is None or has_contiguous_rows(x) for x in (dq, dk, dv))
        self.common = arguments.Common(q, k, variant, varlen)
        of_inputs = tuple(arguments.strides(x) for x in (q, k, v))
        of_dout, of_out = arguments.strides(dout), arguments.strides(out)
        of_dq, of_dk, of_dv = (None if x is None else arguments.strides(x) for x in (dq, dk, dv))
        self.strides_q = (*of_inputs, of_dout, of_out, of_dq)
        self.strides_kv = (*of_inputs, of_dout, of_dk, of_dv)
        self.strides_bias = (*of_inputs, of_dout)
        self.rest_q, self.rest_kv = self.common.after(self.strides_q), self.common.after(self.strides_kv)
        # Keys that no sequence uses lie between those that programs own.
        self.fills = varlen is not None and (varlen.seqused_k is not None or varlen.leftpad_k is not None)
        self.no_sequences = batch == 0

        block_d, block_dv = plan.block_dims(q.shape[-1], v.shape[-1])
        plans = plan.backward(arguments.problem(q, v, variant, varlen))
        of_tensors = [x for x in (*self.strides_q, of_dk, of_dv) if x is not None]

        def launch(kernel, programs: int, chosen: plan.Plan, **constants) -> Launch | None:
            if programs == 0:
                return None
            shared = {
                "HEAD_DIM": q.shape[-1],
                "HEAD_DIM_V": v.shape[-1],
                "BLOCK_M": chosen.BLOCK_M,
                "BLOCK_N": chosen.BLOCK_N,
                "BLOCK_D": block_d,
                "BLOCK_DV": block_dv,
                "PRECISION": arguments.precision(q),
                "WIDE": arguments.is_wide(variant, 0, *of_tensors),
            }
            options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
            return Launch(kernel, programs, shared | constants, options)

        def row_tiles(x: Tensor, block: int) -> int:
            if varlen is None:
                return x.shape[0] * -(-x.shape[1] // block)
            return tiles.packed_tiles(x.shape[0], batch, block) if x.shape[0] else 0

        self.queries = launch(query_gradient_kernel, row_tiles(q, plans.queries.BLOCK_M) * heads, plans.queries)
        self.keys = self.values = self.sink = self.bias = None
        own_pass = plans.values is not None
        if dk is not None or (dv is not None and not own_pass):
            self.keys = launch(key_gradient_kernel, row_tiles(k, plans.keys.BLOCK_N) * heads_k, plans.keys)
        if dv is not None and own_pass:
            self.values = launch(key_gradient_kernel, row_tiles(k, plans.values.BLOCK_N) * heads_k, plans.values)
        if variant.sink is not None and batch:
            self.sink = Launch(sink_gradient_kernel, batch * heads, {"BLOCK_M": 1024}, {"num_warps": 4})
        self.dbias = self.dbias_parts = None
        if need_dbias:
            self._prepare_bias(bias, (batch, heads, *self.common.longest), plans.bias, launch)

    def _prepare_bias(self, bias: Tensor, whole: tuple[int, ...], chosen: plan.Plan, launch) -> None:
        sums = [size == 1 for size in bias.shape]
        row_tiles, column_tiles = -(-whole[2] // chosen.BLOCK_M), -(-whole[3] // chosen.BLOCK_N)
        programs = 1
        for summed, size in zip(sums, (*whole[:2], row_tiles, column_tiles), strict=True):
            programs *= 1 if summed else size
        strips = 1
        if sums[2] and programs:
            strips = max(1, min(row_tiles, _BIAS_PROGRAMS // programs))
        self.dbias = arguments.Result(bias.shape, bias.dtype, self.device)
        if strips > 1:
            self.dbias_parts = arguments.Result((strips, *bias.shape), torch.float32, self.device)
        self.bias_tiles = (row_tiles, column_tiles, strips)
        self.bias = launch(
            bias_gradient_kernel,
            programs * strips if 0 not in whole else 0,
            chosen,
            **dict(zip(("SUM_BATCH", "SUM_HEADS", "SUM_ROWS", "SUM_COLUMNS"), sums, strict=True)),
        )

    def __call__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        variant: Variant,
        need_dbias: bool,
        varlen: Varlen | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.current_index() != self.index:
            return self.elsewhere(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant, need_dbias, varlen)
        return self.fill(
            *(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant, varlen),
            *arguments.empty(self.statistics, self.dsink, self.dbias),
        )

    def fill(
        self, dout, q, k, v, out, lse, dlse, dq, dk, dv, variant, varlen, statistics, dsink, dbias
    ) -> tuple[Tensor | None, Tensor | None]:
        """On the current device, into memory that may hold anything."""
        if self.no_sequences:
            for grad in (dq, dk, dv, dbias):
                if grad is not None:
                    grad.zero_()
            return dsink, dbias
        if self.copies:
            dout, q, k, v, out = map(contiguous_rows, (dout, q, k, v, out))
        given = (dq, dk, dv)
        if self.copies_back:
            dq, dk, dv = (x if x is None or has_contiguous_rows(x) else x.new_empty(x.shape) for x in given)
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        common = self.common.fixed or self.common(q, k, variant, varlen)
        if self.queries is not None:
            rest = self.rest_q or (*self.strides_q, *common)
            self.queries((q, k, v, dout, out, lse, dlse, statistics, dq), rest)
        if self.fills:
            for grad in (dk, dv):
                if grad is not None:
                    grad.zero_()
        rest = self.rest_kv or (*self.strides_kv, *common)
        if self.keys is not None:
            self.keys((q, k, v, dout, statistics, dk, None if self.values is not None else dv), rest)
        if self.values is not None:
            self.values((q, k, v, dout, statistics, None, dv), rest)
        if self.sink is not None:
            self.sink((statistics, dsink), common[1:-1])  # neither group nor bias
        if self.copies_back:
            for to, grad in zip(given, (dq, dk, dv), strict=True):
                if to is not grad:
                    to.copy_(grad)
        if dbias is not None:
            self._fill_bias_gradient(q, k, v, dout, statistics, common, dbias)
        return dsink, dbias

    def _fill_bias_gradient(self, q, k, v, dout, statistics, common, dbias) -> None:
        if self.bias is None:
            dbias.zero_()
            return
        parts = dbias
        if self.dbias_parts is not None:
            (parts,) = arguments.empty(self.dbias_parts)
        self.bias((q, k, v, dout, statistics, parts), (*self.strides_bias, *common, *self.bias_tiles))
        if parts is not dbias:
            dbias.copy_(parts.sum(0))


class Backward(BackwardInto):
    """The same into tensors of its own: returns dq, dk, dv, dsink and dbias, or None in their place."""

    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        variant: Variant,
        need_dq: bool,
        need_dkv: bool,
        need_dbias: bool,
        varlen: Varlen | None = None,
    ) -> None:
        needed = ((q, need_dq), (k, need_dkv), (v, need_dkv))
        self.grads = [arguments.Result(x.shape, x.dtype, q.device) if need else None for x, need in needed]
        like = (torch.empty(x.shape, dtype=x.dtype, device="meta") if need else None for x, need in needed)
        super().__init__(dout, q, k, v, out, lse, dlse, *like, variant, need_dbias, varlen)

    def __call__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        variant: Variant,
        need_dq: bool,
        need_dkv: bool,
        need_dbias: bool,
        varlen: Varlen | None = None,
    ) -> tuple[Tensor | None, ...]:
        if self.current_index() != self.index:
            return self.elsewhere(dout, q, k, v, out, lse, dlse, variant, need_dq, need_dkv, need_dbias, varlen)
        dq, dk, dv, *own = arguments.empty(*self.grads, self.statistics, self.dsink, self.dbias)
        return dq, dk, dv, *self.fill(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant, varlen, *own)
