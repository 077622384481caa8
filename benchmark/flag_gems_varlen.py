"""Cases of flag_gems_report.py: flash_attn_varlen_func."""

from __future__ import annotations

import math
from types import ModuleType
from unittest import mock

import torch
from flag_gems_calls import (
    LENGTHS,
    band,
    kernel,
    launches,
    slopes,
    varlen,
)
from flag_gems_evidence import (
    DTYPE,
    FACT,
    RAISES,
    RIGHT,
    WRONG,
    Evidence,
    NotHereError,
    Results,
    by_ours,
    called,
    case,
    compared,
    computed,
    draw,
    instead,
    needs_no_gradient,
    of_each,
    only_nan,
    packed,
    paged,
)
from torch import Tensor

import flash_attn_plus as fap


@case(RIGHT, "causal, aligned bottom-right, with GQA", "lengths 17, 70, 128 of 40, 70, 200 keys")
def varlen_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, (40, 70, 200), causal=True)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "softcap", "softcap 2")
def varlen_softcap(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, softcap=2.0)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "ALiBi", "-slope * |distance|")
def varlen_alibi(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, (40, 70, 200), alibi_slopes=slopes(device))
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(WRONG, "causal with ALiBi, the log-sum-exp is off by a constant in each row; out is right", "-slope * |distance|")
def varlen_alibi_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, (40, 70, 200), alibi_slopes=slopes(device), causal=True)
    predicted = computed(problem, torch.float64)
    behind = torch.cat([torch.arange(n) - (n - 1) for n in LENGTHS])
    predicted["lse"] += slopes(torch.device("cpu"))[:, None] * behind
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"), predicted)


@case(RIGHT, "a window with two sides", "window (30, 10)")
def varlen_window(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_left=30, window_right=10)
    return compared(problem, lambda: varlen(gems, problem))


@case(RIGHT, "a left window with causal", "window (30, -1), causal")
def varlen_window_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_left=30, causal=True)
    return compared(problem, lambda: varlen(gems, problem))


@case(RIGHT, "head dimensions 24, 96 and 192", "each of them")
def varlen_head_dims(gems: ModuleType, device: torch.device) -> Evidence:
    def look(dim: int) -> Evidence:
        problem = packed(device, LENGTHS, dim=dim, causal=True)
        return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))

    return of_each((24, 96, 192), look)


@case(RAISES, "a head dimension of 8 does not compile", "1 to 256", raises="CompilationError")
def varlen_head_dim_8(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, dim=8)
    return compared(problem, lambda: varlen(gems, problem))


@case(RAISES, "head dimensions that are no multiples of 8 raise AssertionError", "1 to 256", raises="AssertionError")
def varlen_head_dim_20(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, dim=20)
    return compared(problem, lambda: varlen(gems, problem))


@case(RIGHT, "keys in pages", "pages of 16, causal, GQA")
def varlen_paged(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (1, 20, 64), (40, 70, 200), causal=True)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "decoding from pages with GQA: the output", "3 sequences, one query each")
def varlen_paged_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (1, 1, 1), (40, 70, 200), causal=True)
    return compared(problem, lambda: varlen(gems, problem))


@case(WRONG, "a window with a left side only also hides the query's own key and all behind it", "window (30, -1)")
def varlen_window_left(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (128,), window_left=30)
    predicted = instead(problem, attn_bias=band(problem, lambda i, j: (j >= i - 30) & (j <= i - 1)), window_left=-1)
    return compared(problem, lambda: varlen(gems, problem), predicted=predicted)


@case(WRONG, "a window with a right side only is dropped", "window (-1, 10)")
def varlen_window_right(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_right=10)
    return compared(problem, lambda: varlen(gems, problem), predicted=instead(problem, window_right=-1))


@case(WRONG, "a window is dropped whose left side reaches all keys", "window (1000, 10)")
def varlen_window_wide(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, window_left=1000, window_right=10)
    predicted = instead(problem, window_left=-1, window_right=-1)
    return compared(problem, lambda: varlen(gems, problem), predicted=predicted)


