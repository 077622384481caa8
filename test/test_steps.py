"""eager.again: a step against a KV cache that is like an earlier one is not checked and described again.

A CPU checks lengths in every call, and remembers no steps; here it is told not to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn_plus import cpu, eager, flash_attn_with_kvcache, gpu, kvcache, library

CAPACITY, BATCH, HEADS_K, DIM = 32, 2, 2, 16


@pytest.fixture(autouse=True)
def _no_lengths_are_looked_at(monkeypatch) -> None:
    monkeypatch.setattr(eager, "_looks_at_lengths", lambda q: False)
    for name in ("append_kv", "decode", "rotary"):
        library.memory_of(name).clear()


@pytest.fixture
def first(monkeypatch) -> list[str]:
    """An entry for every step that goes the whole way."""
    calls, real = [], kvcache._first

    def spy(step):
        calls.append("first")
        return real(step)

    monkeypatch.setattr(kvcache, "_first", spy)
    return calls


def problem(device: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, queries: int = 1, new: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    lengths = torch.randint(1, CAPACITY - 4, (BATCH,), generator=generator).int().to(device)
    return {
        "q": make(BATCH, queries, 2 * HEADS_K, DIM),
        "k_cache": make(BATCH, CAPACITY, HEADS_K, DIM),
        "v_cache": make(BATCH, CAPACITY, HEADS_K, DIM),
        "k": make(BATCH, new, HEADS_K, DIM),
        "v": make(BATCH, new, HEADS_K, DIM),
        "cache_seqlens": lengths,
    }


@pytest.fixture
def kernels(device: str, monkeypatch) -> None:
    """The Triton kernels, on a CPU too: they are made for one layout, which plain PyTorch forgives."""
    if device == "cpu":
        import interpreter

        interpreter.install()
        monkeypatch.setattr(gpu, "why_row_blocks", lambda q: None)
        for name in ("append_kv", "decode", "rotary"):
            monkeypatch.setattr(cpu, f"prepare_{name}", getattr(gpu, f"prepare_{name}"), raising=False)


def numbers(*values: int) -> Callable[[str], Tensor]:
    return lambda device: torch.tensor(values, dtype=torch.int32, device=device)


def in_pages(step: dict) -> dict:
    pages = {name: step[name].view(-1, 8, HEADS_K, DIM) for name in ("k_cache", "v_cache")}
    table = torch.tensor([[3, 0, 6, 1], [7, 2, 5, 4]], dtype=torch.int32, device=step["q"].device)
    return {**step, **pages, "block_table": table}


def rotated(step: dict, **options) -> dict:
    angles = torch.arange(CAPACITY * DIM // 2).view(CAPACITY, -1).float().to(step["q"].device)
    return {**step, "rotary_cos": angles.cos().bfloat16(), "rotary_sin": angles.sin().bfloat16(), **options}


def without_new(step: dict) -> dict:
    return {**step, "k": None, "v": None}


KINDS = {
    "append": (1, lambda step: step),
    "causal": (3, lambda step: {**step, "causal": True}),
    "no new keys": (1, without_new),
    "all keys": (1, lambda step: {**without_new(step), "cache_seqlens": None}),
    "pages": (1, in_pages),
    "rotary": (1, rotated),
    "rotary, causal": (3, lambda step: rotated(step, causal=True)),
    "rotary, window": (3, lambda step: rotated(step, window_size=(5, 2), rotary_interleaved=False)),
    "rotary, all by one row": (3, rotated),
    "numbers of caches": (1, lambda step: {**step, "cache_batch_idx": numbers(1, 0)(step["q"].device)}),
    "leftpad": (1, lambda step: {**step, "cache_leftpad": numbers(1, 0)(step["q"].device)}),
    "options": (1, lambda step: {**step, "softcap": 3.0, "softmax_scale": 0.3, "num_splits": 2}),
    "negative splits": (1, lambda step: {**step, "num_splits": -1}),
}


def make(kind: str, device: str, seed: int) -> dict:
    queries, change = KINDS[kind]
    return change(problem(device, seed, queries=queries, new=queries))


def run(step: dict) -> list[Tensor]:
    """out, lse, and the caches behind them."""
    out, lse = flash_attn_with_kvcache(**step, return_softmax_lse=True)
    return [out, lse, step["k_cache"], step["v_cache"]]


def expected(step: dict, monkeypatch) -> list[Tensor]:
    """The same the whole way."""
    copy = {name: x.clone() if isinstance(x, Tensor) else x for name, x in step.items()}
    with monkeypatch.context() as patched:
        patched.setattr(eager, "again", lambda step: None)
        return run(copy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_like_an_earlier_one(kind: str, device: str, first, monkeypatch) -> None:
    for seed in range(3):  # the first goes through the dispatcher; the second is the first that may be remembered
        run(make(kind, device, seed))
    assert len(first) == 2
    for seed in (7, 8):
        step = make(kind, device, seed)
        right = expected(step, monkeypatch)
        first.clear()
        for result, other in zip(run(step), right, strict=True):
            assert torch.equal(result, other)
        assert not first


def in_a_wider_one(x: Tensor) -> Tensor:
    """The same numbers, whose rows lie apart."""
    return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]]


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)


@pytest.mark.parametrize("place", [in_a_wider_one, misaligned])
def test_rotated_queries_lie_elsewhere(place, device: str, kernels, first, monkeypatch) -> None:
    """The kernel that runs is that for the rotated ones, which are a new tensor."""

    def laid_out(step: dict) -> dict:
        return {**step, "q": place(step["q"])}

    for seed in range(3):
        run(laid_out(problem(device, seed)))
    for seed in range(5):
        step = laid_out(rotated(problem(device, seed)))
        right = run({**rotated(problem(device, seed))})
        first.clear()
        for result, other in zip(run(step), right, strict=True):
            assert torch.equal(result, other) and result.isfinite().all()
    assert not first  # it is remembered, too


def test_inference_tensors_outside(device: str, kernels, first) -> None:
    """To guards, they look like the tensors of a step in inference mode."""
    step = problem(device)
    with torch.inference_mode():
        remembered(step, first)
        other = problem(device, 1)
    before = other["k_cache"].clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        run(other)
    assert torch.equal(other["k_cache"], before)


def test_gradients_of_keys_fill_no_memory(device: str, first) -> None:
    remembered(problem(device), first)
    for _ in range(5):
        step = problem(device, queries=2, new=2)
        step["k"].requires_grad_()
        run(step)
    first.clear()
    run(problem(device))
    assert not first and len(library.memory_of("decode").recent_callers.latest) == 1


def test_too_many_positions_are_told_before_anything_is_written(device: str) -> None:
    step = problem(device)
    before = step["k_cache"].clone()
    table = torch.ones(1, DIM // 2, dtype=torch.bfloat16, device=device).expand(2**31, -1)
    with pytest.raises((ValueError, NotImplementedError)):
        run({**step, "rotary_cos": table, "rotary_sin": table})
    assert torch.equal(step["k_cache"], before)


def test_windows_that_are_no_plain_tuples(device: str, first) -> None:
    window = NamedTuple("Window", [("left", int), ("right", int)])(3, 0)
    for seed in range(4):
        run({**problem(device, seed), "window_size": window})
    assert len(first) == 4


def remembered(step: dict, first: list[str]) -> None:
    for _ in range(3):
        run(step)
    assert len(first) == 2
    first.clear()


CHANGES = {
    "no new keys": without_new,
    "no lengths": lambda step: {**without_new(step), "cache_seqlens": None},
    "a number": lambda step: {**step, "cache_seqlens": 5},
    "pages": in_pages,
    "a window": lambda step: {**step, "window_size": (4, 0)},
    "a list": lambda step: {**step, "window_size": [-1, -1]},
    "causal": lambda step: {**step, "causal": True},
    "a scale": lambda step: {**step, "softmax_scale": 0.5},
    "softcap": lambda step: {**step, "softcap": 1.0},
    "another dtype": lambda step: {k: x.half() if x.is_floating_point() else x for k, x in step.items()},
    "other strides": lambda step: (
        {**step, "k": step["k"].transpose(1, 2).contiguous().transpose(1, 2).expand_as(step["k"])}
        | {"q": torch.cat([step["q"]] * 2, -1)[..., :DIM]}
    ),
    "other alignment": lambda step: {
        **step,
        "q": torch.cat([step["q"].flatten()[:1], step["q"].flatten()])[1:].view_as(step["q"]),
    },
    "slopes": lambda step: {**step, "alibi_slopes": torch.ones(2 * HEADS_K, device=step["q"].device)},
    "a sink": lambda step: {**step, "sink": torch.ones(2 * HEADS_K, device=step["q"].device)},
    "splits": lambda step: {**step, "num_splits": 2},
    "rotary": rotated,
    "leftpad": lambda step: {**step, "cache_leftpad": numbers(0, 1)(step["q"].device)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_that_differs(change: str, device: str, first, monkeypatch) -> None:
    remembered(problem(device), first)
    step = CHANGES[change](problem(device, 1))
    right = expected(step, monkeypatch)
    first.clear()
    for result, other in zip(run(step), right, strict=True):
        assert torch.equal(result, other)
    assert first


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"window_size": (-1.0, -1)}, "window_size"),
        ({"v": None}, "v: expected a tensor"),
        ({"k": None}, "k: expected a tensor"),
        ({"cache_seqlens": None}, "cache_seqlens: expected a tensor"),
        ({"q": None}, "q: expected a tensor"),
        ({"cache_seqlens": torch.ones(BATCH)}, "cache_seqlens"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_errors_are_told_as_before(wrong: dict, message: str, device: str, first) -> None:
    remembered(problem(device), first)
    step = problem(device, 1)
    before = step["k_cache"].clone()
    wrong = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in wrong.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        run({**step, **wrong})
    assert torch.equal(step["k_cache"], before)


@pytest.mark.parametrize("options", [{"alibi_slopes": 1}, {"sink": 1}, {"cache_seqlens": 5}, {"window_size": [3, 0]}])
def test_what_is_not_remembered(options: dict, device: str, first) -> None:
    options = {name: torch.ones(2 * HEADS_K, device=device) if x == 1 else x for name, x in options.items()}
    for seed in range(4):
        run({**problem(device, seed), **options})
    assert len(first) == 4


def test_float32_is_not_remembered(device: str, first) -> None:
    """Its precision is a global setting."""
    for seed in range(4):
        run(problem(device, seed, torch.float32))
    assert len(first) == 4


def test_on_a_cpu_lengths_are_looked_at_every_time(first, monkeypatch) -> None:
    monkeypatch.undo()
    step = problem("cpu")
    for _ in range(3):
        run(step)
    step["cache_seqlens"].fill_(CAPACITY)
    with pytest.raises(ValueError, match="cache_seqlens"):
        run(step)


def test_versions_rise(device: str, first) -> None:
    step = problem(device)
    remembered(step, first)
    versions = [step[name]._version for name in ("k_cache", "v_cache", "q", "k")]
    run(step)
    assert not first
    after = [step[name]._version for name in ("k_cache", "v_cache", "q", "k")]
    rises = [b - a for a, b in zip(versions, after, strict=True)]
    assert rises[2:] == [0, 0]
    # On a CPU, PyTorch's own functions that write raise them once more.
    assert rises[:2] == ([2, 2] if step["q"].is_cpu else [1, 1])


def test_inference_mode(device: str, first) -> None:
    """Its tensors are refused outside of it, remembered or not."""
    with torch.inference_mode():
        step = problem(device)
        remembered(step, first)
        run(step)
        assert not first
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        run(step)


def test_gradients(device: str, first) -> None:
    """Where they would be recorded, a step goes the whole way: there the lack of a backward is told."""
    step = problem(device)
    remembered(step, first)
    step["q"].requires_grad_()
    for _ in range(3):
        out, *_ = run(step)
        assert out.requires_grad
    with pytest.raises(NotImplementedError):
        out.sum().backward()
    first.clear()
    with torch.no_grad():
        for _ in range(3):
            out, *_ = run(step)
            assert not out.requires_grad


class Sees(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_both_operators(device: str, first) -> None:
    step = problem(device)
    remembered(step, first)
    with Sees() as mode:
        run(step)
    assert [name for name in mode.names if "flash_attn_plus" in name] == [
        "flash_attn_plus.append_kv.default",
        "flash_attn_plus.decode.default",
    ]


def test_the_profiler_sees_both_operators(device: str, first) -> None:
    step = problem(device)
    remembered(step, first)
    with torch.profiler.profile() as profile:
        run(step)
    assert {"flash_attn_plus::append_kv", "flash_attn_plus::decode"} <= {event.key for event in profile.key_averages()}


def test_autocast(device: str, first) -> None:
    """What was remembered outside of it is not taken inside."""
    step = problem(device)
    remembered(step, first)
    with warnings.catch_warnings(), torch.autocast(torch.device(device).type, torch.bfloat16):
        warnings.simplefilter("ignore")
        for _ in range(3):
            run(step)
    assert len(first) == 3
    first.clear()
    run(step)
    assert not first


def test_compiled(device: str, first) -> None:
    step = problem(device)
    remembered(step, first)
    compiled = torch.compile(lambda **step: flash_attn_with_kvcache(**step), backend="eager", fullgraph=True)
    assert torch.equal(compiled(**step), flash_attn_with_kvcache(**step))


def test_what_is_forgotten_with_the_operator(device: str, first) -> None:
    step = problem(device)
    remembered(step, first)
    library.memory_of("decode").clear()
    run(step)
    assert first
