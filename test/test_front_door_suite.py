"""What flash-attn's own test-suite covers, through the front door: some thousand calls of ``flash_attn`` on a GPU.

Values and gradients are held to its rule: against attention in float32, the error may be ``k`` times that of the same
attention in the tested dtype, plus 1e-5. Both are written here, for a padded batch. The calls are drawn, always the
same ones; a call's number in ``CASES`` is its seed. What decides which kernels are compiled (``Plan``) is drawn first,
and a dozen calls share it: they stand together, and in one xdist group (``--dist loadgroup``), so that one worker
compiles for them. A few of the smallest run on a CPU too.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import flash_attn_plus
from flash_attn_plus import as_flash_attn

as_flash_attn.serve(replace=True)
flash_attn = importlib.import_module("flash_attn")
bert_padding = importlib.import_module("flash_attn.bert_padding")
interface = importlib.import_module("flash_attn.flash_attn_interface")

DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = ("dense", "packed", "varlen", "varlen_packed")
MASKS = ("full", "causal", "local")
OPTIONS = ("plain", "alibi", "softcap", "dropout", "dropout_alibi")
HEADS = {"mha": (6, 6), "gqa": (6, 2), "mqa": (6, 1)}
LENGTHS = (97, 113, 127, 128, 129, 200, 217, 239, 256, 257, 339, 384, 512, 513, 777, 1000, 1023, 1024, 2047, 2048)
SHORT_LENGTHS = (1, 2, 3, 7, 16, 31, 63, 64)
FEWEST_KEYS = 7
DROPOUT_P = 0.17
SOFTCAP = 50.0

PLANS_EACH, LONG_EACH, SHORT_EACH, PAGED_EACH = 10, 9, 3, 8  # of a dtype and a head dimension
MOST_SCORES = 1 << 24  # (batch, heads, seqlen_q, seqlen_k) of the reference's tensors
MOST_SCORES_DROPOUT = 1 << 22  # S_dmask takes some twenty times as much memory


class Plan(NamedTuple):
    """What decides which kernels are compiled, but for the few queries that have tiles of their own."""

    dtype: str
    dim: int
    layout: str
    mask: str
    option: str
    heads: str

    def __str__(self) -> str:
        return "-".join((self.layout, self.dtype, f"d{self.dim}", self.mask, self.option, self.heads))


class Case(NamedTuple):
    number: int
    plan: Plan
    batch: int
    seqlen_q: int
    seqlen_k: int
    window: tuple[int, int]
    slopes_per_batch: bool
    attn_probs: bool
    deterministic: bool
    page_size: int = 0

    def __str__(self) -> str:
        more = [f"w{self.window[0]}_{self.window[1]}"] if self.plan.mask == "local" else []
        more += [name for name in ("deterministic",) if getattr(self, name)]
        more += [f"page{self.page_size}"] if self.page_size else []
        lengths = f"b{self.batch}_{self.seqlen_q}x{self.seqlen_k}"
        return "-".join((f"{self.number:04d}", str(self.plan), lengths, *more))

    @property
    def dropout_p(self) -> float:
        return DROPOUT_P if "dropout" in self.plan.option else 0.0

    @property
    def softcap(self) -> float:
        return SOFTCAP if self.plan.option == "softcap" else 0.0

    @property
    def is_varlen(self) -> bool:
        return "varlen" in self.plan.layout or bool(self.page_size)

    @property
    def band(self) -> tuple[int, int]:
        """How far a row sees to the left and to the right of its diagonal; negative is without end."""
        return (self.window[0], 0) if self.plan.mask == "causal" else self.window


def _plans(rng: random.Random) -> Iterator[Plan]:
    for dtype, dim in product(DTYPES, DIMS):
        kinds = [
            (layout, mask, option, heads)
            for layout, mask, option, heads in product(LAYOUTS, MASKS, OPTIONS, HEADS)
            if not (layout == "packed" and heads == "mqa")
        ]
        for layout, mask, option, heads in rng.sample(kinds, PLANS_EACH):
            yield Plan(dtype, dim, layout, mask, option, heads)
        yield Plan(dtype, dim, "paged", rng.choice(MASKS), "plain", rng.choice(list(HEADS)))


def _case(rng: random.Random, number: int, plan: Plan, lengths_q: tuple[int, ...], page_size: int) -> Case:
    seqlen_q = rng.choice(lengths_q)
    # Where every row sees one key only, dq and dk are exactly 0 in plain PyTorch, which then is no measure: there are
    # some keys, and windows hold some.
    same = "packed" in plan.layout and plan.heads == "mha" and rng.random() < 0.7 and seqlen_q >= FEWEST_KEYS
    seqlen_k = seqlen_q if same else rng.choice(LENGTHS + tuple(n for n in SHORT_LENGTHS if n >= FEWEST_KEYS))
    most = MOST_SCORES_DROPOUT if "dropout" in plan.option else MOST_SCORES
    if "dropout" in plan.option:
        seqlen_q, seqlen_k = min(seqlen_q, 1024), min(seqlen_k, 1024)
    batch = max(1, min(4, most // (HEADS[plan.heads][0] * seqlen_q * seqlen_k)))
    window = (-1, -1)
    if plan.mask == "local":
        # Both sides, or the keys a row sees would depend on which side there is, and so would the kernel.
        window = (rng.randint(FEWEST_KEYS - 1, seqlen_k), rng.randint(0, seqlen_k))
    return Case(
        *(number, plan, batch, seqlen_q, seqlen_k, window),
        slopes_per_batch=rng.random() < 0.5,
        attn_probs="dropout" in plan.option or rng.random() < 0.5,
        deterministic=rng.random() < 0.25,
        page_size=page_size,
    )


def _cases() -> list[Case]:
    rng = random.Random(283)
    cases: list[Case] = []
    for plan in _plans(rng):
        if plan.layout == "paged":
            lengths = [LENGTHS] * (PAGED_EACH - 2) + [SHORT_LENGTHS] * 2
            pages = [rng.choice((16, 64, 256, 512)) for _ in lengths]
        else:
            lengths = [LENGTHS] * LONG_EACH + [SHORT_LENGTHS] * SHORT_EACH
            pages = [0] * len(lengths)
        for drawn_from, page_size in zip(lengths, pages, strict=True):
            cases.append(_case(rng, len(cases), plan, drawn_from, page_size))
    return cases


CASES = _cases()


def _on_any_device() -> set[int]:
    """The smallest case of each layout and of each option."""
    small = sorted(CASES, key=lambda case: case.batch * case.seqlen_q * case.seqlen_k * case.plan.dim)
    small = [case for case in small if case.seqlen_q > 1]
    wanted = {name: next(case for case in small if name in case.plan) for name in (*LAYOUTS, *OPTIONS, *MASKS, "paged")}
    return {case.number for case in wanted.values()}


ON_ANY_DEVICE = _on_any_device()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """On a CPU all cases that need a GPU are one, skipped: to skip each of thousands takes longer than the others."""
    if "case" not in metafunc.fixturenames:
        return
    on_cpu = metafunc.config.getoption("--device") == "cpu"
    params = [
        pytest.param(case, id=str(case), marks=pytest.mark.xdist_group(str(case.plan)))
        for case in CASES
        if not on_cpu or case.number in ON_ANY_DEVICE
    ]
    if on_cpu:
        params.append(pytest.param(None, id=f"{len(CASES) - len(params)}_more", marks=pytest.mark.gpu))
    metafunc.parametrize("case", params)


class Inputs(NamedTuple):
    """A padded batch: what lies behind a sequence's length is no part of it."""

    q: Tensor  # (batch, seqlen_q, heads, dim)
    k: Tensor  # (batch, seqlen_k, heads_k, dim)
    v: Tensor
    dout: Tensor
    lengths_q: Tensor  # (batch,)
    lengths_k: Tensor
    slopes: Tensor | None  # (heads,) or (batch, heads)

    def is_row(self) -> Tensor:
        """(batch, seqlen_q)"""
        return torch.arange(self.q.shape[1], device=self.q.device) < self.lengths_q[:, None]

    def is_key(self) -> Tensor:
        return torch.arange(self.k.shape[1], device=self.k.device) < self.lengths_k[:, None]


