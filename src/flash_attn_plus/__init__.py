"""Flash attention for every device, as first-class PyTorch operators.

The functions below have the names, arguments and results of flash-attn 2.8.3; the operators under them are
``torch.ops.flash_attn_plus.*``, one node each in torch.compile, FX and torch.export.
"""

from . import autocast, autograd, flops, vmap  # noqa: F401  (each tells PyTorch its part of every operator)
from .backend import use_backend
from .interface import (
    explain,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    merge_states,
)
from .kvcache import flash_attn_with_kvcache
from .library import register_device
from .padding import (
    index_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from .rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

__version__ = "0.1.0"

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "merge_states",
    "pad_input",
    "register_device",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
    "use_backend",
]
