"""memory.py: what a call's signature remembers, and that its quick form tells apart what it does."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_attn_plus import device, library, memory
from flash_attn_plus.memory import Memory
from flash_attn_plus.schemas import Variant


def signature(*args) -> tuple:
    return memory.signature(args)


class TestSignature:
    """Whatever checks or kernels decide by must be in it."""

    x = torch.zeros(2, 8, 4, 16)

    def test_values_are_not_in_it(self):
        assert signature(self.x, True) == signature(torch.ones(2, 8, 4, 16), True)

    @pytest.mark.parametrize(
        "other",
        [
            torch.zeros(2, 8, 4, 17),
            torch.zeros(2, 4, 8, 16).transpose(1, 2),
            torch.zeros(2, 8, 4, 16, dtype=torch.float64),
            torch.zeros(2 * 8 * 4 * 16 + 1)[1:].view(2, 8, 4, 16),
            torch._neg_view(torch.zeros(2, 8, 4, 16)),
        ],
        ids=["shape", "strides", "dtype", "alignment", "negative"],
    )
    def test_tells_apart(self, other):
        assert signature(self.x, True) != signature(other, True)

    def test_tells_devices_apart(self):
        class Elsewhere(torch.Tensor):
            device = torch.device("cuda", 1)

        assert signature(self.x) != signature(self.x.as_subclass(Elsewhere))

    def test_options_are_in_it(self):
        assert signature(self.x, 0.5) != signature(self.x, 0.25)
        assert signature(self.x, None) != signature(self.x, self.x)
        assert signature(self.x, 8) != signature(self.x, 8.0)

    def test_the_precision_of_float32_is_in_it(self):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            exact = signature(self.x), signature(self.x.half())
            torch.set_float32_matmul_precision("high")
            assert signature(self.x) != exact[0] and signature(self.x.half()) == exact[1]
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize(
        "x",
        [x.to_sparse(), x[:0], torch._efficientzerotensor(2, 8), x.to("meta"), torch._to_functional_tensor(x)],
        ids=["sparse", "empty", "zeros without memory", "meta", "wrapper"],
    )
    def test_what_cannot_be_told_apart_is_remembered_by_nobody(self, x):
        assert signature(x) is None


class TestMemory:
    x = torch.zeros(1, 3, 1, 8)

    @pytest.fixture(autouse=True)
    def remembered(self) -> dict:
        library._memories["fwd"].clear()
        return library._memories["fwd"].runs

    def call(self, **options) -> None:
        torch.ops.flash_attn_plus.fwd(self.x, self.x, self.x, **options)

    def test_is_bounded(self, remembered, monkeypatch):
        monkeypatch.setattr(memory, "_MOST_SIGNATURES", 3)
        sizes = []
        for n in range(8):
            self.call(softmax_scale=0.1 * n)
            sizes.append(len(remembered))
        assert max(sizes) == 3

    def test_nan_is_not_remembered(self, remembered):
        self.call(softmax_scale=float("nan"))
        assert not remembered


def FLATTEN(*structured):  # noqa: N802
    return library.flatten("fwd", structured)


def signature_of(structured: tuple) -> tuple:
    return memory.signature(FLATTEN(*structured))


def recall(remembers: Memory, args: tuple) -> memory.Found | None:
    """As callers in front of the dispatcher ask."""
    return remembers.latest_like(args) or remembers.recall(args)


def ran(found: memory.Found | None) -> bool:
    return found is not None and found.run is max


def test_what_pytorch_is_expected_to_have():
    """Each has something slower in its place, which would go unnoticed."""
    assert memory._GUARDS is not None
    assert device.quick_empty(torch.device("cpu")) is not None
    arguments = pytest.importorskip("flash_attn_plus.kernels.arguments", reason="imports Triton")
    assert arguments._is_deterministic is torch._C._get_deterministic_algorithms
    if torch.version.cuda:
        assert device._current_cuda_device is torch._C._cuda_getDevice
        assert device.static_launcher(torch.device("cuda")) is not None


class TestLatest:
    """The quick form. What it finds is what the signature finds; where it is not sure it asks that."""

    dtype = torch.bfloat16

    def args(self, shape: tuple[int, ...] = (1, 8, 2, 16), **options) -> tuple:
        return (*(torch.zeros(shape, dtype=self.dtype) for _ in range(3)), Variant(**options))

    @pytest.fixture
    def remembers(self) -> Memory:
        """One call, the way there being quick."""
        remembers, args = Memory(FLATTEN), self.args(causal=True, softcap=2.5, window_left=1000)
        remembers.keep(signature_of(args), FLATTEN(*args), max)
        assert ran(recall(remembers, args)) and len(remembers.recent.latest) == 1
        remembers.runs.clear()
        assert ran(recall(remembers, args))
        return remembers

    def test_finds_equal_calls(self, remembers):
        assert ran(recall(remembers, self.args(causal=True, softcap=5.0 / 2, window_left=10**3)))
        with torch.no_grad():
            assert ran(recall(remembers, self.args(causal=True, softcap=2.5, window_left=1000)))

    @pytest.mark.parametrize(
        "options",
        [
            dict(softcap=2.5, window_left=1000),
            dict(causal=True, softcap=2.0, window_left=1000),
            dict(causal=True, softcap=2.5, window_left=1000.0),
            dict(causal=True, softcap=2.5, window_left=1000, softmax_scale=0.5),
            dict(causal=True, softcap=2.5, window_left=1000, sink=torch.zeros(2)),
            dict(causal=True, softcap=float("nan"), window_left=1000),
        ],
        ids=str,
    )
    def test_other_options(self, remembers, options):
        assert recall(remembers, self.args(**options)) is None

    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize(
        "other",
        [
            torch.zeros(1, 8, 2, 17, dtype=dtype),
            torch.zeros(1, 9, 2, 16, dtype=dtype),
            torch.zeros(1, 2, 8, 16, dtype=dtype).transpose(1, 2),
            torch.zeros(1, 8, 2, 16, dtype=torch.float16),
            torch.zeros(8 * 2 * 16 + 1, dtype=dtype)[1:].view(1, 8, 2, 16),
            torch._neg_view(torch.zeros(1, 8, 2, 16, dtype=dtype)),
            torch._efficientzerotensor(1, 8, 2, 16, dtype=dtype),
            torch.zeros(1, 8, 2, 16, dtype=dtype, device="meta"),
            torch.zeros(1, 8, 2, 16, dtype=dtype).to_sparse(),
            torch._to_functional_tensor(torch.zeros(1, 8, 2, 16, dtype=dtype)),
            None,
        ],
        ids=lambda x: "None" if x is None else f"{x.layout} {tuple(x.shape)} {x.dtype} {x.device}",
    )
    def test_other_tensors(self, remembers, place, other):
        args = list(self.args(causal=True, softcap=2.5, window_left=1000))
        args[place] = other
        assert not any(latest.is_like(tuple(args)) for latest in remembers.recent.latest)

    def test_tensors_among_the_options(self):
        """Compared as tensors, wherever they lie; without any, what has names is always the same object."""
        remembers, sink = Memory(FLATTEN), torch.zeros(2)
        for options in ({"sink": sink}, {}):
            args = self.args(**options)
            remembers.keep(signature_of(args), FLATTEN(*args), max)
            assert ran(recall(remembers, args))
        with_sink, without = (recall(remembers, self.args(**o)) for o in ({"sink": torch.ones(2)}, {}))
        assert ran(with_sink) and with_sink.skeleton == ((Variant(), ("sink",)),) and len(with_sink.options) == 1
        assert ran(without) and without.skeleton == ((Variant(), ()),) and not without.options
        assert recall(remembers, self.args()).skeleton[0][0] is without.skeleton[0][0]
        for other in (torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(4)[::2], torch.zeros(3)[1:]):
            assert not any(latest.is_like(self.args(sink=other)) for latest in remembers.recent.latest)
        assert not remembers.recent.latest[1].is_like(self.args(sink=None))
        assert not remembers.recent.latest[1].is_like(self.args(alibi_slopes=torch.zeros(2)))
        assert len(remembers.recent.latest) == 2

    @pytest.mark.parametrize("one, other", [("abc", "aab"), ("aab", "abc"), ("aaa", "aab"), ("aba", "aaa")])
    def test_one_tensor_in_several_places(self, one, other):
        """What only looks alike is asked for its signature, and that has the same answer."""
        tensors = dict(zip("abc", self.args()[:3], strict=True))
        remembers = Memory(FLATTEN)
        calls = [(*(tensors[letter] for letter in letters), Variant()) for letters in (one, other)]
        remembers.keep(signature_of(calls[0]), FLATTEN(*calls[0]), max)
        for args in (*calls, *calls):
            assert ran(recall(remembers, args))
        assert len(remembers.recent.latest) == 2
        assert [
            latest.is_like(args) for latest, args in zip(remembers.recent.latest, reversed(calls), strict=True)
        ] == [True] * 2
        assert not remembers.recent.latest[0].is_like(calls[0]) and not remembers.recent.latest[1].is_like(calls[1])

    def test_another_class(self, remembers):
        class Other(torch.Tensor):
            pass

        q, *rest = self.args(causal=True, softcap=2.5, window_left=1000)
        assert not remembers.recent.latest[0].is_like((q.as_subclass(Other), *rest))

    def test_keeps_the_latest_few_and_makes_each_once(self, monkeypatch):
        """In turn, more than are kept: found by their signature, and no guards are made again."""
        made, original = [], memory.Latest.__init__
        monkeypatch.setattr(memory.Latest, "__init__", lambda *args: (made.append(1), original(*args))[1])
        remembers = Memory(FLATTEN)
        calls = [self.args((1, 8, 2, n)) for n in range(1, 30)]
        for args in calls:
            remembers.keep(signature_of(args), FLATTEN(*args), max)
        for _ in range(3):
            assert all(ran(recall(remembers, args)) for args in calls)
        assert len(remembers.recent.latest) == memory._MOST_LATEST and len(made) == len(calls)

    def test_what_a_signature_leaves_out_is_bounded_too(self):
        remembers, args = Memory(FLATTEN), self.args()
        remembers.keep(signature_of(args), FLATTEN(*args), max)
        for flags in itertools.product((False, True), repeat=3):
            for x, flag in zip(args, flags, strict=False):
                x.requires_grad_(flag)
            assert ran(recall(remembers, args))
        assert [len(known) for known in remembers.guarded.values()] == [memory._MOST_OF_ONE]

    def test_memory_that_was_given_back(self):
        remembers, args = Memory(FLATTEN), self.args()
        remembers.keep(signature_of(args), FLATTEN(*args), max)
        assert ran(recall(remembers, args))
        args[1].untyped_storage().resize_(0)
        assert recall(remembers, args) is None

    def test_float32_is_asked_for_its_precision_every_time(self):
        remembers, args = Memory(FLATTEN), tuple(x.float() if isinstance(x, torch.Tensor) else x for x in self.args())
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            remembers.keep(signature_of(args), FLATTEN(*args), max)
            assert ran(recall(remembers, args)) and not remembers.recent.latest
            torch.set_float32_matmul_precision("high")
            assert recall(remembers, args) is None
        finally:
            torch.set_float32_matmul_precision(before)

    def test_nothing_is_found_after_clear(self, remembers):
        remembers.clear()
        assert recall(remembers, self.args(causal=True, softcap=2.5, window_left=1000)) is None

    def test_keeps_the_object_that_has_no_tensors(self, remembers):
        """Autograd hands the forward's options to the backward: the same object is not compared again."""
        variant = remembers.recent.latest[0].parts[0][1]
        assert remembers.recent.latest[0].skeleton == ((variant, ()),)
        args = self.args(causal=True, softcap=2.5, window_left=1000)
        found = recall(remembers, (*args[:3], variant))
        assert found.skeleton[0][0] is variant
        mine = Memory(FLATTEN)
        mine.keep(signature_of(args), FLATTEN(*args), max)
        assert recall(mine, args).skeleton[0][0] is args[3]
