"""The operators' schemas, each argument written once.

Standard library only: this file can be read, tested and diffed without PyTorch.

Exported programs store calls by these schemas, so they are **append only**: never reorder, insert, rename,
make keyword-only, or change a result. A new option goes to the end of a schema, with a default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NAMESPACE = "flash_attn_plus"

_VARIANT = (
    "float? softmax_scale=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, "
    "SymInt? diagonal=None, float softcap=0.0, Tensor? alibi_slopes=None, Tensor? attn_bias=None, "
    "Tensor? sink=None, float dropout_p=0.0, Tensor? rng_state=None, bool deterministic=False"
)
_LAYOUT = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_LAYOUT_OPTIONS = "Tensor? seqused_q=None, Tensor? seqused_k=None, Tensor? leftpad_k=None, Tensor? block_table=None"
_SAVED = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse"
_INTO = "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"
_NEEDS = "bool need_dq=True, bool need_dkv=True, bool need_dbias=True"
_OUT = "(Tensor out, Tensor lse)"
_ROTATION = (
    "Tensor cos, Tensor sin, SymInt offset=0, Tensor? seqlen_offsets=None, Tensor? cu_seqlens=None, "
    "SymInt? max_seqlen=None, bool interleaved=False, bool conjugate=False"
)
_CACHE = (
    "Tensor? cache_seqlens=None, SymInt seqlen_new=0, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, "
    "Tensor? block_table=None"
)
_NEW = (
    "Tensor cache_seqlens, Tensor? cache_batch_idx=None, Tensor? block_table=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, bool rotary_interleaved=True"
)
_GRADS_OF_OPTIONS = "(Tensor dsink, Tensor dbias)"
_GRADS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dsink, Tensor dbias)"

SCHEMAS: dict[str, str] = {
    "fwd": f"(Tensor q, Tensor k, Tensor v, {_VARIANT}) -> {_OUT}",
    "bwd": f"({_SAVED}, {_VARIANT}, {_NEEDS}) -> {_GRADS}",
    "varlen_fwd": f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}, {_VARIANT}, {_LAYOUT_OPTIONS}) -> {_OUT}",
    "varlen_bwd": f"({_SAVED}, {_LAYOUT}, {_VARIANT}, {_LAYOUT_OPTIONS}, {_NEEDS}) -> {_GRADS}",
    "merge_states": f"(Tensor out1, Tensor lse1, Tensor out2, Tensor lse2) -> {_OUT}",
    "combine": f"(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype=None) -> {_OUT}",
    # The backward into given tensors, of any strides; None where a gradient is not needed.
    "bwd_into": f"({_SAVED}, {_INTO}, {_VARIANT}, bool need_dbias=True) -> {_GRADS_OF_OPTIONS}",
    "varlen_bwd_into": (
        f"({_SAVED}, {_INTO}, {_LAYOUT}, {_VARIANT}, {_LAYOUT_OPTIONS}, bool need_dbias=True) -> {_GRADS_OF_OPTIONS}"
    ),
    "rotary": f"(Tensor x, {_ROTATION}) -> Tensor",
    "rotary_": f"(Tensor(a!) x, {_ROTATION}) -> ()",
    "append_kv": f"(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, {_NEW}) -> ()",
    "decode": f"(Tensor q, Tensor k_cache, Tensor v_cache, {_CACHE}, {_VARIANT}, SymInt num_splits=0) -> {_OUT}",
    # By flag_gems, where the caller selects it: the same arguments, of which it takes some (checks_flag_gems.py).
    "flag_gems_fwd": f"(Tensor q, Tensor k, Tensor v, {_VARIANT}) -> {_OUT}",
    "flag_gems_varlen_fwd": f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}, {_VARIANT}, {_LAYOUT_OPTIONS}) -> {_OUT}",
    # Implemented by the native library (csrc/) on CPU only; chosen by cpu.py, never called by users.
    "_cpu_forward": (
        "(Tensor q, Tensor k, Tensor v, float softmax_scale, int left, int right, int diagonal) -> "
        "(Tensor out, Tensor lse)"
    ),
}


class Variant(NamedTuple):
    """Everything that makes one attention differ from another, in the order of the schemas.

    ``causal`` means ``window_right = 0``; a negative window is unlimited; ``diagonal`` is the offset that
    lines query rows up with key columns (default ``seqlen_k - seqlen_q``: bottom right).
    Query i sees key j iff ``i + diagonal - window_left <= j <= i + diagonal + window_right``.
    """

    softmax_scale: float | None = None
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    diagonal: int | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    attn_bias: Tensor | None = None
    sink: Tensor | None = None
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    deterministic: bool = False


class Varlen(NamedTuple):
    """Where the sequences of a packed batch lie, in the order of the schemas.

    The keys of sequence b start at ``cu_seqlens_k[b] + leftpad_k[b]``; there are ``seqused_k[b] - leftpad_k[b]``
    of them (the length of the segment where ``seqused_k`` is None). With ``block_table`` the keys lie in pages:
    k and v are (num_pages, page_size, heads_k, dim), and key j of sequence b is row ``j % page_size`` of page
    ``block_table[b, j // page_size]``.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    block_table: Tensor | None = None


class Cache(NamedTuple):
    """Which keys of a cache a batch sees, in the order of the schemas.

    A cache is (caches, capacity, heads_k, dim); sequence b has number ``cache_batch_idx[b]``, or b. With
    ``block_table`` it lies in pages, as in ``Varlen``, and its capacity are all pages of a row of the table. The keys
    of sequence b end at ``cache_seqlens[b] + seqlen_new`` (the capacity where ``cache_seqlens`` is None) and start at
    ``cache_leftpad[b]``.
    """

    cache_seqlens: Tensor | None = None
    seqlen_new: int = 0
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None


class New(NamedTuple):
    """Where new keys and values go, in the order of the schemas: behind the ``cache_seqlens[b]`` that are there.

    Keys are rotated by the angles of the row of the cache that they go to, where there are tables (see ``Rotation``).
    """

    cache_seqlens: Tensor
    cache_batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = True


class Rotation(NamedTuple):
    """By which angles the rows of a tensor are rotated, in the order of the schemas.

    ``cos`` and ``sin`` are (seqlen_ro, rotary_dim / 2): row p holds the angles of position p. Row i of sequence b sits
    at position ``i + offset``, or ``i + seqlen_offsets[b]`` where that is a tensor. The batch is packed where there are
    ``cu_seqlens``. Columns j and j + rotary_dim / 2 are a pair (GPT-NeoX), or 2j and 2j + 1 where ``interleaved``
    (GPT-J). ``conjugate`` rotates back.
    """

    cos: Tensor
    sin: Tensor
    offset: int = 0
    seqlen_offsets: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    interleaved: bool = False
    conjugate: bool = False


def band(variant: Variant, seqlen_q: int, seqlen_k: int) -> tuple[int, int, int]:
    """(left, right, diagonal) of one sequence: ints, -1 where that side is unlimited."""
    left = variant.window_left if variant.window_left >= 0 else -1
    right = 0 if variant.causal else (variant.window_right if variant.window_right >= 0 else -1)
    diagonal = seqlen_k - seqlen_q if variant.diagonal is None else variant.diagonal
    return left, right, diagonal