@case(WRONG, "decoding with GQA returns the log-sum-exps of several sequences in a wrong order", "(h, batch)")
def varlen_lse_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (1, 1, 1), (40, 70, 200))
    right = computed(problem, torch.float64)
    right["lse"] = right["lse"].unflatten(0, (2, 2)).transpose(1, 2).reshape(4, 3)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"), right)


@case(RIGHT, "decoding one sequence with GQA, its log-sum-exp included", "(h, 1)")
def varlen_lse_decode_single(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (1,), (200,))
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(RIGHT, "decoding with GQA, told that max_seqlen_q is 2: the heads are not swapped", "(h, batch)")
def varlen_lse_decode_unswapped(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (1, 1, 1), (40, 70, 200))
    problem = problem._replace(layout=problem.layout._replace(max_seqlen_q=2))
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"))


@case(WRONG, "the log-sum-exp of a row that sees no key is +inf", "-inf; out is 0")
def varlen_empty_rows(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (100, 20), (40, 70), causal=True)
    predicted = computed(problem, torch.float64)
    predicted["lse"] = predicted["lse"].masked_fill(predicted["lse"] == -torch.inf, torch.inf)
    return compared(problem, lambda: varlen(gems, problem), ("out", "lse"), predicted)


@case(WRONG, "what dropout keeps is not divided by 1 - p", "the mean stays: 1 for values of 1")
def varlen_dropout(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, (256,), (512,))
    problem = problem._replace(v=torch.ones_like(problem.v))
    arguments = (*problem[:3], *problem.layout[:4])
    mine = fap.flash_attn_varlen_func(*arguments, dropout_p=0.5).mean()
    right = {"mean": torch.ones((), dtype=torch.float64)}
    predicted = {"mean": torch.tensor(0.5, dtype=torch.float64)}
    evidence = Evidence(mine={"mean": mine.cpu()}, right=right, bounds={"mean": 0.05}, predicted=predicted)
    return called(evidence, lambda: {"mean": varlen(gems, problem, dropout_p=0.5)["out"].mean()})


def _kept(gems: ModuleType, device: torch.device, tile: str) -> Tensor:
    """Which of 192 by 192 probabilities dropout keeps, by a tile of those that it ships: all are equal, values unit."""
    plain = packed(device, (192,), heads=1, heads_k=1)
    plain = plain._replace(q=torch.zeros_like(plain.q))
    config = gems.runtime.get_heuristic_config(tile)
    parts = []
    for start in (0, 64, 128):
        v = torch.zeros(192, 1, 64, dtype=DTYPE, device=device)
        v[start : start + 64, 0] = torch.eye(64, dtype=DTYPE, device=device)
        torch.manual_seed(0)
        with mock.patch.object(gems.runtime, "get_heuristic_config", return_value=config):
            parts.append(varlen(gems, plain._replace(v=v), dropout_p=0.5)["out"][:, 0].cpu() > 0)
    return torch.cat(parts, dim=1)


@case(
    FACT,
    "the packed kernel's two loops number what dropout drops by rows and columns, and by columns and rows",
    "one way",
)
def varlen_dropout_loops(gems: ModuleType, device: torch.device) -> Evidence:
    kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    kept = _kept(gems, device, "mha_block_64").unflatten(0, (3, 64)).unflatten(2, (3, 64)).transpose(1, 2)
    # The last block of columns is one loop's, the others are the other's.
    same = [torch.equal(kept[m, 2], kept[2, m]) for m in (0, 1)]
    others = torch.equal(kept[0, 1], kept[1, 0])
    return Evidence(
        holds=all(same) and not others,
        note=f"tiles (0, 2) and (2, 0) equal: {same[0]}, (1, 2) and (2, 1): {same[1]}, (0, 1) and (1, 0): {others}",
    )


