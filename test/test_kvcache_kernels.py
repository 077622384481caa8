"""The Triton kernels of the KV cache: in the interpreter without a GPU, through the operators on one.

Cases and oracles are those of test_kvcache.py. Here are the ways that only kernels have: keys split among programs by
lengths that the device knows, tiles that end inside of pages, lengths and numbers that no host has checked.
"""

from __future__ import annotations

import importlib
import itertools
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy
import pytest
import torch
from assertions import assert_close_to_oracle, rounding_floor
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_properties import bounded
from test_kvcache import (
    APPEND_BY_NAME,
    APPEND_CASES,
    APPEND_ROTARY_CASES,
    DECODE_BY_NAME,
    DECODE_CASES,
    DTYPES,
    INF,
    NAN,
    UNUSED_PAGES,
    Appending,
    Case,
    Decoding,
    check_appending,
    check_decoding,
    places_of,
    rotated,
    run_append,
    run_decode,
    same_bits,
)
from torch import Tensor

from flash_attn_plus import gpu, library, plan, reference
from flash_attn_plus.plan import DecodePlan, DecodeRow, Plan
from flash_attn_plus.schemas import Cache, Rotation

pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")
arguments, combine, decode = (
    importlib.import_module(f"flash_attn_plus.kernels.{name}") for name in ("arguments", "combine", "decode")
)

OPS = torch.ops.flash_attn_plus
# What the interpreter runs with: blocks and parts smaller than the problems, fewer and more programs than parts.
TILES = [
    DecodePlan(16, 4, 1, programs=6, shortest=16),
    DecodePlan(16, 4, 1, programs=8, shortest=48),
    DecodePlan(32, 1, 1, programs=12, shortest=32),
]
WHOLE = [DecodePlan(32, 4, 1, programs=0, shortest=32), DecodePlan(64, 1, 1, programs=0, shortest=64)]  # no splits
PREFILL_TILES = Plan(64, 32, 4, 1)


def interpreted(problem: Decoding) -> tuple[Tensor, Tensor]:
    """By the path that a call on a GPU takes behind the checks."""
    if problem.q.is_cuda:
        return run_decode(problem)
    import interpreter

    interpreter.install()
    arguments = (*problem[:3], problem.cache, problem.variant, problem.num_splits)
    return gpu.prepare_decode(*arguments)(*arguments)


def interpreted_append(problem: Appending) -> None:
    if problem.k.is_cuda:
        run_append(problem)
        return
    import interpreter

    interpreter.install()
    assert gpu.prepare_append_kv(*problem)(*problem) is None
    for cache in problem[:2]:  # what the dispatcher notes
        torch.autograd.graph.increment_version(cache)


def interpreted_rotary(problem: Appending) -> Tensor:
    """The new keys as the kernel that rotates has them, bit by bit."""
    k, new = problem.k, problem.new
    if k.is_cuda or new.rotary_cos is None:
        return rotated(problem)
    import interpreter

    interpreter.install()
    rotation = Rotation(new.rotary_cos, new.rotary_sin, 0, new.cache_seqlens, interleaved=new.rotary_interleaved)
    return gpu.prepare_rotary(k, rotation)(k, rotation)


@pytest.fixture
def tiles(monkeypatch, device: str) -> Callable[..., None]:
    """Sets the interpreter's tiles; a GPU keeps its plans."""

    def choose(chosen: DecodePlan) -> None:
        if device == "cpu":
            monkeypatch.setattr(plan, "decode", lambda *problem: DecodeRow(chosen, chosen))
            monkeypatch.setattr(plan, "forward", lambda problem: PREFILL_TILES)
            # Where there is one warp, which the interpreter has anyway, weights are added up in several sums.
            monkeypatch.setattr(decode, "_sums", lambda *problem: 8 if chosen.num_warps == 1 else 1)

    return choose


def drawn(name: str) -> int:
    return zlib.crc32(name.encode())


_RAGGED = {"lengths": (140, 0, 7, 60, 1, 33), "capacity": 150}
LINE = [
    Case("line", **_RAGGED),
    Case("line_queries", seqlen_q=3, causal=True, **_RAGGED),
    Case("line_new", seqlen_new=2, sink="h", **_RAGGED),
    Case("line_window", window=(40, -1), sink="bh", **_RAGGED),
    Case("line_diagonal", window=(-1, 3), diagonal=50, alibi="bh", **_RAGGED),
    Case("line_softcap", softcap=2.0, alibi="h", dim=59, dim_v=17, **_RAGGED),
    Case("line_leftpad", leftpad=(20, 0, 7, 3, 0, 32), batch_idx=(5, 0, 3, 3, 7, 1), caches=8, **_RAGGED),
    Case("line_no_keys", lengths=(0, 0, 0, 0), capacity=150, sink="bh"),
    Case("line_last", lengths=(0, 0, 0, 150), capacity=150, heads=2, heads_k=2),
    *(Case(f"line_pages_{n}", page_size=n, sink="h", window=(70, -1), **_RAGGED) for n in (3, 4, 16, 48)),
]


