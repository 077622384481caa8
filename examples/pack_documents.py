"""Train on documents of different lengths twice: packed without padding, and padded to the longest of each batch.

The documents are the functions, methods and classes of the Python standard library, cut at the context's length.
Packed, they lie one behind the other, and flash_attn_varlen_func keeps each to itself; padded, they are the rows of a
rectangle, where flash_attn_func computes on padding too: with causal attention nothing real sees what lies behind it,
and the loss leaves it out. Positions start at 0 in every document. Two models start from the same weights, take every
step on the same documents, and must have the same loss on each document; then the speeds are compared, in tokens that
are no padding. Run it with no arguments for ten seconds on a CPU; on a CUDA machine it uses the GPU:

    python examples/pack_documents.py

The model is in gpt.py.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT, Config, causal_attention, packed_attention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from train_gpt import (
    ALPHABET,
    Sizes,
    add_device_and_dtype,
    add_sizes,
    after_warm_up,
    complete_dtype,
    complete_sizes,
    describe_machine,
    encode,
    library_sources,
    verdict,
)

# On |packed loss - padded loss| of every document in the compared steps, in nats. The mathematics is the same, but sums
# run in another order, and from step to step training amplifies how they are rounded. bfloat16: logits between 1 and 2
# lie eps = 2**-7 = 7.8e-3 apart, so a loss may be off by one such rounding. float32: sums over hundreds of terms round
# more than the logits do; 1e-5 is 84 eps. Ten steps on a CPU differ by 6e-4 and 7e-7. Where each document sees just the
# last character of the one before it, they differ by 2.5e-2.
TOLERANCE = {torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float32: 1e-5}
COMPARED_STEPS = 10
LEARNING_RATE = 1e-3

# option, meaning, default, default on CUDA: a model that keeps an H100 busy
SIZES: Sizes = (
    ("steps", "training steps", 10, 40),
    ("documents", "documents per step", 8, 64),
    ("context", "characters that are kept of a document", 512, 2048),
    ("layers", "transformer blocks", 2, 6),
    ("heads", "query heads", 4, 12),
    ("kv-heads", "key/value heads; divides --heads", 2, 4),
    ("dim", "model width; an even multiple of --heads", 128, 768),
)
NO_TARGET = -100  # of padding: F.cross_entropy gives it loss 0 and no gradient


@dataclass
class Batch:
    """Some documents in one of the two layouts: n rows altogether, padding included, on the device."""

    inputs: tuple[Any, ...]  # what the model takes
    targets: Tensor  # (n,) the next character, or NO_TARGET
    document: Tensor  # (n,) the number of the document that the row is of
    lengths: Tensor  # (documents,) float32


@dataclass
class Training:
    """One of the two models, and what its training leaves behind."""

    model: GPT
    optimizer: torch.optim.Optimizer
    losses: list[Tensor] = field(default_factory=list)  # of each step: (documents,), on the device
    speeds: list[float] = field(default_factory=list)  # of each step: tokens/s, padding not counted
    waits: list[str] = field(default_factory=list)  # what made the host wait for the GPU


def load_documents(context: int) -> list[Tensor]:
    """Each (characters,) int64, at least two of them: the first is only input, the last only target."""
    parts = (part for text in library_sources() for part in re.split(r"\n(?=\t?(?:def|class) )", text))
    documents = (encode(part)[: context + 1] for part in parts)
    return [document for document in documents if len(document) > 1]


def pack(documents: list[Tensor], device: torch.device) -> Batch:
    """One behind the other. All lengths are known here, on the host: nothing later has to ask the device for one."""
    lengths = torch.tensor([len(document) - 1 for document in documents])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens = torch.cat([document[:-1] for document in documents])
    positions = torch.cat([torch.arange(len(document) - 1) for document in documents])
    tensors = (tokens, positions, cu_seqlens)
    inputs = (*(x.to(device) for x in tensors), int(lengths.max()))
    targets = torch.cat([document[1:] for document in documents])
    document = torch.arange(len(documents)).repeat_interleave(lengths)
    return Batch(inputs, targets.to(device), document.to(device), lengths.float().to(device))


def pad(documents: list[Tensor], device: torch.device) -> Batch:
    """One row of a rectangle each; what lies behind a document is character 0, and has no target."""
    lengths = torch.tensor([len(document) - 1 for document in documents])
    tokens = pad_sequence([document[:-1] for document in documents], batch_first=True)
    targets = pad_sequence([document[1:] for document in documents], batch_first=True, padding_value=NO_TARGET)
    document = torch.arange(len(documents)).repeat_interleave(tokens.shape[1])
    inputs = (tokens.to(device),)
    return Batch(inputs, targets.flatten().to(device), document.to(device), lengths.float().to(device))


def document_losses(model: GPT, batch: Batch, dtype: torch.dtype) -> Tensor:
    """(documents,): the mean loss of each document's characters, in nats."""
    with torch.autocast(batch.targets.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(*batch.inputs)
    logits = logits.flatten(0, -2).float()  # (n, vocab)
    losses = F.cross_entropy(logits, batch.targets, ignore_index=NO_TARGET, reduction="none")
    return torch.zeros_like(batch.lengths).index_add(0, batch.document, losses) / batch.lengths


def begin(args: argparse.Namespace, attention: Callable[..., Tensor]) -> Training:
    torch.manual_seed(args.seed)
    config = Config(len(ALPHABET), args.context, args.layers, args.heads, args.kv_heads, args.dim)
    model = GPT(config, attention).to(args.device)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99)))


