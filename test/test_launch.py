"""kernels/launch.py and kernels/relaunch.py: what is launched again takes the addresses and numbers that the operators
would give it.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from test_kvcache import Case

from flash_attn_plus import eager
from flash_attn_plus.memory import Latest
from flash_attn_plus.schemas import New

pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")
append, arguments, decode, launch, relaunch = (
    importlib.import_module(f"flash_attn_plus.kernels.{name}")
    for name in ("append", "arguments", "decode", "launch", "relaunch")
)
CASES = [
    Case("contiguous", (19, 5), seqlen_new=1),
    Case("pages", (19, 5), seqlen_new=2, page_size=4, window=(9, 0)),
    Case("leftpad", (19, 5), seqlen_new=1, leftpad=(3, 0), batch_idx=(2, 0), caches=3),
    Case("split", (300,), capacity=400, seqlen_new=1, num_splits=3),
    Case("no_new", (19, 5), capacity=400, num_splits=2),
    Case("one_list_twice", (1, 0), seqlen_new=1, batch_idx=(1, 0)),
]


class Direct:
    """In the place of what launches a compiled kernel."""

    def __init__(self, of: launch.Launch, launched: list) -> None:
        self.launch = lambda told, stream: launched.append((of, told, stream))

    def behind_of(self, rest: tuple) -> tuple:
        return ("behind", id(rest))


def step_of(case: Case) -> eager.Step:
    """With tensors of its own, of the same layout every time."""
    problem = case.decoding("cpu", torch.float16)
    cache, variant = problem.cache, problem.variant
    k = v = None
    if case.seqlen_new:
        k, v = (torch.empty(case.sequences, case.seqlen_new, case.heads_k, case.dim).half() for _ in range(2))
    batch_idx = cache.cache_batch_idx
    if case.name == "one_list_twice":
        batch_idx = cache.cache_seqlens
    return eager.Step(
        *(*problem[:3], k, v, None, None, cache.cache_seqlens, batch_idx, cache.cache_leftpad, cache.block_table),
        *(variant.softmax_scale, variant.causal, (variant.window_left, variant.window_right), 0.0, True, None),
        *(case.num_splits, None),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_operators_launch(case: Case, device: str, monkeypatch) -> None:
    if device != "cpu":
        pytest.skip("on a GPU test_gpu_kvcache.py runs what is launched")
    import interpreter

    interpreter.install()
    problem = case.decoding("cpu", torch.float16)
    step, other = step_of(case), step_of(case)
    cache = problem.cache._replace(cache_seqlens=step.cache_seqlens, cache_batch_idx=step.cache_batch_idx)
    write = None
    new = New(*step[7:9], step.block_table)
    if step.k is not None:
        write = append.Append(*step[1:5], new)
    attend = decode.Decode(*step[:3], cache, problem.variant, case.num_splits)
    launched: list = []
    for one in (write and write.launch, attend.launch, getattr(attend, "combine", None)):
        if one is not None:
            one.direct, one.stream_of = Direct(one, launched), lambda index: "stream"
    again = eager._relaunch(Latest(step, None), step, write, attend, cache)
    assert again is not None
    # The same results both times, to compare where they lie.
    results = arguments.empty(*attend.results)
    monkeypatch.setattr(arguments, "empty", lambda *of: list(results) if of == attend.results else 1 / 0)
    out, lse, _ = again(Latest(step, None).addresses_of(other))
    assert out is results[0] and lse is results[1]
    expected: list = []

    def record(self, tensors: tuple, rest: tuple) -> None:
        told = [x.data_ptr() for x in tensors if x is not None]
        expected.append((self, (*told, "behind", id(rest)), "stream"))

    monkeypatch.setattr(launch.Launch, "__call__", record)
    if write is not None:
        write(*other[1:5], New(*other[7:9], other.block_table))
    lists = (other.cache_seqlens, cache.seqlen_new, other.cache_batch_idx, other.cache_leftpad, other.block_table)
    attend(*other[:3], type(cache)(*lists), problem.variant, case.num_splits)
    assert launched == expected and len(expected) == 1 + (write is not None) + (results[2] is not None)


def test_where_a_call_is_more_than_launches(device: str, monkeypatch) -> None:
    if device != "cpu":
        pytest.skip("it has no kernel to launch")
    import interpreter

    interpreter.install()
    case = CASES[0]
    problem, step = case.decoding("cpu", torch.float16), step_of(case)

    def of(q=step.q, variant=problem.variant, seqlens=step.cache_seqlens):
        cache = problem.cache._replace(cache_seqlens=seqlens)
        attend = decode.Decode(q, *step[1:3], cache, variant, 0)
        if hasattr(attend, "launch"):
            attend.launch.direct, attend.launch.stream_of = direct, None
        given = step._replace(q=q, k=None, v=None, cache_seqlens=seqlens)
        return eager._relaunch(Latest(given, None), given, None, attend, cache)

    direct = Direct(None, [])
    assert of() is not None
    assert of(q=step.q.repeat_interleave(2, -1)[..., ::2]) is None  # a copy is made
    assert of(seqlens=step.cache_seqlens.repeat_interleave(2)[::2]) is None
    assert of(q=step.q[:, :0]) is None  # nothing is launched
    assert (
        of(variant=problem.variant._replace(sink=torch.zeros(case.heads))) is None
    )  # its address is no tensor's of it
    direct = None
    assert of() is None  # such a launcher is not there
    # Nor are operators of CPUs launches.
    assert eager._relaunch(Latest(step, None), step, None, torch.ops.flash_attn_plus.decode, problem.cache) is None


@pytest.mark.parametrize("possible", [True, False])
@pytest.mark.parametrize("appends", [True, False])
def test_the_function_takes_this_way(appends: bool, possible: bool, device: str, monkeypatch) -> None:
    if device != "cpu":
        pytest.skip("on a GPU test_gpu_kvcache.py takes it")
    case = CASES[0] if appends else CASES[4]
    step, other, ran = step_of(case), step_of(case), []

    class Again:
        def is_possible(self) -> bool:
            return possible

        def __call__(self, addresses: list[int]) -> list:
            ran.append(addresses)
            return ["out", "lse", "parts"]

    def write(*args) -> None:
        ran.append(args)

    def attend(*args) -> tuple[str, str]:
        ran.append(args)
        return "out", "lse"

    ways = eager._Ways(None, write if appends else None, attend, None, case.num_splits, Again())
    monkeypatch.setattr(eager._steps, "latest", (Latest(step, ways),))
    caches = other.k_cache, other.v_cache
    versions = [x._version for x in caches]
    with torch.no_grad():
        assert eager.again(other) == ("out", "lse")
    assert [x._version for x in caches] == [version + appends for version in versions]
    tensors = [x for x in other if isinstance(x, torch.Tensor)]
    if possible:
        assert ran == [[x.data_ptr() for x in tensors]]
    else:
        assert len(ran) == 1 + appends and ran[-1][0] is other.q
    assert eager.again(other._replace(q=other.q[:, :0])) is None


@pytest.mark.parametrize("hindrance", ["", "device", "thread", "watched", "capture"])
def test_where_it_is_not_possible(hindrance: str, device: str, monkeypatch) -> None:
    if device != "cpu":
        pytest.skip("a stand-in is asked")
    prepared = launch.Prepared(torch.device("cpu"))
    if hindrance == "device":
        prepared.current_index = lambda: 7
    one = SimpleNamespace(direct=Direct(None, []), stream_of=None)
    again = relaunch.Relaunch(prepared, (), [(one, (0, 1), ("rest",))])
    monkeypatch.setattr(launch.of_thread, "has_context", hindrance != "thread")
    if hindrance == "watched":
        monkeypatch.setattr(relaunch, "is_watched", lambda: True)
    if hindrance == "capture":
        monkeypatch.setattr(relaunch.device, "is_capturing", lambda: True)
    assert again.is_possible() == (not hindrance)


@pytest.mark.parametrize("names", [("DIM", "BLOCK"), ("BLOCK",), ("BLOCK", "DIM", "EARLY")])
def test_constants_are_passed_by_their_places(names: tuple[str, ...]) -> None:
    function = SimpleNamespace(arg_names=["x_ptr", "BLOCK", "DIM"])
    assert launch.Launch(function, 1, {"BLOCK": 1, "DIM": 2}, {}).constants == (1, 2)
    with pytest.raises(TypeError, match="constants: expected"):
        launch.Launch(function, 1, dict.fromkeys(names, 1), {})