class TestLine:
    """Slots that go through several sequences."""

    @pytest.mark.parametrize(
        "case, slots",
        [*itertools.product(LINE, (2, 5, 7)), (Case("line_equal", lengths=None, batch=6, capacity=70), 5)],
        ids=str,
    )
    def test_agrees_with_the_oracle(self, case: Case, slots: int, device: str, tiles, monkeypatch) -> None:
        found, splits = [], plan.splits
        monkeypatch.setattr(plan, "splits", lambda *problem: found.append(splits(*problem)) or found[-1])
        block = 32 if slots == 5 else 16
        tiles(DecodePlan(block, 1 if slots == 2 else 4, 1, programs=slots * case.heads_k, shortest=32))
        dtype = DTYPES[drawn(case.name) % len(DTYPES)]
        check_decoding(case.decoding(device, dtype), case.name, interpreted)
        assert device != "cpu" or found == [(None, slots)]

    @pytest.mark.parametrize(
        "options, keys, equal",
        [
            ({}, 150, False),
            ({"lengths": None, "batch": 6}, 150, True),
            ({"lengths": None, "batch": 6, "leftpad": (0, 1, 2, 3, 4, 5)}, 150, False),
            ({"window": (40, -1)}, 40 + 1 + 15, False),
            ({"window": (20, 0)}, 20 + 1 + 15, True),  # four times as short as the cache
            ({"window": (20, 0), "seqlen_q": 4}, 20 + 4 + 15, False),
            ({"window": (-1, 20)}, 150, False),
            ({"window": (2, -1), "diagonal": 9}, 150, False),
            ({"window": (2, 5), "diagonal": 9}, 2 + 1 + 5 + 15, True),
            ({"page_size": 10}, 160, False),
        ],
        ids=str,
    )
    def test_is_planned_by_what_is_seen(self, options, keys, equal, device: str, tiles, monkeypatch) -> None:
        if device != "cpu":
            pytest.skip("tiles are those of a plan")
        found, splits = [], plan.splits
        monkeypatch.setattr(plan, "splits", lambda *problem: found.append(problem) or splits(*problem))
        tiles(DecodePlan(16, 4, 1, programs=8, shortest=16))
        problem = Case("planned", **{**_RAGGED, **options}).decoding()
        decode.prepare(*problem[:3], problem.cache, problem.variant, problem.num_splits)
        [(_, room, programs, batch, *rest)] = found
        assert (room, programs, batch, *rest) == (8, 2, 6, keys, 0, equal)


