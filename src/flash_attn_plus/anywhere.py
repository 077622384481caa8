"""The operators on a device that has no kernels of its own: plain PyTorch in blocks of rows.

Right everywhere, fast nowhere. Packed sequences read their lengths on the host, which waits for the device.
"""

from . import into
from .rowblocks import backward, forward, varlen_backward, varlen_forward
from .states import combine, merge_states

__all__ = ["combine", "explain", "forward", "merge_states", "varlen_forward"]
__all__ += ["backward", "backward_into", "varlen_backward", "varlen_backward_into"]

backward_into = into.copying(backward)
varlen_backward_into = into.copying(varlen_backward)


def explain(q, k, v, variant, layout=None) -> str:
    why = f"there are no kernels for device type {q.device.type!r} yet"
    return f"forward:  row blocks in plain PyTorch: {why}\nbackward: row blocks in plain PyTorch: {why}"
