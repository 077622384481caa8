"""Rotary position embedding: values against complex numbers in fp64, gradients, in place, traces, the Triton kernel."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
import torch
from assertions import assert_close_to_oracle
from test_opcheck import check
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import flash_attn_plus as fap
from flash_attn_plus import gpu, library
from flash_attn_plus.schemas import Rotation

OPS = torch.ops.flash_attn_plus
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One rotation. A packed batch is described by ``lengths``."""

    name: str
    batch: int = 2
    seqlen: int = 19
    heads: int = 3
    head_dim: int = 32
    rotary_dim: int = 32
    positions: int = 64  # rows of the tables
    offset: int | tuple[int, ...] = 0  # a tuple is a tensor: one for each sequence
    offsets_dtype: torch.dtype = torch.int32
    tables: torch.dtype | None = None  # None: x's
    # Of x: or "heads_first", "sliced", "packed" (in one qkv tensor), "every_other" (strides in the last axis).
    layout: str = "contiguous"
    strided_tables: bool = False
    lengths: tuple[int, ...] | None = None
    before: int = 0  # rows of x before the first sequence
    padding: int = 0  # and behind the last one
    max_seqlen: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def starts(self) -> list[int]:
        return list(accumulate(self.lengths, initial=self.before))

    def make(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        interleaved: bool = False,
        conjugate: bool = False,
    ) -> tuple[Tensor, Rotation]:
        """x and how it is rotated: the same values on every device. Rows of no sequence hold NaN and infinities."""
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(len(self.name)))
        rows, sequences = self.seqlen, self.batch
        if self.lengths is not None:
            rows, sequences = self.starts[-1] + self.padding, len(self.lengths)
        x = draw(*(() if self.lengths is not None else (self.batch,)), rows, self.heads, self.head_dim)
        if self.lengths is not None:
            x[: self.before], x[self.starts[-1] :] = NAN, torch.inf
        angles = draw(self.positions, self.rotary_dim // 2) * 3
        cos, sin = (table.to(device, self.tables or dtype) for table in (angles.cos(), angles.sin()))
        if self.strided_tables:
            cos, sin = cos.t().contiguous().t(), torch.stack([sin, sin * NAN], -1)[..., 0]
        per_sequence = cu_seqlens = None
        if isinstance(self.offset, tuple):
            assert len(self.offset) == sequences
            per_sequence = torch.tensor(self.offset, dtype=self.offsets_dtype, device=device)
        if self.lengths is not None:
            cu_seqlens = torch.tensor(self.starts, dtype=torch.int32, device=device)
        offset = 0 if per_sequence is not None else self.offset
        rotation = Rotation(cos, sin, offset, per_sequence, cu_seqlens, self.max_seqlen, interleaved, conjugate)
        return self._laid_out(x.to(device, dtype)), rotation

    def _laid_out(self, x: Tensor) -> Tensor:
        """The same values with other strides; NaN in the gaps."""
        if self.layout == "heads_first":
            return x.transpose(-2, -3).contiguous().transpose(-2, -3)
        if self.layout == "sliced":
            whole = x.new_full((*x.shape[:-1], x.shape[-1] + 5), NAN)
            whole[..., 3:-2] = x
            return whole[..., 3:-2]
        if self.layout == "packed":
            whole = x.new_full((*x.shape[:-2], 3, *x.shape[-2:]), NAN)
            whole[..., 1, :, :] = x
            return whole[..., 1, :, :]
        if self.layout == "every_other":
            return torch.stack([x, x * NAN], -1)[..., 0]
        return x


CASES = [
    Case("plain"),
    Case("batch_0", batch=0),
    Case("seqlen_0", seqlen=0),
    Case("seqlen_1", seqlen=1, batch=5, offset=7),
    Case("heads_1", heads=1),
    Case("heads_0", heads=0),
    Case("many_heads", heads=13, seqlen=5, head_dim=64, rotary_dim=64),
    Case("rotary_dim_2", rotary_dim=2),
    Case("head_dim_2", head_dim=2, rotary_dim=2),
    Case("part", head_dim=59, rotary_dim=32),
    Case("odd_rest", head_dim=17, rotary_dim=10),
    Case("odd_half", head_dim=192, rotary_dim=96, seqlen=9),
    Case("wide", head_dim=256, rotary_dim=256, seqlen=7),
    Case("wider", head_dim=576, rotary_dim=64, seqlen=5),
    Case("whole_table", seqlen=64),
    Case("offset", offset=45),
    Case("offsets_int32", offset=(3, 45)),
    Case("offsets_int64", offset=(45, 0), offsets_dtype=torch.int64),
    Case("offsets_past_the_table", offset=(60, 64, 1000, 2**31 - 1), batch=4),
    Case("offsets_far_past_the_table", offset=(2**40, 2**62), offsets_dtype=torch.int64),
    Case("offsets_before_the_table", offset=(-5, -(2**31)), head_dim=40),
    Case("no_positions", positions=0, offset=(0, 1)),
    Case("float32_tables", tables=torch.float32, offset=3),
    Case("float16_tables", tables=torch.float16),
    Case("strided_tables", strided_tables=True, offset=(1, 2)),
    Case("heads_first", layout="heads_first", head_dim=40),
    Case("sliced", layout="sliced", head_dim=40, offset=(2, 0)),
    Case("packed", layout="packed"),
    Case("every_other", layout="every_other", head_dim=40),
    Case("varlen", lengths=(5, 0, 19, 1), max_seqlen=19),
    Case("varlen_without_max_seqlen", lengths=(5, 30), head_dim=33, rotary_dim=6),
    Case("varlen_padding", lengths=(0, 7, 0, 9, 0), before=3, padding=11, max_seqlen=20),
    Case("varlen_no_sequences", lengths=(), padding=9, offset=(), max_seqlen=0),
    Case("varlen_no_rows", lengths=(0, 0), max_seqlen=0),
    Case("varlen_offset", lengths=(40, 3), offset=30, head_dim=48),
    Case("varlen_offset_far_past_the_table", lengths=(4, 3), offset=2**40),
    Case("varlen_offsets", lengths=(5, 0, 40), offset=(60, 3, -2), offsets_dtype=torch.int64, padding=4),
    Case("varlen_sliced", lengths=(30, 11), layout="sliced", offset=(1, 2), padding=1),
    Case("varlen_every_other", lengths=(30, 11), layout="every_other", head_dim=34),
]
BY_NAME = {case.name: case for case in CASES}
both_pairings = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def rows_of(x: Tensor, rotation: Rotation) -> list[tuple[tuple[int, ...], int]]:
    """(index of a row, its position in the tables) of all rows that are rotated."""
    per_sequence, starts = rotation.seqlen_offsets, rotation.cu_seqlens
    if starts is None:
        where = [((b, i), b, i) for b in range(x.shape[0]) for i in range(x.shape[1])]
    else:
        bounds = pairwise(starts.tolist())
        where = [((row,), b, row - first) for b, (first, end) in enumerate(bounds) for row in range(first, end)]
    offsets = per_sequence.tolist() if per_sequence is not None else None
    placed = [(index, i + (rotation.offset if offsets is None else offsets[b])) for index, b, i in where]
    return [(index, position) for index, position in placed if 0 <= position < rotation.cos.shape[0]]


def oracle(x: Tensor, rotation: Rotation) -> Tensor:
    """Each pair of columns is a complex number, which is multiplied by another: in fp64, row by row."""
    out = x.detach().double().cpu().clone()
    factors = torch.complex(rotation.cos.detach().double().cpu(), rotation.sin.detach().double().cpu())
    if rotation.conjugate:
        factors = factors.conj()
    half = factors.shape[1]
    for index, position in rows_of(x, rotation):
        rotary = out[index][:, : 2 * half]
        if rotation.interleaved:
            numbers = torch.view_as_complex(rotary.reshape(-1, half, 2).contiguous())
        else:
            numbers = torch.complex(*(part.contiguous() for part in rotary.split(half, 1)))
        turned = torch.view_as_real(numbers * factors[position])
        rotary.copy_((turned if rotation.interleaved else turned.transpose(1, 2)).flatten(1))
    return out


def plain(x: Tensor, rotation: Rotation) -> Tensor:
    """The same maths in real numbers, at x's dtype."""
    out = x.detach().cpu().clone()
    cos, sin = (table.detach().to(x.dtype).cpu() for table in rotation[:2])
    sin = -sin if rotation.conjugate else sin
    half = cos.shape[1]
    first = slice(0, 2 * half, 2) if rotation.interleaved else slice(half)
    second = slice(1, 2 * half, 2) if rotation.interleaved else slice(half, 2 * half)
    for index, p in rows_of(x, rotation):
        a, b = out[index][:, first].clone(), out[index][:, second].clone()
        out[index][:, first] = a * cos[p] - b * sin[p]
        out[index][:, second] = a * sin[p] + b * cos[p]
    return out


def check_values(actual: Tensor, x: Tensor, rotation: Rotation, name: str) -> None:
    """The oracle rule for what is rotated, and equality for everything else. ``x`` is what came in."""
    assert actual.dtype == x.dtype and actual.shape == x.shape
    actual, x = actual.detach().cpu(), x.detach().cpu()
    rotary_dim = 2 * rotation.cos.shape[1]
    is_rotated = torch.zeros(x.shape[:-2], dtype=torch.bool)
    for index, _ in rows_of(x, rotation):
        is_rotated[index] = True
    for passed_on in (slice(rotary_dim, None), slice(None)):
        rows = is_rotated if passed_on.start else ~is_rotated
        same = torch.equal(actual[rows][..., passed_on].nan_to_num(7.0), x[rows][..., passed_on].nan_to_num(7.0))
        assert same, f"{name}: what is passed on has changed"
    expected, at_dtype = oracle(x, rotation), plain(x, rotation)
    if is_rotated.any():
        rotated = (t[is_rotated][..., :rotary_dim] for t in (actual, expected, at_dtype))
        assert_close_to_oracle(*rotated, name=f"{name}, {x.dtype}")


def run_operator(x: Tensor, rotation: Rotation, in_place: bool = False) -> Tensor:
    if in_place:
        assert OPS.rotary_(x, *rotation) is None
        return x
    return OPS.rotary(x, *rotation)


def run_kernel(x: Tensor, rotation: Rotation, in_place: bool = False) -> Tensor:
    """By the path that a call on a GPU takes behind the checks; interpreted without one."""
    if x.is_cuda:
        return run_operator(x, rotation, in_place)
    import interpreter

    interpreter.install()
    prepare = gpu.prepare_rotary_ if in_place else gpu.prepare_rotary
    out = prepare(x, rotation)(x, rotation)
    assert (out is None) == in_place
    return x if in_place else out


def check_case(case: Case, device: str, dtype: torch.dtype, run: Callable, **how: bool) -> None:
    x, rotation = case.make(device, dtype, **how)
    before = x.clone()
    out = run(x, rotation)
    assert out.is_contiguous() and (out.numel() == 0 or out.data_ptr() != x.data_ptr())
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0)), f"{case}: x has changed"
    check_values(out, x, rotation, case.name)
    storage = x.untyped_storage()
    whole = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (len(storage) // x.element_size(),))
    gaps = whole.isnan().sum()
    assert run(x, rotation, in_place=True) is x
    assert torch.equal(x.nan_to_num(7.0), out.nan_to_num(7.0)), f"{case}: in place, it is something else"
    assert whole.isnan().sum() == gaps, f"{case}: it was written between the elements of x"


class TestValues:
    @both_pairings
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_operator(self, case: Case, dtype: torch.dtype, interleaved: bool, device: str) -> None:
        check_case(case, device, dtype, run_operator, interleaved=interleaved)

    @both_pairings
    @pytest.mark.parametrize("name", ["part", "offsets_int32", "varlen_padding"])
    def test_conjugate_rotates_back(self, name: str, interleaved: bool, device: str) -> None:
        check_case(BY_NAME[name], device, torch.float32, run_operator, interleaved=interleaved, conjugate=True)

    def test_an_expanded_tensor_is_read(self) -> None:
        x, rotation = BY_NAME["plain"].make()
        x = x[:, :, :1].expand(-1, -1, 3, -1)
        check_values(OPS.rotary(x, *rotation), x, rotation, "expanded")

    def test_offsets_that_grow_are_checked_every_time(self) -> None:
        """One signature, whatever the offset: what ran before runs again, and must still be told what is wrong."""
        x, rotation = BY_NAME["seqlen_1"].make()
        memory = library.memory_of("rotary")
        memory.clear()
        for offset in (0, 1, 63, 5):
            at = rotation._replace(offset=offset)
            check_values(OPS.rotary(x, *at), x, at, f"offset {offset}")
            assert len(memory.runs) == 1
        with pytest.raises(ValueError, match=r"cos: expected at least 65 positions \(offset 64 \+ seqlen 1\)"):
            OPS.rotary(x, *rotation._replace(offset=64))

    def test_no_device_is_asked_for_lengths(self) -> None:
        """Plain PyTorch of other devices traces without values."""
        from flash_attn_plus import rotate

        for name in ("varlen_padding", "varlen_offsets", "offsets_int64"):
            x, rotation = BY_NAME[name].make()
            moved = Rotation(*(v.to("meta") if isinstance(v, Tensor) else v for v in rotation))
            assert rotate.rotary(x.to("meta"), moved).shape == x.shape


class TestKernel:
    """The Triton kernel: in the interpreter without a GPU, through the operators on one."""

    pytestmark = pytest.mark.skipif(not library.importlib.util.find_spec("triton"), reason="Triton is not installed")

    @both_pairings
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_agrees_with_the_oracle(self, case: Case, dtype: torch.dtype, interleaved: bool, device: str) -> None:
        conjugate = case.name in ("offset", "varlen_offsets", "part")
        check_case(case, device, dtype, run_kernel, interleaved=interleaved, conjugate=conjugate)

    def test_offsets_of_later_calls(self, device: str) -> None:
        x, rotation = BY_NAME["varlen_offset"].make(device)
        prepared = gpu.prepare_rotary(x, rotation) if device == "cpu" else lambda x, at: OPS.rotary(x, *at)
        for offset in (30, 0, 2**40):
            at = rotation._replace(offset=offset)
            check_values(prepared(x, at), x, at, f"offset {offset}")

    @pytest.mark.parametrize("starts", [[0, 9, 4, 30], [-7, 5, 2**30], [40, 3], [2**31 - 1, -(2**31)]])
    def test_wrong_lengths_touch_nothing_else(self, starts: list[int], device: str) -> None:
        """What no host may read, no one checks: rows stay inside x, whatever the offsets say."""
        x, rotation = BY_NAME["varlen_padding"].make(device)
        wrong = rotation._replace(cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device))
        assert run_kernel(x, wrong).shape == x.shape

    @pytest.mark.no_poison
    def test_results_come_from_the_quick_allocator_too(self, device: str) -> None:
        check_case(BY_NAME["part"], device, torch.float16, run_kernel)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def tables(positions: int = 9, half: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(positions, half, dtype=dtype), torch.randn(positions, half, dtype=dtype)


CU_SEQLENS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
OFFSETS = torch.tensor([1, 2**20])
# name: (what is rotated, shape of its input)
FUNCTIONS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "dense": (lambda x, *t: fap.apply_rotary_emb(x, *t, seqlen_offsets=2), (2, 4, 2, 8)),
    "offsets": (lambda x, *t: fap.apply_rotary_emb(x, *t, interleaved=True, seqlen_offsets=OFFSETS), (2, 4, 2, 8)),
    "varlen": (lambda x, *t: fap.apply_rotary_emb(x, *t, cu_seqlens=CU_SEQLENS, max_seqlen=3), (6, 2, 8)),
    "in_place": (lambda x, *t: fap.apply_rotary_emb(x * 2, *t, inplace=True), (2, 4, 2, 8)),
    "in_place_view": (lambda x, *t: fap.apply_rotary_emb((x * 2).transpose(1, 2), *t, inplace=True), (2, 2, 4, 8)),
    "varlen_in_place": (
        lambda x, *t: fap.apply_rotary_emb(x * 2, *t, inplace=True, cu_seqlens=CU_SEQLENS, max_seqlen=3),
        (6, 2, 8),
    ),
    "qkv": (lambda x, *t: fap.apply_rotary_emb_qkv_(x * 2, *t), (2, 4, 3, 2, 8)),
    "qkv_of_keys": (lambda x, *t: fap.apply_rotary_emb_qkv_(x * 2, *t, t[1], t[0]), (2, 4, 3, 2, 8)),
    "qkv_strided": (lambda x, *t: fap.apply_rotary_emb_qkv_((x * 2).transpose(2, 3), *t), (2, 4, 2, 3, 8)),
    "gqa": (lambda x, *t: fap.apply_rotary_emb_qkv_(x * 2, *t, num_heads_q=3), (2, 4, 7, 8)),
    "kv": (lambda x, *t: fap.apply_rotary_emb_kv_(x * 2, *t, seqlen_offsets=5), (2, 4, 2, 2, 8)),
}
IN_PLACE = ["in_place", "in_place_view", "varlen_in_place", "qkv", "qkv_of_keys", "qkv_strided", "gqa", "kv"]


