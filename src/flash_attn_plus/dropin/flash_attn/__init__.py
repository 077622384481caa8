"""``flash_attn`` 2.8.3, as flash_attn_plus serves it (flash_attn_plus/as_flash_attn.py)."""

from pkgutil import extend_path

from flash_attn_plus.as_flash_attn import VERSION, not_served

__version__ = VERSION
# What other distributions put into a folder of this name, without being flash-attn 2, is still found.
__path__ = extend_path(__path__, __name__)

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__getattr__ = not_served(__name__, [*__all__, "__version__"])