@case(FACT, "what the packed kernel's dropout drops depends on the sizes of its blocks", "on the seed alone")
def varlen_dropout_blocks(gems: ModuleType, device: torch.device) -> Evidence:
    kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    first, again, other = (_kept(gems, device, tile) for tile in ("mha_block_64", "mha_block_64", "mha_block_128"))
    differ = int((first != other).sum())
    note = f"{differ} of {first.numel()} differ; kept {first.double().mean():.2f} and {other.double().mean():.2f}"
    return Evidence(holds=torch.equal(first, again) and differ > 0, note=note)


@case(WRONG, "s_aux (a sink) is accepted and ignored", "one more logit per head")
def varlen_sink(gems: ModuleType, device: torch.device) -> Evidence:
    sink = torch.full((4,), 4.0, device=device)
    problem = packed(device, LENGTHS, sink=sink)
    predicted = instead(problem, sink=None)
    return compared(problem, lambda: varlen(gems, problem, s_aux=sink), ("out", "lse"), predicted)


@case(WRONG, "a scale of 0 gives NaN", "every key counts the same")
def varlen_scale_zero(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS, softmax_scale=0.0)
    return compared(problem, lambda: varlen(gems, problem), predicted=only_nan(problem))


@case(WRONG, "pages that lie apart are read as if they lay side by side", "keys and values in one tensor of pages")
def varlen_page_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (20, 64), (70, 200))
    pool = draw(device, len(problem.k), 2, 16, 2, 64, seed=9)
    problem = problem._replace(k=pool[:, 0], v=pool[:, 1])
    beside = (16 * 2 * 64, 2 * 64, 64, 1)
    read = [torch.as_strided(x, x.shape, beside, x.storage_offset()) for x in (problem.k, problem.v)]
    predicted = computed(problem._replace(k=read[0], v=read[1]), torch.float64)
    return compared(problem, lambda: varlen(gems, problem), predicted=predicted)


@case(
    WRONG,
    "offsets into pages are 32-bit numbers: beyond 2**31 elements they are negative",
    "the last pages",
    alone=True,
)
def varlen_paged_overflow(gems: ModuleType, device: torch.device) -> Evidence:
    if device.type == "cpu" or torch.cuda.mem_get_info(device)[0] < 20 * 2**30:
        raise NotHereError("needs 13 GB")
    few, others = paged(device, (20,), (200,)), draw(device, 13, 16, 2, 64, seed=9)
    pages = 2**31 // few.k[0].numel() + 16
    # What lies 2**32 elements before a page is read in its place.
    memory = torch.empty(2**32 + pages * few.k[0].numel(), dtype=DTYPE, device=device)
    pool, before = (memory[start:][: pages * few.k[0].numel()].view(pages, *few.k.shape[1:]) for start in (2**32, 0))
    pool[-len(few.k) :], before[-len(few.k) :] = few.k, others
    table = few.layout.block_table + (pages - len(few.k))
    big = few._replace(k=pool, v=pool, layout=few.layout._replace(block_table=table))
    few = few._replace(v=few.k)
    mine = {"out": by_ours(big)["out"].cpu()}
    predicted = computed(few._replace(k=others, v=others), torch.float64)
    evidence = compared(few, lambda: varlen(gems, big), predicted=predicted)
    evidence.mine = mine
    return evidence


@case(RAISES, "k and v of different strides raise AssertionError", "any strides", raises="AssertionError")
def varlen_value_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    v = draw(device, sum(LENGTHS), 4, 64, seed=9)[:, ::2]
    problem = problem._replace(v=v)
    return compared(problem, lambda: varlen(gems, problem))