@contextmanager
def noting_waits(device: torch.device, waits: list[str]) -> Iterator[None]:
    """Note every operation in which PyTorch makes the host wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits += [f"{x.filename}:{x.lineno}" for x in told if "synchronizing CUDA operation" in str(x.message)]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def step(training: Training, batch: Batch, dtype: torch.dtype, tokens: int) -> None:
    device = batch.targets.device
    began = clock(device)
    with noting_waits(device, training.waits):
        losses = document_losses(training.model, batch, dtype)
        loss = (losses * batch.lengths).sum() / tokens  # every character counts the same, as in one long text
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.losses.append(losses.detach())
    training.speeds.append(tokens / (clock(device) - began))


def differences(packed: Training, padded: Training) -> list[float]:
    """Of each compared step: the largest difference of a document's losses."""
    pairs = zip(packed.losses[:COMPARED_STEPS], padded.losses, strict=False)
    return torch.stack([(a - b).abs().max() for a, b in pairs]).tolist()


def failures(packed: Training, padded: Training, dtype: torch.dtype) -> list[str]:
    """Every criterion that does not hold, in words. A loss that is not a number fails."""
    failed = []
    for number, difference in enumerate(differences(packed, padded), 1):
        if not difference <= TOLERANCE[dtype]:
            bar = f"more than {TOLERANCE[dtype]:.1e}"
            failed.append(f"step {number}: the losses of a document differ by {difference:.1e}, {bar}")
            break  # the steps behind it differ because this one does
    if packed.waits:
        places = ", ".join(sorted(set(packed.waits)))
        failed.append(f"packed steps made the host wait for the GPU {len(packed.waits)} times: {places}")
    return failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_device_and_dtype(parser, "")
    add_sizes(parser, SIZES, "on CUDA")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the weights and the order of documents")
    args = parser.parse_args(argv)
    complete_sizes(parser, args, SIZES, args.device.type == "cuda")
    complete_dtype(args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    documents = load_documents(args.context)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(args.seed)).tolist()
    lengths = torch.tensor([len(document) - 1.0 for document in documents])
    print(
        f"documents  {len(documents)}, of {lengths.min():.0f} to {lengths.max():.0f} characters, "
        f"{lengths.mean():.0f} on average; {args.documents} per step"
    )
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"device     {args.device} ({describe_machine(args.device)}), {dtype}, {args.steps} steps")

    packed, padded = begin(args, packed_attention), begin(args, causal_attention)
    real = rows = 0
    for i in range(args.steps):
        places = range(i * args.documents, (i + 1) * args.documents)
        chosen = [documents[order[place % len(order)]] for place in places]
        batches = pack(chosen, args.device), pad(chosen, args.device)
        tokens = sum(len(document) - 1 for document in chosen)
        # In turn, so that both meet the same clocks and the same neighbours on this machine.
        for training, batch in zip((packed, padded), batches, strict=True):
            step(training, batch, args.dtype, tokens)
        real += tokens
        rows += len(batches[1].targets)

    speeds = [statistics.median(after_warm_up(training.speeds)) for training in (packed, padded)]
    found = torch.tensor(differences(packed, padded))
    table = [
        ("padding", f"{1 - real / rows:.0%} of the padded rows; none packed"),
        ("mean loss, first and last step", f"{packed.losses[0].mean():.3f}, {packed.losses[-1].mean():.3f}"),
        ("largest difference", f"{found.max():.1e} nats of a document's loss (first {len(found)} steps)"),
        ("tolerance", f"{TOLERANCE[args.dtype]:.1e} ({dtype})"),
        ("packed", f"{speeds[0]:,.0f} tokens/s ({speeds[0] / speeds[1]:.2f} x padded)"),
        ("padded", f"{speeds[1]:,.0f} tokens/s, padding not counted"),
    ]
    if args.device.type == "cuda":
        table.append(("host waits in packed steps", str(len(packed.waits))))
    print("\nresult")
    for name, value in table:
        print(f"  {name:32s} {value}")
    return verdict(failures(packed, padded, args.dtype), "packed and padded documents have the same losses")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