def make(case: Case, device: str) -> Inputs:
    torch.manual_seed(case.number)
    plan, rng = case.plan, random.Random(case.number)
    heads, heads_k = HEADS[plan.heads]
    options = dict(dtype=DTYPES[plan.dtype], device=device)
    q = torch.randn(case.batch, case.seqlen_q, heads, plan.dim, **options)
    k, v = torch.randn(2, case.batch, case.seqlen_k, heads_k, plan.dim, **options)
    if case.softcap:
        q = q * case.softcap  # or hardly a score would be capped
    dout = torch.randn_like(q)
    slopes = None
    if "alibi" in plan.option:
        slopes = torch.rand(*((case.batch,) if case.slopes_per_batch else ()), heads, device=device) * 0.3

    def lengths(longest: int) -> list[int]:
        """Of full length, of any, and empty ones."""
        fewest = min(FEWEST_KEYS, longest)
        drawn = [rng.randint(fewest, longest) if rng.random() < 0.7 else longest for _ in range(case.batch)]
        if case.batch > 2 and rng.random() < 0.3:
            drawn[rng.randrange(case.batch)] = 0
        drawn[rng.randrange(case.batch)] = longest
        return drawn

    drawn_q, drawn_k = [case.seqlen_q] * case.batch, [case.seqlen_k] * case.batch
    if case.is_varlen:
        drawn_q = lengths(case.seqlen_q)
        drawn_k = drawn_q if is_self(case) else lengths(case.seqlen_k)
    lengths_q, lengths_k = (torch.tensor(x, device=device) for x in (drawn_q, drawn_k))
    inputs = Inputs(q, k, v, dout, lengths_q, lengths_k, slopes)
    return inputs._replace(dout=dout.masked_fill(~inputs.is_row()[..., None, None], 0.0))


