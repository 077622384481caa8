"""flag_gems as a backend: what is refused and when, what it is asked for, and what becomes of its results.

Without a GPU a stand-in takes its place: a module of that name with its two functions, which computes by the reference
and has flag_gems' faults. Where flag_gems drops or damages something without a word, the stand-in does, or fails.
"""

from __future__ import annotations

import functools
import importlib
import sys
import textwrap
import threading
import types
from collections.abc import Iterator

import pytest
import torch
from assertions import assert_close_to_oracle, check_problem
from cases import BY_NAME, CASES, EMPTY, RAGGED, Case, Problem
from expecttest import assert_expected_inline
from graphs import offsets, operator_nodes
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import flash_attn_plus as fap
from flash_attn_plus import checks_flag_gems, library, reference
from flash_attn_plus.integrations import flag_gems as integration
from flash_attn_plus.schemas import SCHEMAS, Variant, Varlen

OPS = torch.ops.flash_attn_plus
NAMES = ("flag_gems_fwd", "flag_gems_varlen_fwd")

# Beside the rows of cases.py: where flag_gems has other kernels, or another fault.
MORE = [
    Case("gqa_decode", batch=3, seqlen_q=1, seqlen_k=97, heads=4, causal=True),
    Case("decode_alibi", batch=3, seqlen_q=1, seqlen_k=40, heads=4, causal=True, alibi="bh"),
    Case("varlen_gqa_decode", lengths=((1, 40), (1, 5), (1, 70)), heads=4),
    Case("varlen_gqa_decode_empty", lengths=((0, 5), (1, 40), (1, 0), (1, 70)), heads=4, padding=(2, 3), causal=True),
    Case("paged_gqa_decode", lengths=((1, 40), (1, 5), (1, 70)), heads=4, page_size=16, causal=True),
    Case("causal_tiles", seqlen_q=256, seqlen_k=256, causal=True),
    Case("causal_tiles_more_queries", batch=1, seqlen_q=256, seqlen_k=100, causal=True),
    Case("one_slice", batch=1, layout="sliced"),
    Case("dim_16", dim=16),
    Case("dim_96", dim=96, causal=True),
    Case("window_one_side_beyond", window=(1000, 30), seqlen_q=150, seqlen_k=33),
    Case("window_right_beyond", window=(20, 100), seqlen_q=33, seqlen_k=100),
    Case("window_beyond_the_keys_only", window=(1000, 60), seqlen_q=150, seqlen_k=33),
    Case("window_largest", window=(2**31, 2**31)),
    Case("alibi_causal", alibi="bh", causal=True, seqlen_q=128, seqlen_k=128),
    Case("varlen_only_padding", lengths=(), padding=(3, 2)),
    Case("varlen_empty_window", lengths=EMPTY, window=(5, 5)),
    Case("varlen_dim_24", lengths=RAGGED, dim=24, causal=True),
    Case("paged_dim_24", lengths=RAGGED, dim=24, page_size=16, unused_k=(3, 0, 1, 20)),
]


def refusal(case: Case) -> str | None:
    q, k, v, variant, varlen = case.make(dtype=torch.float16)
    try:
        if varlen is None:
            checks_flag_gems.dense(q, k, v, variant)
        else:
            checks_flag_gems.varlen(q, k, v, varlen, variant)
    except NotImplementedError as error:
        return str(error)
    return None


REFUSED = {case.name: message for case in [*CASES, *MORE] if (message := refusal(case)) is not None}
ACCEPTED = [case for case in [*CASES, *MORE] if case.name not in REFUSED]