class TestGradients:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_gradcheck(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        cos, sin = tables()
        rotate = lambda x: function(x, cos, sin)  # noqa: E731
        fast = name in IN_PLACE  # along random directions, instead of every element by itself
        assert torch.autograd.gradcheck(rotate, leaf(*shape), check_forward_ad=True, fast_mode=fast)
        assert torch.autograd.gradgradcheck(rotate, leaf(*shape), check_fwd_over_rev=True, fast_mode=True)

    @both_pairings
    @pytest.mark.parametrize("name", ["plain", "part", "offsets_past_the_table", "varlen_padding", "every_other"])
    def test_is_the_rotation_back(self, name: str, interleaved: bool, device: str) -> None:
        x, rotation = BY_NAME[name].make(device, interleaved=interleaved)
        out = OPS.rotary(x.requires_grad_(), *rotation)
        dout = torch.randn_like(out)
        (dx,) = torch.autograd.grad(out, x, dout)
        check_values(dx, dout, rotation._replace(conjugate=True), f"{name}: dx")

    @pytest.mark.parametrize("name", ["dense", "in_place"])
    @pytest.mark.parametrize("transform", ["grad", "grad_of_grad", "jvp", "jvp_of_jvp", "jvp_of_grad", "grad_of_jvp"])
    def test_function_transforms(self, name: str, transform: str) -> None:
        func = torch.func
        cos, sin = tables()
        x, t, u = torch.randn(3, 2, 4, 2, 8, dtype=torch.float64).unbind(0)

        def by_matrices(x: Tensor) -> Tensor:
            c, s = (table[2:6] if name == "dense" else table[:4] for table in (cos[:, None], sin[:, None]))
            a, b, rest = (x if name == "dense" else 2 * x).split((3, 3, 2), -1)
            return torch.cat([a * c - b * s, a * s + b * c, rest], -1)

        def derivative(rotate: Callable) -> Tensor:
            cube = lambda x: rotate(x).pow(3).sum()  # noqa: E731
            slope = lambda x: func.jvp(cube, (x,), (t,))[1]  # noqa: E731
            return {
                "grad": func.grad(cube),
                "grad_of_grad": func.grad(lambda x: func.grad(cube)(x).square().sum()),
                "jvp": slope,
                "jvp_of_jvp": lambda x: func.jvp(slope, (x,), (u,))[1],
                "jvp_of_grad": lambda x: func.jvp(func.grad(cube), (x,), (t,))[1],
                "grad_of_jvp": func.grad(slope),
            }[transform](x)

        actual = derivative(lambda x: FUNCTIONS[name][0](x, cos, sin))
        torch.testing.assert_close(actual, derivative(by_matrices))

    def test_tables_that_require_a_gradient_raise_by_name(self) -> None:
        x, (cos, sin) = torch.randn(2, 4, 2, 8), tables(dtype=torch.float32)
        for op in (OPS.rotary, OPS.rotary_):
            with pytest.raises(NotImplementedError, match=r"^cos: expected a tensor that does not require a gradient"):
                op(x, cos.clone().requires_grad_(), sin)
            with pytest.raises(NotImplementedError, match=r"^sin: expected a tensor that does not require a gradient"):
                op(x, cos, sin.clone().requires_grad_())
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode gradient"):
                op(forward_ad.make_dual(x, x.clone()), forward_ad.make_dual(cos, cos.clone()), sin)
            with torch.no_grad():
                op(x, cos.clone().requires_grad_(), sin)

    def test_tables_changed_in_place_are_noticed(self) -> None:
        cos, sin = tables()
        out = fap.apply_rotary_emb(leaf(2, 4, 2, 8), cos, sin)
        cos.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_half_precision_gradients_are_rounded_once(self) -> None:
        x, rotation = BY_NAME["part"].make(dtype=torch.bfloat16)
        out = OPS.rotary(x.requires_grad_(), *rotation)
        out.sum().backward()
        assert x.grad.dtype == torch.bfloat16
        check_values(x.grad, torch.ones_like(x), rotation._replace(conjugate=True), "dx")


class TestInPlace:
    @pytest.mark.parametrize("name", IN_PLACE)
    def test_queries_and_keys_as_one_by_one_and_values_stay(self, name: str) -> None:
        cos, sin = tables(dtype=torch.float32)
        function, shape = FUNCTIONS[name]
        x = torch.randn(shape)
        out = function(x, cos, sin)
        expected = x * 2
        if name in ("qkv", "qkv_of_keys", "qkv_strided", "kv", "gqa"):
            heads = expected.transpose(2, 3) if name == "qkv_strided" else expected
            options = {"seqlen_offsets": 5 if name == "kv" else 0}
            of_keys = (sin, cos) if name == "qkv_of_keys" else (cos, sin)
            if name == "gqa":
                q, k, v = heads.split((3, 2, 2), 2)
                parts = fap.apply_rotary_emb(q, cos, sin), fap.apply_rotary_emb(k, cos, sin), v
                torch.testing.assert_close(out, torch.cat(parts, 2), rtol=0, atol=0)
                return
            *q, k, v = heads.unbind(2)
            parts = [fap.apply_rotary_emb(part, cos, sin) for part in q]
            parts += [fap.apply_rotary_emb(k, *of_keys, **options), v]
            torch.testing.assert_close(out, torch.stack(parts, 2), rtol=0, atol=0)
            return
        packed = {"cu_seqlens": CU_SEQLENS, "max_seqlen": 3} if name == "varlen_in_place" else {}
        expected = expected.transpose(1, 2) if name == "in_place_view" else expected
        torch.testing.assert_close(out, fap.apply_rotary_emb(expected, cos, sin, **packed), rtol=0, atol=0)

    @pytest.mark.parametrize("function", [fap.apply_rotary_emb_qkv_, fap.apply_rotary_emb_kv_, "inplace"])
    def test_returns_what_it_changed(self, function: Callable | str) -> None:
        shape = {fap.apply_rotary_emb_qkv_: (2, 4, 3, 2, 8), fap.apply_rotary_emb_kv_: (2, 4, 2, 2, 8)}
        x = torch.randn(shape.get(function, (2, 4, 2, 8)))
        before, version = x.clone(), x._version
        call = function if callable(function) else functools.partial(fap.apply_rotary_emb, inplace=True)
        assert call(x, *tables(dtype=torch.float32)) is x
        assert x._version > version and not torch.equal(x, before)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_notes_that_x_was_written_into(self, context: Callable) -> None:
        x, rotation = BY_NAME["plain"].make()
        version, others = x._version, [t._version for t in rotation[:2]]
        with context():
            OPS.rotary_(x, *rotation)
        assert x._version == version + 1
        assert [t._version for t in rotation[:2]] == others

    def test_what_was_saved_is_noticed(self) -> None:
        x = torch.randn(2, 4, 2, 8)
        product = torch.ones_like(x, requires_grad=True) * x
        OPS.rotary_(x, *tables())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_its_own_backward_needs_no_x(self) -> None:
        x = leaf(2, 4, 2, 8)
        cos, sin = tables()
        out = fap.apply_rotary_emb(x * 1, cos, sin, inplace=True)
        loss = out.sum()
        with torch.no_grad():
            out.zero_()
        (dx,) = torch.autograd.grad(loss, x)
        assert dx.abs().sum() > 0

    @pytest.mark.parametrize(
        "make, sentence",
        [
            (lambda x: x, "^a leaf Variable that requires grad is being used in an in-place operation"),
            (
                lambda x: x[:, 1:],
                "^a view of a leaf Variable that requires grad is being used in an in-place operation",
            ),
            (lambda x: (x * 1).split(1)[0], "is the output of a function that returns multiple views"),
        ],
        ids=["leaf", "view_of_a_leaf", "multiple_views"],
    )
    def test_errors_of_pytorch_come_before_anything_runs(self, make: Callable, sentence: str) -> None:
        x = make(leaf(2, 4, 2, 8))
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match=sentence):
            fap.apply_rotary_emb(x, *tables(), inplace=True)
        assert torch.equal(x, before)
        with torch.no_grad():
            fap.apply_rotary_emb(x, *tables(), inplace=True)
        assert not torch.equal(x, before)

    def test_views_of_other_parts_see_nothing(self) -> None:
        """As in a transformer: q, k and v are views, of which some are rotated."""
        x, (cos, sin) = leaf(2, 4, 3, 2, 8), tables()
        qkv = x * 1
        q, k, v = (qkv[:, :, i] for i in range(3))
        for part in (q, k):
            fap.apply_rotary_emb(part, cos, sin, inplace=True)
        (actual,) = torch.autograd.grad((q * k * v).sum(), x)
        q, k, v = x.unbind(2)
        expected = fap.apply_rotary_emb(q, cos, sin) * fap.apply_rotary_emb(k, cos, sin) * v
        torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), x)[0])

    def test_an_inference_tensor_is_not_written_into_outside_inference_mode(self) -> None:
        with torch.inference_mode():
            x, rotation = BY_NAME["plain"].make()
        with pytest.raises(RuntimeError, match="inference tensor is written into outside InferenceMode"):
            OPS.rotary_(x, *rotation)

    def test_keys_that_do_not_fit_leave_the_queries(self) -> None:
        qkv, (cos, sin) = torch.randn(2, 4, 3, 2, 8), tables(dtype=torch.float32)
        before = qkv.clone()
        with pytest.raises(ValueError, match="cos: expected at least 4 positions"):
            fap.apply_rotary_emb_qkv_(qkv, cos, sin, cos[:3], sin[:3])
        assert torch.equal(qkv, before)


