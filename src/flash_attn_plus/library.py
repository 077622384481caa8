"""The operators ``torch.ops.flash_attn_plus.*``: schemas, fakes and dispatch. Imports torch only.

An operator is one row of ``_OPERATORS``. A call runs: vmap (vmap.py) -> Autocast key (autocast.py) -> Autograd
key (autograd.py) -> device key (here: checks, then the device's module, imported on the first call).
Fakes and device kernels run the same checks, so a wrong argument is told in the same words under
``torch.compile``, in ``torch.export``, on the meta device and in eager mode.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, checks_cache, checks_flag_gems, checks_rotary, native
from .memory import Memory, signature
from .schemas import NAMESPACE, SCHEMAS, Cache, New, Rotation, Variant, Varlen

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def overload(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def argument_names(name: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in overload(name)._schema.arguments)


_DEFAULTS = {name: tuple(argument.default_value for argument in overload(name)._schema.arguments) for name in SCHEMAS}


def bind(name: str, args: tuple) -> tuple:
    """All arguments of a call: the dispatcher drops trailing ones that equal their defaults."""
    return args + _DEFAULTS[name][len(args) :]


def written_arguments(name: str) -> tuple[int, ...]:
    """The places of the arguments that an operator writes into."""
    arguments = overload(name)._schema.arguments
    return tuple(i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write)


def _parts_of(names: tuple[str, ...]) -> tuple[list[str], list[type], list[str]]:
    """The arguments in front of, and behind, those that make up Varlen, Cache, New and Variant."""
    parts = [part for part in (Varlen, Cache, New, Variant) if set(part._fields) <= set(names)]
    inside = set().union(*(part._fields for part in parts))
    first = min(i for i, name in enumerate(names) if name in inside)
    return [*names[:first]], parts, [name for name in names[first:] if name not in inside]


def _attention_parser(name: str) -> Callable:
    """All arguments -> the tensors, Varlen or Cache where there is one, Variant, what is left: what checks and kernels
    take.

    By name and not by place: an option that a later release appends to Variant or Varlen stands behind everything
    else in the schema.
    """
    names = argument_names(name)
    tensors, parts, rest = _parts_of(names)

    def pick(wanted: Sequence[str]) -> Callable[[tuple], tuple]:
        places = [names.index(name) for name in wanted]
        if len(places) > 1:
            return operator.itemgetter(*places)
        return lambda args: tuple([args[i] for i in places])  # of one place, itemgetter makes no tuple

    pick_tensors, pick_rest = pick(tensors), pick(rest)
    make, pick_part = parts[-1]._make, pick(parts[-1]._fields)

    def parse_one(*args):
        return *pick_tensors(args), make(pick_part(args)), *pick_rest(args)

    if len(parts) == 1:
        return parse_one
    make_first, pick_first = parts[0]._make, pick(parts[0]._fields)

    def parse_two(*args):
        return *pick_tensors(args), make_first(pick_first(args)), make(pick_part(args)), *pick_rest(args)

    return parse_two


def _attention_flattener(name: str) -> Callable:
    """The way back: what the parser returns -> all arguments."""
    names = argument_names(name)
    tensors, parts, rest = _parts_of(names)
    order = [*tensors, *itertools.chain(*(part._fields for part in parts)), *rest]
    places, count = [order.index(name) for name in names], len(tensors)
    end, in_order = count + len(parts), places == sorted(places)

    def flatten(*structured) -> tuple:  # nothing here that Dynamo could not trace
        flat = [*structured[:count]]
        for part in structured[count:end]:
            flat = [*flat, *part]
        flat = [*flat, *structured[end:]]
        return tuple(flat) if in_order else tuple([flat[i] for i in places])

    return flatten


def _parse_unchanged(*args):
    return args


def _parse_rotation(x, *rotation):
    return x, Rotation._make(rotation)


# Fresh results of the right shape, dtype and (contiguous) strides: what the fakes return.


def _fwd_results(q, k, v, variant):
    batch, seqlen_q, heads, _ = q.shape
    lse = q.new_empty((batch, heads, seqlen_q), dtype=checks.lse_dtype(q))
    return q.new_empty((batch, seqlen_q, heads, v.shape[3])), lse


def _varlen_fwd_results(q, k, v, layout, variant):
    total, heads, _ = q.shape
    return q.new_empty((total, heads, v.shape[-1])), q.new_empty((heads, total), dtype=checks.lse_dtype(q))


def _gradients(q, k, v, batch, variant, need_dq, need_dkv, need_dbias):
    """A gradient that does not exist, or is not needed, is an empty tensor."""
    nothing = functools.partial(q.new_empty, (0,))
    sink, bias = variant.sink, variant.attn_bias
    return (
        q.new_empty(q.shape) if need_dq else nothing(),
        k.new_empty(k.shape) if need_dkv else nothing(),
        v.new_empty(v.shape) if need_dkv else nothing(),
        nothing() if sink is None else q.new_empty((batch, q.shape[-2]), dtype=checks.lse_dtype(q)),
        bias.new_empty(bias.shape) if need_dbias and has_bias_gradient(bias) else nothing(),
    )


def has_bias_gradient(bias: Tensor | None) -> bool:
    return bias is not None and bias.is_floating_point()


def _bwd_results(dout, q, k, v, out, lse, dlse, variant, *needs):
    return _gradients(q, k, v, q.shape[0], variant, *needs)


def _varlen_bwd_results(dout, q, k, v, out, lse, dlse, layout, variant, *needs):
    return _gradients(q, k, v, layout.cu_seqlens_q.shape[0] - 1, variant, *needs)


def _bwd_into_results(dout, q, k, v, out, lse, dlse, dq, dk, dv, *rest):
    *layout, variant, need_dbias = rest
    batch = layout[0].cu_seqlens_q.shape[0] - 1 if layout else q.shape[0]
    return _gradients(q, k, v, batch, variant, False, False, need_dbias)[3:]


def _merge_states_results(out1, lse1, out2, lse2):
    return (
        out1.new_empty(out1.shape, dtype=torch.promote_types(out1.dtype, out2.dtype)),
        lse1.new_empty(lse1.shape, dtype=torch.promote_types(lse1.dtype, lse2.dtype)),
    )


def _combine_results(out_partial, lse_partial, out_dtype):
    return (
        out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype),
        lse_partial.new_empty(lse_partial.shape[1:]),
    )


def _rotary_result(x, rotation):
    return x.new_empty(x.shape)


def _decode_results(q, k_cache, v_cache, cache, variant, num_splits):
    return _fwd_results(q, k_cache, v_cache, variant)


def _no_results(*structured):
    return None


_flatteners = {
    name: _attention_flattener(name)
    for name in SCHEMAS
    if "Tensor? attn_bias" in SCHEMAS[name] or "cache_seqlens" in SCHEMAS[name]
}


def flatten(name: str, structured: tuple) -> tuple:
    """The structured arguments of an attention operator -> all its arguments."""
    return _flatteners[name](*structured)


class _Operator(NamedTuple):
    parse: Callable
    check: Callable
    results: Callable
    kernel: str  # its name in a device's module
    # Arguments that change from call to call and are left out of the signature, and what checks them in every call.
    varying: tuple[str, ...] = ()
    check_varying: Callable | None = None
    module: str | None = None  # the one that implements it on every device; None: each device's own


_OPERATORS = {
    "fwd": _Operator(_attention_parser("fwd"), checks.dense, _fwd_results, "forward"),
    "bwd": _Operator(_attention_parser("bwd"), checks.dense_backward, _bwd_results, "backward"),
    "varlen_fwd": _Operator(_attention_parser("varlen_fwd"), checks.varlen, _varlen_fwd_results, "varlen_forward"),
    "varlen_bwd": _Operator(
        _attention_parser("varlen_bwd"), checks.varlen_backward, _varlen_bwd_results, "varlen_backward"
    ),
    "bwd_into": _Operator(
        _attention_parser("bwd_into"), checks.dense_backward_into, _bwd_into_results, "backward_into"
    ),
    "varlen_bwd_into": _Operator(
        _attention_parser("varlen_bwd_into"), checks.varlen_backward_into, _bwd_into_results, "varlen_backward_into"
    ),
    "merge_states": _Operator(_parse_unchanged, checks.merge_states, _merge_states_results, "merge_states"),
    "combine": _Operator(_parse_unchanged, checks.combine, _combine_results, "combine"),
    "rotary": _Operator(
        _parse_rotation, checks_rotary.rotary, _rotary_result, "rotary", ("offset",), checks_rotary.offset
    ),
    "rotary_": _Operator(
        _parse_rotation, checks_rotary.rotary_, _no_results, "rotary_", ("offset",), checks_rotary.offset
    ),
    "append_kv": _Operator(_attention_parser("append_kv"), checks_cache.append_kv, _no_results, "append_kv"),
    "decode": _Operator(_attention_parser("decode"), checks_cache.decode, _decode_results, "decode"),
    "flag_gems_fwd": _Operator(
        *(_attention_parser("flag_gems_fwd"), checks_flag_gems.dense, _fwd_results, "forward"),
        module="integrations.flag_gems",
    ),
    "flag_gems_varlen_fwd": _Operator(
        *(_attention_parser("flag_gems_varlen_fwd"), checks_flag_gems.varlen, _varlen_fwd_results, "varlen_forward"),
        module="integrations.flag_gems",
    ),
}


OPERATORS = tuple(_OPERATORS)  # those that users call


def parse(name: str, args: tuple) -> tuple:
    """All arguments of a call -> the structured arguments of its check and its kernels."""
    return _OPERATORS[name].parse(*args)


# The module that implements the operators under a dispatch key (PyTorch for ROCm uses the key CUDA too). Any device
# without kernels of its own runs plain PyTorch in blocks of rows: right everywhere, fast nowhere.
BACKENDS = {"CPU": "cpu", "CUDA": "gpu", "CompositeExplicitAutograd": "anywhere"}


def _fake(name: str) -> Callable:
    parse, check, results, *_ = _OPERATORS[name]

    def fake(*args):
        structured = parse(*bind(name, args))
        check(*structured)
        return results(*structured)

    return fake


# Of operators without a flattener, nothing is recalled before the dispatcher.
_memories = {name: Memory(_flatteners.get(name, lambda *structured: structured)) for name in _OPERATORS}


def memory_of(name: str) -> Memory:
    """What ran for calls of an operator that came through the dispatcher; it takes structured arguments."""
    return _memories[name]


def _signed(name: str) -> list[int]:
    """The places of the arguments that make up the signature of a call."""
    varying = _OPERATORS[name].varying
    return [i for i, argument in enumerate(argument_names(name)) if argument not in varying]


def recalled(name: str, args: tuple) -> Callable | None:
    """What ran for a call like this one that came through the dispatcher. ``args`` are all of its arguments."""
    return _memories[name].find(signature([args[i] for i in _signed(name)]))


def _device_kernel(name: str, module: str) -> Callable:
    """The kernel of a dispatch key: arguments that differ from earlier ones in values alone skip what these passed.

    A device's module may have ``prepare_forward`` beside ``forward`` (and so on): it takes the same arguments, decides
    all that their signature decides, and returns what then runs in place of ``forward``. Its ``say`` logs what is not
    taken for such arguments, and why.
    """
    parse, check, _, attribute, varying, check_varying, only = _OPERATORS[name]
    memory, signed = _memories[name], _signed(name)

    def prepared(structured: tuple) -> Callable:
        check(*structured)
        implementation = importlib.import_module(f"{__package__}.{module}")
        if "Tensor? attn_bias" in SCHEMAS[name] and only is None:  # attention that chooses what runs
            implementation.say(attribute, *structured)
        prepare = getattr(implementation, f"prepare_{attribute}", None)
        return prepare(*structured) if prepare else getattr(implementation, attribute)

    def kernel(*args):
        args = bind(name, args)
        structured, of_call = parse(*args), signature([args[i] for i in signed] if varying else args)
        run = memory.find(of_call)
        if run is None:
            run = prepared(structured)
            memory.keep(of_call, args, run)
        elif check_varying is not None:
            check_varying(*structured)
        results = run(*structured)
        if results.__class__ is not tuple or all(x is not None for x in results):
            return results
        q = structured[1]  # of a backward: only there may results be missing
        return tuple([q.new_empty(0) if x is None else x for x in results])

    return kernel


# Keys of devices that a vendor's PyTorch can bring and Triton may compile for.
_VENDOR_KEYS = ("XPU", "PrivateUse1", "MTIA", "HPU")


def register_device(dispatch_key: str) -> None:
    """Let the Triton kernels serve another device: "XPU", "PrivateUse1" (NPU, MUSA, MLU, ...), "MTIA" or "HPU".

    For a vendor's PyTorch, whose package calls it once; all operators run there from the next call on. Without it such
    a device runs row blocks in plain PyTorch. A PyTorch that keeps the key "CUDA" needs no call.

    Args:
        dispatch_key: PyTorch's name of the key that the device's tensors have; not the name of the device type.

    Raises:
        ValueError: another key, or one that has its kernels already.
    """
    if isinstance(dispatch_key, str) and dispatch_key in BACKENDS:
        raise ValueError(f"dispatch_key: {dispatch_key!r} is registered already")
    if not isinstance(dispatch_key, str) or dispatch_key not in _VENDOR_KEYS:  # what came may be anything
        meant = _key_meant(dispatch_key)
        hint = f", a device type, whose key is {meant!r}" if meant else ""
        raise ValueError(f"dispatch_key: expected one of {', '.join(_VENDOR_KEYS)}, got {dispatch_key!r}{hint}")
    for name, row in _OPERATORS.items():
        if row.module is None:
            LIBRARY.impl(name, _device_kernel(name, "gpu"), dispatch_key)
            _memories[name].clear()  # what ran there until now
    BACKENDS[dispatch_key] = "gpu"


def _key_meant(device_type: object) -> str | None:
    """The key of a device type that was given in its place."""
    try:
        key = _dispatch_key(torch.device(device_type))
    except (RuntimeError, TypeError):
        return None
    return key if key in _VENDOR_KEYS else None


def _dispatch_key(of: torch.device) -> str:
    return "PrivateUse1" if of.type == torch._C._get_privateuse1_backend_name() else of.type.upper()


def explain(
    q: Tensor, k: Tensor, v: Tensor, variant: Variant, layout: Varlen | None = None, backend: str | None = None
) -> str:
    """What the device's module, or a backend, would run for these arguments, and why."""
    name = "fwd" if layout is None else "varlen_fwd"
    operator = _OPERATORS[name if backend is None else f"{backend}_{name}"]
    operator.check(*((q, k, v, variant) if layout is None else (q, k, v, layout, variant)))
    module = operator.module or BACKENDS.get(_dispatch_key(q.device), BACKENDS["CompositeExplicitAutograd"])
    return importlib.import_module(f"{__package__}.{module}").explain(q, k, v, variant, layout)


def _register() -> None:
    for name in _OPERATORS:
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(name), lib=LIBRARY)
        everywhere = _OPERATORS[name].module
        modules = BACKENDS if everywhere is None else {"CompositeExplicitAutograd": everywhere}
        for key, module in modules.items():
            LIBRARY.impl(name, _device_kernel(name, module), key)

    def cpu_forward_fake(q, k, v, softmax_scale, left, right, diagonal):
        return _fwd_results(q, k, v, Variant())

    torch.library.register_fake(f"{NAMESPACE}::_cpu_forward", cpu_forward_fake, lib=LIBRARY)
    native.load()


_register()
