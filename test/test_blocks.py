"""Which blocks a tile visits and which of them need no mask (scores.py), against the definition of a window."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels do not run: Triton is not installed")

import triton.language as tl  # noqa: E402

from flash_attn_plus.kernels import scores, tiles  # noqa: E402


class Window(NamedTuple):
    seqlen_q: int
    seqlen_k: int
    diagonal: int
    left: int | None
    right: int | None

    def sees(self, row: int, column: int) -> bool:
        """Of a row and a column that exist."""
        low = -(10**9) if self.left is None else row + self.diagonal - self.left
        high = 10**9 if self.right is None else row + self.diagonal + self.right
        return low <= column <= high


@triton.jit
def bounds_kernel(
    out_ptr, seqlen_q, seqlen_k, diagonal, left, right, KEYS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    sequence = tiles.Sequence(0, 0, 0, seqlen_q, seqlen_q, 0, seqlen_k)
    variant = scores.Variant(diagonal, left, right)
    head = scores.Head(diagonal, 0.0, 0, 0, 0, 0)
    if KEYS:
        bounds = scores.key_blocks(tl.program_id(0) * M, sequence, head, variant, M, N)
    else:
        bounds = scores.query_blocks(tl.program_id(0) * N, sequence, head, variant, M, N)
    for n in tl.static_range(4):
        tl.store(out_ptr + tl.program_id(0) * 4 + n, bounds[n])


def windows() -> list[Window]:
    draw = random.Random(0)
    found = [
        Window(70, 70, 0, None, 0),
        Window(1, 100, 99, None, 0),
        Window(100, 1, -99, None, 0),
        Window(0, 9, 9, 3, 3),
    ]
    for _ in range(60):
        q, k = draw.randrange(0, 150), draw.randrange(0, 150)
        left, right = (draw.choice([None, 0, 1, 17, 64, 200]) for _ in range(2))
        found.append(Window(q, k, draw.choice([k - q, 0, draw.randint(-200, 200)]), left, right))
    return found


@pytest.mark.parametrize("keys", [True, False], ids=["keys of a tile of rows", "rows of a tile of keys"])
@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 64)])
def test_every_pair_that_sees_is_visited_and_only_whole_blocks_go_unmasked(keys, block_m, block_n, device):
    for window in windows():
        q, k = window.seqlen_q, window.seqlen_k
        owned, owned_end, block, end = (block_m, q, block_n, k) if keys else (block_n, k, block_m, q)
        programs = -(-owned_end // owned) + 1  # one that owns nothing
        out = torch.full((programs, 4), -1, dtype=torch.int32, device=device)
        bounds_kernel[(programs,)](
            out, q, k, window.diagonal, window.left, window.right, KEYS=keys, M=block_m, N=block_n
        )
        for program, (begin, full_begin, full_end, stop) in enumerate(out.tolist()):
            mine = range(program * owned, min((program + 1) * owned, owned_end))
            name = f"{window}, program {program}: {begin, full_begin, full_end, stop}"
            assert begin % block == full_begin % block == full_end % block == 0, name
            assert begin <= full_begin <= full_end and stop <= end, name
            seen = [[window.sees(*((a, b) if keys else (b, a))) for b in range(end)] for a in mine]
            visited = range(begin, max(stop, full_end))
            for other in range(end):
                if any(row[other] for row in seen):
                    assert other in visited, f"{name}: {other} is not visited"
                if full_begin <= other < full_end:
                    assert all(row[other] for row in seen), f"{name}: {other} needs a mask"
            assert full_begin == full_end or full_end <= end, name
            if not mine:
                assert begin >= stop, f"{name}: visits blocks for nothing"