@pytest.mark.parametrize("dim", [64, 130])
def test_offsets_that_leave_32_bits(dim: int) -> None:
    def pool(*shape: int, strides: tuple[int, ...] | None = None) -> Tensor:
        if strides is None:
            return torch.empty(*shape, dim, device="meta")
        return torch.empty_strided((*shape, dim), (*strides, 1), device="meta")

    near = pool(2**31 // (16 * dim) - 3, 16, 1)
    assert not arguments.are_far(near, near)
    assert arguments.are_far(near, pool(2**31 // (16 * dim) + 3, 16, 1))
    assert arguments.are_far(pool(2**31 // (16 * dim) + 3, 16, 1), near)
    assert not arguments.are_far(pool(1, 16, 1, strides=(1, 2**26, 1)))
    assert arguments.are_far(pool(1, 16, 1, strides=(1, 2**27, 1)))
    assert arguments.are_far(pool(2**20, 16, 2, strides=(dim, 2**20 * 2 * dim, 2**20 * dim)))  # pages innermost
    assert arguments.are_far(pool(2**25 - 1, 16, 1, strides=(64, 1, 1)))  # by its columns


def test_no_kernel_of_its_own_where_it_makes_no_difference() -> None:
    def constants(page_size: int, width: int, rows: int = 8) -> dict:
        k = torch.empty(rows, page_size, 1, 64, device="meta")
        return arguments.paging(k, k, torch.empty(1, width, dtype=torch.int32), 64)

    for page_size in (64, 256, 100, 7, 1):
        assert constants(page_size, 4) == constants(page_size, 5) != constants(16, 4)
    assert constants(16, 4) != constants(16, 5)
    assert constants(64, 4, 2**21) == constants(64, 4) and constants(128, 4, 2**21) == constants(128, 4)
    assert constants(16, 4, 2**21) != constants(16, 4) and constants(48, 4, 2**21) != constants(48, 4)
    assert arguments.paging(*[torch.empty(1, 1, 1, 1)] * 2, None, 64)["PAGE_SIZE"] is None


class TestDecode:
    @pytest.mark.parametrize("case", DECODE_CASES, ids=str)
    def test_agrees_with_the_oracle(self, case: Case, device: str, tiles) -> None:
        """On a CPU each case in one dtype, with one choice of tiles: all of them meet over the cases."""
        dtypes = DTYPES if device == "cuda" else [DTYPES[drawn(case.name) % len(DTYPES)]]
        # Parts are added up row by row, which the interpreter takes long for.
        choices = [*WHOLE, *WHOLE, TILES[drawn(case.name) % len(TILES)]] if case.seqlen_q < 5 else WHOLE
        tiles(choices[drawn(case.name) // 7 % len(choices)])
        for dtype in dtypes:
            check_decoding(case.decoding(device, dtype), case.name, interpreted)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", ["dim_59", "splits_sink"])
    def test_dtypes(self, name: str, dtype: torch.dtype, device: str, tiles) -> None:
        tiles(TILES[0] if "splits" in name else WHOLE[0])
        check_decoding(DECODE_BY_NAME[name].decoding(device, dtype), name, interpreted)

    @pytest.mark.parametrize("chosen", [TILES[0], TILES[2]], ids=lambda chosen: str(chosen.BLOCK_N))
    @pytest.mark.parametrize("num_splits", [0, 3])
    @pytest.mark.parametrize("page_size", [0, 3, 16, 48])
    def test_tiles_splits_and_pages(
        self, page_size: int, num_splits: int, chosen: DecodePlan, device: str, tiles
    ) -> None:
        """A tile is a page, a part of one, several, or ends inside of one."""
        tiles(chosen)
        case = Case("tiles", (89, 0, 1, 64), capacity=96, page_size=page_size, num_splits=num_splits)
        case = replace(case, heads=2, heads_k=1, sink="bh", window=(70, -1))
        check_decoding(case.decoding(device, torch.float16), case.name, interpreted)

    @pytest.mark.parametrize("chosen", [TILES[0], TILES[2]], ids=lambda chosen: str(chosen.BLOCK_N))
    @pytest.mark.parametrize("num_splits", [1, 2])
    @pytest.mark.parametrize("page_size", [0, 3, 8, 16, 32])
    def test_parts_of_many_blocks(
        self, page_size: int, num_splits: int, chosen: DecodePlan, device: str, tiles
    ) -> None:
        """More than the entries of the table are asked for ahead."""
        tiles(chosen)
        case = Case("blocks", (209, 0, 133, 17), capacity=224, page_size=page_size, num_splits=num_splits)
        case = replace(case, heads=2, heads_k=1, sink="h")
        check_decoding(case.decoding(device, torch.float16), case.name, interpreted)

    @pytest.mark.parametrize(
        "arch, rows, block_n, page_size, line, sums",
        [
            ("sm_90", 16, 128, None, False, 32),
            ("sm_90", 32, 128, None, True, 32),
            ("sm_120", 16, 16, None, False, 16),
            ("sm_90", 64, 128, None, False, 1),
            ("gfx942", 16, 64, None, False, 1),
            ("npu_x", 16, 16, None, False, 1),
            ("sm_90", 16, 128, 16, False, 32),
            ("sm_90", 16, 128, 16, True, 1),
            ("sm_90", 16, 128, 64, True, 32),
            ("sm_90", 16, 128, 256, False, 1),
            ("sm_90", 16, 128, 24, False, 1),
        ],
    )
    def test_sums_that_are_kept(self, arch, rows, block_n, page_size, line, sums) -> None:
        assert decode._sums(arch, rows, DecodePlan(block_n, 4, 3, 1, 128), page_size, line) == sums

    @pytest.mark.parametrize("page_size, seqlen_q", [(4, 1), (5, 1), (16, 1), (5, 70), (16, 70)])
    def test_one_result_however_entries_are_read(
        self, page_size: int, seqlen_q: int, device: str, tiles, monkeypatch
    ) -> None:
        """Entries of the table two by two and one by one, offsets of pages in 32 bits and in 64."""
        tiles(TILES[2])
        case = Case("entries", (0, 73), capacity=73, page_size=page_size, seqlen_q=seqlen_q, heads=2, heads_k=1, dim=16)
        problem = case.decoding(device, torch.float16)
        table = problem.cache.block_table
        wide = torch.nn.functional.pad(table, (0, table.shape[1] % 2), value=UNUSED_PAGES[0])
        shifted = torch.empty(wide.numel() + 1, dtype=torch.int32, device=device)[1:].view_as(wide).copy_(wide)
        odd = torch.nn.functional.pad(wide, (0, 1), value=UNUSED_PAGES[0])
        tables = [wide, shifted, odd, odd[:, :-1]]
        assert [arguments.has_pairs(one) for one in tables] == [True, False, False, True]
        results = []
        for far, one in itertools.product([False, True], tables):
            with monkeypatch.context() as patched:
                if far:
                    patched.setattr(arguments, "are_far", lambda *caches: True)
                library.memory_of("decode").clear()
                results.append(interpreted(problem._replace(cache=problem.cache._replace(block_table=one))))
        library.memory_of("decode").clear()
        check_decoding(problem, case.name, lambda problem: results[0])
        assert all(same_bits(result, results[0]) for result in results)

    @pytest.mark.parametrize("width", [5, 6])
    @pytest.mark.parametrize("page_size", [1, 4, 5, 16, 32])
    def test_nothing_is_read_beside_the_table(
        self, page_size: int, width: int, device: str, tiles, monkeypatch
    ) -> None:
        """Not by blocks that end behind it, or are asked for three turns early. A number from beside it would be
        clamped like any other: it does not show in results.
        """
        if device != "cpu":
            pytest.skip("compute-sanitizer looks at it there")
        tiles(TILES[2])
        import interpreter
        from triton.runtime import interpreter as of_triton

        interpreter.install()
        case = Case("beside", (width * page_size, 3), capacity=width * page_size, page_size=page_size, dim=8)
        problem = case.decoding(device, torch.float16)
        table = problem.cache.block_table[:, :width].contiguous()
        near = 4096  # bytes on both sides, where nothing else lies
        pool = torch.zeros(2 * near + table.nbytes, dtype=torch.uint8)
        table = pool[near : near + table.nbytes].view(torch.int32).view_as(table).copy_(table)
        begin, end = table.data_ptr(), table.data_ptr() + table.nbytes
        builder, reads = of_triton._interpreter, []

        class Watching:
            def __getattr__(self, name):
                return getattr(builder, name)

            def load(self, ptrs, mask, *args):
                places = numpy.broadcast_arrays(numpy.asarray(ptrs), numpy.asarray(mask, dtype=bool))
                size = numpy.dtype(args[-1]).itemsize
                reads.extend((int(at), size) for at in places[0][places[1]] if begin - near <= at < end + near)
                return builder.load(ptrs, mask, *args)

        monkeypatch.setattr(of_triton, "_interpreter", Watching())
        check_decoding(problem._replace(cache=problem.cache._replace(block_table=table)), case.name, interpreted)
        assert reads and all(begin <= at and at + size <= end and at % size == 0 for at, size in reads)

    @pytest.mark.parametrize("alike", [False, True])
    def test_many_sequences(self, alike: bool, device: str, tiles, monkeypatch) -> None:
        """Empty ones, and a long one anywhere."""
        tiles(DecodePlan(16, 4, 1, programs=8, shortest=16))
        batch, long = 300, ((3, 5), (255, 140), (256, 70), (299, 17))
        if device == "cpu":
            batch, long = 14, ((0, 5), (3, 140), (4, 70), (13, 17))
        lengths = [0] * batch
        for i, length in long:
            lengths[i] = length
        case = Case("many", tuple(lengths), capacity=140, heads=1, heads_k=1, dim=8, sink="h")
        if alike:
            case = replace(case, lengths=None, batch=batch, capacity=33)
        check_decoding(case.decoding(device), case.name, interpreted)

    @settings(bounded, max_examples=10)
    @given(data=st.data())
    def test_any_problem(self, data: st.DataObject, device: str, tiles) -> None:
        draw = data.draw
        capacity, batch = draw(st.integers(0, 90)), draw(st.integers(1, 3))
        new = draw(st.integers(0, min(3, capacity)))
        lengths = tuple(draw(st.integers(0, capacity - new)) for _ in range(batch))
        page_size = draw(st.sampled_from([0, 0, 1, 5, 16, 32]))
        options = {}
        if not page_size and draw(st.booleans()):
            options["leftpad"] = tuple(draw(st.integers(0, length + new)) for length in lengths)
        if not page_size and draw(st.booleans()):
            options |= {"caches": 4, "batch_idx": tuple(draw(st.integers(0, 3)) for _ in range(batch))}
        group = draw(st.sampled_from([1, 2, 3, 7]))
        window = st.integers(-1, 40)
        case = Case(
            "any",
            lengths,
            seqlen_q=draw(st.sampled_from([1, 1, 2, 5, 66])),
            seqlen_new=new,
            capacity=capacity,
            page_size=page_size,
            heads=group,
            heads_k=1,
            dim=draw(st.sampled_from([8, 17, 32])),
            dim_v=draw(st.sampled_from([8, 40])),
            causal=draw(st.booleans()),
            window=draw(st.tuples(window, window)),
            diagonal=draw(st.none() | st.integers(-20, 100)),
            softcap=draw(st.sampled_from([0.0, 3.0])),
            alibi=draw(st.sampled_from(["", "h", "bh"])),
            sink=draw(st.sampled_from(["", "h", "bh"])),
            num_splits=draw(st.sampled_from([0, 0, 1, 2, 5])),
            layout=draw(st.sampled_from(["contiguous", "sliced", "heads_first", "every_other"])),
            **options,
        )
        tiles(draw(st.sampled_from([*TILES, *WHOLE])))
        check_decoding(case.decoding(device, draw(st.sampled_from(DTYPES))), str(case), interpreted)

    @pytest.mark.parametrize(
        "diagonal, left, right",
        [(2**30, 2**30 + 2, -1), (-(2**30), -1, 2**30 + 2), (2**40, 2**40, 2**41), (None, 2**40, 2**40)],
    )
    def test_windows_and_diagonals_beyond_32_bits(self, diagonal, left, right, device: str, tiles) -> None:
        tiles(WHOLE[0])
        problem = replace(DECODE_BY_NAME["queries_2"], diagonal=diagonal, window=(left, right)).decoding(device)
        check_decoding(problem, "far", interpreted)

    @pytest.mark.parametrize("scale", [1e-46, 1e-38, -1e-46, 1e4], ids=str)
    def test_a_scale_that_vanishes_or_overwhelms(self, scale: float, device: str, tiles) -> None:
        tiles(TILES[0])
        case = Case("scale", (40, 0, 7), seqlen_q=2, causal=True, num_splits=2, heads=2, softmax_scale=scale)
        check_decoding(case.decoding(device), "scale", interpreted)

    @pytest.mark.no_poison
    @pytest.mark.parametrize("name", ["splits_sink", "splits_no_keys", "prefill"])
    def test_results_come_from_the_quick_allocator_too(self, name: str, device: str, tiles) -> None:
        tiles(TILES[0])
        check_decoding(DECODE_BY_NAME[name].decoding(device), name, interpreted)

    @pytest.mark.parametrize("name", ["splits_sink", "paged_3", "leftpad_batch_idx"])
    def test_later_calls_have_lengths_of_their_own(self, name: str, device: str, tiles) -> None:
        """What is prepared for a signature keeps no value of the first call."""
        tiles(TILES[0])
        case = DECODE_BY_NAME[name]
        problem = case.decoding(device)
        arguments = (*problem[:3], problem.cache, problem.variant, problem.num_splits)
        if device == "cpu":
            import interpreter

            interpreter.install()
            prepared = gpu.prepare_decode(*arguments)
            run = lambda x: prepared(*x[:3], x.cache, x.variant, x.num_splits)  # noqa: E731
        else:
            run = run_decode
        check_decoding(problem, name, run)
        shorter = replace(case, lengths=tuple(length // 2 for length in case.lengths))
        if case.leftpad:
            shorter = replace(shorter, leftpad=tuple(pad // 2 for pad in case.leftpad))
        other = shorter.decoding(device)
        if case.page_size:  # the same pool: fewer pages of it are used
            other = other._replace(k_cache=problem.k_cache, v_cache=problem.v_cache)
            other = other._replace(cache=problem.cache._replace(cache_seqlens=other.cache.cache_seqlens))
        check_decoding(other, name, run)


class TestWrongLengths:
    """No host has checked them. They stop at the ends of the caches; other sequences are right."""

    CASE = Case("wrong", (37, 5, 12), capacity=40, seqlen_new=3, seqlen_q=2, causal=True, sink="h", num_splits=2)
    CASE = replace(CASE, heads=2, heads_k=1)

    @pytest.mark.parametrize("length, seen", [(2**31 - 1, 40), (-1, 3), (-(2**31), 3), (38, 40)])
    @pytest.mark.parametrize("seqlen_q, num_splits", [(1, 0), (2, 2), (66, 0)])
    def test_lengths_end_with_the_cache(
        self, length: int, seen: int, seqlen_q: int, num_splits: int, device: str, tiles
    ) -> None:
        tiles(TILES[0])
        whole = replace(self.CASE, lengths=(37, 37, 12), seqlen_q=seqlen_q, num_splits=num_splits).decoding(device)

        def with_length(n: int) -> Decoding:
            lengths = torch.tensor([37, n, 12], dtype=torch.int32, device=device)
            return whole._replace(cache=whole.cache._replace(cache_seqlens=lengths))

        assert same_bits(interpreted(with_length(length)), interpreted(with_length(seen - 3)))

    @pytest.mark.parametrize("pad, seen", [(-1, 0), (-(2**31), 0), (2**31 - 1, 15), (16, 15)])
    def test_padding_ends_with_the_keys(self, pad: int, seen: int, device: str, tiles) -> None:
        """15 keys: with more padding there are none."""
        tiles(TILES[0])
        case = replace(self.CASE, leftpad=(0, 2, 0))
        problem = case.decoding(device)

        def with_pad(n: int) -> Decoding:
            pads = torch.tensor([0, 2, n], dtype=torch.int32, device=device)
            return problem._replace(cache=problem.cache._replace(cache_leftpad=pads))

        out, lse = interpreted(with_pad(pad))
        assert same_bits((out, lse), interpreted(with_pad(seen)))
        if seen:
            assert not out[2].any()
            sink = problem.variant.sink.float()
            torch.testing.assert_close(lse[2], sink[:, None].expand(-1, case.seqlen_q))

    @pytest.mark.parametrize("number", [-1, 3, 2**31 - 1, -(2**31)])
    def test_a_cache_that_does_not_exist(self, number: int, device: str, tiles) -> None:
        tiles(TILES[0])
        problem = replace(self.CASE, batch_idx=(2, 0, 1)).decoding(device)
        numbers = torch.tensor([2, number, 1], dtype=torch.int32, device=device)
        out, lse = interpreted(problem._replace(cache=problem.cache._replace(cache_batch_idx=numbers)))
        expected = interpreted(problem)
        assert same_bits((out[[0, 2]], lse[[0, 2]]), tuple(x[[0, 2]] for x in expected))

    @pytest.mark.parametrize("page, page_size", zip(UNUSED_PAGES, (3, 16, 3, 16), strict=True))
    def test_a_page_that_does_not_exist(self, page: int, page_size: int, device: str, tiles) -> None:
        tiles(TILES[0])
        problem = replace(self.CASE, page_size=page_size).decoding(device)
        table = problem.cache.block_table.clone()
        table[1, 0] = page
        out, lse = interpreted(problem._replace(cache=problem.cache._replace(block_table=table)))
        expected = interpreted(problem)
        assert same_bits((out[[0, 2]], lse[[0, 2]]), tuple(x[[0, 2]] for x in expected))

    def test_a_length_past_the_table(self, device: str, tiles) -> None:
        tiles(TILES[0])
        problem = replace(self.CASE, page_size=16).decoding(device)
        lengths = problem.cache.cache_seqlens.clone()
        lengths[1] = 10**9
        out, lse = interpreted(problem._replace(cache=problem.cache._replace(cache_seqlens=lengths)))
        expected = interpreted(problem)
        assert same_bits((out[[0, 2]], lse[[0, 2]]), tuple(x[[0, 2]] for x in expected))

    @pytest.mark.parametrize("rotary_dim", [0, 16])
    @pytest.mark.parametrize(
        "lengths",
        [(38, 0, 5), (40, 3, 2**31 - 1), (-2, -3, 7), (-(2**31), 10**9, 0), (2**31 - 2, 39, -1)],
        ids=str,
    )
    def test_new_rows_outside_of_the_cache_are_dropped(
        self, lengths: tuple[int, ...], rotary_dim: int, device: str
    ) -> None:
        """The others are written, and nothing else."""
        case = Case("dropped", (0, 0, 0), seqlen_new=4, rotary_dim=rotary_dim, layout="sliced")
        problem = case.appending(device, torch.bfloat16)
        wrong = torch.tensor(lengths, dtype=torch.int32, device=device)
        problem = problem._replace(new=problem.new._replace(cache_seqlens=wrong))
        check_appending(problem, case.name, interpreted_append, interpreted_rotary)

    @pytest.mark.parametrize("numbers", [(-1, 0, 3), (2, 4, 2**31 - 1), (-(2**31), 1, 0)], ids=str)
    def test_new_rows_of_no_cache_are_dropped(self, numbers: tuple[int, ...], device: str) -> None:
        case = Case("no_cache", seqlen_new=3, batch_idx=numbers, caches=4)
        check_appending(case.appending(device), case.name, interpreted_append)

    @pytest.mark.parametrize("page", [*UNUSED_PAGES, 8])
    def test_new_rows_of_no_page_are_dropped(self, page: int, device: str) -> None:
        """Of those that cross into it, some are written."""
        case = Case("no_page", (14, 0, 29), capacity=32, seqlen_new=4, page_size=16)
        problem = case.appending(device)
        assert problem.k_cache.shape[0] == 8
        lengths = problem.new.cache_seqlens.clone()
        lengths[2] = 46  # of 48
        problem.new.block_table[0, 1] = problem.new.block_table[2, 2] = page
        problem = problem._replace(new=problem.new._replace(cache_seqlens=lengths))
        check_appending(problem, case.name, interpreted_append)


class TestAppend:
    @pytest.mark.parametrize("case", [*APPEND_CASES, *APPEND_ROTARY_CASES], ids=str)
    def test_bit_by_bit(self, case: Case, device: str) -> None:
        for dtype in DTYPES if device == "cuda" else [DTYPES[drawn(case.name) % len(DTYPES)]]:
            check_appending(case.appending(device, dtype), f"{case}, {dtype}", interpreted_append, interpreted_rotary)

    def test_later_calls_have_lengths_of_their_own(self, device: str) -> None:
        case = APPEND_BY_NAME["rotary_paged"]
        problem = case.appending(device)
        if device == "cpu":
            import interpreter

            interpreter.install()
            prepared = gpu.prepare_append_kv(*problem)

            def run(x: Appending) -> None:
                assert prepared(*x) is None
                for cache in x[:2]:
                    torch.autograd.graph.increment_version(cache)
        else:
            run = run_append
        for lengths in ((13, 0, 47), (0, 16, 47), (20, 31, 7), (63, 64, -9)):
            at = torch.tensor(lengths, dtype=torch.int32, device=device)
            moved = problem._replace(new=problem.new._replace(cache_seqlens=at))
            check_appending(moved, f"{lengths}", run, interpreted_rotary)


COMBINED = {
    "dense": (4, (2, 5, 3, 8)),
    "packed": (4, (11, 3, 8)),
    "one": (1, (2, 5, 3, 8)),
    "many": (37, (2, 1, 2, 40)),
    "dim_1": (3, (2, 1, 2, 1)),
    "dim_59": (5, (1, 3, 2, 59)),
    "empty": (3, (0, 5, 3, 8)),
    "no_rows": (3, (2, 0, 3, 8)),
    "no_columns": (3, (2, 5, 3, 0)),
}


class TestCombine:
    """The operator, of given parts: states of disjoint keys, some of which have seen none and hold anything."""

    @staticmethod
    def parts(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        count, shape = COMBINED[name]
        generator = torch.Generator().manual_seed(drawn(name))
        out = torch.randn(count, *shape, generator=generator)
        *batch, rows, heads, _ = shape
        lse = 3 * torch.randn(count, *batch, heads, rows, generator=generator)
        nothing = torch.rand(lse.shape, generator=generator) < 0.3
        if lse.numel() and count > 1:
            nothing[:, ..., 0] = True  # no part has seen anything
            nothing[1:, ..., -1], nothing[0, ..., -1] = True, False  # only the first one has
        lse[nothing] = -INF
        out[nothing.transpose(-1, -2)] = NAN
        return out.to(device, dtype), lse.to(device)

    @staticmethod
    def run(out: Tensor, lse: Tensor, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        if out.is_cuda:
            return OPS.combine(out, lse, out_dtype)
        import interpreter

        interpreter.install()
        return gpu.prepare_combine(out, lse, out_dtype)(out, lse, out_dtype)

    def check(self, name: str, out: Tensor, lse: Tensor, out_dtype: torch.dtype | None = None) -> None:
        actual = self.run(out, lse, out_dtype)
        assert actual[0].dtype == (out_dtype or out.dtype) and actual[1].dtype == lse.dtype
        assert all(x.is_contiguous() for x in actual)
        expected = reference.combine(out, lse)
        # The same maths at the dtype of lse, which is that of the sums, and of what comes out.
        shift = expected[1].masked_fill(expected[1] == -INF, 0.0).to(lse.dtype)
        weights = (lse - shift).exp().transpose(-1, -2).unsqueeze(-1)
        summed = (weights * out.to(lse.dtype).masked_fill(weights == 0, 0.0)).sum(0)
        plain = summed.to(out_dtype or out.dtype), shift + (lse - shift).exp().sum(0).log()
        for result, *values in zip(("out", "lse"), actual, expected, plain, strict=True):
            assert_close_to_oracle(*values, name=f"{name}: {result}")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", COMBINED)
    def test_agrees_with_the_oracle(self, name: str, dtype: torch.dtype, device: str) -> None:
        self.check(name, *self.parts(name, device, dtype))

    @pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_out_dtype(self, out_dtype: torch.dtype, device: str) -> None:
        self.check("dense", *self.parts("dense", device), out_dtype)

    def test_strides(self, device: str) -> None:
        for name in ("dense", "packed"):
            out, lse = self.parts(name, device)
            for dim in range(out.dim()):
                moved = out.movedim(dim, 0).contiguous().movedim(0, dim)
                self.check(name, moved, lse)
            for dim in range(lse.dim()):
                self.check(name, out, lse.movedim(dim, 0).contiguous().movedim(0, dim))
            self.check(name, out[:1].expand_as(out), lse[:1].expand_as(lse))

    def test_one_part_is_itself(self, device: str) -> None:
        out, lse = self.parts("one", device)
        lse = lse.masked_fill(lse == -INF, 0.5)
        out = out.nan_to_num(1.0)
        actual = self.run(out, lse)
        assert (actual[0] - out).abs().max() <= rounding_floor(out, out.dtype)
        assert (actual[1] - lse).abs().max() <= rounding_floor(lse, lse.dtype)

    def test_far_log_sum_exps(self, device: str) -> None:
        """Weights that vanish against others, of which none is computed by a difference of infinities."""
        out, lse = self.parts("dense", device)
        for shift in (1e4, -1e4, 3e38):
            self.check("far", out, (lse + shift).clamp(max=3.4e38))


class TestNotANumber:
    """What is not a number stays visible, however the keys are split."""

    @pytest.mark.parametrize("num_splits", [1, 3])
    @pytest.mark.parametrize("where", ["q", "a key", "the keys of a part", "all keys", "infinite keys", "a value"])
    def test_is_seen(self, where: str, num_splits: int, device: str, tiles) -> None:
        tiles(TILES[0])
        case = Case("nan", (90, 41), capacity=96, heads=2, heads_k=1, dim=16, num_splits=num_splits)
        problem = case.decoding(device)
        part = {"a key": slice(40, 41), "the keys of a part": slice(0, 32)}.get(where, slice(0, 90))
        if where == "q":
            problem.q[0] = NAN
        elif where == "a value":
            problem.v_cache[0, 40] = NAN
        else:
            problem.k_cache[0, part] = torch.inf if where == "infinite keys" else NAN
        out, lse = interpreted(problem)
        assert out[0].isnan().all()
        assert lse[0].isnan().all() == (where != "a value")
        assert out[1].isfinite().all() and lse[1].isfinite().all()

    @pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
    @pytest.mark.parametrize("num_splits", [1, 2, 3])
    def test_is_seen_where_its_weight_rounds_to_0(self, num_splits: int, value: float, device: str, tiles) -> None:
        """One key has all the weight, in whichever part: 0 * value is NaN, as it is in one part."""
        tiles(TILES[0])
        case = Case("dominated", (90, 41), capacity=96, heads=2, heads_k=1, dim=16, num_splits=num_splits)
        problem = case.decoding(device)
        problem.q[0] = problem.k_cache[0, 5] = 30.0
        problem.v_cache[0, 40] = value
        out, lse = interpreted(problem)
        assert out[0].isnan().all() and lse[0].isfinite().all()
        assert out[1].isfinite().all() and lse[1].isfinite().all()


class TestSplits:
    """How keys are given out: every key once, whatever the lengths and the tiles are."""

    @pytest.mark.parametrize("chosen", TILES[:2], ids=lambda chosen: str(chosen.programs))
    @pytest.mark.parametrize(
        "lengths",
        [(0, 0, 0, 0), (140, 0, 0, 1), (16, 17, 15, 32), (0, 70, 70, 140)],
        ids=str,
    )
    def test_weights_add_up_to_one(self, lengths: tuple[int, ...], chosen: DecodePlan, device: str, tiles) -> None:
        """Equal scores: each key weighs as much, and a value counts where its key is."""
        tiles(chosen)
        heads = 1
        q = torch.zeros(4, 1, heads, 8, device=device)
        k = torch.full((4, 140, 1, 8), NAN, device=device)
        v = torch.full((4, 140, 1, 4), NAN, device=device)
        numbers = torch.arange(140.0, device=device)
        seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        cache = Cache(seqlens)
        for b in range(4):
            at = places_of(k, cache, b)
            k[at] = 0.0
            v[at] = torch.stack([numbers, numbers**2, torch.ones_like(numbers), -numbers], 1)[: len(at[0]), None]
        problem = Case("x").decoding(device)._replace(q=q, k_cache=k, v_cache=v, cache=cache)
        out, lse = interpreted(problem)
        for b, n in enumerate(lengths):
            mean = v[b, :n, 0].double().mean(0) if n else torch.zeros(4, device=device).double()
            torch.testing.assert_close(out[b, 0].double(), mean.expand(heads, 4), rtol=1e-5, atol=1e-5)
            expected = torch.full((heads, 1), float(n), device=device).log()
            torch.testing.assert_close(lse[b], expected)
