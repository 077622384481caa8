"""Cases of flag_gems_report.py: flash_attention_forward."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from flag_gems_calls import (
    band,
    flash,
    flash_again,
    heads_first,
    kernel,
    reread,
    slopes,
)
from flag_gems_evidence import (
    FACT,
    RAISES,
    RIGHT,
    WRONG,
    Evidence,
    NotHereError,
    Problem,
    Results,
    called,
    case,
    compared,
    computed,
    dense,
    draw,
    instead,
    needs_no_gradient,
    of_each,
    only_nan,
)
from torch import Tensor


@case(RIGHT, "GQA", "4 query heads, 2 key heads")
def dense_gqa(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 100, 200, heads_k=2)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(RIGHT, "causal, aligned bottom-right, where the number of queries is a multiple of 128", "128 queries, 256 keys")
def dense_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, causal=True)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(RIGHT, "softcap", "softcap 2")
def dense_softcap(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, softcap=2.0)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(RIGHT, "ALiBi", "-slope * |distance|")
def dense_alibi(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, alibi_slopes=slopes(device))
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"))


@case(WRONG, "causal with ALiBi, the log-sum-exp is off by a constant in each row; out is right", "-slope * |distance|")
def dense_alibi_causal(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 128, 256, alibi_slopes=slopes(device), causal=True)
    predicted = computed(problem, torch.float64)
    predicted["lse"] += slopes(torch.device("cpu"))[:, None] * (torch.arange(128) - 127)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"), predicted)


@case(RIGHT, "dropout: what it keeps is divided by 1 - p", "the mean stays: 1 for values of 1")
def dense_dropout(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, 512)
    problem = problem._replace(v=torch.ones_like(problem.v))
    evidence = Evidence(right={"mean": torch.ones((), dtype=torch.float64)}, bounds={"mean": 0.05})
    return called(evidence, lambda: {"mean": flash(gems, problem, dropout=0.5)["out"].float().mean()})


@case(RIGHT, "a window with two sides, where the number of queries is a multiple of 128", "window (64, 32)")
def dense_window(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, window_left=64, window_right=32)
    return compared(problem, lambda: flash(gems, problem, window_size_left=64, window_size_right=32))


@case(RIGHT, "head dimensions 24, 96, 192 and 256", "each of them")
def dense_head_dims(gems: ModuleType, device: torch.device) -> Evidence:
    def look(dim: int) -> Evidence:
        problem = dense(device, 64, heads=2, dim=dim, batch=1)
        return compared(problem, lambda: flash(gems, problem), ("out", "lse"))

    return of_each((24, 96, 192, 256), look)


@case(RAISES, "head dimensions up to 16 raise AssertionError", "1 to 256", raises="AssertionError")
def dense_head_dim_16(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 64, dim=16)
    return compared(problem, lambda: flash(gems, problem))


def _truncated(problem: Problem, right: int) -> Tensor:
    """Which columns a block of 128 rows reaches, counted from the end of the last block instead of the last row."""
    sq, sk, blocks = problem.q.shape[1], problem.k.shape[1], -(-problem.q.shape[1] // 128)
    ends = [min(sk, sk + (block + 1 - blocks) * 128 + right) for block in range(blocks)]
    end = torch.tensor([-(-end // 32) * 32 for end in ends]).repeat_interleave(128)[:sq, None]
    return band(problem, lambda i, j: j < end)


@case(WRONG, "causal loses keys where the number of queries is no multiple of 128", "192 queries, 192 keys")
def dense_causal_odd(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 192, causal=True)
    predicted = instead(problem, attn_bias=_truncated(problem, 0))
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"), predicted)


@case(WRONG, "a window loses keys there too", "window (64, 32), 192 queries")
def dense_window_odd(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 192, window_left=64, window_right=32)
    predicted = instead(problem, attn_bias=_truncated(problem, 32))
    options = dict(window_size_left=64, window_size_right=32)
    return compared(problem, lambda: flash(gems, problem, **options), ("out", "lse"), predicted)


@case(WRONG, "a window with one side is dropped", "window (64, -1)")
def dense_window_left(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, window_left=64)
    call = functools.partial(flash, gems, problem, window_size_left=64)
    return compared(problem, call, predicted=instead(problem, window_left=-1))


@case(WRONG, "a window is dropped whose left side reaches all keys", "window (1000, 16)")
def dense_window_wide(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, window_left=1000, window_right=16)
    call = functools.partial(flash, gems, problem, window_size_left=1000, window_size_right=16)
    return compared(problem, call, predicted=instead(problem, window_left=-1, window_right=-1))


@case(WRONG, "v is read with the strides of k", "any strides")
def dense_value_strides(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    v = draw(device, 2, 192, 4, 64, seed=9)[:, :128]
    problem = problem._replace(v=v)
    predicted = computed(problem._replace(v=reread(v, problem.k)), torch.float64)
    return compared(problem, lambda: flash(gems, problem), predicted=predicted)


@case(WRONG, "split-KV writes (b, s, h, d) wrongly and outside its memory", "8 heads, 16 queries", alone=True)
def dense_splitkv_contiguous(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 16, 2048, heads=8, batch=1)
    nothing = {"out": torch.full((1, 16, 8, 64), torch.nan)}
    first = torch.zeros(1, 16, 8, 64, dtype=torch.bool)
    first[:, :, 0] = True  # several programs write each row of the first head, the last one stays
    call = functools.partial(flash, gems, problem, split=True)
    return compared(problem, call, ("out",), nothing, {"out": first}, predicted_outside=7 * 64)


@case(WRONG, "so does a decoding step without GQA", "8 heads, one query", alone=True)
def dense_splitkv_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 1, 2048, heads=8, batch=1)
    predicted = computed(problem, torch.float64)
    predicted["out"][:, :, 1:] = torch.nan  # a head for each row, of which there is one
    call = functools.partial(flash, gems, problem, split=True)
    return compared(problem, call, predicted=predicted, predicted_outside=7 * 64)


@case(RIGHT, "split-KV on memory in the order (b, h, s, d)", "the same, transposed", alone=True)
def dense_splitkv_transposed(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 16, 2048, heads=8, batch=1)
    problem = problem._replace(**{name: heads_first(getattr(problem, name)).transpose(1, 2) for name in "qkv"})
    return compared(problem, lambda: flash(gems, problem, split=True), ("out", "lse"))


@case(RIGHT, "split-KV with GQA and one query", "8 query heads, 2 key heads", alone=True)
def dense_splitkv_gqa_decode(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 1, 2048, heads=8, heads_k=2, batch=1)
    return compared(problem, lambda: flash(gems, problem, split=True))


@case(WRONG, "split-KV gives NaN to rows that see no key", "0", alone=True)
def dense_splitkv_empty_rows(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 512, 256, heads=2, batch=1, causal=True)
    problem = problem._replace(**{name: heads_first(getattr(problem, name)).transpose(1, 2) for name in "qkv"})
    predicted = computed(problem, torch.float64)
    predicted["out"][:, :256] = torch.nan
    return compared(problem, lambda: flash(gems, problem, split=True), predicted=predicted)


@case(WRONG, "scale=0.0 is taken for None", "every key counts the same")
def dense_scale_zero(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, softmax_scale=0.0)
    call = functools.partial(flash, gems, problem, scale=0.0)
    return compared(problem, call, predicted=instead(problem, softmax_scale=None))


@case(WRONG, "a negative scale under a mask gives NaN", "scale -0.125, causal")
def dense_scale_negative(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, softmax_scale=-0.125, causal=True)
    return compared(problem, lambda: flash(gems, problem, scale=-0.125), predicted=only_nan(problem))


@case(WRONG, "the log-sum-exp of a row that sees no key is +inf", "-inf; out is 0")
def dense_empty_rows(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device, 256, 128, causal=True)
    predicted = computed(problem, torch.float64)
    predicted["lse"] = predicted["lse"].masked_fill(predicted["lse"] == -torch.inf, torch.inf)
    return compared(problem, lambda: flash(gems, problem), ("out", "lse"), predicted)


@case(FACT, "it has no backward and says nothing: the result needs no gradient", "a gradient, or an error")
def dense_no_gradient(gems: ModuleType, device: torch.device) -> Evidence:
    problem = dense(device)
    return needs_no_gradient(flash(gems, problem._replace(q=problem.q.requires_grad_())))


@case(WRONG, "100 keys of a cache after 128 of it reuse the kernel for even lengths, and see 128", "100 keys")
def libentry_cache_slice(gems: ModuleType, device: torch.device) -> Evidence:
    whole = dense(device, 128, 256)
    first, then = (whole._replace(k=whole.k[:, :n], v=whole.v[:, :n]) for n in (128, 100))

    notes: list[str] = []

    def call() -> Results:
        flash(gems, first)  # forgets what was compiled, and compiles
        try:
            remembered = kernel(gems, "flash_kernel", "flash_fwd_kernel").kernel_cache
        except NotHereError:
            remembered = ()
        before = sum(map(len, remembered))
        found = flash_again(gems, then)
        notes.append(f"{sum(map(len, remembered)) - before} kernels compiled for it")
        return found

    evidence = compared(then, call, predicted=computed(first, torch.float64))
    evidence.note = "; ".join(filter(None, [evidence.note, *notes]))
    return evidence
