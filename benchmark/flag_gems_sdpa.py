"""Cases of flag_gems_report.py: scaled_dot_product_attention and its backward."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from flag_gems_calls import (
    HALF_ROWS,
    SDPA_TILE,
    band,
    choose,
    heads_first,
    kernel,
    sdpa,
    sdpa_backward,
    shipped,
)
from flag_gems_evidence import (
    BROKEN,
    DTYPE,
    FACT,
    LN2,
    LOG2E,
    RAISES,
    RIGHT,
    WRONG,
    Evidence,
    Problem,
    Results,
    case,
    compared,
    computed,
    dense,
    draw,
    instead,
    of_each,
    verdict,
)
from torch import Tensor

from flash_attn_plus.schemas import Variant


@case(WRONG, "causal is aligned top-left, the other forwards of flag_gems bottom-right", "bottom-right (flash-attn)")
def sdpa_causal_alignment(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 64, 128, causal=True)
    return compared(problem, lambda: sdpa(gems, problem, causal=True), predicted=instead(problem, diagonal=0))


@case(WRONG, "a bool mask is inverted: True hides the key", "True keeps the key (PyTorch's SDPA)")
def sdpa_bool_mask(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    mask = draw(device, 2, 4, 128, 128, seed=9) > 0
    problem = problem._replace(variant=Variant(attn_bias=mask))
    return compared(problem, lambda: sdpa(gems, problem, mask), predicted=instead(problem, attn_bias=~mask.cpu()))


@case(WRONG, "a float bias is added without the factor log2(e): it counts ln 2 times", "scores + bias")
def sdpa_float_bias(gems: ModuleType, device: torch.device) -> Evidence:
    bias = draw(device, 2, 4, 128, 128, seed=9)
    problem = dense(device)._replace(variant=Variant(attn_bias=bias))
    predicted = instead(problem, attn_bias=bias.double() * LN2)
    return compared(problem, lambda: sdpa(gems, problem, bias), predicted=predicted)


@case(WRONG, "with causal, the factor is there on the diagonal blocks only", "scores + bias, everywhere")
def sdpa_float_bias_causal(gems: ModuleType, device: torch.device) -> Evidence:
    bias = draw(device, 2, 4, 256, 256, seed=9)
    problem = dense(device, 256)._replace(variant=Variant(attn_bias=bias, causal=True))
    left = band(problem, lambda i, j: j < i // SDPA_TILE["BLOCK_M"] * SDPA_TILE["BLOCK_M"])
    predicted = instead(problem, attn_bias=bias.cpu().double() * torch.where(left, LN2, 1.0))
    return compared(problem, lambda: sdpa(gems, problem, bias, causal=True), predicted=predicted)


@case(WRONG, "a mask that broadcasts is read by its own strides, past its entries", "(1, 1, sq, sk) broadcasts")
def sdpa_mask_broadcast(gems: ModuleType, device: torch.device) -> Evidence:
    beyond = draw(device, 2, 4, 128, 128, seed=9)
    bias = beyond[:1, :1]
    problem = dense(device)._replace(variant=Variant(attn_bias=bias))
    predicted = instead(problem, attn_bias=beyond.double() * LN2)
    return compared(problem, lambda: sdpa(gems, problem, bias), predicted=predicted)


@case(WRONG, "v is read with the batch and head strides of k", "any strides")
def sdpa_value_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    q, k, _ = map(heads_first, problem[:3])
    v = draw(device, 2, 4, 192, 64, seed=9)[:, :, :128]
    problem = problem._replace(v=v.transpose(1, 2))

    def call() -> Results:
        choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
        return {"out": gems.scaled_dot_product_attention_forward(q, k, v)[0].transpose(1, 2)}

    read = torch.as_strided(v, v.shape, (*k.stride()[:2], *v.stride()[2:]))
    return compared(problem, call, predicted=computed(problem._replace(v=read.transpose(1, 2)), torch.float64))


@case(WRONG, "its second result is the log-sum-exp in base 2", "a natural logarithm")
def sdpa_lse_base_2(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    predicted = {"lse": computed(problem, torch.float64)["lse"] * LOG2E}
    return compared(problem, lambda: {"lse": sdpa(gems, problem)["lse"] * LOG2E}, ("lse",), predicted)


@case(RIGHT, "GQA without a mask", "4 query heads, 2 key heads")
def sdpa_gqa(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, heads_k=2)
    return compared(problem, lambda: sdpa(gems, problem), ("out", "lse"))


@case(RIGHT, "head dimensions 16, 32, 64, 128 and 256", "each of them")
def sdpa_head_dims(gems: ModuleType, device: torch.device) -> Evidence:
    def look(dim: int) -> Evidence:
        problem = dense(device, 64, heads=2, dim=dim, batch=1)
        tile = {**SDPA_TILE, "BLOCK_N": min(dim, SDPA_TILE["BLOCK_N"])}  # not wider than a head
        return compared(problem, lambda: sdpa(gems, problem, tile=tile), ("out", "lse"))

    return of_each((16, 32, 64, 128, 256), look)


@case(RAISES, "other head dimensions raise AssertionError", "1 to 256", raises="AssertionError")
def sdpa_head_dim_96(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 64, dim=96)
    return compared(problem, lambda: sdpa(gems, problem))


@case(RIGHT, "causal with as many queries as keys, of any number", "200 queries, 200 keys")
def sdpa_causal_square(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 200, causal=True)
    return compared(problem, lambda: sdpa(gems, problem, causal=True), ("out", "lse"))


@case(FACT, "the forward tunes 45 configs anew for every number of keys", "no tuning by lengths")
def sdpa_tunes_by_length(gems: ModuleType, device: torch.device) -> Evidence:
    entry = kernel(gems, "attention", "_attn_fwd")
    configs, keys = shipped(entry), entry.fn.keys
    return Evidence(holds="KV_CTX" in keys and len(configs) == 45, note=f"{len(configs)}, by {', '.join(keys)}")


GRADIENTS = ("dq", "dk", "dv")


@case(RIGHT, "its backward, causal, as many queries as keys, by the one config that writes every row", "dq, dk, dv")
def sdpagrad_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, heads_k=2, causal=True, backward=True)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True), GRADIENTS)


@case(WRONG, "the backward masks causally where is_causal is False", "no mask")
def sdpagrad_full(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, backward=True)
    predicted = _masked_gradients(problem)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=False), GRADIENTS, predicted)


def _masked_gradients(problem: Problem) -> Results:
    """The gradients of attention without a mask, its probabilities masked causally only now."""
    P = _scores(problem).softmax(-1)
    return _gradients(problem, P @ problem.v.cpu().double().transpose(1, 2), P.tril())


def _scores(problem: Problem) -> Tensor:
    """(b, h, sq, sk), scaled, without bias or mask."""
    Q, K = (x.cpu().double().transpose(1, 2) for x in problem[:2])
    return Q @ K.mT * Q.shape[-1] ** -0.5


def _gradients(problem: Problem, out: Tensor, P: Tensor) -> Results:
    """As a flash backward computes them, of these probabilities and this output, whether or not they fit."""
    Q, K, V, dO = (x.cpu().double().transpose(1, 2) for x in (*problem[:3], problem.dout))
    dS = P * (dO @ V.mT - (out * dO).sum(-1, keepdim=True)) * Q.shape[-1] ** -0.5
    return {name: x.transpose(1, 2) for name, x in (("dq", dS @ K), ("dk", dS.mT @ Q), ("dv", P.mT @ dO))}


@case(WRONG, "two of the three tiles that it ships leave half the rows of dq unwritten", "every row")
def sdpagrad_dq_unwritten(gems: ModuleType, device: torch.device) -> Evidence:
    kernel(gems, "attention", "_attn_bwd")
    problem = dense(device, 256, causal=True, backward=True)
    predicted = _half_of_dq(problem)
    notes = []
    for tile in HALF_ROWS:
        call = functools.partial(sdpa_backward, gems, problem, True, tile=tile)
        evidence = compared(problem, call, ("dq",), predicted)
        if evidence.raised:
            return evidence
        rows = evidence.theirs["dq"].isnan().any(-1)
        notes.append(f"BLOCK_M2 {tile['BLOCK_M2']}, BLOCK_N2 {tile['BLOCK_N2']}: {int(rows.sum())} of {rows.numel()}")
        if verdict(WRONG, evidence) != "as reported":
            break
    evidence.note = f"rows unwritten: {'; '.join(notes)}"
    return evidence


def _half_of_dq(problem: Problem) -> Results:
    """A program for each 128 columns, which computes 64 rows: the second one those from 64, of the first 128 keys."""
    right = computed(problem, torch.float64)
    P = (_scores(problem) - right["lse"][..., None]).exp()
    P[..., 128:] = 0
    dq = right["dq"].clone()
    dq[:, 64:128] = _gradients(problem, right["out"].transpose(1, 2), P)["dq"][:, 64:128]
    dq[:, 128:] = torch.nan
    return {"dq": dq}


@case(FACT, "12 of the 18 configs shipped for it have BLOCK_M2 64, and a program for 128 rows", "one for each block")
def sdpagrad_configs(gems: ModuleType, device: torch.device) -> Evidence:
    configs = [config.kwargs for config in shipped(kernel(gems, "attention", "_attn_bwd"))]
    half = [config for config in configs if config["BLOCK_M2"] < max(other["BLOCK_N1"] for other in configs)]
    tiles = {tuple(config.values()) for config in configs}
    holds = (len(configs), len(half), len(tiles)) == (18, 12, 3)
    return Evidence(holds=holds, note=f"{len(half)} of {len(configs)}, of {len(tiles)} tiles")


@case(BROKEN, "left to tune, it takes a wrong tile, or crashes", "dq, dk, dv", alone=True)
def sdpagrad_tuned(gems: ModuleType, device: torch.device) -> Evidence:
    tuner = kernel(gems, "attention", "_attn_bwd").fn
    choose(gems, "attention", "_attn_fwd", **SDPA_TILE)
    problem = dense(device, 1024, heads=8, batch=1, causal=True, backward=True)

    def tuned() -> Results:
        sdpa_backward(gems, problem, causal=True, tile=None)
        torch.cuda.synchronize()
        return sdpa_backward(gems, problem, causal=True, tile=None)

    evidence = compared(problem, tuned, GRADIENTS)
    evidence.note = f"{len(tuner.configs)} configs; {getattr(tuner, 'best_config', None) or 'none chosen'}"
    return evidence


@case(WRONG, "with more keys than queries, dk and dv are wrong or unwritten", "zero for keys unseen", alone=True)
def sdpagrad_more_keys(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, causal=True, diagonal=0, backward=True)
    predicted = computed(problem, torch.float64)
    for name in ("dk", "dv"):  # 128 keys of each head, one head behind the other as if these were all
        written = predicted[name][:, :128].transpose(1, 2).flatten()
        memory = torch.cat((written, torch.full_like(written, torch.nan)))
        predicted[name] = memory.view(2, 4, 256, 64).transpose(1, 2)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True), GRADIENTS, predicted)


@case(WRONG, "with more queries than keys it writes dk and dv outside their memory", "inside", alone=True)
def sdpagrad_more_queries(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, 128, causal=True, diagonal=0, backward=True)
    predicted = computed(problem, torch.float64)
    for name in ("dk", "dv"):  # room for 256 keys of each head: half the heads, and the other half outside
        heads = predicted[name].transpose(1, 2).reshape(8, 128, 64)[:4]
        memory = torch.stack((heads, torch.full_like(heads, torch.nan)), dim=1)
        predicted[name] = memory.view(2, 4, 128, 64).transpose(1, 2)
    call = functools.partial(sdpa_backward, gems, problem, causal=True)
    return compared(problem, call, GRADIENTS, predicted, predicted_outside=2 * 4 * 128 * 64)


@case(WRONG, "it reads dout past its end where the number of queries is no multiple of its block", "NaN behind dout")
def sdpagrad_reads_past_dout(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 100, causal=True, backward=True)
    do = heads_first(problem.dout)
    memory = torch.full((2 * do.numel(),), torch.nan, dtype=DTYPE, device=device)
    dout = memory[: do.numel()].view(do.shape).copy_(do)
    problem = problem._replace(dout=dout.transpose(1, 2))
    predicted = computed(problem, torch.float64)
    predicted["dv"][-1, :, -1] = torch.nan  # of the last head; behind the others lies the next one
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True, dout=dout), GRADIENTS, predicted)


@case(WRONG, "the backward ignores attn_mask", "gradients of the masked attention")
def sdpagrad_ignores_mask(gems: ModuleType, device: torch.device) -> Evidence:
    bias = 2 * draw(device, 2, 4, 128, 128, seed=9)  # one diagonal block: there, the forward is right
    problem = dense(device, 128, backward=True)._replace(variant=Variant(attn_bias=bias, causal=True))
    right = computed(problem, torch.float64)
    P = (_scores(problem) - right["lse"][..., None]).exp().tril()
    predicted = _gradients(problem, right["out"].transpose(1, 2), P)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True, mask=bias), GRADIENTS, predicted)


@case(RAISES, "the backward takes contiguous tensors only", "any strides", raises="AssertionError")
def sdpagrad_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, causal=True, backward=True)
    dout = problem.dout.transpose(1, 2)
    return compared(problem, lambda: sdpa_backward(gems, problem, causal=True, dout=dout), GRADIENTS)