def compiled(function: Callable) -> tuple[Callable, AotEagerAndRecordGraphs]:
    torch._dynamo.reset()
    graphs = AotEagerAndRecordGraphs()
    return torch.compile(function, backend=graphs, fullgraph=True, dynamic=True), graphs


def operators_in(graph: torch.fx.GraphModule) -> list[str]:
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target for target in targets if "flash_attn_plus" in target or "auto_functionalized" in target]


class TestWhatPyTorchAsks:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_schema_autograd_and_fake(self, case: Case) -> None:
        x, rotation = case.make(interleaved=True)
        every = ("test_schema", "test_autograd_registration", "test_faketensor")
        x = x.nan_to_num(0.0, 0.0, 0.0)
        check((OPS.rotary_.default, (x.clone(), *rotation)), every)
        check((OPS.rotary.default, (x.requires_grad_(), *rotation)), every)

    @pytest.mark.parametrize("name", ["plain", "batch_0", "offset", "offsets_int64", "varlen_padding", "no_positions"])
    def test_traces_with_symbolic_sizes(self, name: str) -> None:
        x, rotation = BY_NAME[name].make()
        x = x.nan_to_num(0.0, 0.0, 0.0)
        check((OPS.rotary_.default, (x.clone(), *rotation)), ("test_aot_dispatch_dynamic",))
        check((OPS.rotary.default, (x.requires_grad_(), *rotation)), ("test_aot_dispatch_dynamic",))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_meta_device(self, case: Case) -> None:
        x, rotation = case.make()
        on_meta = Rotation(*(v.to("meta") if isinstance(v, Tensor) else v for v in rotation))
        promised, out = OPS.rotary(x.to("meta"), *on_meta), OPS.rotary(x, *rotation)
        assert promised.is_meta and promised.is_contiguous()
        assert (promised.shape, promised.dtype) == (out.shape, out.dtype)
        assert OPS.rotary_(x.to("meta"), *on_meta) is None

    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "qkv_strided"])
    def test_compiled_whole_for_all_lengths(self, name: str) -> None:
        function, shape = FUNCTIONS[name]
        cos, sin = tables(90)
        run, graphs = compiled(lambda x: function(x, cos, sin).sin())
        axis = 0 if name.startswith("varlen") else 1
        for length in (6, 7, 31, 8):
            x = leaf(*shape[:axis], length, *shape[axis + 1 :])
            torch.testing.assert_close(run(x), function(x, cos, sin).sin())
            grads = [torch.autograd.grad(f(x).square().sum(), x) for f in (run, lambda x: function(x, cos, sin).sin())]
            torch.testing.assert_close(*grads)
        count = 2 if name == "qkv_of_keys" else 1
        assert len(graphs.fw_graphs) == 1
        for [graph] in (graphs.fw_graphs, graphs.bw_graphs):
            assert operators_in(graph) == ["flash_attn_plus.rotary.default"] * count

    def test_compiled_once_for_all_offsets(self) -> None:
        cos, sin = tables(90)
        run, graphs = compiled(lambda x, offset: fap.apply_rotary_emb(x, cos, sin, seqlen_offsets=offset))
        for length, offset in ((4, 0), (5, 1), (4, 2), (9, 60)):
            x = torch.randn(2, length, 2, 8)
            assert torch.equal(run(x, offset), fap.apply_rotary_emb(x, cos, sin, seqlen_offsets=offset))
        assert len(graphs.fw_graphs) == 1

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_the_operator_in_place_is_one_node(self, requires_grad: bool) -> None:
        cos, sin = tables()

        def rotate(x: Tensor) -> Tensor:
            x = x * 2
            OPS.rotary_(x, cos, sin)
            return x.sin()

        run, graphs = compiled(rotate)
        for length in (4, 7):
            x = leaf(2, length, 2, 8).requires_grad_(requires_grad)
            torch.testing.assert_close(run(x), rotate(x))
            if requires_grad:
                grads = [torch.autograd.grad(f(x).square().sum(), x) for f in (run, rotate)]
                torch.testing.assert_close(*grads)
        assert [len(operators_in(graph)) for graph in graphs.fw_graphs] == [1]

    def test_inputs_are_changed_by_compiled_functions_too(self) -> None:
        cos, sin = tables(90)
        run, graphs = compiled(lambda qkv: fap.apply_rotary_emb_qkv_(qkv, cos, sin))
        for length in (4, 5, 9):
            x = torch.randn(2, length, 3, 2, 8)
            expected = fap.apply_rotary_emb_qkv_(x.clone(), cos, sin)
            assert torch.equal(run(x), expected) and torch.equal(x, expected)
        assert len(graphs.fw_graphs) == 1

    def test_exported_as_one_node(self) -> None:
        cos, sin = tables(90)

        class Rotate(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return fap.apply_rotary_emb(x, cos, sin)

        length = torch.export.Dim("length", min=2, max=90)
        program = torch.export.export(Rotate(), (torch.randn(2, 4, 2, 8),), dynamic_shapes={"x": {1: length}})
        program = program.run_decompositions()
        assert operators_in(program.graph_module) == ["flash_attn_plus.rotary.default"]
        x = torch.randn(2, 60, 2, 8)
        assert torch.equal(program.module()(x), fap.apply_rotary_emb(x, cos, sin))

    @pytest.mark.parametrize("function", ["apply_rotary_emb", "apply_rotary_emb_qkv_", "apply_rotary_emb_kv_"])
    def test_one_node_of_a_symbolic_trace(self, function: str) -> None:
        public = getattr(fap, function)
        assert inspect.isfunction(public) and pickle.loads(pickle.dumps(public)) is public
        traced = torch.fx.symbolic_trace(lambda x, cos, sin: public(x, cos, sin, interleaved=True))
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [public]

    @pytest.mark.parametrize("mapped", ["x", "offsets", "both", "tables", "varlen"])
    def test_vmap(self, mapped: str) -> None:
        x, offsets = torch.randn(3, 2, 4, 2, 8), torch.tensor([[0, 1], [2, 3], [4, 60]])
        cos, sin = torch.randn(2, 3, 9, 3).unbind(0)
        if mapped == "varlen":
            x = torch.randn(3, 6, 2, 8)
            rotate = lambda x: OPS.rotary(x, cos[0], sin[0], 1, None, CU_SEQLENS, 3)  # noqa: E731
            actual, expected = torch.vmap(rotate)(x), [rotate(x[i]) for i in range(3)]
        else:
            rotate = lambda x, cos, sin, offsets: OPS.rotary(x, cos, sin, 0, offsets)  # noqa: E731
            of_x = 1 if mapped in ("x", "both", "tables") else None
            of_tables = 0 if mapped == "tables" else None
            of_offsets = 1 if mapped in ("offsets", "both") else None
            values = (
                *(x.movedim(0, 1) if of_x else x[0], cos if mapped == "tables" else cos[0]),
                *(sin if mapped == "tables" else sin[0], offsets.t() if of_offsets else offsets[0]),
            )
            actual = torch.vmap(rotate, in_dims=(of_x, of_tables, of_tables, of_offsets))(*values)
            expected = [
                rotate(
                    *(x[i] if of_x else x[0], values[1] if of_tables is None else cos[i]),
                    *(values[2] if of_tables is None else sin[i], offsets[i] if of_offsets else offsets[0]),
                )
                for i in range(3)
            ]
        torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=0)

    def test_vmap_over_nothing_of_gradients_and_in_place(self) -> None:
        cos, sin = tables(dtype=torch.float32)
        for tables_of in ((cos, sin), (cos.expand(0, 9, 3), sin)):
            axes = (0, 0 if tables_of[0].dim() == 3 else None, None)
            out = torch.vmap(OPS.rotary, in_dims=axes)(torch.randn(0, 2, 4, 2, 8), *tables_of)
            assert out.shape == (0, 2, 4, 2, 8)
        gradient = torch.func.grad(lambda x: OPS.rotary(x, cos, sin).pow(3).sum())
        x = torch.randn(3, 2, 4, 2, 8)
        torch.testing.assert_close(torch.vmap(gradient)(x), torch.stack([gradient(one) for one in x]))
        with pytest.raises(NotImplementedError, match="flash_attn_plus::rotary_ writes into its arguments and has no"):
            torch.vmap(lambda x: OPS.rotary_(x, cos, sin))(x)

    def test_autocast_leaves_dtypes_as_they_are(self) -> None:
        x, rotation = BY_NAME["float32_tables"].make(dtype=torch.float16)
        expected = OPS.rotary(x, *rotation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(OPS.rotary(x, *rotation), expected)
            assert torch.equal(OPS.rotary(x.float(), *rotation), OPS.rotary(x.float(), *rotation).float())
            OPS.rotary_(x, *rotation)
        assert torch.equal(x, expected)


def errors() -> list[tuple[str, type, dict]]:
    x, (cos, sin) = torch.zeros(2, 4, 3, 8), tables(dtype=torch.float32)
    ints = functools.partial(torch.tensor, dtype=torch.int32)
    packed = {"x": x[0], "cu_seqlens": ints([0, 2, 4])}
    wide = torch.zeros(9, 5)
    return [
        ("x: expected 4 dimensions (batch, seqlen, heads, head_dim) without cu_seqlens", ValueError, {"x": x[0]}),
        ("x: expected 3 dimensions (total, heads, head_dim) beside cu_seqlens", ValueError, {**packed, "x": x}),
        ("x: expected dtype float16, bfloat16, float32 or float64, got torch.int32", TypeError, {"x": x.int()}),
        ("x: expected a strided tensor, got layout torch.sparse_coo", TypeError, {"x": x.to_sparse()}),
        ("cos: expected 2 dimensions (seqlen_ro, rotary_dim / 2)", ValueError, {"cos": cos[0]}),
        ("sin: expected shape of cos = (9, 3), got (8, 3)", ValueError, {"sin": sin[:8]}),
        ("cos: expected a floating dtype of 16, 32 or 64 bits", TypeError, {"cos": cos.long()}),
        ("cos: expected a rotary_dim of at least 2", ValueError, {"cos": cos[:, :0], "sin": sin[:, :0]}),
        ("cos: expected a rotary_dim of at most head_dim (8), got 10", ValueError, {"cos": wide, "sin": wide}),
        ("cos: expected device cpu (x's), got meta", ValueError, {"cos": cos.to("meta")}),
        ("cos: expected at least 10 positions (offset 6 + seqlen 4), got shape (9, 3)", ValueError, {"offset": 6}),
        ("offset: expected a position of at least 0, got -1", ValueError, {"offset": -1}),
        ("offset: expected 0 beside seqlen_offsets, got 1", ValueError, {"offset": 1, "seqlen_offsets": ints([0, 0])}),
        ("seqlen_offsets: expected dtype torch.int32 or torch.int64", TypeError, {"seqlen_offsets": torch.zeros(2)}),
        ("seqlen_offsets: expected shape (batch,) = (2,), got (3,)", ValueError, {"seqlen_offsets": ints([0, 0, 0])}),
        ("cu_seqlens: expected dtype torch.int32", TypeError, {**packed, "cu_seqlens": torch.tensor([0, 2, 4])}),
        ("cu_seqlens: expected shape (batch + 1,)", ValueError, {**packed, "cu_seqlens": ints([[0, 4]])}),
        ("max_seqlen: expected a length of at least 0, got -1", ValueError, {**packed, "max_seqlen": -1}),
    ]  # fmt: skip


VALUES = [
    ("cu_seqlens: expected offsets that are not negative and never fall, got [0, 3, 2]", [0, 3, 2], None),
    ("cu_seqlens: expected to end at or before the 4 rows of x, got 5", [0, 3, 5], None),
    ("max_seqlen: expected at least the longest sequence (3), got 2", [0, 3, 4], 2),
]


class TestErrors:
    @pytest.mark.parametrize("sentence, error, changes", errors(), ids=lambda x: x if isinstance(x, str) else "")
    def test_sentences(self, sentence: str, error: type, changes: dict) -> None:
        cos, sin = tables(dtype=torch.float32)
        call = {"x": torch.zeros(2, 4, 3, 8), "cos": cos, "sin": sin, **changes}
        for op in (OPS.rotary, OPS.rotary_):
            with pytest.raises(error) as raised:
                op(**call)
            assert str(raised.value).startswith(sentence)

    @pytest.mark.parametrize("sentence, starts, longest", VALUES)
    def test_values_that_the_host_can_read(self, sentence: str, starts: list[int], longest: int | None) -> None:
        x, (cos, sin) = torch.ones(4, 3, 8), tables(dtype=torch.float32)
        for op in (OPS.rotary, OPS.rotary_):
            with pytest.raises(ValueError) as raised:  # noqa: PT011
                op(x, cos, sin, 0, None, torch.tensor(starts, dtype=torch.int32), longest)
            assert str(raised.value) == sentence
        assert (x == 1).all()

    def test_in_place_every_element_has_a_place_of_its_own(self) -> None:
        x, rotation = BY_NAME["plain"].make()
        with pytest.raises(ValueError, match="x: expected a place of its own for every element"):
            OPS.rotary_(x[:, :, :1].expand_as(x), *rotation)

    def test_packed_shapes(self) -> None:
        cos, sin = tables(dtype=torch.float32)
        for x, options, sentence in (
            (torch.zeros(2, 4, 2, 2, 8), {}, "qkv: expected shape (batch, seqlen, 3, heads, head_dim), got"),
            (torch.zeros(2, 4, 8), {}, "qkv: expected shape (batch, seqlen, 3, heads, head_dim) or"),
            (torch.zeros(2, 4, 6, 8), {}, "num_heads_q: expected the number of query heads beside qkv"),
            (torch.zeros(2, 4, 6, 8), {"num_heads_q": 3}, "num_heads_q: expected 6 = num_heads_q + 2 * heads_k heads"),
            (torch.zeros(2, 4, 6, 8), {"num_heads_q": 8}, "num_heads_q: expected 6 = num_heads_q + 2 * heads_k heads"),
        ):
            with pytest.raises(ValueError) as raised:  # noqa: PT011
                fap.apply_rotary_emb_qkv_(x, cos, sin, **options)
            assert str(raised.value).startswith(sentence)
        with pytest.raises(ValueError, match="kv: expected shape"):
            fap.apply_rotary_emb_kv_(torch.zeros(2, 4, 3, 2, 8), cos, sin)


def angles(seqlen: int, dim: int, base: float = 10000.0) -> Tensor:
    return torch.arange(seqlen, dtype=torch.float64)[:, None] * base ** -(
        torch.arange(0, dim, 2, dtype=torch.float64) / dim
    )


class TestRotaryEmbedding:
    @both_pairings
    @pytest.mark.parametrize("offset", [0, 6, torch.tensor([3, 0])], ids=["0", "6", "tensor"])
    def test_qkv(self, interleaved: bool, offset: int | Tensor) -> None:
        module = fap.RotaryEmbedding(8, base=100.0, interleaved=interleaved)
        qkv = torch.randn(2, 5, 3, 2, 12)
        q, k, v = qkv.clone().unbind(2)
        turns = angles(20, 8, 100.0)
        options = {"interleaved": interleaved, "seqlen_offsets": offset}
        expected = [fap.apply_rotary_emb(x, turns.cos(), turns.sin(), **options) for x in (q, k)]
        out = module(qkv, seqlen_offset=offset, max_seqlen=20)
        assert out is qkv
        torch.testing.assert_close(out, torch.stack([*expected, v], 2))

    def test_q_and_kv_and_heads_on_one_axis(self) -> None:
        module = fap.RotaryEmbedding(8)
        q, kv = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 2, 8)
        joint = torch.cat([q, kv.flatten(2, 3)], 2)
        out_q, out_kv = module(q, kv, seqlen_offset=2)
        assert out_q is q and out_kv is kv
        joined = module(joint, seqlen_offset=2, num_heads_q=4)
        torch.testing.assert_close(joined, torch.cat([q, kv.flatten(2, 3)], 2), rtol=0, atol=0)

    def test_scaled(self) -> None:
        """XPos: queries are scaled by what keys are divided by, so that products depend on distances alone."""
        dim, length, scale_base = 8, 10, 32.0
        module = fap.RotaryEmbedding(dim, scale_base=scale_base)
        qkv = torch.randn(1, length, 3, 1, dim)
        q, k, _ = qkv.clone().unbind(2)
        zeta = (torch.arange(0, dim, 2, dtype=torch.float64) + 0.4 * dim) / (1.4 * dim)
        scale = zeta ** ((torch.arange(length, dtype=torch.float64) - length // 2) / scale_base)[:, None]
        cos, sin = angles(length, dim).cos(), angles(length, dim).sin()
        rotated_q = fap.apply_rotary_emb(q, cos * scale, sin * scale)
        rotated_k = fap.apply_rotary_emb(k, cos / scale, sin / scale)
        q_then, kv_then = module(q.clone(), torch.stack([k, k], 2))
        module(qkv)
        torch.testing.assert_close((qkv[:, :, 0], qkv[:, :, 1]), (rotated_q, rotated_k))
        torch.testing.assert_close((q_then, kv_then[:, :, 0], kv_then[:, :, 1]), (rotated_q, rotated_k, k))

    def test_tables_are_made_when_they_are_needed(self) -> None:
        module = fap.RotaryEmbedding(8)
        made = []

        def tables_of(x: Tensor, **options) -> Tensor:
            module(x, **options)
            made.append(module._cos_cached)
            return module._cos_cached

        x = torch.randn(1, 6, 3, 1, 8)
        first = tables_of(x)
        assert tables_of(x[:, :3]) is first
        assert tables_of(x[:, :3], seqlen_offset=3) is first
        longer = tables_of(x, seqlen_offset=1)
        assert longer is not first and longer.shape[0] == 7
        assert tables_of(x, seqlen_offset=torch.tensor([1])) is longer
        assert tables_of(x, max_seqlen=30).shape[0] == 30
        assert tables_of(x.half()).dtype == torch.float16
        with torch.inference_mode():
            evaluated = tables_of(x.clone())
        assert not evaluated.is_inference() and tables_of(x) is evaluated

    def test_a_tensor_offset_first_needs_a_length(self) -> None:
        with pytest.raises(ValueError, match="max_seqlen: expected a length beside a tensor seqlen_offset"):
            fap.RotaryEmbedding(8)(torch.randn(1, 6, 3, 1, 8), seqlen_offset=torch.tensor([1]))

    @pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
    def test_frequencies_stay_float32(self, cast: Callable) -> None:
        module = torch.nn.Sequential(fap.RotaryEmbedding(8, scale_base=512))
        module[0].inv_freq.mul_(0.5)  # as longer contexts are made
        kept = module[0].inv_freq.clone()
        cast(module)
        assert torch.equal(module[0].inv_freq, kept) and module[0].scale.dtype == torch.float32
        assert set(dict(module.named_buffers())) == {"0.inv_freq", "0.scale"} and not module.state_dict()

    def test_made_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            module = fap.RotaryEmbedding(8, scale_base=512)
        assert module.inv_freq.is_meta
        module.to_empty(device="cpu")
        expected = fap.RotaryEmbedding(8, scale_base=512)
        assert torch.equal(module.inv_freq, expected.inv_freq) and torch.equal(module.scale, expected.scale)

    def test_gradients(self) -> None:
        module, x = fap.RotaryEmbedding(6), leaf(1, 4, 3, 2, 8)
        assert torch.autograd.gradcheck(lambda x: module(x * 1.0), x)

    def test_compiled(self) -> None:
        module = fap.RotaryEmbedding(8)
        module._update_cos_sin_cache(64, "cpu", torch.float32)
        run, graphs = compiled(lambda x: module(x * 1.0))
        for length in (5, 9, 50):
            x = torch.randn(2, length, 3, 2, 8)
            torch.testing.assert_close(run(x), module(x.clone()))
        assert len(graphs.fw_graphs) == 1
        x = torch.randn(2, 70, 3, 2, 8)  # longer than the tables
        torch.testing.assert_close(run(x), fap.RotaryEmbedding(8)(x.clone()))
        assert module._cos_cached.shape[0] == 64  # what a graph makes is not kept


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("name", ["part", "offsets_int32", "varlen_offsets"])
    def test_later_launches_are_the_first_one(self, name: str, in_place: bool, device: str) -> None:
        x, rotation = BY_NAME[name].make(device, torch.bfloat16)
        first = run_operator(x.clone(), rotation, in_place)
        for _ in range(3):
            assert torch.equal(run_operator(x.clone(), rotation, in_place).nan_to_num(7.0), first.nan_to_num(7.0))

    @both_pairings
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large(self, dtype: torch.dtype, interleaved: bool, device: str) -> None:
        """As plain PyTorch on the device, which the CPU's tests compare with the oracle."""
        from flash_attn_plus import rotate

        case = Case("large", batch=2, seqlen=4096, heads=16, head_dim=128, rotary_dim=128, positions=4096)
        x, rotation = case.make(device, dtype, interleaved=interleaved)
        expected = rotate.rotary(x.double(), Rotation(*(t.double() for t in rotation[:2]), *rotation[2:]))
        at_dtype = rotate.rotary(x, rotation)
        assert_close_to_oracle(OPS.rotary(x, *rotation), expected, at_dtype, name=f"{dtype}")

    @pytest.mark.xdist_group("memory")
    @pytest.mark.parametrize("packed", [False, True])
    def test_more_than_2_to_the_31_elements(self, packed: bool, device: str) -> None:
        rows, heads, dim = 2**18 + 3, 128, 64
        row = torch.randn(heads, dim, device=device).bfloat16()
        x = row.expand(rows, heads, dim).contiguous()
        assert x.numel() > 2**31
        turns = torch.randn(rows, dim // 2, device=device)
        cos, sin = turns.cos(), turns.sin()
        second = rows - 5  # where the second sequence starts
        if packed:
            starts = torch.tensor([0, second, rows], dtype=torch.int32, device=device)
            OPS.rotary_(x, cos, sin, 0, None, starts)
        else:
            OPS.rotary_(x[None], cos, sin)
        for i in (0, rows // 2, second - 1, second, rows - 1):
            position = i - second if packed and i >= second else i
            expected = OPS.rotary(row[None, None], cos, sin, position)
            assert torch.equal(x[i], expected[0, 0]), i

    @pytest.mark.xdist_group("memory")
    def test_strides_that_span_2_to_the_31_elements(self, device: str) -> None:
        """Inside one tile: heads lie further apart than 32 bits count."""
        whole = torch.zeros(4, 2**29 + 64, dtype=torch.float16, device=device)
        x = whole[:, :64].unflatten(1, (1, 1, 64)).permute(1, 2, 0, 3)  # (1, 1, 4, 64)
        x.copy_(torch.randn(1, 1, 4, 64, device=device))
        before, (cos, sin) = x.clone(), (t.to(device) for t in tables(1, 32, torch.float32))
        OPS.rotary_(x, cos, sin)
        assert torch.equal(x, OPS.rotary(before, cos, sin))
        assert not whole[:, 64:].any()

    def test_in_a_cuda_graph(self, device: str) -> None:
        x, rotation = BY_NAME["offsets_int32"].make(device, torch.bfloat16)
        OPS.rotary(x, *rotation)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = OPS.rotary(x, *rotation)
        for offsets in ([5, 6], [40, 70]):
            rotation.seqlen_offsets.copy_(torch.tensor(offsets))
            x.normal_()
            graph.replay()
            check_values(out, x, rotation, f"{offsets}")

    @pytest.mark.no_poison
    def test_reads_nothing_on_the_host_and_allocates_nothing_in_place(self, device: str) -> None:
        x, rotation = BY_NAME["varlen_offsets"].make(device, torch.bfloat16)
        OPS.rotary_(x, *rotation)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            OPS.rotary_(x, *rotation)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


class TestTablesOfOtherModes:
    """A module is evaluated under modes and trained without them; compiled or not."""

    @pytest.mark.parametrize("compiled_in", [(), (0,), (1,), (0, 1)], ids=str)
    def test_inference_mode(self, compiled_in) -> None:
        torch._dynamo.reset()
        module = fap.RotaryEmbedding(8)
        graph = torch.compile(module, backend="aot_eager", fullgraph=True)
        evaluate, train = (graph if i in compiled_in else module for i in (0, 1))
        x = torch.randn(2, 8, 3, 2, 16)
        expected = fap.RotaryEmbedding(8)(x.clone())
        for _ in range(2):
            with torch.inference_mode():
                evaluate(torch.randn(2, 50, 3, 2, 16))
            leaf = x.clone().requires_grad_()
            out = train(leaf * 1.0)
            torch.testing.assert_close(out, expected)
            out.sum().backward()
            assert leaf.grad.abs().sum() > 0

    def test_fake_tensors(self) -> None:
        module, x = fap.RotaryEmbedding(8), torch.randn(1, 5, 3, 2, 16)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            module(mode.from_tensor(x))
        torch.testing.assert_close(module(x.clone()), fap.RotaryEmbedding(8)(x.clone()))