def run_backend(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v, variant, varlen = problem
    if varlen is None:
        return OPS.flag_gems_fwd(q, k, v, *variant)
    return OPS.flag_gems_varlen_fwd(q, k, v, *varlen[:4], *variant, *varlen[4:])


def test_what_is_accepted_of_the_cases() -> None:
    assert_expected_inline(
        textwrap.fill(" ".join(case.name for case in ACCEPTED), 100),
        """\
plain plain_block_multiple more_keys more_queries one_query one_key one_by_one no_queries no_keys
no_queries_no_keys gqa mqa dim_256 packed_qkv causal causal_more_keys causal_more_queries
causal_one_query window_both window_0 window_causal window_beyond window_more_queries softcap
softcap_causal alibi alibi_per_batch varlen varlen_causal varlen_single varlen_empty
varlen_no_sequences varlen_padding varlen_max_seqlen_larger varlen_transposed varlen_window
varlen_softcap varlen_alibi varlen_alibi_per_batch paged paged_odd paged_one
paged_larger_than_sequence gqa_decode decode_alibi varlen_gqa_decode varlen_gqa_decode_empty
paged_gqa_decode causal_tiles causal_tiles_more_queries one_slice dim_16 dim_96
window_one_side_beyond window_right_beyond window_beyond_the_keys_only window_largest alibi_causal
varlen_only_padding varlen_empty_window varlen_dim_24 paged_dim_24""",
    )


class StandIn(types.ModuleType):
    """flag_gems on the CPU, with the signatures and the faults of 5.0.2. ``calls`` holds what it was asked for."""

    __version__ = "5.0.2"
    device = "cpu"

    def __init__(self) -> None:
        super().__init__("flag_gems")
        self.config = types.SimpleNamespace(use_c_extension=False)
        self.calls: list[dict] = []

    def flash_attention_forward(
        self,
        query,
        key,
        value,
        cumulative_sequence_length_q,
        cumulative_sequence_length_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        disable_splitkv=False,
    ):
        self.calls.append({**locals(), "function": "dense"})
        assert cumulative_sequence_length_q is cumulative_sequence_length_k is seqused_k is None
        assert disable_splitkv and dropout_p == 0.0 and not return_debug_mask
        assert window_size_left is window_size_right is None  # beyond the keys they are dropped
        assert query.shape[-1] > 16
        for x in (query, key, value):  # compiled for other lengths otherwise
            assert x.stride() == torch.empty(x.shape).stride()
        variant = Variant(
            softmax_scale=scale or query.shape[-1] ** -0.5,
            causal=is_causal,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
        seqlen_q = query.shape[1]
        if is_causal and seqlen_q % 128 != 0 and not (seqlen_q == 1 and alibi_slopes is None):
            raise AssertionError("a causal mask of a part of a tile")
        out, lse = reference.attention(query, key, value, variant, dtype=torch.float32)
        return out.to(query.dtype), self.lse(lse, is_causal, alibi_slopes), None, None, None

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        max_seqlen_q,
        cu_seqlens_q,
        max_seqlen_k,
        cu_seqlens_k=None,
        seqused_k=None,
        q_v=None,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=None,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
        return_softmax_lse=False,
        out=None,
    ):
        self.calls.append({**locals(), "function": "varlen"})
        assert len(q) and len(cu_seqlens_q) > 1  # it divides by their numbers
        assert k.stride() == v.stride() and return_softmax_lse and out.is_contiguous()
        assert (cu_seqlens_k is None) != (seqused_k is None) and (block_table is None) == (seqused_k is None)
        for x in (cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, block_table):
            assert x is None or x.is_contiguous()
        left, right = (-1 if side >= max_seqlen_k else side for side in window_size)
        if causal:
            right = 0
        elif left < 0:
            right = -1  # dropped
        elif right < 0:
            raise AssertionError("a lone left side, which hides the key of a row's own place")
        assert not (max_seqlen_q == 1 and q.shape[1] > k.shape[-2]), "every sequence taken for one of one row"
        lengths = seqused_k if cu_seqlens_k is None else None
        starts = torch.zeros_like(cu_seqlens_q) if cu_seqlens_k is None else cu_seqlens_k
        layout = Varlen(cu_seqlens_q, starts, max_seqlen_q, max_seqlen_k, seqused_k=lengths, block_table=block_table)
        variant = Variant(
            softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            window_left=left,
            window_right=right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
        computed, lse = reference.varlen_attention(q, k, v, layout, variant, dtype=torch.float32)
        row = torch.arange(len(q))
        written = (row >= cu_seqlens_q[0]) & (row < cu_seqlens_q[-1])
        out.fill_(float("nan"))
        out[written] = computed.to(q.dtype)[written]
        return out, self.lse(lse, causal, alibi_slopes).masked_fill(~written, float("nan"))

    for function in (flash_attention_forward, flash_attn_varlen_func):
        function.__module__ = "flag_gems.ops.attention"
    del function

    @staticmethod
    def lse(lse: Tensor, causal: bool, alibi_slopes: Tensor | None) -> Tensor:
        if causal and alibi_slopes is not None:
            lse = lse + 1.0  # a constant in each row
        return lse.masked_fill(lse == float("-inf"), float("inf"))


def forget() -> None:
    """What was prepared for earlier calls, with the module of then."""
    for name in NAMES:
        library.memory_of(name).clear()


@pytest.fixture(autouse=True)
def dense_kernel_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has one there."""
    monkeypatch.setattr(integration, "_DENSE_DEVICES", ("cuda", "cpu", "meta"))


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def triton_3_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_triton_version", lambda: "3.6.0")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, triton_3_6: None) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "flag_gems", module)
    return module


def dense(*shape: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


def packed(total: int = 14, heads: int = 2, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.randn(total, heads, 32, dtype=dtype) for _ in range(3)]


class TestResults:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", ACCEPTED, ids=str)
    def test_are_those_of_the_oracle(self, stand_in: StandIn, case: Case, dtype: torch.dtype) -> None:
        check_problem(case.make(dtype=dtype), case.name, loss="", run=run_backend)

    def test_the_stand_in_was_asked(self, stand_in: StandIn) -> None:
        for name in ("plain", "varlen", "paged"):
            run_backend(BY_NAME[name].make(dtype=torch.float16))
        assert [call["function"] for call in stand_in.calls] == ["dense", "varlen", "varlen"]

    @pytest.mark.parametrize("shapes", [((0, 5, 2, 32), (0, 5, 2, 32)), ((2, 0, 2, 32), (2, 5, 2, 32))])
    def test_without_queries_nothing_is_asked(self, stand_in: StandIn, shapes: tuple) -> None:
        q, k = (torch.randn(shape, dtype=torch.float16) for shape in shapes)
        out, lse = OPS.flag_gems_fwd(q, k, k)
        assert out.shape == q.shape and lse.shape == (q.shape[0], 2, q.shape[1]) and not stand_in.calls

    def test_a_second_call_computes_with_its_own_tensors(self, stand_in: StandIn) -> None:
        for _ in range(2):
            q, k, v = dense(2, 9, 2, 32)
            want = reference.attention(q, k, v, Variant(), dtype=torch.float32)[1]
            torch.testing.assert_close(OPS.flag_gems_fwd(q, k, v)[1], want)


class TestWhatIsAskedFor:
    def kernel(self, stand_in: StandIn, q: Tensor, k: Tensor, v: Tensor, **options) -> str:
        forget()
        fap.flash_attn_func(q, k, v, backend="flag_gems", **options)
        return stand_in.calls[-1]["function"]

    def test_the_dense_kernel_on_no_other_vendors_device(self, stand_in: StandIn, monkeypatch) -> None:
        """It asks for a device "cuda"."""
        monkeypatch.setattr(integration, "_DENSE_DEVICES", ("cuda",))
        assert self.kernel(stand_in, *dense(2, 128, 2, 32)) == "varlen"

    def test_the_dense_kernel_where_it_is_right(self, stand_in: StandIn) -> None:
        tile, short = dense(2, 128, 2, 32), dense(2, 100, 2, 32)
        slopes = torch.rand(2)
        assert self.kernel(stand_in, *short) == "dense"
        assert self.kernel(stand_in, *short, alibi_slopes=slopes) == "dense"
        assert self.kernel(stand_in, *tile, causal=True) == "dense"
        assert self.kernel(stand_in, *dense(2, 1, 2, 32), causal=True) == "dense"
        assert self.kernel(stand_in, *short, causal=True) == "varlen"
        assert self.kernel(stand_in, *tile, causal=True, alibi_slopes=slopes) == "varlen"
        assert self.kernel(stand_in, *tile, window_size=(10, 3)) == "varlen"
        assert self.kernel(stand_in, *dense(2, 100, 2, 16)) == "varlen"

    def test_no_dense_kernel_for_a_slice_of_one_sequence(self, stand_in: StandIn) -> None:
        """As its launcher sees them, 100 keys of 128 are 128."""
        q, k, v = dense(1, 128, 2, 32)
        assert self.kernel(stand_in, q, k, v) == "dense"
        assert self.kernel(stand_in, q, k[:, :100], v[:, :100]) == "varlen"
        assert self.kernel(stand_in, q[:, :100], k, v) == "varlen"

    def test_dense(self, stand_in: StandIn) -> None:
        q, k, v = dense(2, 128, 2, 32)
        fap.flash_attn_func(q, k, v, causal=True, softcap=2.0, backend="flag_gems")
        (call,) = stand_in.calls
        assert all(call[name] is x for name, x in (("query", q), ("key", k), ("value", v)))
        assert (call["scale"], call["is_causal"], call["softcap"]) == (32**-0.5, True, 2.0)
        assert call["alibi_slopes"] is None and (call["max_q"], call["max_k"]) == (128, 128)
        assert call["disable_splitkv"] is True

    def test_varlen(self, stand_in: StandIn) -> None:
        q, k, v = packed()
        cu, slopes = offsets(5, 0, 9), torch.rand(2)
        fap.flash_attn_varlen_func(
            *(q, k, v, cu, cu, 9, 10),
            softmax_scale=0.25,
            window_size=(4, 3),
            alibi_slopes=slopes,
            backend="flag_gems",
        )
        (call,) = stand_in.calls
        expected = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "alibi_slopes": slopes}
        assert all(call[name] is x for name, x in expected.items())
        assert (call["max_seqlen_q"], call["max_seqlen_k"], call["window_size"]) == (9, 10, (4, 3))
        assert (call["softmax_scale"], call["causal"], call["softcap"]) == (0.25, False, 0.0)
        assert call["seqused_k"] is call["block_table"] is None

    @pytest.mark.parametrize(
        "options, longest_k, window, causal",
        [
            (dict(), 10, (-1, -1), False),
            (dict(causal=True), 10, (-1, -1), True),
            (dict(window_size=(-1, 0)), 10, (-1, -1), True),
            (dict(causal=True, window_size=(4, 4)), 10, (4, 0), False),
            # Longer than the keys: dropped, with the other one, but for a longer max_seqlen_k.
            (dict(window_size=(30, 3)), 31, (30, 3), False),
            (dict(window_size=(4, 10)), 11, (4, 10), False),
            (dict(window_size=(2**40, 2**40)), 2**30 + 1, (2**30, 2**30), False),
            # As a causal mask beside slopes it is another log-sum-exp.
            (dict(causal=True, alibi_slopes=torch.ones(2)), 2**30 + 1, (2**30, 0), False),
        ],
    )
    def test_masks(self, stand_in: StandIn, options: dict, longest_k: int, window: tuple, causal: bool) -> None:
        cu = offsets(5, 0, 9)
        fap.flash_attn_varlen_func(*packed(), cu, cu, 9, 10, **options, backend="flag_gems")
        (call,) = stand_in.calls
        assert (call["max_seqlen_k"], call["window_size"], call["causal"]) == (longest_k, window, causal)

    def test_pages(self, stand_in: StandIn) -> None:
        """Lengths, not offsets; of the offsets where there is no seqused_k."""
        q, k = torch.randn(5, 2, 32, dtype=torch.float16), torch.randn(4, 16, 2, 32, dtype=torch.float16)
        table = torch.tensor([[0, 1, 9], [2, 3, 9]], dtype=torch.int32)[:, :2]
        layout = (offsets(2, 3), offsets(20, 17), 3, 20)
        used = torch.tensor([18, 0], dtype=torch.int32)
        for seqused_k, lengths in ((None, [20, 17]), (used, [18, 0])):
            fap.flash_attn_varlen_func(
                q, k, k, *layout, block_table=table, seqused_k=seqused_k, causal=True, backend="flag_gems"
            )
            call = stand_in.calls[-1]
            assert call["cu_seqlens_k"] is None and call["seqused_k"].tolist() == lengths
            assert call["block_table"].tolist() == table.tolist()

    def test_more_programs_than_its_dense_kernel_launches(self, stand_in: StandIn) -> None:
        assert self.kernel(stand_in, *dense(255, 1, 257, 24)[:1] * 3) == "dense"
        assert self.kernel(stand_in, *dense(256, 1, 256, 24)[:1] * 3) == "varlen"

    def test_never_one_row(self, stand_in: StandIn) -> None:
        fap.flash_attn_varlen_func(*packed(2), offsets(1, 1), offsets(1, 1), 1, 1, backend="flag_gems")
        assert stand_in.calls[0]["max_seqlen_q"] == 2


CU = offsets(5, 0, 9)
PAGES = torch.randn(4, 16, 2, 32, dtype=torch.float16)
TABLE = torch.tensor([[0], [1], [2]], dtype=torch.int32)


def dense_call(**changes) -> tuple:
    q, k, v = (changes.pop(name, x) for name, x in zip("qkv", dense(2, 9, 2, 32), strict=True))
    return OPS.flag_gems_fwd, (q, k, v), changes


def varlen_call(**changes) -> tuple:
    q, k, v = (changes.pop(name, x) for name, x in zip("qkv", packed(), strict=True))
    return OPS.flag_gems_varlen_fwd, (q, k, v, CU, CU, 9, 9), changes


def wide(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, dtype=dtype)


GUARDS = {
    "float32": (
        dense_call,
        dict(zip("qkv", dense(2, 9, 2, 32, dtype=torch.float32), strict=True)),
        "q: expected dtype",
    ),
    "float64": (varlen_call, dict(zip("qkv", packed(dtype=torch.float64), strict=True)), "q: expected dtype"),
    "head_dim 8": (dense_call, dict(zip("qkv", dense(2, 9, 2, 8), strict=True)), "q: expected a head_dim"),
    "head_dim 20": (dense_call, dict(zip("qkv", dense(2, 9, 2, 20), strict=True)), "q: expected a head_dim"),
    "head_dim_v": (dense_call, dict(v=wide(2, 9, 2, 40)), "v: expected head_dim 32"),
    "diagonal": (dense_call, dict(diagonal=3), "diagonal: expected None"),
    "attn_bias": (dense_call, dict(attn_bias=wide(1, 1, 9, 9)), "attn_bias: expected None"),
    "sink": (varlen_call, dict(sink=wide(2)), "sink: expected None"),
    "dropout": (
        dense_call,
        dict(dropout_p=0.5, rng_state=torch.zeros(2, dtype=torch.int64)),
        "dropout_p: expected 0.0",
    ),
    "scale 0": (dense_call, dict(softmax_scale=0.0), "softmax_scale: expected None or a positive"),
    "scale negative": (varlen_call, dict(softmax_scale=-0.5), "softmax_scale: expected None or a positive"),
    "scale inf": (dense_call, dict(softmax_scale=float("inf")), "softmax_scale: expected None or a positive"),
    "scale nan": (dense_call, dict(softmax_scale=float("nan")), "softmax_scale: expected None or a positive"),
    "left window": (dense_call, dict(window_left=3), "window_size: expected none, both sides, or causal"),
    "right window": (varlen_call, dict(window_right=3), r"window_size: .* got \(-1, 3\)"),
    "k sliced": (dense_call, dict(k=wide(2, 12, 2, 32)[:, :9], v=wide(2, 12, 2, 32)[:, :9]), "k: expected sequences"),
    "v of other strides": (dense_call, dict(v=wide(2, 9, 3, 32)[:, :, :2]), "v: expected strides"),
    "packed v of other strides": (varlen_call, dict(v=wide(14, 3, 32)[:, :2]), "v: expected strides"),
    "every other": (dense_call, dict(k=wide(2, 9, 2, 64)[..., ::2]), "k: expected a contiguous last dimension"),
    "gaps behind head_dim 24": (
        varlen_call,
        dict(q=wide(14, 2, 24), k=wide(14, 2, 32)[..., :24], v=wide(14, 2, 32)[..., :24]),
        "k: expected rows without gaps",
    ),
    "seqused_q": (varlen_call, dict(seqused_q=torch.ones(3, dtype=torch.int32)), "seqused_q: expected None"),
    "leftpad_k": (varlen_call, dict(leftpad_k=torch.ones(3, dtype=torch.int32)), "leftpad_k: expected None"),
    "seqused_k": (varlen_call, dict(seqused_k=torch.ones(3, dtype=torch.int32)), "seqused_k: .* without block_table"),
    "pages apart": (varlen_call, dict(k=PAGES[:, :8], v=PAGES[:, :8], block_table=TABLE), "k: expected pages"),
}


class AskedTooEarly(BaseException):
    """No Exception: those become an ImportError."""


@pytest.fixture
def unimportable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that looks at flag_gems, or at Triton, fails its test."""

    def asked() -> None:
        raise AskedTooEarly

    monkeypatch.setattr(integration, "_triton_version", asked)
    monkeypatch.setattr(integration, "_import", asked)


@pytest.mark.usefixtures("unimportable")
class TestGuards:
    @pytest.mark.parametrize("name", GUARDS)
    def test_raise_before_anything_is_imported(self, name: str) -> None:
        call, changes, message = GUARDS[name]
        op, args, options = call(**changes)
        with pytest.raises(NotImplementedError, match=message):
            op(*args, **options)

    @pytest.mark.parametrize("name", GUARDS)
    def test_say_the_same_of_fakes(self, name: str) -> None:
        call, changes, message = GUARDS[name]
        op, args, options = call(**changes)

        def on_meta(x: object) -> object:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

        with pytest.raises(NotImplementedError, match=message):
            op(*map(on_meta, args), **{name: on_meta(x) for name, x in options.items()})

    @pytest.mark.parametrize(
        "call",
        [
            dense_call,
            varlen_call,
            # A stride along one sequence leads nowhere.
            lambda: dense_call(
                q=wide(1, 9, 2, 32), k=wide(1, 9, 2, 32), v=wide(3, 9, 2, 32).as_strided((1, 9, 2, 32), (7, 64, 32, 1))
            ),
        ],
    )
    def test_let_the_unchanged_call_through(self, call) -> None:
        op, args, options = call()
        with pytest.raises(AskedTooEarly):
            op(*args, **options)

    @pytest.mark.parametrize(
        "rows_q, rows_k, dim, message",
        [
            (2**25, 2**25, 32, None),
            (2**25, 2**25 + 1, 32, r"k: expected less than 2\*\*31 elements"),
            (2**25 + 1, 2**25, 32, r"q: expected less than 2\*\*31 elements"),
            (2**25, 9, 40, r"q: expected less than 2\*\*31 elements"),
            # Padded to 64.
            (2**24, 9, 40, None),
            (2**24 + 1, 9, 40, r"q: expected up to 2\*\*31 elements .* head_dim of 64"),
            (9, 2**24 + 1, 40, r"k: expected up to 2\*\*31 elements .* head_dim of 64"),
        ],
    )
    def test_more_than_32_bits_of_elements(self, rows_q: int, rows_k: int, dim: int, message: str | None) -> None:
        q, k = (torch.empty(1, rows, 2, dim, dtype=torch.float16, device="meta") for rows in (rows_q, rows_k))
        with pytest.raises(AskedTooEarly) if message is None else pytest.raises(NotImplementedError, match=message):
            integration.prepare_forward(q, k, k, Variant())

    def test_more_than_32_bits_of_elements_of_the_output(self) -> None:
        """As many as a q has that is expanded, and lies in less."""
        few = torch.empty(1, 9, 1, 64, dtype=torch.float16, device="meta")
        q = few[:, :1].expand(1, 2**24 + 1, 2, 64)
        message = r"q: expected up to 2\*\*31 elements"
        with pytest.raises(NotImplementedError, match=message):
            integration.prepare_forward(q, few, few, Variant())
        cu = torch.empty(2, dtype=torch.int32, device="meta")
        layout = Varlen(cu, cu, 2**24 + 1, 9)
        with pytest.raises(NotImplementedError, match=message):
            integration.prepare_varlen_forward(q[0], few[0], few[0], layout, Variant())
        # It pads nothing for its packed kernel.
        q = torch.empty(2**24 + 1, 2, 40, dtype=torch.float16, device="meta")
        with pytest.raises(AskedTooEarly):
            integration.prepare_varlen_forward(q, q[:9], q[:9], layout, Variant())

    @pytest.mark.parametrize(
        "batch, heads, causal, message",
        [
            (1, 65536, False, "q: expected up to 65535 heads"),
            (65536, 1, False, "q: expected up to 65535 sequences"),
            (65536, 1, True, "q: expected up to 65535 sequences"),
            (40000, 2, False, None),  # the packed kernel has them in two dimensions
            (65535, 1, True, None),
        ],
    )
    def test_more_programs_than_can_be_launched(
        self, batch: int, heads: int, causal: bool, message: str | None
    ) -> None:
        q = torch.empty(batch, 2, heads, 32, dtype=torch.float16, device="meta")
        with pytest.raises(AskedTooEarly) if message is None else pytest.raises(NotImplementedError, match=message):
            integration.prepare_forward(q, q, q, Variant(causal=causal))
        cu = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        message = message and message.replace("q: expected up to 65535 seq", "cu_seqlens_q: expected up to 65535 seq")
        with pytest.raises(AskedTooEarly) if message is None else pytest.raises(NotImplementedError, match=message):
            integration.prepare_varlen_forward(*[q.flatten(0, 1)] * 3, Varlen(cu, cu, 2, 2), Variant(causal=causal))

    def test_arguments_that_no_backend_takes_are_told_as_ever(self) -> None:
        q, k, v = dense(2, 9, 2, 32)
        with pytest.raises(ValueError, match="k: expected shape"):
            fap.flash_attn_func(q, k[:1], v, backend="flag_gems")


class TestImport:
    @pytest.mark.parametrize(
        "error",
        [
            *(ImportError, ModuleNotFoundError, RuntimeError, AssertionError, AttributeError),
            *(PermissionError, OSError, KeyError, TypeError),
        ],
    )
    def test_says_what_to_install(
        self, triton_3_6: None, monkeypatch: pytest.MonkeyPatch, tmp_path, error: type[Exception]
    ) -> None:
        (tmp_path / "flag_gems.py").write_text(f"raise {error.__name__}('no device')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
        q, k, v = dense(2, 9, 2, 32)
        for _ in range(2):  # nothing is remembered of a failure
            with pytest.raises(ImportError, match=rf"backend: .* {error.__name__}: '?no device") as told:
                fap.flash_attn_func(q, k, v, backend="flag_gems")
            assert "pip install 'flash-attn-plus[flag_gems]'" in str(told.value)
            assert isinstance(told.value.__cause__, error)

    def test_leaves_nothing_behind(self, triton_3_6: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        """A second import of a package finds the parts that the first one imported, and the path that it changed."""
        package = tmp_path / "flag_gems"
        package.mkdir()
        (package / "__init__.py").write_text(
            """import sys
if "flag_gems.part" in sys.modules or "of flag_gems" in sys.path:
    raise ValueError("another reason")
sys.path.insert(0, "of flag_gems")
from . import part
raise PermissionError("no cache")
"""
        )
        (package / "part.py").write_text(
            "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent / 'of'))\nimport _of_a_vendor"
        )
        (package / "of").mkdir()
        (package / "of" / "_of_a_vendor.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] == "flag_gems"]:
            monkeypatch.delitem(sys.modules, name)
        path = list(sys.path)
        for _ in range(2):
            with pytest.raises(ImportError, match=r"backend: .* PermissionError: no cache"):
                fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")
            assert sys.path == path
            assert not [name for name in sys.modules if name.partition(".")[0] in ("flag_gems", "_of_a_vendor")]

    def test_one_thread_at_a_time(self, triton_3_6: None, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        """The other one would find half of what the first one imports."""
        package = tmp_path / "flag_gems"
        package.mkdir()
        (package / "__init__.py").write_text("import time\ntime.sleep(0.2)\nraise PermissionError('no cache')")
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] == "flag_gems"]:
            monkeypatch.delitem(sys.modules, name)
        path, said = list(sys.path), []

        def call() -> None:
            with pytest.raises(ImportError) as told:
                fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")
            said.append(str(told.value))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said) == 3 and all("PermissionError: no cache" in text for text in said), said
        assert sys.path == path

    def test_what_was_imported_before_stays(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        part = types.ModuleType("flag_gems.part")
        monkeypatch.setitem(sys.modules, "flag_gems.part", part)
        monkeypatch.setitem(sys.modules, "flag_gems", types.ModuleType("flag_gems"))
        with pytest.raises(ImportError, match="AttributeError"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")
        assert sys.modules["flag_gems.part"] is part and "flag_gems" in sys.modules

    @pytest.mark.parametrize("version", ["5.0.1", "5.1.0", None])
    def test_of_another_version(self, stand_in: StandIn, version: str | None) -> None:
        stand_in.__version__ = version
        with pytest.raises(NotImplementedError, match=rf"flag_gems: expected version 5\.0\.2, .* got {version}"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")

    def test_of_a_function_of_a_vendor(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
        def function(*args, **kwargs):
            raise AssertionError("called")

        function.__module__ = "_hygon.ops.attention"
        monkeypatch.setattr(stand_in, "flash_attention_forward", function, raising=False)
        with pytest.raises(NotImplementedError, match=r"flash_attention_forward: .* got one of _hygon\.ops\.attention"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")
        fap.flash_attn_varlen_func(*packed(), CU, CU, 9, 9, backend="flag_gems")
        monkeypatch.setattr(stand_in, "flash_attn_varlen_func", function, raising=False)
        forget()
        with pytest.raises(NotImplementedError, match=r"flash_attn_varlen_func: .* got one of _hygon"):
            fap.flash_attn_varlen_func(*packed(), CU, CU, 9, 9, backend="flag_gems")

    @pytest.mark.parametrize("name", ["flash_attention_forward", "flash_attn_varlen_func", "device"])
    def test_of_a_version_without_what_is_called(
        self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        module = types.ModuleType("flag_gems")
        for other in {"flash_attention_forward", "flash_attn_varlen_func", "device"} - {name}:
            setattr(module, other, getattr(stand_in, other))
        monkeypatch.setitem(sys.modules, "flag_gems", module)
        with pytest.raises(ImportError, match=f"AttributeError: .*{name}"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")

    @pytest.mark.parametrize("version", ["3.7.0", "3.7.1+git1234", "3.10.0", "4.0"])
    def test_triton_is_too_new(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        monkeypatch.setattr(integration, "_triton_version", lambda: version)
        with pytest.raises(
            NotImplementedError, match=rf"triton: expected .* 3\.6 .* got {version}".replace("+", r"\+")
        ):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")
        assert not stand_in.calls

    @pytest.mark.parametrize("version", ["3.6.0", "3.6.1+git", "3.5.0", "3.3"])
    def test_triton_is_old_enough(self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        monkeypatch.setattr(integration, "_triton_version", lambda: version)
        fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")
        assert stand_in.calls

    def test_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(ImportError, match=r"backend: .* ModuleNotFoundError: .*triton"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")

    def test_of_flag_gems_for_another_device(self, stand_in: StandIn) -> None:
        stand_in.device = "npu"
        with pytest.raises(NotImplementedError, match=r"q: expected a device of type npu .* got cpu"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")

    def test_of_its_extension(self, stand_in: StandIn) -> None:
        stand_in.config.use_c_extension = True
        with pytest.raises(NotImplementedError, match="USE_C_EXTENSION"):
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend="flag_gems")


def call_each(qkv: Tensor, packed_qkv: Tensor, **options) -> dict:
    """Every function that takes a backend."""
    q, k, v = qkv.unbind(2)
    layout = (CU, CU, 9, 9)
    return {
        "dense": fap.flash_attn_func(q, k, v, **options),
        "kvpacked": fap.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options),
        "qkvpacked": fap.flash_attn_qkvpacked_func(qkv, **options),
        "varlen": fap.flash_attn_varlen_func(*packed_qkv.unbind(1), *layout, **options),
        "varlen_kvpacked": fap.flash_attn_varlen_kvpacked_func(packed_qkv[:, 0], packed_qkv[:, 1:], *layout, **options),
        "varlen_qkvpacked": fap.flash_attn_varlen_qkvpacked_func(packed_qkv, CU, 9, **options),
    }


def assert_agrees_with_the_default(out: Tensor, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    exact = fap.flash_attn_func(*(x.double() for x in (q, k, v)), **options)
    assert_close_to_oracle(out, exact, fap.flash_attn_func(q, k, v, **options))


class TestFunctions:
    def test_all_select_it_and_agree_with_the_default(self, stand_in: StandIn) -> None:
        tensors = wide(2, 9, 3, 2, 32), wide(14, 3, 2, 32)
        default = call_each(*tensors, causal=True)
        exact = call_each(*(x.double() for x in tensors), causal=True)
        assert not stand_in.calls
        for name, out in call_each(*tensors, causal=True, backend="flag_gems").items():
            assert_close_to_oracle(out, exact[name], default[name], name=name)
        assert len(stand_in.calls) == len(default)

    @pytest.mark.parametrize("backend", ["flash", "", "FLAG_GEMS", 1, ["flag_gems"]], ids=repr)
    def test_an_unknown_name(self, backend: object) -> None:
        with pytest.raises(ValueError, match="backend: expected one of 'flag_gems', or none, got ") as told:
            fap.flash_attn_func(*dense(2, 9, 2, 32), backend=backend)
        assert repr(backend) in str(told.value)
        with pytest.raises(ValueError, match="backend"):
            fap.flash_attn_varlen_func(*packed(), CU, CU, 9, 9, backend=backend)
        with pytest.raises(ValueError, match="backend"):
            fap.use_backend(backend)

    def test_backward_raises_and_names_it(self, stand_in: StandIn) -> None:
        for name, out in (
            (
                "flag_gems_fwd",
                fap.flash_attn_func(*(x.requires_grad_() for x in dense(2, 9, 2, 32)), backend="flag_gems"),
            ),
            (
                "flag_gems_varlen_fwd",
                fap.flash_attn_varlen_func(*(x.requires_grad_() for x in packed()), CU, CU, 9, 9, backend="flag_gems"),
            ),
        ):
            assert out.requires_grad
            with pytest.raises(NotImplementedError, match=f"{name} is not differentiable: flag_gems has no backward"):
                out.sum().backward()

    def test_autocast_casts(self, stand_in: StandIn) -> None:
        q, k, v = dense(2, 9, 2, 32, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert fap.flash_attn_func(q, k, v, backend="flag_gems").dtype == torch.bfloat16

    def test_vmap(self, stand_in: StandIn) -> None:
        q, k, v = (torch.randn(3, 2, 9, 2, 32, dtype=torch.float16) for _ in range(3))
        outs = torch.vmap(lambda *qkv: fap.flash_attn_func(*qkv, backend="flag_gems"))(q, k, v)
        assert_agrees_with_the_default(outs[1], q[1], k[1], v[1])

    def test_flops(self, stand_in: StandIn) -> None:
        counts = []
        for backend in (None, "flag_gems"):
            with FlopCounterMode(display=False) as counter:
                fap.flash_attn_func(*dense(2, 9, 2, 32), backend=backend)
                fap.flash_attn_varlen_func(*packed(), CU, CU, 9, 9, backend=backend)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


class TestGraphs:
    def test_the_schemas_are_those_of_the_operators_they_stand_for(self) -> None:
        """``use_backend`` hands their arguments over as they are."""
        assert SCHEMAS["flag_gems_fwd"] == SCHEMAS["fwd"]
        assert SCHEMAS["flag_gems_varlen_fwd"] == SCHEMAS["varlen_fwd"]

    @pytest.mark.parametrize("name", ["plain", "causal", "alibi", "varlen_padding", "varlen_window", "paged"])
    def test_opcheck(self, stand_in: StandIn, name: str) -> None:
        q, k, v, variant, varlen = BY_NAME[name].make(dtype=torch.float16)
        args = (q, k, v, *variant) if varlen is None else (q, k, v, *varlen[:4], *variant, *varlen[4:])
        op = OPS.flag_gems_fwd.default if varlen is None else OPS.flag_gems_varlen_fwd.default
        assert set(opcheck(op, args).values()) == {"SUCCESS"}

    @pytest.mark.parametrize("name", ["plain", "no_keys", "gqa", "causal", "varlen_padding", "paged"])
    def test_fakes_promise_what_comes(self, stand_in: StandIn, name: str) -> None:
        problem = BY_NAME[name].make(dtype=torch.float16)

        def on_meta(x: object) -> object:
            return x.to("meta") if isinstance(x, Tensor) else x

        fake = run_backend(
            Problem(
                *map(on_meta, problem[:3]),
                Variant(*map(on_meta, problem.variant)),
                problem.varlen and Varlen(*map(on_meta, problem.varlen)),
            )
        )
        for promised, real in zip(fake, run_backend(problem), strict=True):
            assert (promised.shape, promised.dtype) == (real.shape, real.dtype)
            assert promised.is_contiguous() and real.is_contiguous()

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile_has_one_node_each(self, stand_in: StandIn, dynamic: bool) -> None:
        seen = []

        def look(graph, inputs):
            seen.append(operator_nodes(graph))
            return graph

        @torch.compile(backend=look, fullgraph=True, dynamic=dynamic)
        def attend(q, k, v, packed):
            out = fap.flash_attn_func(q, k, v, causal=True, backend="flag_gems")
            return out, fap.flash_attn_varlen_func(*packed, CU, CU, 9, 9, backend="flag_gems")

        q, k, v = dense(2, 9, 2, 32)
        out, of_packed = attend(q, k, v, packed())
        assert seen == [{"flag_gems_fwd": 1, "flag_gems_varlen_fwd": 1}]
        assert_agrees_with_the_default(out, q, k, v, causal=True)
        assert of_packed.shape == (14, 2, 32) and len(stand_in.calls) == 2

    def test_compile_tells_an_unknown_name(self) -> None:
        attend = torch.compile(lambda q: fap.flash_attn_func(q, q, q, backend="flash"), backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="backend: expected one of 'flag_gems'"):
            attend(wide(2, 9, 2, 32))

    @pytest.mark.parametrize("by", ["argument", "context"])
    def test_export_has_one_node_and_runs(self, stand_in: StandIn, by: str) -> None:
        class Attend(torch.nn.Module):
            def forward(self, q, k, v):
                return fap.flash_attn_func(q, k, v, causal=True, backend="flag_gems" if by == "argument" else None)

        q, k, v = dense(2, 9, 2, 32)
        if by == "argument":
            program = torch.export.export(Attend(), (q, k, v))
        else:
            with fap.use_backend("flag_gems"):
                program = torch.export.export(Attend(), (q, k, v))
        assert operator_nodes(program.graph_module) == {"flag_gems_fwd": 1}
        assert_agrees_with_the_default(program.module()(q, k, v), q, k, v, causal=True)


class TestContext:
    def test_reaches_every_function_and_the_operators(self, stand_in: StandIn) -> None:
        tensors = wide(2, 9, 3, 2, 32), wide(14, 3, 2, 32)
        call_each(*tensors)  # what is remembered of these calls must not be found again
        with fap.use_backend("flag_gems"):
            call_each(*tensors)
            assert len(stand_in.calls) == 6
            OPS.fwd(*tensors[0].unbind(2))
            OPS.fwd.default(*tensors[0].unbind(2))
            OPS.varlen_fwd(*tensors[1].unbind(1), CU, CU, 9, 9)
            OPS.varlen_fwd.default(*tensors[1].unbind(1), CU, CU, 9, 9)
        assert len(stand_in.calls) == 10
        call_each(*tensors)
        assert len(stand_in.calls) == 10

    def test_explain_tells_of_it(self, stand_in: StandIn) -> None:
        q, k, v = dense(2, 9, 2, 32)
        packed_qkv, lengths = packed(), dict(cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=9, max_seqlen_k=9)
        ours = fap.explain(q, k, v)

        def in_context(*args, **options) -> str:
            with fap.use_backend("flag_gems"):
                return fap.explain(*args, **options)

        for explain in (functools.partial(fap.explain, backend="flag_gems"), in_context):
            told = explain(q, k, v)
            assert "forward: flag_gems 5.0.2: flash_attention_forward" in told and "backward: none" in told
            assert "forward: flag_gems 5.0.2: flash_attn_varlen_func" in explain(*packed_qkv, **lengths)
            assert "no queries" in explain(q[:, :0], k, v)
            with pytest.raises(NotImplementedError, match="sink"):
                explain(q, k, v, sink=torch.zeros(2))
        with pytest.raises(ValueError, match="backend: expected one of 'flag_gems'"):
            fap.explain(q, k, v, backend="else")
        assert fap.explain(q, k, v) == ours and "flag_gems" not in ours and not stand_in.calls

    def test_nothing_else_runs_in_its_place(self, stand_in: StandIn) -> None:
        q, k, v = dense(2, 1, 2, 32)
        with fap.use_backend("flag_gems"):
            with pytest.raises(NotImplementedError, match="sink"):
                fap.flash_attn_func(q, k, v, sink=torch.zeros(2))
            with pytest.raises(NotImplementedError, match=r"backend: .* flash_attn_with_kvcache"):
                fap.flash_attn_with_kvcache(q, k, v)
            for decode in (OPS.decode, OPS.decode.default):
                with pytest.raises(NotImplementedError, match="backend"):
                    decode(q, k, v)
        assert fap.flash_attn_with_kvcache(q, k, v).shape == q.shape
        assert not stand_in.calls

    @pytest.mark.parametrize("how", ["eager", "compile", "export"])
    def test_refuses_higher_order_operators(self, stand_in: StandIn, how: str) -> None:
        """It does not reach their bodies, where this package's kernels would run."""

        class Attend(torch.nn.Module):
            def forward(self, q, k, v):
                return torch.cond(q.sum() > 0, fap.flash_attn_func, lambda q, k, v: q.clone(), (q, k, v))

        attend, tensors = Attend(), tuple(dense(2, 9, 2, 32))
        run = {
            "eager": lambda: attend(*tensors),
            "compile": lambda: torch.compile(attend, backend="eager", fullgraph=True)(*tensors),
            "export": lambda: torch.export.export(attend, tensors),
        }
        # Dynamo has an error of its own for it, with this one's message in it; in PyTorch 2.11 with its class only.
        told = "backend: expected no higher-order operator"
        if torch.torch_version.TorchVersion(torch.__version__) < (2, 12):
            told += "|<class 'NotImplementedError'>"
        with (
            pytest.raises(Exception, match=told),
            fap.use_backend("flag_gems"),
        ):
            run[how]()
        assert not stand_in.calls

    def test_refuses_a_higher_order_operator_by_name(self) -> None:
        context = fap.use_backend("flag_gems")
        with pytest.raises(NotImplementedError, match=r"backend: .* use_backend\('flag_gems'\)"):
            context.__torch_function__(torch.ops.higher_order.cond, ())

    def test_does_not_hold_inside_of_a_custom_operator(self, stand_in: StandIn) -> None:
        """As documented: PyTorch takes the mode away while it runs a function of its own. The argument holds."""

        @torch.library.custom_op("flash_attn_plus_test::attend", mutates_args=())
        def attend(q: Tensor, by_argument: bool) -> Tensor:
            return fap.flash_attn_func(q, q, q, backend="flag_gems" if by_argument else None)

        q = wide(2, 9, 2, 32)
        with fap.use_backend("flag_gems"):
            attend(q, False)
            assert not stand_in.calls
            attend(q, True)
        assert len(stand_in.calls) == 1

    def test_nests_and_is_used_again(self, stand_in: StandIn) -> None:
        tensors, context = dense(2, 9, 2, 32), fap.use_backend("flag_gems")
        for _ in range(2):
            with context:
                with context, fap.use_backend("flag_gems"):
                    fap.flash_attn_func(*tensors)
                fap.flash_attn_func(*tensors)
                fap.flash_attn_func(*tensors, backend="flag_gems")
            fap.flash_attn_func(*tensors)
        assert len(stand_in.calls) == 6

    def test_ends_with_an_exception(self, stand_in: StandIn) -> None:
        tensors = dense(2, 9, 2, 32)
        with pytest.raises(KeyError), fap.use_backend("flag_gems"):
            raise KeyError
        with pytest.raises(NotImplementedError), fap.use_backend("flag_gems"):
            fap.flash_attn_func(*tensors, attn_bias=torch.zeros(9, 9))
        fap.flash_attn_func(*tensors)
        assert not stand_in.calls

    @pytest.mark.parametrize("compiled", [False, True])
    def test_holds_for_its_thread(self, stand_in: StandIn, compiled: bool) -> None:
        tensors, attend = dense(2, 9, 2, 32), lambda q, k, v: fap.flash_attn_func(q, k, v)
        if compiled:
            attend = torch.compile(attend, backend="eager", fullgraph=True)
        counts = []

        def run() -> None:
            attend(*tensors)
            counts.append(len(stand_in.calls))

        def in_another_thread() -> None:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

        with fap.use_backend("flag_gems"):
            run()
            in_another_thread()
            run()
        in_another_thread()
        assert counts == [1, 1, 2, 2]

    def test_compiled_functions_follow_it(self, stand_in: StandIn) -> None:
        seen = []

        def look(graph, inputs):
            seen.append(operator_nodes(graph))
            return graph

        attend = torch.compile(lambda q, k, v: fap.flash_attn_func(q, k, v) + 1, backend=look, fullgraph=True)
        tensors = dense(2, 9, 2, 32)
        for count in (1, 2):
            attend(*tensors)
            with fap.use_backend("flag_gems"):
                attend(*tensors)
            assert len(stand_in.calls) == count
        assert seen == [{"fwd": 1}, {"flag_gems_fwd": 1}]

    def test_inside_of_a_compiled_function(self, stand_in: StandIn) -> None:
        """Among calls of PyTorch of many kinds, which the context sees too."""

        @torch.compile(backend="aot_eager", fullgraph=True)
        def attend(q, k, v, cu):
            with fap.use_backend("flag_gems"):
                x = torch.nn.functional.gelu(q).transpose(1, 2).contiguous().transpose(1, 2) * q.shape[0]
                out = fap.flash_attn_func(x.to(q.dtype), k, v)
                rows = fap.flash_attn_varlen_func(*(y.flatten(0, 1) for y in (q, k, v)), cu, cu, 9, 9)
            return out + fap.flash_attn_func(q, k, v), rows[..., :3].sum(-1).relu_()

        attend(*dense(2, 9, 2, 32), offsets(9, 9))
        assert len(stand_in.calls) == 2


@pytest.mark.gpu
class TestOnAGPU:
    """The real one. Skipped, with the reason, where it cannot be called."""

    @pytest.fixture(autouse=True)
    def available(self) -> None:
        pytest.importorskip("triton")
        try:
            importlib.import_module("flag_gems")
        except Exception as error:
            pytest.skip(f"flag_gems cannot be imported ({type(error).__name__}: {error})")
        version = integration._triton_version()
        if tuple(map(int, version.split(".")[:2])) >= integration._TRITON_TOO_NEW:
            pytest.skip(f"flag_gems is not right with Triton {version}")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", ACCEPTED, ids=str)
    def test_is_right(self, case: Case, dtype: torch.dtype) -> None:
        check_problem(case.make("cuda", dtype), case.name, loss="", run=run_backend)

    def test_is_right_whatever_came_before(self) -> None:
        """Its launcher finds a compiled kernel again by less than what it was compiled for."""
        q, k, v = (x.cuda() for x in dense(1, 128, 2, 64))
        for keys in (128, 100, 128, 67):
            problem = Problem(q, k[:, :keys], v[:, :keys], Variant(), None)
            check_problem(problem, f"{keys} keys", loss="", run=run_backend)

    def test_the_cpu_is_not_its_device(self) -> None:
        with pytest.raises(NotImplementedError, match="q: expected a device of type cuda"):
            OPS.flag_gems_fwd(*dense(2, 9, 2, 32))
