"""The KV cache on a GPU: long contexts, CUDA graphs over growing lengths, memory, streams, and lengths that lie.

Values at small sizes are in test_kvcache_kernels.py, which runs there too. Tests that hold more than 8 GB share the
xdist group "memory", as those of test_gpu_forward.py do.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from test_gpu_forward import check_alone
from test_kvcache import (
    APPEND_BY_NAME,
    APPEND_CASES,
    APPEND_ROTARY_CASES,
    DECODE_BY_NAME,
    DECODE_CASES,
    EVERYTHING,
    Appending,
    Case,
    Decoding,
    check_appending,
    check_decoding,
    run_append,
    run_decode,
    same_bits,
)
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import flash_attn_plus as fap

pytestmark = pytest.mark.gpu

OPS = torch.ops.flash_attn_plus
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """The workers share one device: none keeps what a test has cached."""
    yield
    torch.cuda.empty_cache()


def long(name: str, lengths: tuple[int, ...] | None = (131_072, 1, 40_000), **options) -> Case:
    """Scores with a deviation of 4: a few keys have most of the weight, so that losing one block of many shows."""
    dim = options.get("dim", 64)
    defaults = {"capacity": 131_072, "dim": dim, "heads": 4, "heads_k": 1, "softmax_scale": 4.0 * dim**-0.5}
    return Case(f"long_{name}", lengths, **defaults | options)


LONG = [
    long("one", (131_072,)),
    long("one_less_one", (131_071,)),
    long("uneven"),
    long("whole", None, batch=2),
    long("many", tuple(range(0, 64 * 128, 128)), capacity=8192, heads=2),
    long("one_of_many", (*[17] * 63, 131_072), capacity=131_072, heads=1, dim=16),
    long("dim_128", (100_001, 70_000), dim=128, heads=8),
    long("dim_59", (65_000, 3), dim=59),
    long("dim_256", (30_000, 3), dim=256, capacity=30_000),
    long("latent", (30_000, 3), dim=192, dim_v=128, heads=16, capacity=30_000),
    long("group_7", (100_001, 5), heads=14, heads_k=2),
    long("as_many_heads", (60_000, 5), heads=3, heads_k=3, capacity=60_000),
    long("queries_3", seqlen_q=3, seqlen_new=3, lengths=(131_069, 0, 40_000), causal=True),
    long("queries_64", seqlen_q=64, causal=True),
    long("prefill", seqlen_q=300, causal=True),
    long("window", window=(5000, -1)),
    long("window_queries", window=(5000, 100), seqlen_q=9),
    long("softcap_alibi", softcap=20.0, alibi="bh"),
    long("sink", sink="bh", seqlen_q=2, causal=True),
    long("leftpad", leftpad=(100_000, 0, 39_999)),
    long("batch_idx", batch_idx=(2, 0, 1), layout="heads_first"),
    long("sliced", layout="sliced", dim=72),
    long("layer", layout="layer"),
    *(long(f"splits_{n}", num_splits=n) for n in (1, 2, 7, 100, 5000)),
    *(long(f"paged_{n}", page_size=n) for n in (1, 16, 48, 64, 256)),
    long("paged_64_dim_128", page_size=64, dim=128, heads=8, lengths=(100_001, 70_000, 5, 1300)),
    long("paged_64_window", page_size=64, dim=128, heads=8, window=(60_000, -1)),
    long("paged_shared", page_size=16, shared_pages=2000, lengths=(131_072, 32_001, 40_000)),
    long("paged_window", page_size=16, window=(3000, -1), sink="h", causal=True, seqlen_q=2),
    long("paged_prefill", page_size=16, seqlen_q=130, causal=True),
]


class TestLongContexts:
    @pytest.mark.parametrize("case", LONG, ids=str)
    def test_bfloat16(self, case, device):
        check_decoding(case.decoding(device, BF16), case.name)

    @pytest.mark.parametrize("name", ["uneven", "paged_16", "queries_3"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_dtypes(self, name, dtype, device):
        case = next(case for case in LONG if case.name == f"long_{name}")
        check_decoding(case.decoding(device, dtype), case.name)

    @pytest.mark.parametrize("dim", [1, 8, 24, 40, 59, 72, 96, 111, 128, 160, 192, 224, 255, 256])
    def test_head_dim(self, dim, device):
        case = Case(f"head_dim_{dim}", (900, 0, 37), capacity=1000, dim=dim, heads=6, heads_k=2)
        check_decoding(case.decoding(device, BF16), case.name)

    def test_a_large_batch(self, device):
        lengths = [(i * 7919) % 2000 for i in range(700)]
        case = Case("large_batch", tuple(lengths), capacity=2000, heads=1, heads_k=1, dim=16, page_size=16)
        check_decoding(case.decoding(device, BF16), case.name)

    def test_a_long_append(self, device):
        case = Case("long_append", (0, 70_000), capacity=100_000, seqlen_new=30_000, rotary_dim=64, dim=128)
        problem = case.appending(device, BF16)
        k_cache, v_cache = (x.clone() for x in problem[:2])
        run_append(problem)
        new = problem.new
        k = OPS.rotary(problem.k, new.rotary_cos, new.rotary_sin, 0, new.cache_seqlens, interleaved=True)
        for cache, rows in ((k_cache, k), (v_cache, problem.v)):
            for b, length in enumerate(case.lengths):
                cache[b, length : length + 30_000] = rows[b]
        assert same_bits((k_cache, v_cache), problem[:2])


@pytest.mark.parametrize("case", [*APPEND_CASES, *APPEND_ROTARY_CASES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_later_appends_are_the_first_one(case, dtype, device):
    """A remembered launch passes addresses instead of tensors."""
    for _ in range(3):
        check_appending(case.appending(device, dtype), case.name)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_later_decodings_are_the_first_one(case, device):
    problem = case.decoding(device, BF16)
    first = run_decode(problem)
    for _ in range(3):
        assert same_bits(run_decode(problem), first)


RERUN = ["uneven", "many", "group_7", "queries_64", "prefill", "sink", "splits_100", "paged_1", "paged_16", "latent"]


@pytest.mark.parametrize("name", RERUN)
def test_50_reruns_are_bit_equal(name, device):
    problem = next(case for case in LONG if case.name == f"long_{name}").decoding(device, BF16)
    first = run_decode(problem)
    for n in range(50):
        assert same_bits(run_decode(problem), first), f"run {n}"


def test_50_reruns_of_appending_are_bit_equal(device):
    case = replace(APPEND_BY_NAME["rotary_paged"], lengths=(1300, 0, 4700), capacity=6000, seqlen_new=900)
    problem = case.appending(device, BF16)
    first = case.appending(device, BF16)
    run_append(first)
    caches = [x.clone() for x in problem[:2]]
    for n in range(50):
        for x, before in zip(problem[:2], caches, strict=True):
            x.copy_(before)
        run_append(problem)
        assert same_bits(problem[:2], first[:2]), f"run {n}"


class Growing:
    """A batch of decoders whose sequences grow: one step appends and attends, and is captured once."""

    def __init__(
        self,
        device: str,
        page_size: int,
        seqlen: int = 1,
        rotary: bool = True,
        capacity: int = 3000,
        batch: int = 4,
        dim: int = 64,
    ) -> None:
        self.seqlen, self.batch, heads, heads_k = seqlen, batch, 8, 2
        make = functools.partial(torch.randn, dtype=BF16, device=device)
        self.q = make(self.batch, seqlen, heads, dim)
        self.k, self.v = make(2, self.batch, seqlen, heads_k, dim).unbind(0)
        self.lengths = torch.zeros(self.batch, dtype=torch.int32, device=device)
        self.table, shape = None, (self.batch, capacity)
        if page_size:
            each = -(-capacity // page_size)
            shape = (self.batch * each + 3, page_size)
            order = torch.randperm(shape[0], device=device)[: self.batch * each]
            self.table = order.view(self.batch, each).to(torch.int32)
        self.caches = [torch.full((*shape, heads_k, dim), float("nan"), dtype=BF16, device=device) for _ in range(2)]
        self.tables = (None, None)
        if rotary:
            angles = torch.rand(-(-capacity // max(page_size, 1)) * max(page_size, 1), dim // 2, device=device) * 6
            self.tables = angles.cos().to(BF16), angles.sin().to(BF16)

    def step(self, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        return fap.flash_attn_with_kvcache(
            *(self.q, *caches, self.k, self.v, *self.tables, self.lengths, None, None, self.table),
            causal=True,
            return_softmax_lse=True,
        )

    def next(self, lengths: list[int]) -> None:
        self.lengths.copy_(torch.tensor(lengths))
        for x in (self.q, self.k, self.v):
            x.normal_()

    def captured(self) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step([x.clone() for x in self.caches])  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.step(self.caches)
        return graph, results


class TestGraphs:
    @pytest.mark.parametrize("page_size", [0, 1, 16, 48, 64])
    @pytest.mark.parametrize("seqlen", [1, 3])
    def test_a_step_over_growing_lengths(self, seqlen, page_size, device):
        growing = Growing(device, page_size, seqlen)
        graph, results = growing.captured()
        caches = [x.clone() for x in growing.caches]
        seen, starts = [], [0, 15, 700, 2900]
        # Rows before the first step count too: they are filled.
        for x in (growing.caches, caches):
            generator = torch.Generator(device).manual_seed(1)
            for cache in x:
                cache.copy_(torch.randn(cache.shape, generator=generator, device=device))
        assert same_bits(tuple(growing.caches), tuple(caches))
        for n in range(0, 20 * seqlen, seqlen):
            growing.next([start + n for start in starts])
            graph.replay()
            expected = growing.step(caches)
            assert same_bits(results, expected), f"step {n}"
            assert same_bits(tuple(growing.caches), tuple(caches)), f"caches at step {n}"
            assert not any(torch.equal(results[0], earlier) for earlier in seen)
            seen.append(results[0].clone())
        assert all(x.isfinite().all() for x in results)

    @pytest.mark.parametrize("page_size", [0, 16, 48, 64, 256])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_keys_that_were_asked_for_ahead(self, batch, page_size, device):
        """Programs that have a processor to themselves ask for their first keys while these, and how many they are, are
        being written.
        """
        growing = Growing(device, page_size, batch=batch, dim=128, capacity=2048)
        lengths = torch.zeros_like(growing.lengths)

        def step(caches: list[Tensor]) -> list[Tensor]:
            results = []
            for _ in range(6):
                results += growing.step(caches)
                growing.lengths.add_(1)
            growing.lengths.copy_(lengths)
            return results

        step([x.clone() for x in growing.caches])  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(growing.caches)
        for x in growing.caches:
            x.normal_()
        caches = [x.clone() for x in growing.caches]
        for start in (0, 3, 100, 126, 1100, 2041):
            lengths.fill_(start)
            growing.next([start] * batch)
            graph.replay()
            got = [x.clone() for x in results]
            assert same_bits(tuple(got), tuple(step(caches))), f"from {start}"
            assert same_bits(tuple(growing.caches), tuple(caches)), f"caches from {start}"

    @pytest.mark.parametrize("page_size", [0, 16])
    def test_from_nothing_to_the_whole_capacity(self, page_size, device):
        """Empty sequences, and full ones, in one batch; what is not yet written is NaN."""
        growing = Growing(device, page_size, rotary=False, capacity=320)
        graph, results = growing.captured()
        caches = [x.clone() for x in growing.caches]
        for n in range(320):
            growing.next([n] * growing.batch)
            graph.replay()
            expected = growing.step(caches)
            assert same_bits(results, expected) and results[0].isfinite().all(), f"step {n}"
        assert same_bits(tuple(growing.caches), tuple(caches))

    def test_another_table_and_other_caches(self, device):
        problem = replace(DECODE_BY_NAME["paged_16"], lengths=(37, 64, 0, 49)).decoding(device, BF16)
        problem = problem._replace(k_cache=torch.randn_like(problem.k_cache), v_cache=torch.randn_like(problem.v_cache))
        run_decode(problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run_decode(problem)
        table, lengths = problem.cache.block_table, problem.cache.cache_seqlens
        for n in range(4):
            table.random_(0, problem.k_cache.shape[0])
            lengths.random_(0, 65)
            graph.replay()
            assert same_bits(results, run_decode(problem)), f"table {n}"
        numbered = DECODE_BY_NAME["batch_idx_of_more"].decoding(device, BF16)
        numbered = numbered._replace(k_cache=torch.randn_like(numbered.k_cache))
        numbered = numbered._replace(v_cache=torch.randn_like(numbered.v_cache))
        run_decode(numbered)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run_decode(numbered)
        for n in range(4):
            numbered.cache.cache_batch_idx.random_(0, 6)
            graph.replay()
            assert same_bits(results, run_decode(numbered)), f"caches {n}"


class TestEarlyStart:
    """In a CUDA graph, kernels are placed before the one in front has ended (kernels/early.py)."""

    SLEEP = 2_000_000  # cycles: a millisecond, in which a kernel that does not wait would have ended

    @pytest.mark.parametrize("name", ["plain", "everything_splits", "paged_16"])
    def test_waits_for_what_it_reads(self, name, device):
        """Queries, keys, lengths and tables are written a millisecond after the kernel could have started."""
        problem = DECODE_BY_NAME[name].decoding(device, BF16)
        fields = {"q": problem.q, "k_cache": problem.k_cache, "v_cache": problem.v_cache}
        lists = {"cache_seqlens": problem.cache.cache_seqlens, "block_table": problem.cache.block_table}
        right = {key: x.clone() for key, x in {**fields, **lists}.items() if x is not None}
        expected = run_decode(problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for key, x in right.items():
                torch.cuda._sleep(self.SLEEP)
                {**fields, **lists}[key].copy_(x)
            results = run_decode(problem)
        for _ in range(3):
            for key in right:
                {**fields, **lists}[key].zero_()
            graph.replay()
            assert same_bits(results, expected)

    def test_what_follows_waits_for_it(self, device):
        """Kernels that know nothing of early starts, one that overwrites what is still read among them."""
        problem = DECODE_BY_NAME["everything_splits"].decoding(device, BF16)
        keys = problem.k_cache.clone()
        expected = run_decode(problem)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.k_cache.copy_(keys)
            results = [x + 1 for x in run_decode(problem)]
            problem.k_cache.zero_()
        for _ in range(20):
            graph.replay()
            assert same_bits(tuple(results), tuple(x + 1 for x in expected))
            assert not problem.k_cache.any()

    @pytest.mark.parametrize("in_front", ["nothing", "memset", "copy", "host copy", "two streams", "event"])
    def test_after_anything(self, in_front, device):
        """Whatever a graph has in front of the kernel, capturing it works and its values are right."""
        problem = DECODE_BY_NAME["everything_splits"].decoding(device, BF16)
        expected = run_decode(problem)
        q, other = problem.q.clone(), torch.cuda.Stream()
        on_host = q.cpu().pin_memory()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            here = torch.cuda.current_stream()
            if in_front == "memset":
                problem.q.zero_()
                problem.q.add_(q)
            elif in_front == "copy":
                problem.q.copy_(q)
            elif in_front == "host copy":
                problem.q.copy_(on_host, non_blocking=True)
            elif in_front in ("two streams", "event"):
                other.wait_stream(here)
                with torch.cuda.stream(other):
                    torch.cuda._sleep(self.SLEEP)
                    problem.q.copy_(q)
                if in_front == "two streams":
                    problem.k_cache.add_(0)
                here.wait_stream(other)
            results = run_decode(problem)
        for _ in range(3):
            if in_front != "nothing":
                problem.q.zero_()
            graph.replay()
            assert same_bits(results, expected)

    def test_outside_of_graphs_too(self, device):
        """The first launch of all asks for an early start, whatever comes in front of it."""
        for dim in (40, 72, 104):  # compiled here
            problem = Case("early", (700, 900), capacity=1000, dim=dim, num_splits=3).decoding(device, BF16)
            q = problem.q.clone()
            problem.q.zero_()
            torch.cuda._sleep(self.SLEEP)
            problem.q.copy_(q)
            first = run_decode(problem)
            assert same_bits(first, run_decode(problem)) and first[0].any()


PUBLIC_CALLS = ["new keys", "a number", "rotary", "paged", "splits", "prefill", "decode alone", "options"]


def public_call(name: str, device: str) -> Callable[[], object]:
    growing = Growing(device, 16 if name == "paged" else 0, 100 if name == "prefill" else 1, name == "rotary")
    growing.next([5, 0, 1000, 2000])
    q, (k_cache, v_cache), table = growing.q, growing.caches, growing.table
    options = {"causal": True, "cache_seqlens": growing.lengths, "block_table": table, "return_softmax_lse": True}
    new = {"k": growing.k, "v": growing.v, "rotary_cos": growing.tables[0], "rotary_sin": growing.tables[1]}
    if name == "decode alone":
        new = {}
    if name == "a number":
        options["cache_seqlens"] = 70
    if name == "splits":
        options["num_splits"] = 5
    if name == "options":
        slopes = torch.rand(4, 8, device=device)
        pads, numbers = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([1, 0, 9, 3], [3, 0, 1, 2]))
        options |= {"cache_leftpad": pads, "cache_batch_idx": numbers, "alibi_slopes": slopes, "softcap": 9.0}
        options |= {"sink": torch.zeros(8, dtype=BF16, device=device), "window_size": (100, -1)}
    return lambda: fap.flash_attn_with_kvcache(q, k_cache, v_cache, **new, **options)


@pytest.mark.parametrize("poisoned", [True, pytest.param(False, marks=pytest.mark.no_poison)])
@pytest.mark.parametrize("name", PUBLIC_CALLS)
def test_the_host_never_waits(name, poisoned, device):
    call = public_call(name, device)
    call()
    one = torch.ones((), device=device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            one.item()  # the mode works
        for _ in range(2):
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


class TestStreams:
    def test_runs_on_the_current_stream(self, device):
        growing = Growing(device, 16)
        growing.next([5, 0, 1000, 2000])
        for x in growing.caches:
            x.normal_()
        caches = [x.clone() for x in growing.caches]
        later = torch.randn_like(growing.k)
        growing.k.copy_(later)
        expected = growing.step(caches)
        growing.k.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Another stream would not wait for the new keys.
            torch.cuda._sleep(100_000_000)
            growing.k.copy_(later)
            actual = growing.step(growing.caches)
        stream.synchronize()
        assert same_bits((*actual, *growing.caches), (*expected, *caches))

    @pytest.mark.parametrize("name", ["splits_7", "everything_paged", "prefill"])
    def test_runs_on_the_device_of_its_tensors(self, name, device):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        assert torch.cuda.current_device() == 0
        for other in ("cuda:1", "cuda:0", "cuda:1"):
            check_decoding(DECODE_BY_NAME[name].decoding(other, BF16), f"{name} on {other}")
            check_appending(APPEND_BY_NAME["rotary_paged"].appending(other, BF16), f"append on {other}")
        assert torch.cuda.current_device() == 0


@pytest.mark.no_poison
class TestMemory:
    @staticmethod
    def allocated(call: Callable[[], object]) -> tuple[int, object]:
        """The most bytes that a second call holds at a time, and its results."""
        call()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        results = call()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, results

    @pytest.mark.parametrize("name", ["append", "append_paged_16", "append_every_other", "rotary", "rotary_sliced"])
    def test_append_allocates_nothing(self, name, device):
        problem = APPEND_BY_NAME[name].appending(device, BF16)
        assert self.allocated(lambda: run_append(problem)) == (0, None)

    @pytest.mark.parametrize("name", ["plain", "dim_59", "sliced", "layer", "paged_3", "paged_prefill", "leftpad"])
    def test_decode_without_splits_allocates_its_results(self, name, device):
        problem = DECODE_BY_NAME[name].decoding(device, BF16)._replace(num_splits=1)
        peak, results = self.allocated(lambda: run_decode(problem))
        assert peak == sum(x.nbytes for x in results)

    def test_parts_are_small(self, device):
        """Whatever the lengths, they are a fraction of the keys."""
        problem = Case("parts", (100_000, 3), capacity=131_072, heads=8, heads_k=2, dim=128).decoding(device, BF16)
        peak, _ = self.allocated(lambda: run_decode(problem))
        assert peak < 0.1 * problem.k_cache.nbytes


STEPS = {
    "contiguous": {},
    "pages": {"page_size": 16, "window": (50, 0)},
    "leftpad": {"leftpad": (3, 0, 1), "batch_idx": (2, 0, 3), "caches": 4},
    "no_new": {"seqlen_new": 0},
    "many_queries": {"seqlen_q": 100, "seqlen_new": 1},  # not only launches
    "rotary": {"rotary_dim": 32},
}


@pytest.mark.parametrize("poisoned", [True, pytest.param(False, marks=pytest.mark.no_poison)])
@pytest.mark.parametrize("name", STEPS)
def test_later_steps_are_the_operators(name, poisoned, device, monkeypatch):
    """Of other tensors each: what is launched again gets theirs. On another stream, in a graph, while someone watches,
    in another thread.
    """
    from triton import knobs

    from flash_attn_plus.kernels.relaunch import Relaunch

    relaunched, relaunch = [], Relaunch.__call__
    monkeypatch.setattr(Relaunch, "__call__", lambda self, *args: relaunched.append(self) or relaunch(self, *args))
    case = Case(name, (190, 0, 77), capacity=256, dim=64, causal=True, **{"seqlen_new": 1, **STEPS[name]})

    def tensors(i):
        problem = case.decoding(device, BF16)
        appending = case.appending(device, BF16) if case.seqlen_new else None
        seqlens = (problem.cache.cache_seqlens + i).clamp(max=190)
        q = torch.randn_like(problem.q)
        new = [torch.randn_like(x) for x in appending[2:4]] if appending else [None, None]
        tables = appending.new[3:5] if appending else (None, None)
        problem = problem._replace(k_cache=torch.randn_like(problem.k_cache), v_cache=torch.randn_like(problem.v_cache))
        return problem, q, (problem.k_cache.clone(), problem.v_cache.clone()), new, seqlens, tables

    def step(problem, q, caches, new, seqlens, tables):
        cache, variant = problem.cache, problem.variant
        return fap.flash_attn_with_kvcache(
            *(q, *caches, *new, *tables, seqlens, cache.cache_batch_idx, cache.cache_leftpad, cache.block_table),
            causal=variant.causal,
            window_size=(variant.window_left, variant.window_right),
            return_softmax_lse=True,
        )

    def check(of_step, got):
        problem, q, caches, new, seqlens, tables = of_step
        expected = problem.k_cache.clone(), problem.v_cache.clone()
        cache = problem.cache
        if case.seqlen_new:
            OPS.append_kv(*expected, *new, seqlens, cache.cache_batch_idx, cache.block_table, *tables)
            if case.rotary_dim:
                q = OPS.rotary(q, *tables, 0, seqlens, interleaved=True)
        result = run_decode(
            problem._replace(q=q, k_cache=expected[0], v_cache=expected[1], cache=cache._replace(cache_seqlens=seqlens))
        )
        assert same_bits(got, result) and same_bits(caches, expected) and got[0].isfinite().all()

    with torch.no_grad():
        for i in range(5):
            of_step = tensors(i)
            versions = [x._version for x in of_step[2]]
            check(of_step, step(*of_step))
            if case.seqlen_new:
                assert all(x._version > before for x, before in zip(of_step[2], versions, strict=True))
        used = name not in ("many_queries", "rotary")
        assert len(relaunched) >= (3 if used else 0)  # the first two are found by other ways
        assert used or not relaunched
        before, of_step, side = len(relaunched), tensors(7), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            got = step(*of_step)
        torch.cuda.synchronize()
        assert len(relaunched) == before + used
        check(of_step, got)
        for watch in ("hook", "graph", "thread"):
            before, of_step = len(relaunched), tensors(8)
            torch.cuda.synchronize()
            if watch == "hook":
                seen, hooks = [], knobs.runtime.launch_enter_hook
                hooks.add(seen.append)
                got = step(*of_step)
                hooks.remove(seen.append)
                assert seen
            elif watch == "graph":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    got = step(*of_step)
                graph.replay()
            else:
                with ThreadPoolExecutor(1) as pool:
                    got = pool.submit(torch.no_grad()(step), *of_step).result()
            torch.cuda.synchronize()
            check(of_step, got)
            assert len(relaunched) == before


@pytest.mark.xdist_group("memory")
class TestLargeCaches:
    def test_more_than_2_to_the_31_elements_in_pages(self, device):
        """The last pages of a pool, which 32 bits do not reach."""
        size, dim = 16, 64
        pages = 2**31 // (size * dim) + 5
        k_cache = torch.zeros(pages, size, 1, dim, dtype=BF16, device=device)
        v_cache = torch.zeros(pages, size, 1, 1, dtype=BF16, device=device)
        assert k_cache.numel() > 2**31
        small = Case("small", (37, 20), capacity=48, page_size=size, heads=2, heads_k=1, dim=dim, dim_v=1, seqlen_new=3)
        there = small.appending(device, BF16)
        there = there._replace(k_cache=torch.randn_like(there.k_cache), v_cache=torch.randn_like(there.v_cache))
        there = there._replace(k=torch.randn_like(there.k), v=torch.randn_like(there.v))
        used = there.k_cache.shape[0]
        k_cache[-used:], v_cache[-used:] = there.k_cache, there.v_cache
        table = there.new.block_table
        moved = torch.where((table >= 0) & (table < used), table + pages - used, table).to(torch.int32)
        here = there._replace(k_cache=k_cache, v_cache=v_cache, new=there.new._replace(block_table=moved))
        decoding = small.decoding(device, BF16)
        results = []
        for problem in (there, here):
            run_append(problem)
            cache = decoding.cache._replace(block_table=problem.new.block_table)
            results.append(run_decode(decoding._replace(k_cache=problem.k_cache, v_cache=problem.v_cache, cache=cache)))
        assert same_bits(*results) and results[0][0].isfinite().all()
        assert same_bits((k_cache[-used:], v_cache[-used:]), there[:2])
        assert not k_cache[:-used].any()

    def test_strides_that_span_2_to_the_31_elements(self, device):
        """Rows, and heads, of one cache lie further apart than 32 bits count."""
        for axis in (1, 2):
            whole = torch.zeros(3, 2**30 + 2**20, dtype=BF16, device=device)
            near = torch.randn(1, 3, 3, 64, device=device).to(BF16)
            far = whole[:, : 3 * 64].unflatten(1, (3, 64))
            far = far[None] if axis == 1 else far[None].transpose(1, 2)
            assert far.stride(axis) * 2 > 2**31
            lengths = torch.tensor([2], dtype=torch.int32, device=device)
            new = torch.randn(1, 1, 3, 64, device=device).to(BF16)
            q = torch.randn(1, 1, 6, 64, device=device).to(BF16)
            far.copy_(near)
            results = []
            for cache in (near, far):
                OPS.append_kv(cache, cache.clone(), new, new, lengths)
                results.append(OPS.decode(q, cache, cache, lengths, seqlen_new=1))
            assert torch.equal(near, far) and torch.equal(near[0, 2], new[0, 0])
            assert same_bits(*results)
            assert not whole[:, 3 * 64 :].any()
            del whole, far


@pytest.mark.no_poison
@pytest.mark.xdist_group("inductor")
class TestInductor:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("page_size", [0, 16])
    def test_compiled_is_bit_equal_to_eager(self, page_size, device):
        growing = Growing(device, page_size)
        for x in growing.caches:
            x.normal_()
        caches = [x.clone() for x in growing.caches]
        compiled = torch.compile(growing.step, fullgraph=True)
        code = None
        with torch.no_grad():
            for n in range(5):
                growing.next([n, 15 + n, 700 + n, 2900 + n])
                if n == 0:
                    actual, [code] = run_and_get_code(compiled, growing.caches)
                else:
                    actual = compiled(growing.caches)
                assert same_bits(actual, growing.step(caches))
                assert same_bits(tuple(growing.caches), tuple(caches))
        assert "flash_attn_plus.append_kv.default(" in code and "copy_" not in code and "clone" not in code

    def test_cuda_graphs_of_the_compiler(self, device):
        """Caches that do not move are written in its graphs too."""

        class Decoder(torch.nn.Module):
            def __init__(self, growing: Growing) -> None:
                super().__init__()
                self.growing = growing
                for name, x in zip(("k_cache", "v_cache"), growing.caches, strict=True):
                    self.register_buffer(name, x)

            def forward(self, q, k, v, lengths):
                caches = self.k_cache, self.v_cache
                return fap.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True) * 2.0

        growing = Growing(device, 0, rotary=False)
        for x in growing.caches:
            x.normal_()
        caches = [x.clone() for x in growing.caches]
        compiled = torch.compile(Decoder(growing), fullgraph=True, mode="reduce-overhead")
        with torch.no_grad():
            for n in range(6):
                growing.next([n, 15 + n, 700 + n, 2900 + n])
                torch.compiler.cudagraph_mark_step_begin()
                actual = compiled(growing.q, growing.k, growing.v, growing.lengths).clone()
                assert torch.equal(actual, growing.step(caches)[0] * 2.0), f"step {n}"
                assert same_bits(tuple(growing.caches), tuple(caches)), f"step {n}"
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        assert skips == 0, "reduce-overhead ran without CUDA graphs"


def inside_problems(device: str) -> Iterator[tuple[str, Decoding | Appending]]:
    """What tempts a kernel to leave its tensors: odd shapes, and lengths and numbers that no caller should pass."""
    for name in ("dim_59", "everything", "everything_paged", "paged_3", "splits_7", "latent", "paged_prefill"):
        yield name, DECODE_BY_NAME[name].decoding(device, BF16)
    for name in ("append_dims", "append_paged_3", "rotary_part", "rotary_paged", "rotary_every_other"):
        yield name, APPEND_BY_NAME[name].appending(device, BF16)

    generator = torch.Generator().manual_seed(0)

    def garbage(x: Tensor | None, low: int, high: int) -> Tensor | None:
        return None if x is None else torch.randint(low, high, x.shape, generator=generator).to(device, torch.int32)

    everything = {**EVERYTHING, "layout": "contiguous", "layout_new": "contiguous"}
    numbered = {"leftpad": (9, 0, 7, 30), "batch_idx": (3, 0, 4, 1), "caches": 5}
    kinds = {
        "numbered": Case("numbered", **everything, **numbered),
        "numbered splits": Case("numbered_splits", num_splits=3, **everything, **numbered),
        "numbered prefill": Case("numbered_prefill", **{**everything, **numbered, "seqlen_q": 70}),
        **{f"paged {n}": Case("paged", page_size=n, **everything) for n in (1, 13, 16, 64)},
        "paged prefill": Case("paged_prefill", page_size=13, **{**everything, "seqlen_q": 70}),
    }
    ranges = [(-10, 200)] * 2 + [(-(2**31), 2**31)] * 2
    for kind, case in kinds.items():
        for low, high in ranges:
            decoding = case.decoding(device, BF16)
            lists = {n: garbage(x, low, high) for n, x in decoding.cache._asdict().items() if isinstance(x, Tensor)}
            label = f"{kind}: { ({n: x.tolist() for n, x in lists.items()}) }"
            yield label, decoding._replace(cache=decoding.cache._replace(**lists))
            if "prefill" in kind:
                continue
            appending = replace(case, seqlen_new=9, rotary_dim=16).appending(device, BF16)
            new = {n: lists[n] for n in ("cache_seqlens", "cache_batch_idx", "block_table") if n in lists}
            yield f"append, {label}", appending._replace(new=appending.new._replace(**new))
        for values in ([2**31 - 1] * 4, [-(2**31)] * 4, [150, 151, 149, 148], [0, 0, 0, -1]):
            wrong = torch.tensor(values, dtype=torch.int32, device=device)
            decoding = case.decoding(device, BF16)
            yield f"{kind}, {values}", decoding._replace(cache=decoding.cache._replace(cache_seqlens=wrong))
            appending = replace(case, seqlen_new=9, rotary_dim=16).appending(device, BF16)
            yield f"append, {kind}, {values}", appending._replace(new=appending.new._replace(cache_seqlens=wrong))

    # A table, but no page; sequences, but no cache.
    paged = kinds["paged 16"].decoding(device, BF16)
    yield "no pages", paged._replace(k_cache=paged.k_cache[:0].clone(), v_cache=paged.v_cache[:0].clone())
    whole = kinds["numbered"].decoding(device, BF16)
    yield "no caches", whole._replace(k_cache=whole.k_cache[:0].clone(), v_cache=whole.v_cache[:0].clone())
    appending = replace(kinds["paged 16"], seqlen_new=9).appending(device, BF16)
    yield "append, no pages", appending._replace(k_cache=appending.k_cache[:0], v_cache=appending.v_cache[:0])
    appending = replace(kinds["numbered"], seqlen_new=9).appending(device, BF16)
    yield "append, no caches", appending._replace(k_cache=appending.k_cache[:0], v_cache=appending.v_cache[:0])


def run_inside_problems() -> None:
    for name, problem in inside_problems("cuda"):
        print(name, flush=True)  # the last one printed is the one that failed
        if isinstance(problem, Appending):
            run_append(problem)
        else:
            out, lse = run_decode(problem)
            if name in ("no pages", "no caches"):
                assert not out.any() and torch.equal(lse, problem.variant.sink.float()[..., None].expand_as(lse))
        torch.cuda.synchronize()


@pytest.mark.parametrize("tool", ["no tool", "compute-sanitizer"])
def test_nothing_outside_the_tensors_is_touched(tool):
    check_alone(run_inside_problems, tool)


def test_the_kernel_is_not_plain_pytorch(device):
    """Every test of this file would pass with plain PyTorch too, some of them slowly: it reads lengths on the host."""
    from flash_attn_plus import gpu

    problem = DECODE_BY_NAME["plain"].decoding(device, BF16)
    run = gpu.prepare_decode(*problem[:3], problem.cache, problem.variant, problem.num_splits)
    appending = APPEND_BY_NAME["append"].appending(device, BF16)
    for prepared in (run, gpu.prepare_append_kv(*appending)):
        assert type(prepared).__module__.startswith("flash_attn_plus.kernels.")
