"""``use_backend``: another library computes the attention of a part of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from . import eager, interface, kvcache, library
from .schemas import NAMESPACE

# Past the dispatcher as they are, they would not be seen: their argument says it.
_FUNCTIONS = frozenset(
    (
        interface.flash_attn_func,
        interface.flash_attn_kvpacked_func,
        interface.flash_attn_qkvpacked_func,
        interface.flash_attn_varlen_func,
        interface.flash_attn_varlen_kvpacked_func,
        interface.flash_attn_varlen_qkvpacked_func,
        interface.explain,
    )
)
_packets = getattr(torch.ops, NAMESPACE)
_fwd, _varlen_fwd, _decode = (library.overload(name) for name in ("fwd", "varlen_fwd", "decode"))


class use_backend(TorchFunctionMode):  # noqa: N801  (as torch.no_grad)
    """A context in which attention is computed by another library: ``with use_backend("flag_gems"): ...``.

    Every call that the program makes in it of the attention functions without a ``backend`` of its own, and of the
    operators ``fwd`` and ``varlen_fwd``, is one of the backend's. As ``torch.no_grad`` it holds for the thread that
    enters it, can be nested and used again, and compiled functions are compiled anew in it. Every call of PyTorch takes
    about a microsecond more in there.

    It does not hold for what a function of PyTorch calls in turn, which runs as outside: the body of an operator of
    ``torch.library``, hooks during the backward pass, and what a checkpoint computes again there. The argument
    ``backend`` holds everywhere.

    Args:
        backend: "flag_gems".

    Raises:
        ValueError: another name.
        NotImplementedError: in the context, what the backend does not compute: nothing else runs in its place.
            ``flash_attn_with_kvcache`` is among it, and so are higher-order operators (``torch.cond``, flex_attention
            and others; where PyTorch compiles them, its own error says so), since the context does not reach their
            bodies.
    """

    def __init__(self, backend: str) -> None:
        eager.selected(backend, "fwd")  # raises where there is none
        super().__init__()
        self.backend = backend

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        # By identity: not everything that PyTorch calls can be hashed where a graph is traced.
        if function is _fwd or function is _packets.fwd:
            function = library.overload(f"{self.backend}_fwd")
        elif function is _varlen_fwd or function is _packets.varlen_fwd:
            function = library.overload(f"{self.backend}_varlen_fwd")
        elif function is _decode or function is _packets.decode or function is kvcache.flash_attn_with_kvcache:
            raise NotImplementedError(
                f"backend: expected attention without a cache in use_backend({self.backend!r}), got "
                "flash_attn_with_kvcache"
            )
        elif isinstance(function, HigherOrderOperator):
            # The context would not reach what it calls.
            raise NotImplementedError(
                f"backend: expected no higher-order operator (torch.cond, torch.while_loop, map, scan, a compiled "
                f"checkpoint, ...) in use_backend({self.backend!r}), which does not hold inside of it"
            )
        elif isinstance(function, FunctionType) and function in _FUNCTIONS and kwargs.get("backend") is None:
            kwargs = {**kwargs, "backend": self.backend}
        return function(*args, **kwargs)