def is_self(case: Case) -> bool:
    """Whether q, k and v can be one tensor."""
    return "packed" in case.plan.layout and case.plan.heads == "mha" and case.seqlen_q == case.seqlen_k


class Expected(NamedTuple):
    out: Tensor
    probs: Tensor  # before dropout
    scores: Tensor
    lse: Tensor
    visible: Tensor  # (batch, 1, seqlen_q, seqlen_k)
    gradients: tuple[Tensor, ...]


def attend(case: Case, inputs: Inputs, dtype: torch.dtype, kept: Tensor | None, backward: bool = True) -> Expected:
    """Attention of a padded batch in plain PyTorch in ``dtype``, and its gradients."""
    q, k, v = (x.detach().to(dtype).requires_grad_(backward) for x in inputs[:3])
    heads, heads_k = HEADS[case.plan.heads]
    keys, values = (x.repeat_interleave(heads // heads_k, dim=2) for x in (k, v))
    scale = case.plan.dim**-0.5
    # As good an order as the other one, which is float32's: the error of one of them is no measure by itself.
    queries, keys = (q * scale, keys) if dtype == torch.float32 else (q, keys * scale)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    rows = torch.arange(case.seqlen_q, device=q.device).view(-1, 1)
    columns = torch.arange(case.seqlen_k, device=q.device)
    distance = columns - rows - (inputs.lengths_k - inputs.lengths_q).view(-1, 1, 1, 1)
    if inputs.slopes is not None:
        scores = scores - inputs.slopes.view(-1, heads, 1, 1) * distance.abs()
    left, right = case.band
    visible = inputs.is_row()[:, None, :, None] & inputs.is_key()[:, None, None, :]
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    scores = scores.masked_fill(~visible, -torch.inf)
    sees_no_key = ~visible.any(-1, keepdim=True)
    probs = scores.softmax(-1).masked_fill(sees_no_key, 0.0).to(dtype)
    dropped = probs if kept is None else probs.masked_fill(~kept, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", dropped, values * (1.0 / (1.0 - case.dropout_p)))
    gradients = torch.autograd.grad(out, (q, k, v), inputs.dout.to(dtype)) if backward else ()
    lse = scores.detach().float().logsumexp(-1)
    return Expected(out.detach(), probs.detach(), scores.detach(), lse, visible, gradients)


class Actual(NamedTuple):
    """Padded again."""

    out: Tensor
    lse: Tensor | None  # (batch, heads, seqlen_q)
    S_dmask: Tensor | None
    again: Callable[[], tuple[Tensor, ...]]  # the gradients of q, k and v, once more
    gradients: tuple[Tensor, ...]


def call(case: Case, inputs: Inputs) -> Actual:
    """The function of ``flash_attn`` that the plan names, forward and backward."""
    options = dict(
        dropout_p=case.dropout_p,
        causal=case.plan.mask == "causal",
        window_size=case.window,
        softcap=case.softcap,
        alibi_slopes=inputs.slopes,
        deterministic=case.deterministic,
        return_attn_probs=case.attn_probs,
    )
    leaves, results, layout = _called(case, inputs, options)
    out, lse, S_dmask = results if case.attn_probs else (results, None, None)
    heads = HEADS[case.plan.heads][0]
    assert out.dtype == DTYPES[case.plan.dtype]
    if case.is_varlen:
        is_row, indices = inputs.is_row(), layout
        padded = bert_padding.pad_input(out, indices, case.batch, case.seqlen_q)
        if lse is not None:
            assert lse.shape == (heads, out.shape[0])
            lse = lse.new_full((case.batch, case.seqlen_q, heads), -torch.inf).index_put((is_row,), lse.T)
            lse = lse.transpose(1, 2)
        out = padded
    elif lse is not None:
        assert lse.shape == (case.batch, heads, case.seqlen_q)

    def gradients() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
        if len(grads) == 1:
            return grads[0].unbind(2)
        return (grads[0], *grads[1].unbind(2)) if len(grads) == 2 else grads

    return Actual(out.detach(), lse, S_dmask, gradients, () if case.page_size else gradients())


def _called(case: Case, inputs: Inputs, options: dict):
    """(padded leaves, what the function returned, where the rows of a packed batch lie)."""
    q, k, v = inputs[:3]
    if case.page_size:
        return (), *_paged(case, inputs, options)
    if "packed" not in case.plan.layout:
        leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
        functions = flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func
    elif is_self(case):
        leaves = (torch.stack((q, k, v), dim=2).requires_grad_(),)
        functions = flash_attn.flash_attn_qkvpacked_func, flash_attn.flash_attn_varlen_qkvpacked_func
    else:
        leaves = q.clone().requires_grad_(), torch.stack((k, v), dim=2).requires_grad_()
        functions = flash_attn.flash_attn_kvpacked_func, flash_attn.flash_attn_varlen_kvpacked_func
    if not case.is_varlen:
        return leaves, functions[0](*leaves, **options), None
    first, indices, starts_q, most_q, _ = bert_padding.unpad_input(leaves[0], inputs.is_row())
    if len(leaves) == 1:
        return leaves, functions[1](first, starts_q, most_q, **options), indices
    rest = [bert_padding.unpad_input(x, inputs.is_key()) for x in leaves[1:]]
    _, _, starts_k, most_k, _ = rest[0]
    tensors = first, *(x[0] for x in rest)
    return leaves, functions[1](*tensors, starts_q, starts_k, most_q, most_k, **options), indices


def _paged(case: Case, inputs: Inputs, options: dict):
    """The keys of each sequence in pages that lie anywhere."""
    page_size, most = case.page_size, -(-case.seqlen_k // case.page_size)
    order = torch.randperm(case.batch * most + 3, device=inputs.q.device)[: case.batch * most]
    pools = []
    for x in (inputs.k, inputs.v):
        x = x.masked_fill(~inputs.is_key()[..., None, None], torch.nan)  # read by nobody
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, most * page_size - case.seqlen_k), value=torch.nan)
        pool = x.new_full((case.batch * most + 3, page_size, *x.shape[2:]), torch.nan)
        pool[order] = x.reshape(-1, page_size, *x.shape[2:])
        pools.append(pool)
    table = order.view(case.batch, most).to(torch.int32)
    rows, indices, starts_q, most_q, _ = bert_padding.unpad_input(inputs.q, inputs.is_row())
    starts_k = torch.nn.functional.pad(inputs.lengths_k.cumsum(0), (1, 0)).to(torch.int32)
    layout = starts_q, starts_k, most_q, case.seqlen_k
    return flash_attn.flash_attn_varlen_func(rows, *pools, *layout, **options, block_table=table), indices


def check_error(name: str, case: Case, actual: Tensor, reference: Tensor, same_dtype: Tensor, factor: float) -> None:
    assert actual.shape == reference.shape, f"{name}: {tuple(actual.shape)} != {tuple(reference.shape)}; {case!r}"
    assert actual.isfinite().all(), f"{name}: not finite; {case!r}"
    three = actual.float() - reference, same_dtype.float() - reference, reference
    error, plain, largest = (x.abs().amax().item() for x in three)
    assert error <= factor * plain + 1e-5, (
        f"{name}: error {error:.3g} > {factor} x {plain:.3g} + 1e-5, of values up to {largest:.3g}; "
        f"torch.manual_seed({case.number}); {case!r}"
    )


def kept_of(case: Case, S_dmask: Tensor, visible: Tensor) -> Tensor:
    """What dropout kept, as the signs tell it: about as much as it should."""
    assert S_dmask.shape[-2:] == (-(-case.seqlen_q // 128) * 128, -(-case.seqlen_k // 128) * 128), f"{case!r}"
    dropped = S_dmask[..., : case.seqlen_q, : case.seqlen_k].signbit()
    visible = visible.expand_as(dropped)
    count = int(visible.sum())
    if count:
        fraction = int((dropped & visible).sum()) / count
        most = max(0.01, 6 * (DROPOUT_P * (1 - DROPOUT_P) / count) ** 0.5)
        assert abs(fraction - DROPOUT_P) <= most, f"dropped {fraction} of {count}; {case!r}"
    return ~dropped


def probs_of(case: Case, S_dmask: Tensor, reference: Expected) -> Tensor:
    """Normalised: a block of keys lacks the weight of the keys left of it."""
    width = interface._get_block_size_n(S_dmask.device, case.plan.dim, True, case.plan.mask == "causal")
    magnitude = S_dmask[..., : case.seqlen_q, : case.seqlen_k].abs().float()
    blocks = torch.stack([x.amax(-1) for x in reference.scores.split(width, dim=-1)], dim=-1)
    peaks = blocks.flip(-1).cummax(-1).values.flip(-1).repeat_interleave(width, dim=-1)[..., : case.seqlen_k]
    return magnitude * (peaks - reference.lse[..., None]).exp().nan_to_num(0.0)


def check(case: Case, device: str) -> None:
    inputs = make(case, device)
    actual = call(case, inputs)
    backward = not case.page_size
    kept = None
    if case.dropout_p:
        with torch.no_grad():
            visible = attend(case, inputs, torch.float32, None, backward=False).visible
        kept = kept_of(case, actual.S_dmask, visible)
    elif actual.S_dmask is not None:
        assert actual.S_dmask.numel() == 0
    reference = attend(case, inputs, torch.float32, kept, backward)
    plain = attend(case, inputs, DTYPES[case.plan.dtype], kept, backward)

    check_error("out", case, actual.out, reference.out, plain.out, 2)
    sees_no_key = ~reference.visible.any(-1).transpose(1, 2).expand(-1, -1, actual.out.shape[2])
    assert (actual.out[sees_no_key] == 0).all(), f"out: not 0 where a row sees no key; {case!r}"
    if actual.lse is not None:
        nothing = reference.lse == -torch.inf
        assert torch.equal(actual.lse == -torch.inf, nothing), f"lse: -inf elsewhere; {case!r}"
        lses = (x.masked_fill(nothing, 0.0) for x in (actual.lse, reference.lse, plain.lse))
        check_error("lse", case, *lses, 2)
    if case.dropout_p:
        check_error("S_dmask", case, probs_of(case, actual.S_dmask, reference), reference.probs, plain.probs, 2)
    factor = 2 if case.plan.option == "plain" and case.plan.mask != "full" else 3
    if not backward:
        return
    for name, *three in zip(("dq", "dk", "dv"), actual.gradients, reference.gradients, plain.gradients, strict=True):
        check_error(name, case, *three, factor)
    if case.deterministic:
        for name, first, second in zip(("dq", "dk", "dv"), actual.gradients, actual.again(), strict=True):
            assert torch.equal(first, second), f"{name}: a second backward differs; {case!r}"


def test_outputs_and_gradients(case: Case, device: str) -> None:
    check(case, device)


def test_another_flash_attn_is_not_what_is_tested() -> None:
    folder = Path(flash_attn_plus.__file__).parent
    for module in (flash_attn, bert_padding, interface):
        assert Path(module.__file__).is_relative_to(folder)


def test_the_cases_cover_what_they_should() -> None:
    """A change of the draw may not lose a head dimension, a layout or an option."""
    fields = {"dtype": DTYPES, "dim": DIMS, "layout": (*LAYOUTS, "paged"), "mask": MASKS, "option": OPTIONS}
    for field, values in (fields | {"heads": HEADS}).items():
        assert {getattr(case.plan, field) for case in CASES} == set(values)
    for option, mask in product(OPTIONS, MASKS):
        assert any((option, mask) == (case.plan.option, case.plan.mask) for case in CASES), (option, mask)
    assert {case.seqlen_q for case in CASES} >= {*LENGTHS, *SHORT_LENGTHS}
    unequal = {case.seqlen_q > case.seqlen_k for case in CASES if case.plan.mask == "causal"}
    assert unequal == {True, False}
    assert any(is_self(case) for case in CASES if "varlen" in case.plan.layout)
    assert len({str(case) for case in CASES}) == len(CASES)


RERUN = [
    (dtype, dim, layout, options)
    for dtype, (dim, layout, options) in zip(
        list(DTYPES) * 6,
        [
            (64, "dense", {}),
            (128, "dense", {"causal": True}),
            (256, "dense", {"causal": True}),
            (59, "dense", {"dropout_p": DROPOUT_P}),
            (96, "varlen", {"causal": True}),
            (128, "varlen", {"window_size": (100, 20)}),
            (160, "varlen", {}),
            (64, "varlen", {"dropout_p": DROPOUT_P, "causal": True}),
            (128, "dense", {"softcap": SOFTCAP}),
            (192, "dense", {"window_size": (64, 0)}),
            (32, "varlen", {"causal": True}),
            (111, "dense", {"causal": True}),
        ],
        strict=True,
    )
]


@pytest.mark.gpu
@pytest.mark.no_poison  # memory as it comes: what an earlier run left there must not show
@pytest.mark.parametrize(
    "dtype, dim, layout, options",
    RERUN,
    ids=["-".join((dtype, f"d{dim}", layout, *options)) for dtype, dim, layout, options in RERUN],
)
class TestReruns:
    def step(self, dtype: str, dim: int, layout: str, options: dict) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward of many sequences at once, so that all programs of a GPU run beside each other."""
        torch.manual_seed(0)
        batch, seqlen = 20, 239
        rows = (batch, seqlen) if layout == "dense" else (batch * seqlen,)
        shape = (*rows, 6, dim)
        q, k, v = (torch.randn(shape, dtype=DTYPES[dtype], device="cuda").requires_grad_() for _ in range(3))
        dout = torch.randn_like(q)
        starts = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32, device="cuda")
        starts[1:-1] += torch.randint(-100, 100, (batch - 1,), device="cuda", dtype=torch.int32)

        def forward() -> Tensor:
            torch.manual_seed(1)  # of dropout
            if layout == "dense":
                return flash_attn.flash_attn_func(q, k, v, **options)
            return flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, 450, 450, **options)

        def step() -> tuple[Tensor, ...]:
            out = forward()
            return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

        return step

    def check(self, step: Callable[[], tuple[Tensor, ...]], count: int) -> None:
        first = step()
        assert all(x.isfinite().all() for x in first)
        for run in range(count):
            # Looked at together: `equal` waits for the GPU.
            differ = torch.stack([(a != b).any() for a, b in zip(step(), first, strict=True)]).tolist()
            assert not any(differ), f"run {run}: (out, dq, dk, dv) differ: {differ}"

    def test_no_race(self, dtype: str, dim: int, layout: str, options: dict) -> None:
        self.check(self.step(dtype, dim, layout, options), 250)

    def test_deterministic(self, dtype: str, dim: int, layout: str, options: dict) -> None:
        self.check(self.step(dtype, dim, layout, {**options, "deterministic": True}), 50)
