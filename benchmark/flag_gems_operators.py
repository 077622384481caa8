"""Cases of flag_gems_report.py: what its functions are to PyTorch: operators, fakes, gradients, devices."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from flag_gems_calls import (
    FORWARDS,
    LENGTHS,
    PRESENT,
    flash,
    kernel,
    sdpa,
    sdpa_backward,
    varlen,
)
from flag_gems_evidence import (
    DTYPE,
    FACT,
    Evidence,
    Problem,
    by_ours,
    case,
    dense,
    draw,
    packed,
)


@case(FACT, "all are plain Python functions", "operators")
def package_functions(gems: ModuleType, device: torch.device) -> Evidence:
    others = [name for name in PRESENT if not inspect.isfunction(getattr(gems, name, None))]
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flag_gems::")]
    note = f"{len(PRESENT)} functions; operators of flag_gems: {', '.join(operators) or 'none'}"
    return Evidence(holds=not others and not operators, note=note + (f"; no functions: {others}" if others else ""))


@case(FACT, "enable() registers _flash_attention_forward, and no other attention, no backward", "both")
def package_registered(gems: ModuleType, device: torch.device) -> Evidence:
    class Library:
        def __init__(self) -> None:
            self.found: dict[str, Callable] = {}

        def impl(self, name: str, function: Callable, *key: str, **options: bool) -> None:
            self.found[name] = function

    library = Library()
    gems.enable(lib=library)
    names = [name for name in library.found if re.search("attention|sdp", name)]
    holds = names == ["_flash_attention_forward"] and library.found[names[0]] is gems.flash_attention_forward
    return Evidence(holds=holds, note=f"{', '.join(names)} of {len(library.found)} operators")


class _Launched(Exception):  # noqa: N818
    """A kernel would have run."""


@case(FACT, "there are no fakes: asked with fake tensors, they launch their kernels with them", "shapes")
def package_fakes(gems: ModuleType, device: torch.device) -> Evidence:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    entry = type(kernel(gems, "flash_kernel", "flash_fwd_kernel"))

    def launch(_: Any, *arguments: Any, **options: Any) -> None:
        raise _Launched(sum(isinstance(x, FakeTensor) for x in arguments))

    starts = packed(device, LENGTHS)
    fakes = {}
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(entry, "run", launch):

        def fake(problem: Problem) -> Problem:
            made = (torch.empty(x.shape, dtype=DTYPE, device=device) for x in problem[:3])
            return problem._replace(**dict(zip("qkv", made, strict=True)))

        calls = {FORWARDS[0]: (sdpa, dense(device)), FORWARDS[1]: (flash, dense(device)), FORWARDS[2]: (varlen, starts)}
        for name, (call, problem) in calls.items():
            try:
                call(gems, fake(problem))
            except _Launched as launched:
                fakes[name] = launched.args[0]
        shape = by_ours(fake(dense(device)))["out"].shape
    holds = len(fakes) == len(calls) and all(fakes.values())
    note = ", ".join(f"{name}: launched with {count} fake tensors" for name, count in fakes.items())
    return Evidence(holds=holds, note=f"{note}; ours gives {tuple(shape)}")


@case(FACT, "the fused functions have no backward and say nothing: their results need no gradient", "one, or an error")
def fused_no_gradient(gems: ModuleType, device: torch.device) -> Evidence:
    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return draw(device, *shape).to(dtype).requires_grad_()

    def count(*shape: int) -> torch.Tensor:
        return torch.arange(64, dtype=torch.int32, device=device).expand(*shape).contiguous()

    pages = torch.zeros(1, 1, dtype=torch.int32, device=device)
    length = torch.full((1,), 64, dtype=torch.int32, device=device)
    calls = {
        "flash_mla": lambda: gems.flash_mla(
            make(1, 1, 16, 576), pages, make(1, 64, 1, 576), 64, 64, 1, 1, length, 16, 1, 576, 512, True
        ),
        "flash_mla_sparse_fwd": lambda: gems.flash_mla_sparse_fwd(
            make(4, 64, 576), make(64, 1, 576), count(4, 1, 64), 0.1
        ),
        "sparse_attn_triton": lambda: gems.sparse_attn_triton(
            make(1, 4, 16, 64), make(1, 64, 64), make(16, dtype=torch.float32), count(1, 4, 64), 0.1
        ),
        "apply_rotary_pos_emb": lambda: gems.apply_rotary_pos_emb(
            make(1, 8, 4, 64), make(1, 8, 2, 64), *(draw(device, 8, 32).float() for _ in range(2))
        ),
    }
    found = {name: call() for name, call in calls.items()}
    tensors = {name: x if isinstance(x, tuple) else (x,) for name, x in found.items()}
    needs = [name for name, results in tensors.items() if any(x.requires_grad for x in results)]
    return Evidence(holds=not needs, note=f"with a gradient: {', '.join(needs) or 'none'} of {', '.join(found)}")


def _parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


@case(FACT, "the backward takes neither softcap, ALiBi, windows, packed sequences nor a seed of dropout", "all of them")
def sdpagrad_options(gems: ModuleType, device: torch.device) -> Evidence:
    names = _parameters(gems.scaled_dot_product_attention_backward)
    found = [name for name in names if re.search("softcap|alibi|window|seq|seed|offset|philox|bias", name)]
    return Evidence(holds=not found, note=f"its arguments: {', '.join(sorted(names))}")


@case(FACT, "no function takes a cache with new keys, rotation, an index of caches or padding at the left", "one")
def package_cache(gems: ModuleType, device: torch.device) -> Evidence:
    wanted = "rotary|cos|sin|cache_batch|batch_idx|leftpad|k_new|knew"
    names = ("flash_attn_varlen_func", "flash_attn_varlen_opt_func", "flash_attention_forward")
    names += ("reshape_and_cache", "reshape_and_cache_flash")
    found = {name: [p for p in _parameters(getattr(gems, name)) if re.search(wanted, p)] for name in names}
    found = {name: options for name, options in found.items() if options}
    return Evidence(holds=not found, note=f"found after all: {found}" if found else f"none of {', '.join(names)}")


@case(FACT, "the backward does not enter the device of its tensors, as the forward does", "it does")
def sdpagrad_device(gems: ModuleType, device: torch.device) -> Evidence:
    kernel(gems, "attention", "_attn_bwd")
    problem = dense(device, 128, causal=True, backward=True)
    entered: list[object] = []
    enter = torch.cuda.device

    class Watched(enter):
        def __init__(self, device: Any) -> None:
            if sys._getframe(1).f_globals["__name__"] == "flag_gems.ops.attention":
                entered.append(device)
            super().__init__(device)

    with mock.patch.object(torch.cuda, "device", Watched):
        sdpa(gems, problem, causal=True)
        forward = len(entered)
        sdpa_backward(gems, problem, causal=True)  # a forward and a backward
        backward = len(entered) - 2 * forward
    return Evidence(holds=forward > 0 and backward == 0, note=f"entered: forward {forward}, backward {backward}")


@case(
    FACT, 'flash_attention_forward asks "cuda" for its processors, whatever the device is called', "the tensors' device"
)
def dense_asks_cuda(gems: ModuleType, device: torch.device) -> Evidence:
    kernel(gems, "flash_kernel", "flash_fwd_kernel")

    class Name(str):
        """flag_gems's name of the device, told from the same word in a source."""

    asked: list[object] = []
    properties = torch.cuda.get_device_properties

    def watched(which: Any = None) -> Any:
        if sys._getframe(1).f_globals["__name__"] == "flag_gems.ops.flash_api":
            asked.append(which)
        return properties(str(which) if isinstance(which, str) else which)

    found = {}
    with (
        mock.patch.object(gems, "device", Name(gems.device)),
        mock.patch.object(torch.cuda, "get_device_properties", watched),
    ):
        for name, call, problem in (
            ("flash_attention_forward", flash, dense(device)),
            ("flash_attn_varlen_func", varlen, packed(device, LENGTHS)),
        ):
            asked.clear()
            call(gems, problem)
            found[name] = ["flag_gems.device" if isinstance(x, Name) else repr(x) for x in asked]
    holds = found == {"flash_attention_forward": ["'cuda'"], "flash_attn_varlen_func": ["flag_gems.device"]}
    return Evidence(holds=holds, note="; ".join(f"{name} asks {', '.join(x)}" for name, x in found.items()))
