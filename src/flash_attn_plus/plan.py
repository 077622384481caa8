"""Problem -> Plan: the tiles that a kernel runs with. Pure tables, standard library only.

Nothing is tuned at run time: a first call compiles one kernel, and equal calls run equal kernels. ``benchmark/tune.py``
measures tiles on a device and prints the fastest. ``test/test_compile_gate.py`` compiles both tables for their targets,
with no such device at hand, and holds them to the target's registers and shared memory.
"""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """What a plan depends on."""

    arch: str  # "sm_90", "gfx942", ...
    itemsize: int  # bytes of an element of q
    head_dim: int  # the larger one of q's and v's
    seqlen_q: int  # of the longest sequence
    options: bool  # softcap, ALiBi, bias or dropout: they take registers


class Plan(NamedTuple):
    BLOCK_M: int  # query rows of a tile
    BLOCK_N: int  # keys of a tile
    num_warps: int
    num_stages: int  # tiles of keys and values in flight


MOST_ROWS = 128  # of any tile here
SHORT = 64  # query rows that the last column of the tables is for


def block_dim(head_dim: int) -> int:
    """Columns of a tile: the power of two that holds the head dimension; matrix units take 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def block_dims(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """Columns of the tiles of q and k, and of v: equal up to 64, so that both are swizzled alike in shared memory.

    Where k and v take turns in one buffer and differ (64 columns and 16 or 32), an H100 gave wrong numbers or an
    illegal address with the ptxas of Triton 3.6, and right ones with the ptxas of CUDA 13.0.
    """
    dim, dim_v = block_dim(head_dim), block_dim(head_dim_v)
    return max(dim, min(dim_v, 64)), max(dim_v, min(dim, 64))


class Row(NamedTuple):
    plain: Plan
    options: Plan
    short: Plan  # for sequences of at most SHORT queries, with or without options


def _rows(*tiles: tuple[int, int, int, int]) -> Row:
    return Row(*(Plan(*x) for x in tiles))


# Architecture -> (bytes of an element, columns of a tile) -> rows (BLOCK_M, BLOCK_N, num_warps, num_stages).
FORWARD: dict[str, dict[tuple[int, int], Row]] = {
    # Plain rows: measured on an H100, 16k tokens in sequences of 4096, hidden size 2048 (docs/performance.md). The
    # others were chosen to compile without spilling, or nearly so.
    "sm_90": {
        (2, 64): _rows((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): _rows((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        (2, 256): _rows((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)),
        (4, 64): _rows((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        (4, 128): _rows((32, 64, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
        (4, 256): _rows((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    },
    # Not measured: chosen to compile without spilling, or nearly so.
    "sm_80": {
        (2, 64): _rows((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): _rows((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        (2, 256): _rows((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        (4, 64): _rows((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        (4, 128): _rows((64, 16, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
        (4, 256): _rows((32, 16, 8, 1), (16, 16, 4, 2), (16, 16, 4, 2)),
    },
    "sm_86": {
        (2, 64): _rows((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): _rows((128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
        (2, 256): _rows((64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        (4, 64): _rows((64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
        (4, 128): _rows((32, 64, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
        (4, 256): _rows((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    },
    "sm_100": {
        (2, 64): _rows((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
        (2, 128): _rows((128, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        (2, 256): _rows((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        (4, 64): _rows((32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        (4, 128): _rows((32, 64, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
        (4, 256): _rows((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    },
    "gfx942": {
        (2, 64): _rows((128, 64, 4, 1), (128, 64, 4, 1), (64, 64, 4, 1)),
        (2, 128): _rows((128, 64, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
        (2, 256): _rows((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        (4, 64): _rows((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1)),
        (4, 128): _rows((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        (4, 256): _rows((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    },
    "gfx1100": {
        (2, 64): _rows((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        (2, 128): _rows((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        (2, 256): _rows((32, 16, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        (4, 64): _rows((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        (4, 128): _rows((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        (4, 256): _rows((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}
# The same shared memory and matrix units.
FORWARD["sm_120"] = FORWARD["sm_86"]
FORWARD["gfx90a"] = FORWARD["gfx942"]


class BackwardRow(NamedTuple):
    queries: Plan  # of the pass whose programs own rows: dq
    keys: Plan  # of the pass whose programs own keys: dk and dv
    values: Plan | None  # of a pass of its own for dv, where the sums of both do not fit in the registers
    bias: Plan  # of the pass that sums the gradient of the bias


def _backward_row(*tiles: tuple[int, int, int, int] | None) -> BackwardRow:
    return BackwardRow(*(None if x is None else Plan(*x) for x in tiles))


# As FORWARD: architecture -> (bytes of an element, columns of a tile) -> tiles without options, and with.
BACKWARD: dict[str, dict[tuple[int, int], tuple[BackwardRow, BackwardRow]]] = {
    # 16 bits without options: measured on an H100, causal, 16k tokens in sequences of 4096, hidden size 2048. The
    # others were chosen to compile without spilling, or nearly so.
    "sm_90": {
        (2, 64): (
            _backward_row((64, 64, 4, 3), (64, 64, 4, 3), None, (64, 64, 4, 1)),
            _backward_row((64, 64, 4, 2), (32, 64, 4, 2), None, (64, 64, 4, 1)),
        ),
        (2, 128): (
            _backward_row((128, 64, 8, 3), (32, 64, 4, 3), None, (64, 64, 8, 1)),
            _backward_row((128, 64, 8, 2), (32, 64, 8, 2), None, (64, 64, 8, 1)),
        ),
        (2, 256): (
            _backward_row((128, 32, 8, 3), (32, 128, 8, 3), (64, 128, 8, 2), (32, 32, 4, 1)),
            _backward_row((64, 32, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (64, 32, 4, 1)),
        ),
        (4, 64): (
            _backward_row((64, 32, 8, 2), (32, 64, 8, 1), None, (32, 32, 8, 1)),
            _backward_row((64, 32, 8, 2), (32, 32, 8, 1), None, (32, 32, 8, 1)),
        ),
        (4, 128): (
            _backward_row((16, 32, 8, 2), (16, 32, 8, 1), None, (16, 16, 4, 1)),
            _backward_row((16, 32, 8, 2), (16, 32, 8, 1), None, (16, 16, 4, 1)),
        ),
        (4, 256): (
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
        ),
    },
    # Not measured: chosen to compile without spilling, or nearly so; on gfx1100 most rows spill.
    "sm_80": {
        (2, 64): (
            _backward_row((64, 64, 4, 2), (64, 64, 4, 2), None, (32, 64, 8, 1)),
            _backward_row((64, 32, 4, 2), (32, 64, 4, 2), None, (32, 64, 8, 1)),
        ),
        (2, 128): (
            _backward_row((64, 64, 4, 2), (64, 64, 8, 2), None, (32, 64, 8, 1)),
            _backward_row((64, 64, 8, 2), (64, 64, 8, 2), None, (32, 64, 8, 1)),
        ),
        (2, 256): (
            _backward_row((64, 64, 8, 2), (32, 64, 8, 2), None, (32, 64, 8, 1)),
            _backward_row((64, 64, 8, 2), (64, 32, 8, 2), None, (32, 64, 8, 1)),
        ),
        (4, 64): (
            _backward_row((64, 32, 8, 2), (32, 64, 8, 1), None, (32, 32, 8, 1)),
            _backward_row((64, 32, 8, 2), (32, 64, 8, 1), None, (32, 32, 8, 1)),
        ),
        (4, 128): (
            _backward_row((16, 32, 8, 2), (32, 32, 8, 1), None, (16, 16, 4, 1)),
            _backward_row((16, 32, 8, 2), (32, 32, 8, 1), None, (16, 16, 4, 1)),
        ),
        (4, 256): (
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
        ),
    },
    "sm_86": {
        (2, 64): (
            _backward_row((64, 64, 4, 2), (64, 64, 4, 2), None, (32, 64, 8, 1)),
            _backward_row((64, 32, 4, 2), (32, 64, 4, 1), None, (32, 64, 8, 1)),
        ),
        (2, 128): (
            _backward_row((64, 64, 4, 2), (64, 64, 8, 2), None, (32, 64, 8, 1)),
            _backward_row((64, 64, 8, 2), (64, 64, 8, 2), None, (32, 64, 8, 1)),
        ),
        (2, 256): (
            _backward_row((64, 32, 8, 1), (32, 64, 8, 1), (32, 128, 8, 1), (32, 64, 8, 1)),
            _backward_row((64, 32, 8, 1), (32, 64, 8, 1), (64, 64, 8, 1), (32, 64, 8, 1)),
        ),
        (4, 64): (
            _backward_row((64, 32, 8, 2), (32, 64, 8, 1), None, (32, 32, 8, 1)),
            _backward_row((64, 32, 8, 2), (32, 64, 8, 1), None, (32, 32, 8, 1)),
        ),
        (4, 128): (
            _backward_row((16, 32, 8, 2), (16, 32, 8, 1), None, (16, 16, 4, 1)),
            _backward_row((16, 32, 8, 2), (16, 32, 8, 1), None, (16, 16, 4, 1)),
        ),
        (4, 256): (
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
            _backward_row((16, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
        ),
    },
    "sm_100": {
        (2, 64): (
            _backward_row((128, 64, 8, 2), (64, 128, 8, 2), None, (64, 64, 4, 1)),
            _backward_row((128, 64, 8, 2), (32, 64, 4, 2), None, (64, 64, 4, 1)),
        ),
        (2, 128): (
            _backward_row((128, 64, 8, 2), (64, 128, 8, 2), None, (64, 64, 8, 1)),
            _backward_row((128, 64, 8, 2), (64, 64, 8, 2), None, (64, 64, 8, 1)),
        ),
        (2, 256): (
            _backward_row((128, 32, 8, 2), (32, 64, 8, 2), None, (64, 32, 8, 1)),
            _backward_row((64, 32, 8, 2), (32, 64, 8, 2), None, (64, 32, 8, 1)),
        ),
        # Triton puts some float32 products of 64 rows or more on the matrix unit, which rounds them to TF32.
        (4, 64): (
            _backward_row((32, 32, 8, 2), (32, 32, 8, 1), None, (32, 32, 8, 1)),
            _backward_row((32, 32, 8, 2), (32, 32, 8, 1), None, (32, 32, 8, 1)),
        ),
        (4, 128): (
            _backward_row((16, 32, 8, 2), (16, 32, 8, 1), None, (16, 16, 4, 1)),
            _backward_row((16, 32, 8, 2), (16, 32, 8, 1), None, (16, 16, 4, 1)),
        ),
        (4, 256): (
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
            _backward_row((32, 16, 8, 2), (16, 32, 8, 1), None, (16, 16, 8, 1)),
        ),
    },
    "gfx942": {
        (2, 64): (
            _backward_row((128, 64, 4, 1), (64, 128, 4, 1), None, (64, 64, 4, 1)),
            _backward_row((128, 64, 4, 1), (64, 128, 4, 1), None, (64, 64, 4, 1)),
        ),
        (2, 128): (
            _backward_row((128, 32, 4, 1), (32, 128, 4, 1), None, (32, 32, 4, 1)),
            _backward_row((128, 32, 4, 1), (32, 128, 4, 1), None, (32, 32, 4, 1)),
        ),
        (2, 256): (
            _backward_row((64, 32, 4, 1), (32, 32, 4, 1), None, (32, 32, 4, 1)),
            _backward_row((64, 32, 4, 1), (16, 32, 4, 1), None, (32, 32, 4, 1)),
        ),
        (4, 64): (
            _backward_row((64, 32, 4, 1), (32, 64, 4, 1), None, (32, 32, 4, 1)),
            _backward_row((64, 32, 4, 1), (32, 64, 4, 1), None, (32, 32, 4, 1)),
        ),
        (4, 128): (
            _backward_row((32, 32, 4, 1), (32, 32, 4, 1), None, (16, 16, 4, 1)),
            _backward_row((32, 32, 4, 1), (16, 32, 4, 1), None, (16, 16, 4, 1)),
        ),
        (4, 256): (
            _backward_row((32, 16, 4, 1), (16, 16, 4, 1), None, (16, 16, 4, 1)),
            _backward_row((32, 16, 4, 1), (16, 16, 4, 1), None, (16, 16, 4, 1)),
        ),
    },
    "gfx1100": {
        (2, 64): (
            _backward_row((64, 32, 4, 1), (16, 64, 4, 1), None, (64, 32, 8, 1)),
            _backward_row((32, 32, 4, 1), (16, 32, 4, 1), None, (64, 32, 8, 1)),
        ),
        (2, 128): (
            _backward_row((32, 16, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (64, 32, 8, 1)),
            _backward_row((32, 16, 8, 1), (16, 64, 8, 1), (16, 64, 8, 1), (64, 32, 8, 1)),
        ),
        (2, 256): (
            _backward_row((16, 16, 4, 1), (16, 32, 8, 1), (16, 64, 8, 1), (64, 32, 8, 1)),
            _backward_row((16, 16, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1), (64, 32, 8, 1)),
        ),
        (4, 64): (
            _backward_row((16, 16, 8, 1), (16, 16, 8, 1), None, (16, 16, 8, 1)),
            _backward_row((16, 16, 8, 1), (16, 16, 8, 1), None, (16, 16, 8, 1)),
        ),
        (4, 128): (
            _backward_row((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
            _backward_row((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        ),
        (4, 256): (
            _backward_row((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
            _backward_row((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        ),
    },
}
BACKWARD["sm_120"] = BACKWARD["sm_86"]
BACKWARD["gfx90a"] = BACKWARD["gfx942"]


class DecodePlan(NamedTuple):
    BLOCK_N: int  # keys of a tile
    num_warps: int
    num_stages: int  # tiles of keys and values in flight
    programs: int  # that run together on a processor; only ``split`` below is planned by it
    shortest: int  # keys that a part of a sequence has at least: whole tiles


class Splits(NamedTuple):
    """See kernels/splits.py."""

    parts: int | None
    shares: int


class DecodeRow(NamedTuple):
    split: DecodePlan  # where sequences are split among the processors
    whole: DecodePlan  # where there are enough of them without

    def tiles(self, cut: Splits) -> DecodePlan:
        return self.whole if cut.parts == 1 else self.split


# Bytes of shared memory that two programs have each: of an H100, and of what has as much.
_HALF_A_PROCESSOR = 113 * 1024


def is_alone(tile: DecodePlan, bytes_of_key: int) -> bool:
    """Whether a program that decodes takes so much shared memory that no second one is placed beside it. Where
    processors have less than an H100's, so do smaller ones, of which this says no.
    """
    return (tile.num_stages - 1) * tile.BLOCK_N * bytes_of_key > _HALF_A_PROCESSOR


def most_rows_of_decode(itemsize: int, head_dim: int) -> int:
    """Query rows of a tile, the heads of a key head counted: what 4 warps hold. float32 products are unrolled."""
    if itemsize > 2:
        return 16
    return 64 if head_dim <= 64 else 32


def _decode_row(*tiles: tuple[int, int, int, int, int]) -> DecodeRow:
    return DecodeRow(*(DecodePlan(*x) for x in tiles))


# As FORWARD: architecture -> (bytes of an element, columns of a tile).
DECODE: dict[str, dict[tuple[int, int], DecodeRow]] = {
    # (2, 128): measured on an H100 (docs/performance.md). The others were chosen to fit. With more than three stages a
    # program waits for an entry of its table that was asked for just before (decode.py).
    "sm_90": {
        (2, 64): _decode_row((128, 4, 3, 1, 128), (128, 4, 3, 3, 128)),
        (2, 128): _decode_row((128, 4, 3, 1, 128), (128, 4, 3, 1, 128)),
        (2, 256): _decode_row((64, 4, 3, 1, 128), (32, 4, 3, 2, 128)),
        (4, 64): _decode_row((32, 4, 3, 1, 128), (32, 4, 3, 3, 128)),
        (4, 128): _decode_row((16, 4, 3, 1, 128), (16, 4, 3, 3, 128)),
        (4, 256): _decode_row((16, 8, 3, 1, 128), (16, 8, 2, 2, 128)),
    },
    "sm_86": {
        (2, 64): _decode_row((128, 4, 3, 1, 128), (64, 4, 3, 2, 128)),
        (2, 128): _decode_row((64, 4, 3, 1, 128), (64, 4, 2, 2, 128)),
        (2, 256): _decode_row((32, 4, 3, 1, 128), (32, 4, 2, 2, 128)),
        (4, 64): _decode_row((32, 4, 2, 1, 128), (32, 4, 2, 2, 128)),
        (4, 128): _decode_row((16, 4, 2, 1, 128), (16, 4, 2, 2, 128)),
        (4, 256): _decode_row((16, 8, 2, 1, 128), (16, 8, 2, 1, 128)),
    },
    "gfx942": {
        (2, 64): _decode_row((64, 4, 1, 2, 128), (64, 4, 1, 4, 128)),
        (2, 128): _decode_row((64, 4, 1, 2, 128), (64, 4, 1, 4, 128)),
        (2, 256): _decode_row((32, 4, 1, 2, 128), (32, 4, 1, 4, 128)),
        (4, 64): _decode_row((32, 4, 1, 2, 128), (32, 4, 1, 4, 128)),
        (4, 128): _decode_row((32, 4, 1, 2, 128), (32, 4, 1, 4, 128)),
        (4, 256): _decode_row((16, 4, 1, 2, 128), (16, 4, 1, 4, 128)),
    },
    "gfx1100": {
        (2, 64): _decode_row((64, 4, 1, 2, 128), (64, 4, 1, 4, 128)),
        (2, 128): _decode_row((32, 4, 1, 2, 128), (32, 4, 1, 4, 128)),
        (2, 256): _decode_row((16, 4, 1, 2, 128), (16, 4, 1, 4, 128)),
        (4, 64): _decode_row((16, 8, 1, 2, 128), (16, 8, 1, 4, 128)),
        (4, 128): _decode_row((16, 8, 1, 2, 128), (16, 8, 1, 4, 128)),
        (4, 256): _decode_row((16, 8, 1, 2, 128), (16, 8, 1, 4, 128)),
    },
}
DECODE["sm_80"] = DECODE["sm_100"] = DECODE["sm_90"]
DECODE["sm_120"], DECODE["gfx90a"] = DECODE["sm_86"], DECODE["gfx942"]


MOST_SPLITS = 128  # that are asked for: their results are kept until they are combined


# Sequences for every slot of a line, from which on each has a program of its own: their lengths even out. Unless one of
# them may be so long that all others have ended long before it; but not if a line has so many that each of its programs
# takes as long to find its place.
_MANY, _LONG, _MOST_SEQUENCES = 4, 16384, 1024
# Keys of a batch whose blocks, of 16 keys at least, 32 bits count.
_COUNTED = 2**34


def splits(row: DecodeRow, room: int, programs: int, batch: int, keys: int, num_splits: int, equal: bool) -> Splits:
    """How the keys of a batch are split.

    ``room``: programs that run together; ``programs``: of a slot. ``keys``: the most that are seen of a sequence;
    ``equal``: as many are seen of about every one.
    """
    if num_splits > 0:
        return Splits(max(1, min(num_splits, MOST_SPLITS, -(-keys // row.split.BLOCK_N))), 0)
    most = max(1, -(-keys // row.split.shortest))
    fit = room // programs
    parts = min(max(1, fit // batch), most)
    many = batch > _MOST_SEQUENCES or (batch >= _MANY * fit and keys < _LONG)
    if batch == 1 or fit <= 1 or parts == most or many or batch * keys >= _COUNTED:
        return Splits(parts, 0)
    of_line, of_parts = _filled(fit * programs, room), _filled(batch * parts * programs, room)
    if of_line < 0.8 or (equal and of_parts > 0.9 * of_line):
        return Splits(parts, 0)
    return Splits(None, fit)


def _filled(programs: int, room: int) -> float:
    """The part of the processors' time that has work, where all programs have as much."""
    return programs / (room * -(-programs // room))


# Anything that Triton compiles for: small enough for the smallest.
_ANYWHERE = {2: Plan(32, 32, 4, 1), 4: Plan(16, 16, 4, 1)}
_DECODE_ANYWHERE = DecodePlan(16, 4, 1, 2, 128)


def row_arch(arch: str) -> str | None:
    """The architecture whose rows serve ``arch``: its own, or the nearest older one of its family."""
    if arch in FORWARD:
        return arch
    family = next((name for name in ("sm_", "gfx9", "gfx1") if arch.startswith(name)), None)
    if family is None:
        return None

    def generation(name: str) -> int:
        return int("0" + "".join(filter(str.isdigit, name.removeprefix(family))))

    older = [name for name in FORWARD if name.startswith(family) and generation(name) <= generation(arch)]
    return max(older, key=generation, default=None)


def forward(problem: Problem) -> Plan:
    arch = row_arch(problem.arch)
    if arch is None:
        return _ANYWHERE[problem.itemsize]
    row = FORWARD[arch][problem.itemsize, max(64, block_dim(problem.head_dim))]
    if problem.seqlen_q <= SHORT:
        return row.short
    return row.options if problem.options else row.plain


def backward(problem: Problem) -> BackwardRow:
    arch = row_arch(problem.arch)
    if arch not in BACKWARD:
        tiles = _ANYWHERE[problem.itemsize]
        return BackwardRow(tiles, tiles, None, tiles)
    return BACKWARD[arch][problem.itemsize, max(64, block_dim(problem.head_dim))][problem.options]


def decode(arch: str, itemsize: int, head_dim: int) -> DecodeRow:
    arch = row_arch(arch)
    if arch not in DECODE:
        return DecodeRow(_DECODE_ANYWHERE, _DECODE_ANYWHERE)
    return DECODE[arch][itemsize, max(64, block_dim(head_dim))]