@case(RAISES, "seqused_k without pages does not compile", "the used part of each sequence", raises="CompilationError")
def varlen_seqused(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    used = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    q, k, v, _, layout, _ = problem
    problem = problem._replace(layout=layout._replace(seqused_k=used))
    arguments = (q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k)
    return compared(problem, lambda: {"out": gems.flash_attn_varlen_func(*arguments, seqused_k=used)})


@case(
    RAISES,
    "flash_attn_varlen_opt_func without pages raises AttributeError (torch.emtpty)",
    "attention",
    raises="AttributeError",
)
def varlen_opt(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    q, k, v, _, layout, _ = problem
    arguments = (q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k, layout.cu_seqlens_k)
    return compared(problem, lambda: {"out": gems.flash_attn_varlen_opt_func(*arguments)})


@case(RIGHT, "flash_attn_varlen_opt_func with pages", "pages of 16, causal, GQA")
def varlen_opt_paged(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (1, 20, 64), (40, 70, 200), causal=True)
    q, k, v, _, layout, _ = problem
    arguments = (q, k, v, layout.max_seqlen_q, layout.cu_seqlens_q, layout.max_seqlen_k)
    options = dict(seqused_k=layout.seqused_k, block_table=layout.block_table, causal=True, return_softmax_lse=True)

    def call() -> Results:
        return dict(zip(("out", "lse"), gems.flash_attn_varlen_opt_func(*arguments, **options), strict=True))

    return compared(problem, call, ("out", "lse"))


@case(RAISES, "there is no split-KV: num_splits beyond 0 raises RuntimeError", "attention", raises="RuntimeError")
def varlen_num_splits(gems: ModuleType, device: torch.device) -> Evidence:
    problem = paged(device, (1,), (2000,))
    return compared(problem, lambda: varlen(gems, problem, num_splits=2))


@case(RAISES, "more than 65535 sequences cannot be launched", "attention", alone=True, raises="RuntimeError")
def varlen_many_sequences(gems: ModuleType, device: torch.device) -> Evidence:
    if device.type == "cpu":
        raise NotHereError("a CPU has no grid")
    problem = packed(device, (1,) * 65536, heads=1, heads_k=1)
    evidence = Evidence(right={"out": problem.v.double().cpu()}, bounds={"out": 1e-3})  # of one key each
    evidence.mine = {"out": by_ours(problem)["out"].cpu()}
    return called(evidence, lambda: varlen(gems, problem))


@case(FACT, "it has no backward and says nothing: the result needs no gradient", "a gradient, or an error")
def varlen_no_gradient(gems: ModuleType, device: torch.device) -> Evidence:
    problem = packed(device, LENGTHS)
    return needs_no_gradient(varlen(gems, problem._replace(q=problem.q.requires_grad_())))


@case(FACT, "a lone sequence is decoded by as many programs as it has key heads", "as many as the device runs")
def varlen_decode_programs(gems: ModuleType, device: torch.device) -> Evidence:
    entry = kernel(gems, "flash_kernel", "flash_varlen_fwd_kernel")
    problem = paged(device, (1,), (4096,))
    ((_, options),) = launches(entry, lambda: varlen(gems, problem))
    programs = math.prod(options["grid"](options))
    heads_k = problem.k.shape[2]
    return Evidence(holds=programs == heads_k, note=f"{programs} programs for 4096 keys of {heads_k} heads")


@case(FACT, "max_seqlen as a tensor is read: the host waits for the device", "it stays there")
def varlen_max_seqlen(gems: ModuleType, device: torch.device) -> Evidence:
    if device.type == "cpu":
        raise NotHereError("a CPU waits for nothing")
    problem = packed(device, LENGTHS)
    varlen(gems, problem)  # compiles
    longest = torch.tensor(max(LENGTHS), device=device)
    waits = []
    for length in (max(LENGTHS), longest):
        torch.cuda.set_sync_debug_mode("error")
        try:
            varlen(gems, problem._replace(layout=problem.layout._replace(max_seqlen_q=length)))
            waits.append(False)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            waits.append(True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Evidence(holds=waits == [False, True], note=f"waits: a number {waits[0]}, a tensor {waits[1]}")
