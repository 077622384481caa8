"""The operators on a device that has no kernels of its own: plain PyTorch in blocks of rows.

Right everywhere, fast nowhere. Packed sequences read their lengths on the host, which waits for the device.
"""

from . import cache, into, log
from .cache import append_kv
from .rotate import rotary, rotary_
from .rowblocks import backward, forward, varlen_backward, varlen_forward
from .states import combine, merge_states

__all__ = ["append_kv", "combine", "decode", "explain", "forward", "merge_states", "varlen_forward"]
__all__ += ["backward", "backward_into", "rotary", "rotary_", "varlen_backward", "varlen_backward_into"]

_WHY = "row blocks in plain PyTorch: there are no kernels for device type %r yet"

backward_into = into.copying(backward)
varlen_backward_into = into.copying(varlen_backward)


def decode(q, k_cache, v_cache, where, variant, num_splits):
    return cache.decode(q, k_cache, v_cache, where, variant, num_splits, forward)


def explain(q, k, v, variant, layout=None) -> str:
    why = _WHY % q.device.type
    return f"forward:  {why}\nbackward: {why}"


def say(kernel: str, one, *rest) -> None:
    """Log that there are no kernels (library.py calls it when a signature is new)."""
    log.once(_WHY, one.device.type)
