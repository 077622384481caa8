"""Dropout's generator: the published vectors, the counter layout of the contract, and independence from tiling."""

from __future__ import annotations

import pytest
import torch

from flash_attn_plus import reference
from flash_attn_plus.philox import keep_mask, philox4x32

ONES = 0xFFFFFFFF

# Random123's known-answer tests (kat_vectors, philox4x32 10): counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_gives_the_published_words(counter, key, words, device):
    drawn = philox4x32([torch.tensor(c, device=device) for c in counter], [torch.tensor(k, device=device) for k in key])
    assert tuple(word.item() for word in drawn) == words


def test_keep_mask_places_words_as_the_contract_says(device):
    """Key and counter in Python integers, for single scores whose coordinates and seed fill every word."""
    seed, offset, p = -0x1234_5678_9ABC_DEF0, 0x5_0000_0007, 0.37
    rng_state = torch.tensor([seed, offset], device=device)
    for head, i, j in ((0, 0, 0), (5, 1, 2), (70_001, 123_456, 1_000_003)):
        counter = [torch.tensor(c) for c in (j // 4, i, head, offset & ONES)]
        word = philox4x32(counter, [torch.tensor(seed & ONES), torch.tensor((seed >> 32) & ONES)])[j % 4].item()
        keep = keep_mask(rng_state, p, range(head, head + 1), range(i, i + 1), range(j, j + 1), device)
        assert keep.shape == (1, 1, 1)
        assert keep.item() == (word >= int(p * 2**32))


def test_keep_mask_agrees_with_the_reference(device):
    rng_state = torch.tensor([2**40 + 3, 11], device=device)
    expected = reference.dropout_keep_mask(rng_state, 0.3, 2, 3, 9, 21, batch_start=4)
    assert keep_mask(rng_state, 0.3, range(12, 18), range(9), range(21), device).equal(expected.flatten(0, 1))


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("length", [0, 1, 2, 5, 8])
def test_keep_mask_of_a_part_is_the_part_of_the_mask(start, length, device):
    rng_state = torch.tensor([42, 0], device=device)
    whole = keep_mask(rng_state, 0.5, range(4), range(10), range(16), device)
    heads = torch.tensor([3, 1], device=device)
    part = keep_mask(rng_state, 0.5, heads, range(2, 7), range(start, start + length), device)
    assert part.equal(whole[[3, 1], 2:7, start : start + length])


@pytest.mark.parametrize("p", [0.0, 0.17, 0.5, 1.0])
def test_keep_mask_drops_the_fraction_it_is_asked_to(p, device):
    keep = keep_mask(torch.tensor([7, 0], device=device), p, range(8), range(128), range(128), device)
    assert keep.dtype == torch.bool
    assert abs(keep.double().mean().item() - (1 - p)) < 5e-3  # 4 standard deviations of 2**17 draws
    if p in (0.0, 1.0):
        assert keep.all() == (p == 0.0)


def test_keep_mask_depends_on_seed_and_offset(device):
    masks = [
        keep_mask(torch.tensor(state, device=device), 0.5, range(2), range(16), range(16), device)
        for state in ([1, 0], [2, 0], [1, 1], [1 + 2**32, 0])
    ]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


def test_rng_state_is_never_read_on_the_host():
    """A meta tensor has no values: a kernel that asked for one would raise."""
    state = torch.empty(2, dtype=torch.int64, device="meta")
    assert keep_mask(state, 0.1, range(2), range(3), range(1, 7), "meta").shape == (2, 3, 6)
