"""The native CPU kernels of csrc/, one for each instruction set, called directly and held to plain softmax."""

from __future__ import annotations

import math
from typing import NamedTuple

import hypothesis
import pytest
import torch
from assertions import assert_close_to_oracle
from hypothesis import strategies as st
from torch import Tensor

import flash_attn_plus
from flash_attn_plus import native

needs_library = pytest.mark.skipif(not native.loaded(), reason=f"native library: {native.status()}")
INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Shape(NamedTuple):
    batch: int = 2
    seqlen_q: int = 37
    seqlen_k: int = 53
    heads: int = 3
    heads_k: int = 3
    dim: int = 16
    dim_v: int | None = None
    left: int = -1
    right: int = -1
    diagonal: int | None = None
    scale: float | None = None

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        dim_v = self.dim if self.dim_v is None else self.dim_v
        q = torch.randn(self.batch, self.seqlen_q, self.heads, self.dim)
        k = torch.randn(self.batch, self.seqlen_k, self.heads_k, self.dim)
        v = torch.randn(self.batch, self.seqlen_k, self.heads_k, dim_v)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def options(self) -> tuple[float, int, int, int]:
        scale = self.dim**-0.5 if self.scale is None else self.scale
        diagonal = self.seqlen_k - self.seqlen_q if self.diagonal is None else self.diagonal
        return scale, self.left, self.right, diagonal


def forward(q: Tensor, k: Tensor, v: Tensor, *options: float) -> tuple[Tensor, Tensor]:
    return torch.ops.flash_attn_plus._cpu_forward(q, k, v, *options)


def plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, diagonal: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out and lse of attention as the textbook writes it, in ``dtype``."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    group = q.shape[2] // max(1, k.shape[2])
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = torch.ones(len(i), len(j), dtype=torch.bool)
    if left >= 0:
        seen &= j - i >= max(diagonal - left, -(2**62))
    if right >= 0:
        seen &= j - i <= min(diagonal + right, 2**62)
    scores = scores.masked_fill(~seen, -INF)
    lse = scores.logsumexp(-1)
    p = torch.where(seen, (scores - lse[..., None]).exp(), 0.0).to(dtype)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def check(q: Tensor, k: Tensor, v: Tensor, *options: float) -> None:
    out, lse = forward(q, k, v, *options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    expected_out, expected_lse = plain(q, k, v, *options, torch.float64)
    # lse is an fp32 result whatever the inputs are: it is held to fp32's error, out to that of its own dtype.
    assert_close_to_oracle(lse, expected_lse, plain(q, k, v, *options, torch.float32)[1], name="lse")
    assert_close_to_oracle(out, expected_out, plain(q, k, v, *options, q.dtype)[0], name="out")
    assert (out[(expected_lse == -INF).transpose(1, 2)] == 0).all()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def kernel(request):
    """Each instruction set in turn."""
    if native.select_kernel(request.param) is None:
        pytest.skip(f"this machine does not run the {request.param} kernel")
    yield request.param
    native.select_kernel(None)


SHAPES = {
    "one query": Shape(seqlen_q=1, seqlen_k=300),
    "one query, many heads": Shape(seqlen_q=1, seqlen_k=300, heads=16, heads_k=2),
    "one key": Shape(seqlen_k=1),
    "no keys": Shape(seqlen_k=0),
    "no queries": Shape(seqlen_q=0),
    "no batch": Shape(batch=0),
    "no heads": Shape(heads=0, heads_k=0),
    **{f"dim {dim}": Shape(dim=dim, right=0) for dim in (1, 2, 3, 8, 59, 64, 96, 111, 128, 192, 256, 512)},
    "wide values": Shape(dim=24, dim_v=130),
    "narrow values": Shape(dim=130, dim_v=1),
    "grouped heads": Shape(heads=6, heads_k=2, right=0),
    "one kv head": Shape(heads=5, heads_k=1, left=7, right=3),
    "several blocks and tiles": Shape(batch=1, seqlen_q=450, seqlen_k=700, heads=2, heads_k=1),
    "several blocks, causal": Shape(batch=1, seqlen_q=700, seqlen_k=700, heads=1, heads_k=1, right=0),
    "several blocks, window": Shape(batch=1, seqlen_q=700, seqlen_k=700, heads=1, heads_k=1, left=90, right=40),
    "more queries than keys, causal": Shape(seqlen_q=150, seqlen_k=40, right=0),
    "left only": Shape(left=5),
    "the diagonal alone": Shape(left=0, right=0),
    "top left": Shape(right=0, diagonal=0),
    "diagonal past every key": Shape(left=10, right=0, diagonal=1000),
    "diagonal before every key": Shape(right=10, diagonal=-1000),
    "some rows past the keys": Shape(left=4, right=4, diagonal=40),
    "far diagonal": Shape(left=3, right=2**62, diagonal=-(2**62)),
    "far window": Shape(left=2**63 - 1, right=2**63 - 1),
    "negative scale": Shape(scale=-0.4, right=0),
    "zero scale": Shape(scale=0.0, left=9, right=3),
    "large scale": Shape(scale=20.0),
}


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_the_oracle(shape, dtype, kernel):
    check(*shape.tensors(dtype), *shape.options())


@needs_library
@hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
@hypothesis.given(
    shape=st.builds(
        Shape,
        batch=st.just(1),
        seqlen_q=st.integers(1, 150),
        seqlen_k=st.integers(1, 300),
        heads=st.just(2),
        heads_k=st.sampled_from([1, 2]),
        dim=st.integers(1, 24),
        left=st.integers(-1, 320),
        right=st.integers(-1, 320),
        diagonal=st.integers(-200, 350),
        dim_v=st.none(),
        scale=st.none(),
    )
)
def test_any_band(shape):
    torch.manual_seed(0)
    check(*shape.tensors(torch.float32), *shape.options())


@needs_library
class TestStrides:
    """NaN lies around the tensors: a read outside them would show."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_slices_of_larger_tensors(self, dtype, kernel):
        shape = Shape(heads=4, heads_k=2, dim=19, dim_v=13)
        sliced = []
        for x in shape.tensors(dtype):
            around = torch.full([size + 3 for size in x.shape], math.nan, dtype=dtype)
            view = around[1:-2, 2:-1, 1:-2, 2:-1]
            sliced.append(view.copy_(x))
        check(*sliced, *shape.options())

    def test_packed_and_transposed(self):
        qkv = torch.randn(2, 40, 3, 4, 16)
        check(*qkv.unbind(2), *Shape(seqlen_q=40, seqlen_k=40, heads=4, right=0).options())
        q, k, v = (torch.randn(2, 4, 40, 16).transpose(1, 2) for _ in range(3))
        check(q, k, v, *Shape(seqlen_q=40, seqlen_k=40, heads=4, right=0).options())

    def test_expanded_and_reversed_order(self):
        q = torch.randn(1, 40, 1, 16).expand(2, -1, 4, -1)
        k = torch.randn(16, 2, 4, 40).permute(1, 3, 2, 0).contiguous().as_strided((2, 40, 4, 16), (2560, 64, 16, 1))
        check(q, k, k, *Shape(seqlen_q=40, seqlen_k=40, heads=4, left=5).options())


@needs_library
class TestNotFinite:
    """Only the rows that see a number that is not finite are touched by it."""

    def causal(self, kernel: str, **change: tuple[int, float]) -> tuple[Tensor, Tensor, Tensor]:
        shape = Shape(batch=1, seqlen_q=200, seqlen_k=200, heads=1, heads_k=1, right=0)
        tensors = dict(zip("qkv", shape.tensors(torch.float32), strict=True))
        before = forward(*tensors.values(), *shape.options())[0]
        for name, (row, value) in change.items():
            tensors[name][0, row, 0, 3] = value
        out, lse = forward(*tensors.values(), *shape.options())
        return before[0, :, 0], out[0, :, 0], lse[0, 0]

    @pytest.mark.parametrize("row", [0, 77, 130, 199])
    def test_query(self, row, kernel):
        before, out, lse = self.causal(kernel, q=(row, math.nan))
        others = torch.arange(200) != row
        assert torch.equal(before[others], out[others])
        assert out[row].isnan().all()
        assert lse[row].isnan()

    @pytest.mark.parametrize("value", [math.nan, INF])
    def test_key(self, value, kernel):
        before, out, lse = self.causal(kernel, k=(130, value))
        assert torch.equal(before[:130], out[:130])
        if math.isnan(value):
            assert out[130:].isnan().all()
            assert lse[130:].isnan().all()

    @pytest.mark.parametrize("value", [math.nan, INF, -INF])
    def test_value(self, value, kernel):
        before, out, _ = self.causal(kernel, v=(130, value))
        assert torch.equal(before[:130], out[:130])
        assert torch.equal(out[130:, 3], torch.full((70,), value)) or out[130:, 3].isnan().all()
        other = torch.arange(16) != 3
        torch.testing.assert_close(out[130:, other], before[130:, other])

    def test_a_score_of_minus_infinity_hides_its_key(self, kernel):
        q, k, v = Shape(heads=1, heads_k=1).tensors(torch.float32)
        q = q.abs()
        k[:, 20] = -INF
        out, lse = forward(q, k, v, 1.0, -1, -1, 0)
        without = [torch.cat([x[:, :20], x[:, 21:]], 1) for x in (k, v)]
        expected_out, expected_lse = plain(q, *without, 1.0, -1, -1, 0, torch.float64)
        same_out, same_lse = plain(q, *without, 1.0, -1, -1, 0, torch.float32)
        assert_close_to_oracle(out, expected_out, same_out)
        assert_close_to_oracle(lse, expected_lse, same_lse)


@needs_library
@pytest.mark.parametrize("size", [1e4, 1e8, 1e9, 1e10, 1e12, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
def test_very_large_scores(size, sign, kernel):
    """The softmax is all but one-hot, and no difference to the maximum may round to something above zero."""
    q, k, v = Shape(seqlen_q=70, seqlen_k=300, dim=64).tensors(torch.float32)
    scale = sign * size / 8
    out, lse = forward(q, k, v, scale, -1, -1, 0)
    expected_out, expected_lse = plain(q, k, v, scale, -1, -1, 0, torch.float64)
    same_out, same_lse = plain(q * scale, k, v, 1.0, -1, -1, 0, torch.float32)
    assert_close_to_oracle(out, expected_out, same_out)
    assert_close_to_oracle(lse, expected_lse, same_lse)


@needs_library
def test_exponential_is_accurate(kernel):
    """Two keys with the scores 0 and x give sigmoid(x), here with a relative error of a few units in the last place.

    x * log2(e) is rounded once, which costs half a unit of it: hence [-8, 0].
    """
    x = torch.linspace(-8, 0, 20001)
    q, k, v = x[None, :, None, None], torch.tensor([0.0, 1.0])[None, :, None, None], torch.tensor([0.0, 1.0])
    out, _ = forward(q, k, v[None, :, None, None], 1.0, -1, -1, 0)
    error = (out.flatten().double() / x.double().sigmoid() - 1).abs().max().item()
    assert error < 8 * torch.finfo(torch.float32).eps


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["several blocks and tiles", "several blocks, causal", "several blocks, window", "one query, many heads"]
)
def test_threads_do_not_change_a_bit(name, dtype, kernel):
    """Tiles are sized by the number of threads; rows must not notice."""
    tensors, options = SHAPES[name].tensors(dtype), SHAPES[name].options()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(forward(*tensors, *options))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@needs_library
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), "q: expected 4 dimensions"),
        (lambda q, k, v: (q, k.double(), v), "k: expected the dtype of q"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "q: expected float32, bfloat16 or float16"),
        (lambda q, k, v: (q, k[:1], v), "k: expected batch 2, got 1"),
        (lambda q, k, v: (q, k, v[:, 1:]), "v: expected seqlen 53 as k, got 52"),
        (lambda q, k, v: (q, k[:, :, :2], v[:, :, :2]), "q: expected a multiple of 2 heads"),
        (lambda q, k, v: (q, k, v[:, :, :1]), "v: expected 3 heads as k, got 1"),
        (lambda q, k, v: (q, k[..., :7], v), "k: expected dim 16 as q, got 7"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v), "q: expected 1 <= dim <= 512, got 0"),
        (lambda q, k, v: (q, k, v.transpose(2, 3).contiguous().transpose(2, 3)), "v: expected a contiguous last dim"),
    ],
)
def test_wrong_arguments_are_told_by_name(change, message):
    with pytest.raises(RuntimeError, match=message):
        forward(*change(*Shape().tensors(torch.float32)), 1.0, -1, -1, 0)


class TestLibrary:
    @needs_library
    def test_kernels(self):
        fastest = native.select_kernel(None)
        assert fastest in ("baseline", "avx2", "avx512")
        assert native.select_kernel("no such kernel") is None
        assert native.select_kernel("") == fastest  # the failed attempt changed nothing
        assert native.select_kernel("baseline") == "baseline"
        assert native.select_kernel(None) == fastest
        assert native.status() == f"loaded, {fastest} kernel"

    @pytest.mark.parametrize("content, reason", [(None, "not built; to build it"), (b"no library", "failed to load")])
    def test_package_works_without_it_and_says_why(self, content, reason, tmp_path, monkeypatch):
        if content is not None:
            (tmp_path / "_native.so").write_bytes(content)
        monkeypatch.setattr(native, "_library", None)
        monkeypatch.setattr(native, "_status", "")
        with monkeypatch.context() as patch:
            patch.setattr(flash_attn_plus, "__path__", [str(tmp_path / "nowhere"), str(tmp_path)])
            assert not native.load()
        assert not native.loaded()
        assert native.select_kernel(None) is None
        assert reason in native.status()
        q, k, v = Shape().tensors(torch.float32)
        assert_close_to_oracle(
            flash_attn_plus.flash_attn_func(q, k, v),
            plain(q, k, v, *Shape().options(), torch.float64)[0],
            plain(q, k, v, *Shape().options(), torch.float32)[0],
        )
