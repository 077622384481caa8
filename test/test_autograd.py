"""Gradients through every road that PyTorch has: autograd, torch.func, and clear errors for what there is not."""

from __future__ import annotations

import pytest
import torch

import flash_attn_plus
from flash_attn_plus import autograd, reference
from flash_attn_plus.schemas import Variant, Varlen

ops = torch.ops.flash_attn_plus
NAMES = ("q", "k", "v", "bias", "sink")


def inputs(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Small fp64 inputs, every one differentiable; GQA, and a bias that broadcasts over the batch."""
    shapes = {"q": (2, 5, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 3), "bias": (1, 4, 5, 6), "sink": (4,)}
    return {name: torch.randn(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


def ours(q, k, v, bias, sink):
    return ops.fwd(q, k, v, causal=True, attn_bias=bias, sink=sink)


def oracle(q, k, v, bias, sink):
    return reference.attention(q, k, v, Variant(causal=True, attn_bias=bias, sink=sink))


LENGTHS_Q, LENGTHS_K = [0, 2, 2, 5], [0, 3, 4, 6]


def varlen_inputs() -> dict[str, torch.Tensor]:
    shapes = {"q": (5, 4, 8), "k": (6, 2, 8), "v": (6, 2, 3), "bias": (1, 4, 3, 3), "sink": (4,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def varlen_layout() -> Varlen:
    return Varlen(torch.tensor(LENGTHS_Q, dtype=torch.int32), torch.tensor(LENGTHS_K, dtype=torch.int32), 3, 3)


def varlen_ours(q, k, v, bias, sink):
    return ops.varlen_fwd(q, k, v, *varlen_layout()[:4], causal=True, attn_bias=bias, sink=sink)


def varlen_oracle(q, k, v, bias, sink):
    return reference.varlen_attention(q, k, v, varlen_layout(), Variant(causal=True, attn_bias=bias, sink=sink))


PAIRS = {"dense": (inputs, ours, oracle), "varlen": (varlen_inputs, varlen_ours, varlen_oracle)}


def loss(function, values: dict):
    out, lse = function(**values)
    return out.square().sum() + lse.masked_fill(lse == -torch.inf, 0.0).square().sum()


def loss_of(function, values: dict, name: str):
    """The loss as a function of one input."""
    return lambda x: loss(function, values | {name: x})


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("name", NAMES)
class TestFunctionTransforms:
    def test_grad(self, layout, name):
        make, ours, oracle = PAIRS[layout]
        values = make()
        actual, expected = (torch.func.grad(loss_of(f, values, name))(values[name]) for f in (ours, oracle))
        torch.testing.assert_close(actual, expected)

    def test_vjp(self, layout, name):
        make, ours, oracle = PAIRS[layout]
        values = make()
        results = []
        for function in (ours, oracle):
            (out, lse), pull = torch.func.vjp(lambda x, f=function: f(**values | {name: x}), values[name])
            lse_cotangent = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view_as(lse)
            lse_cotangent = lse_cotangent.masked_fill(lse == -torch.inf, 0.0)
            results.append((out, *pull((torch.cos(out.detach()), lse_cotangent))))
        torch.testing.assert_close(*results)

    def test_jacrev(self, layout, name):
        make, ours, oracle = PAIRS[layout]
        values = make()
        actual, expected = (
            torch.func.jacrev(lambda x, f=f: f(**values | {name: x})[0].sum((0, -1)))(values[name])
            for f in (ours, oracle)
        )
        torch.testing.assert_close(actual, expected)

    def test_vmap(self, layout, name):
        make, ours, oracle = PAIRS[layout]
        values = make()
        mapped = torch.stack([values[name], values[name] * 0.5 + 0.1, -values[name]], dim=1)
        actual = torch.vmap(lambda x: ours(**values | {name: x}), in_dims=1)(mapped)
        expected = [oracle(**values | {name: x}) for x in mapped.unbind(1)]
        for i, part in enumerate(zip(*expected, strict=True)):
            torch.testing.assert_close(actual[i], torch.stack(part))

    def test_vmap_of_grad(self, layout, name):
        """Per-sample gradients: also of the inputs that are shared by all samples."""
        make, ours, oracle = PAIRS[layout]
        values = make()
        mapped = torch.stack([values["q"], values["q"] * 0.5 + 0.1, -values["q"]])

        def per_sample(function, q):
            return torch.func.grad(lambda x: loss(function, values | {"q": q} | {name: x}))(
                q if name == "q" else values[name]
            )

        actual = torch.vmap(lambda q: per_sample(ours, q))(mapped)
        torch.testing.assert_close(actual, torch.stack([per_sample(oracle, q) for q in mapped]))

    def test_grad_of_vmap(self, layout, name):
        make, ours, oracle = PAIRS[layout]
        values = make()

        def total(function, x):
            def one(scale):
                return loss(function, values | {"q": values["q"] * scale} | {name: x * scale})

            scales = torch.tensor([1.0, 0.5, -0.25], dtype=torch.float64)
            if function is ours:
                return torch.vmap(one)(scales).sum()
            return sum(one(scale) for scale in scales)

        actual, expected = (torch.func.grad(lambda x, f=f: total(f, x))(values[name]) for f in (ours, oracle))
        torch.testing.assert_close(actual, expected)


def test_vmap_over_everything_at_once():
    values = inputs()
    mapped = {name: torch.stack([x, x + 0.3, -x], dim=-1) for name, x in values.items()}
    actual = torch.vmap(lambda m: ours(**m), in_dims=(dict.fromkeys(mapped, -1),))(mapped)
    expected = [oracle(**{name: x[..., i] for name, x in mapped.items()}) for i in range(3)]
    for i, part in enumerate(zip(*expected, strict=True)):
        torch.testing.assert_close(actual[i], torch.stack(part))


@pytest.mark.parametrize("dims", ["(h,)", "(b, h)"])
@pytest.mark.parametrize("is_mapped", [True, False])
def test_vmap_with_slopes_and_full_sinks(dims, is_mapped):
    values = inputs()
    shape = (4,) if dims == "(h,)" else (2, 4)
    slopes, sink = torch.rand(3, *shape), torch.randn(3, *shape, dtype=torch.float64)
    q = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)
    if not is_mapped:
        slopes, sink = slopes[0], sink[0]
    axis = 0 if is_mapped else None

    def attend(q, slopes, sink):
        return ops.fwd(q, values["k"], values["v"], alibi_slopes=slopes, sink=sink)

    actual = torch.vmap(attend, in_dims=(0, axis, axis))(q, slopes, sink)
    for i in range(3):
        at = (lambda x, i=i: x[i]) if is_mapped else (lambda x: x)
        expected = attend(q[i], at(slopes), at(sink))
        for result, part in zip(actual, expected, strict=True):
            torch.testing.assert_close(result[i], part)


def test_vmap_keeps_the_dropout_pattern_of_each_call():
    values = inputs()
    rng_state = torch.tensor([7, 3])
    q = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)

    def attend(q):
        return ops.fwd(q, values["k"], values["v"], dropout_p=0.4, rng_state=rng_state)[0]

    torch.testing.assert_close(torch.vmap(attend)(q), torch.stack([attend(x) for x in q]), rtol=0, atol=0)
    gradient = torch.func.grad(lambda x: attend(x).square().sum())
    torch.testing.assert_close(torch.vmap(gradient)(q), torch.stack([gradient(x) for x in q]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_vmap_over_nothing(dropout_p):
    values = inputs()
    rng_state = torch.tensor([7, 3])

    def attend(q):
        return ops.fwd(q, values["k"], values["v"], dropout_p=dropout_p, rng_state=rng_state)

    out, lse = torch.vmap(attend)(torch.zeros(0, 2, 5, 4, 8, dtype=torch.float64))
    assert (out.shape, lse.shape) == ((0, 2, 5, 4, 3), (0, 2, 4, 5))


class TestBackwardOperator:
    """What callers other than autograd may hand to bwd: ring attention, padding of their own."""

    @staticmethod
    def saved(dtype=torch.float32):
        q, k, v = (torch.randn(2, 5, 2, 8, dtype=dtype) for _ in range(3))
        out, lse = ops.fwd(q, k, v, causal=True)
        return torch.randn_like(out), q, k, v, out, lse

    @pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)])
    @pytest.mark.parametrize("left", [-1, 2])
    def test_results_never_alias(self, needs, left):
        options = {"window_left": left, "need_dq": needs[0], "need_dkv": needs[1], "causal": True}
        torch.library.opcheck(ops.bwd.default, (*self.saved(), None), options, test_utils="test_schema")

    @pytest.mark.parametrize("left", [-1, 2])
    def test_float32_out_and_dout_beside_float64(self, left):
        dout, q, k, v, out, lse = self.saved(torch.float64)
        expected = ops.bwd(dout, q, k, v, out, lse, None, causal=True, window_left=left)
        actual = ops.bwd(dout.float(), q, k, v, out.float(), lse, None, causal=True, window_left=left)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("with_dlse", [False, True])
    def test_rows_marked_as_padding_give_nothing(self, with_dlse):
        """The same with and without dlse, though other kernels may run."""
        dout, q, k, v, out, lse = self.saved()
        out[0, 2, 0], lse[0, 0, 2] = 0.0, -torch.inf
        dlse = torch.zeros_like(lse) if with_dlse else None
        dq, dk, dv, _, _ = ops.bwd(dout, q, k, v, out, lse, dlse, causal=True)
        assert (dq[0, 2, 0] == 0).all()
        dout[0, 2, 0] = 0.0
        expected = ops.bwd(dout, q, k, v, out, lse, torch.zeros_like(lse), causal=True)
        torch.testing.assert_close((dq, dk, dv), expected[:3])


@pytest.mark.parametrize("diagonal", [2**31 - 1, -(2**33), 2**33])
def test_slopes_with_a_diagonal_far_away(diagonal):
    values = inputs()
    slopes = torch.tensor([1e-9, 2e-9, 3e-9, 4e-9])
    options = {"alibi_slopes": slopes, "diagonal": diagonal}
    actual = ops.fwd(values["q"], values["k"], values["v"], **options)
    expected = reference.attention(values["q"], values["k"], values["v"], Variant(**options))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", PAIRS)
class TestWhatThereIsNot:
    def test_double_backward_raises(self, layout):
        make, ours, _ = PAIRS[layout]
        values = {name: x.requires_grad_() for name, x in make().items()}
        (dq,) = torch.autograd.grad(loss(ours, values), values["q"], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"bwd is not differentiable \(no double backward\)"):
            torch.autograd.grad(dq.square().sum(), values["k"])

    def test_grad_of_grad_raises(self, layout):
        make, ours, _ = PAIRS[layout]
        values = make()
        gradient = torch.func.grad(loss_of(ours, values, "q"))
        with pytest.raises(NotImplementedError, match="not differentiable"):
            torch.func.grad(lambda q: gradient(q).sum())(values["q"])

    @pytest.mark.parametrize("name", NAMES)
    def test_forward_mode_raises(self, layout, name):
        make, ours, _ = PAIRS[layout]
        values = make()
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda x: ours(**values | {name: x})[0], (values[name],), (values[name],))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jacfwd(lambda x: ours(**values | {name: x})[0])(values[name])
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="forward-mode"),
        ):
            ours(**values | {name: torch.autograd.forward_ad.make_dual(values[name], values[name])})

    def test_jvp_of_grad_raises(self, layout):
        make, ours, _ = PAIRS[layout]
        values = make()
        gradient = torch.func.grad(loss_of(ours, values, "q"))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(gradient, (values["q"],), (values["q"],))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.hessian(loss_of(ours, values, "q"))(values["q"])


def test_slopes_that_require_a_gradient_raise():
    values = inputs()
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        ops.fwd(values["q"], values["k"], values["v"], alibi_slopes=slopes)
    ops.fwd(values["q"].requires_grad_(), values["k"], values["v"], alibi_slopes=slopes.detach())


def test_gradients_of_paged_keys_raise_by_name():
    q = torch.randn(3, 2, 8, requires_grad=True)
    pages = torch.randn(2, 4, 2, 8)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    block_table = torch.tensor([[1, 0]], dtype=torch.int32)
    out, _ = ops.varlen_fwd(
        q, pages, pages, cu_seqlens, torch.tensor([0, 7], dtype=torch.int32), 3, 7, block_table=block_table
    )
    with pytest.raises(NotImplementedError, match="block_table"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink"])
def test_in_place_changes_of_saved_inputs_are_noticed(name):
    values = inputs()
    values["q"].requires_grad_()
    leaf = values[name].detach()  # shares memory and version
    out, _ = ours(**values | ({name: leaf} if name != "q" else {}))
    leaf.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("needed", [{"q"}, {"k"}, {"v"}, {"bias"}, {"sink"}, {"q", "sink"}, {"k", "bias"}])
def test_only_what_is_asked_for(needed):
    values, expected = inputs(), {}
    for name in needed:
        values[name].requires_grad_()
    for function, grads in ((ours, {}), (oracle, expected)):
        for name in needed:
            values[name].grad = None
        loss(function, values).backward()
        grads.update({name: values[name].grad for name in NAMES})
        if function is ours:
            actual = grads
    for name in NAMES:
        assert (actual[name] is None) == (name not in needed)
        if name in needed:
            torch.testing.assert_close(actual[name], expected[name])


def test_a_loss_of_the_log_sum_exp_alone():
    values = {name: x.requires_grad_() for name, x in inputs().items()}
    leaves = [values[name] for name in ("q", "k", "bias", "sink")]
    actual, expected = (torch.autograd.grad(f(**values)[1].square().sum(), leaves) for f in (ours, oracle))
    torch.testing.assert_close(actual, expected)


def test_packed_inputs_get_one_gradient():
    qkv = torch.randn(2, 7, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    flash_attn_plus.flash_attn_qkvpacked_func(qkv, causal=True).square().sum().backward()
    leaf = qkv.detach().clone().requires_grad_()
    reference.attention(*leaf.unbind(2), Variant(causal=True))[0].square().sum().backward()
    torch.testing.assert_close(qkv.grad, leaf.grad)


class TestStates:
    """merge_states and combine: gradients, second derivatives, empty states, vmap."""

    @staticmethod
    def parts(layout: str):
        shape, lse_shape = ((2, 3, 2, 4), (2, 2, 3)) if layout == "dense" else ((5, 2, 4), (2, 5))
        out1, out2 = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        lse1, lse2 = (torch.randn(lse_shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        return out1, lse1, out2, lse2

    @pytest.mark.parametrize("layout", ["dense", "varlen"])
    def test_merge_states_is_attention_over_both_key_sets(self, layout):
        values = inputs()
        q, k, v = values["q"], values["k"], values["v"]
        if layout == "varlen":
            whole = Varlen(*(torch.tensor([0, n], dtype=torch.int32) for n in (5, 6)), 5, 6)
            half = whole._replace(cu_seqlens_k=torch.tensor([0, 3], dtype=torch.int32))
            q, k, v = q[0], k[0], v[0]
            parts = [ops.varlen_fwd(q, k[at], v[at], *half[:4]) for at in (slice(0, 3), slice(3, 6))]
            expected = ops.varlen_fwd(q, k, v, *whole[:4])
        else:
            parts = [ops.fwd(q, k[:, at], v[:, at]) for at in (slice(0, 2), slice(2, 6))]
            expected = ops.fwd(q, k, v)
        torch.testing.assert_close(flash_attn_plus.merge_states(*parts[0], *parts[1]), expected)
        stacked = [torch.stack(part) for part in zip(*parts, strict=True)]
        torch.testing.assert_close(flash_attn_plus.flash_attn_combine(*stacked), expected)

    @pytest.mark.parametrize("layout", ["dense", "varlen"])
    def test_merge_states_gradcheck(self, layout):
        assert torch.autograd.gradcheck(flash_attn_plus.merge_states, self.parts(layout))
        assert torch.autograd.gradgradcheck(flash_attn_plus.merge_states, self.parts(layout))

    @pytest.mark.parametrize("layout", ["dense", "varlen"])
    def test_combine_gradcheck(self, layout):
        out1, lse1, out2, lse2 = self.parts(layout)
        out = torch.stack([out1, out2, out1 * 2]).detach().requires_grad_()
        lse = torch.stack([lse1, lse2, lse1 - 1]).detach().requires_grad_()
        assert torch.autograd.gradcheck(flash_attn_plus.flash_attn_combine, (out, lse))
        assert torch.autograd.gradgradcheck(flash_attn_plus.flash_attn_combine, (out, lse))

    def test_rows_that_no_part_has_seen(self):
        out1, lse1, out2, lse2 = (x.detach() for x in self.parts("dense"))
        lse1[:, :, 0] = -torch.inf
        lse2[:, :, 0] = lse2[0, 0, 2] = -torch.inf
        out1[:, 0] = out2[:, 0] = 0.0
        leaves = [x.requires_grad_() for x in (out1, lse1, out2, lse2)]
        out, lse = flash_attn_plus.merge_states(*leaves)
        assert (out[:, 0] == 0).all()
        assert (lse[:, :, 0] == -torch.inf).all()
        torch.testing.assert_close(out[0, 2, 0], out1[0, 2, 0])
        grads = torch.autograd.grad(out.sum() + lse[:, :, 1:].sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, 0] == 0).all()

    def test_a_part_that_has_seen_nothing_may_hold_anything(self):
        out1, lse1, out2, lse2 = (x.detach() for x in self.parts("dense"))
        out1[:, 0], lse1[:, :, 0] = torch.nan, -torch.inf
        out2[:, 2], lse2[:, :, 2] = torch.nan, -torch.inf
        leaves = [x.requires_grad_() for x in (out1, lse1, out2, lse2)]
        stacked = torch.stack([out1, out2]), torch.stack([lse1, lse2])
        for out, lse in (flash_attn_plus.merge_states(*leaves), flash_attn_plus.flash_attn_combine(*stacked)):
            torch.testing.assert_close(out[:, 0], out2[:, 0])
            torch.testing.assert_close(out[:, 2], out1[:, 2])
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
            assert all(grad.isfinite().all() for grad in grads)
            assert (grads[0][:, 0] == 0).all()
            assert (grads[1][:, :, 0] == 0).all()

    def test_dtypes(self):
        out1, lse1, out2, lse2 = (x.detach().float() for x in self.parts("dense"))
        merged, lse = flash_attn_plus.merge_states(out1, lse1, out2.bfloat16(), lse2)
        assert merged.dtype == torch.float32
        merged, lse = flash_attn_plus.merge_states(out1.bfloat16(), lse1, out2.bfloat16(), lse2)
        assert (merged.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        stacked = torch.stack([out1, out2]), torch.stack([lse1, lse2])
        into = torch.empty_like(out1, dtype=torch.float16)
        combined, _ = flash_attn_plus.flash_attn_combine(*stacked, out=into)
        assert combined is into
        assert flash_attn_plus.flash_attn_combine(*stacked, out_dtype=torch.bfloat16)[0].dtype == torch.bfloat16
        with pytest.raises(ValueError, match="out: expected shape"):
            flash_attn_plus.flash_attn_combine(*stacked, out=into[:1])

    def test_vmap(self):
        parts = [torch.stack([x.detach(), -x.detach(), x.detach() * 2]) for x in self.parts("dense")]
        actual = torch.vmap(flash_attn_plus.merge_states)(*parts)
        expected = [flash_attn_plus.merge_states(*(x[i] for x in parts)) for i in range(3)]
        for i, part in enumerate(zip(*expected, strict=True)):
            torch.testing.assert_close(actual[i], torch.stack(part))


def test_private_names_of_pytorch_are_there():
    """What autograd.py, autocast.py and cpu.py take from PyTorch without a promise: when one goes, this says which."""
    assert issubclass(autograd._Function, torch.autograd.function._SingleLevelFunction)
    for name in ("_AutoDispatchBelowAutograd", "_any_requires_grad", "_are_functorch_transforms_active"):
        assert hasattr(torch._C, name), name
    for name in ("_AutoDispatchBelowADInplaceOrView", "_after_ADInplaceOrView_keyset"):
        assert hasattr(torch._C, name), name
    assert callable(torch._C._autograd._get_creation_meta)
    assert hasattr(torch.autograd.forward_ad, "_set_fwd_grad_enabled")
    assert isinstance(torch.autograd.forward_ad._current_level, int)
    assert callable(autograd._single_level)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        assert isinstance(getattr(torch.cpu, name)(), bool)
    for name in ("_ExcludeDispatchKeyGuard", "DispatchKeySet", "_get_privateuse1_backend_name"):
        assert hasattr(torch._C, name), name
