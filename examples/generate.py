"""Generate text with a KV cache: contiguous, paged, and without one; all three must write the same.

A small GPT is trained for a moment on the Python standard library, then continues several prompts of different lengths
at once, each token being the likeliest one. Without a cache every step computes the whole of every text again. With one
(flash_attn_with_kvcache) the first step reads the prompts, and each later step computes one row of each text: it
appends the row's key and value to the cache, and attends to what is there. The paged cache holds each text on pages of
16 tokens, in no order, that a block table lists. How long the texts are is known to the device alone: a step is the
same work for the host every time, so on a CUDA machine it is also captured in a CUDA graph and replayed.

Run it with no arguments for half a minute on two CPU cores; on a CUDA machine it uses the GPU:

    python examples/generate.py

What is compared. The logits of the same mathematics, rounded in another order, differ a little, and so two right ways
may part where the best two logits are nearly equal. Therefore each text is scored again in float64, by PyTorch's MATH
attention without a cache, and by the same model in the dtype that is used. The logits behind every token must be off by
at most twice what PyTorch's own are: the bound. Tokens must be equal to those without a cache up to the end, or to a
place where the float64 logits of the two tokens lie within two bounds of each other. In float32 the bound is about
1e-5, and hardly anything is a tie.

The model is in gpt.py.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpt import GPT, causal_attention
from pack_documents import clock
from torch import Tensor, nn
from train_gpt import (
    ALPHABET,
    INDENT,
    Sizes,
    add_device_and_dtype,
    add_sizes,
    complete_dtype,
    complete_sizes,
    describe_machine,
    fit,
    load_corpus,
    math_attention,
    verdict,
)

from flash_attn_plus import flash_attn_with_kvcache

# option, meaning, default, default on CUDA
SIZES: Sizes = (
    ("steps", "training steps", 150, 150),
    ("batch", "prompts that are continued at once, and sequences of a training step", 8, 16),
    ("tokens", "characters to write behind each prompt; fewer than --seq", 96, 512),
    ("seq", "characters of the longest text, prompt included, and of a sequence in training", 192, 1024),
    ("layers", "transformer blocks", 2, 6),
    ("heads", "query heads", 4, 12),
    ("kv-heads", "key/value heads; divides --heads", 2, 4),
    ("dim", "model width; an even multiple of --heads", 128, 768),
    ("lr", "highest learning rate", 4e-3, 1e-3),
)
PAGE = 16  # tokens
# Logits may be off by this many times what PyTorch's own attention is off by in the same dtype: both are the same
# mathematics, rounded in another order. (The tests of flash-attn judge by the same factor.)
FACTOR = 2.0


@dataclass
class Cache:
    """The keys and values of one layer, and its attention: what a block calls in place of its own."""

    k: Tensor  # (batch, tokens, hk, d); paged (pages, PAGE, hk, d)
    v: Tensor
    block_table: Tensor | None  # int32 (batch, pages of a text)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor) -> Tensor:
        """q (rows, h, d), k and v (rows, hk, d): the next rows of each text, as many of each -> (rows, h, d).

        cache_seqlens: int32 (batch,), the rows that are in the cache already; on the device, and never read here.
        """
        q, k, v = (x.unflatten(0, (len(cache_seqlens), -1)) for x in (q, k, v))
        out = flash_attn_with_kvcache(
            q, self.k, self.v, k, v, cache_seqlens=cache_seqlens, block_table=self.block_table, causal=True
        )
        return out.flatten(0, 1)


def contiguous_caches(model: GPT, batch: int) -> list[Cache]:
    """One of each layer, with room for the model's context."""
    weight, config = model.embedding.weight, model.config
    shape = (batch, config.context, config.kv_heads, config.head_dim)
    return [Cache(weight.new_empty(shape), weight.new_empty(shape), None) for _ in range(config.layers)]


def paged_caches(model: GPT, batch: int) -> list[Cache]:
    """As many pages as the texts can need, dealt out in no order; the table is the same for every layer."""
    weight, config = model.embedding.weight, model.config
    each = -(-config.context // PAGE)
    order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0))
    block_table = order.int().view(batch, each).to(weight.device)
    shape = (batch * each, PAGE, config.kv_heads, config.head_dim)
    return [Cache(weight.new_empty(shape), weight.new_empty(shape), block_table) for _ in range(config.layers)]


class Texts:
    """Texts that grow side by side: text i holds lengths[i] tokens, at the left of its row. All on the device."""

    def __init__(self, prompts: list[Tensor], context: int, device: torch.device) -> None:
        self.prompts = [len(prompt) for prompt in prompts]
        self.rows = torch.arange(len(prompts), device=device)
        self.lengths = torch.tensor(self.prompts, device=device)
        self.tokens = torch.zeros(len(prompts), context, dtype=torch.int64, device=device)
        for row, prompt in zip(self.tokens, prompts, strict=True):
            row[: len(prompt)] = prompt.to(device)
        # At the place of each token that another was chosen behind, what that one was chosen by.
        self.logits = torch.zeros(len(prompts), context, len(ALPHABET), dtype=torch.float64, device=device)

    def extend(self, logits: Tensor) -> None:
        """Add the likeliest token to each text, in place; (batch, vocab)."""
        self.logits[self.rows, self.lengths - 1] = logits.double()
        self.tokens[self.rows, self.lengths] = logits.argmax(-1)
        self.lengths += 1

    def chosen_behind(self, tokens: int) -> Tensor:
        """(batch, context) bool: the places of the prompt's last token and of all written ones but the last."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        first = torch.tensor(self.prompts, device=self.tokens.device)[:, None] - 1
        return (places >= first) & (places < first + tokens)


def recompute(model: GPT, texts: Texts, longest: int) -> None:
    """A step without a cache: every row of every text. What lies behind a text's end is seen by no row of it."""
    logits = model(texts.tokens[:, :longest])
    texts.extend(logits[texts.rows, texts.lengths - 1])


def prefill(model: GPT, texts: Texts, longest: int) -> None:
    """The first step with a cache: the rows of all prompts. Those behind a prompt's end are overwritten later."""
    batch = len(texts.rows)
    positions = torch.arange(longest, device=texts.rows.device).repeat(batch)
    empty = torch.zeros(batch, dtype=torch.int32, device=texts.rows.device)
    logits = model(texts.tokens[:, :longest].flatten(), positions, empty).unflatten(0, (batch, -1))
    texts.extend(logits[texts.rows, texts.lengths - 1])


def decode(model: GPT, texts: Texts) -> None:
    """A later step: one row of each text. Nothing of it depends on what the host knows."""
    last = texts.lengths - 1
    texts.extend(model(texts.tokens[texts.rows, last], last, last.int()))


def capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The same work, replayed from a CUDA graph. It must have run before: kernels are compiled on their first call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        function()
    return graph.replay


def use(model: GPT, attention: list[Cache] | Callable[..., Tensor]) -> None:
    """Let every block call this attention, or its own cache of these."""
    for i, block in enumerate(model.blocks):
        block.attention.attention = attention[i] if isinstance(attention, list) else attention


@dataclass
class Way:
    """One way to generate, and what it leaves behind."""

    name: str
    caches: list[Cache] | None = None
    graph: bool = False
    texts: Texts | None = None
    first: float = 0.0  # seconds until every prompt has its first token
    speed: float = 0.0  # tokens/s behind the first one

    def run(self, model: GPT, prompts: list[Tensor], tokens: int) -> None:
        device = model.embedding.weight.device
        longest = max(map(len, prompts))
        texts = self.texts = Texts(prompts, model.config.context, device)
        use(model, self.caches or causal_attention)
        began = clock(device)
        (prefill if self.caches else recompute)(model, texts, longest)
        self.first = clock(device) - began

        def step() -> None:
            decode(model, texts)

        if self.graph:
            step = capture(step, device)
        began = clock(device)
        for i in range(1, tokens):
            if self.caches:
                step()
            else:
                recompute(model, texts, longest + i)
        self.speed = len(prompts) * (tokens - 1) / max(clock(device) - began, 1e-9)


def in_float64(model: GPT) -> GPT:
    """The same function: what RMSNorm adds by default depends on the dtype, and to float32 it is no rounding."""
    exact = copy.deepcopy(model).double()
    for norm in exact.modules():
        if isinstance(norm, nn.RMSNorm):
            norm.eps = torch.finfo(torch.float32).eps
    return exact


def scores(model: GPT, texts: Texts) -> Tensor:
    """(batch, context, vocab) float64: the logits behind every token by MATH attention. One text at a time: it holds
    matrices of (context, context)."""
    use(model, math_attention)
    return torch.cat([model(row[None]).double() for row in texts.tokens])


def largest(differences: Tensor) -> float:
    return differences.abs().max().item()  # NaN where there is one


def first_difference(one: Texts, other: Texts) -> list[tuple[int, int]]:
    """(text, place) of the first token that differs, of each text where one does."""
    differs = one.tokens != other.tokens
    return [(i, int(row.int().argmax())) for i, row in enumerate(differs) if row.any()]


def compare(ways: list[Way], model: GPT, tokens: int) -> tuple[list[str], float, list[tuple[float, int]]]:
    """What fails, in words; the bound; and of each way how far its logits are off, and how many tokens part."""
    exact = in_float64(model)
    reference = ways[0].texts
    chosen, right = reference.chosen_behind(tokens), scores(exact, reference)
    bound = FACTOR * largest((scores(model, reference) - right)[chosen])
    failed, found = [], []
    for way in ways:
        off = largest((way.texts.logits - scores(exact, way.texts))[chosen])
        found.append((off, int((way.texts.tokens != reference.tokens).sum())))
        if not off <= bound:
            failed.append(f"{way.name}: a logit is off by {off:.1e}, more than {bound:.1e}")
        for i, place in first_difference(reference, way.texts):
            # Both texts are the same before this place, and so are the logits that the two tokens were chosen by.
            pair = [int(texts.tokens[i, place]) for texts in (reference, way.texts)]
            gap = (right[i, place - 1, pair[0]] - right[i, place - 1, pair[1]]).item()
            if not abs(gap) <= 2 * bound:
                here = f"text {i}, token {place}: {ALPHABET[pair[1]]!r} instead of {ALPHABET[pair[0]]!r}"
                failed.append(f"{way.name}: {here}, whose logits are {gap:.1e} apart, no tie")
                break
    return failed, bound, found


def draw_prompts(validation: Tensor, batch: int, longest: int, seed: int) -> list[Tensor]:
    """Pieces of text that the model was not trained on, of ``longest`` characters down to an eighth of it."""
    lengths = torch.linspace(longest, max(1, longest // 8), batch).long().tolist()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(validation) - longest, (batch,), generator=generator).tolist()
    return [validation[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def show(texts: Texts, tokens: int, characters: int = 40) -> None:
    """The end of the shortest prompt, and what was written behind it."""
    row, end = texts.tokens[-1].tolist(), texts.prompts[-1]
    prompt, written = row[max(0, end - characters) : end], row[end : end + tokens][: 4 * characters]
    text = "".join(ALPHABET[i] for i in prompt) + "[...]" + "".join(ALPHABET[i] for i in written)
    print("\nshortest prompt [...] and how it goes on; the likeliest text of so small a model repeats itself")
    print("\n".join("  | " + line for line in text.replace("\t", INDENT).splitlines()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_and_dtype(parser, " on CUDA, and generates with weights in bfloat16")
    add_sizes(parser, SIZES, "on CUDA")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the weights and the prompts (default: 0)")
    args = parser.parse_args(argv)
    complete_sizes(parser, args, SIZES, args.device.type == "cuda")
    if not 2 <= args.tokens < args.seq:
        parser.error(f"--tokens: expected at least 2 and fewer than --seq {args.seq}, got {args.tokens}")
    complete_dtype(args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    dtype = str(args.dtype).removeprefix("torch.")
    corpus = load_corpus()
    prompts = draw_prompts(corpus.validation, args.batch, args.seq - args.tokens, args.seed)
    lengths = sorted(map(len, prompts))
    print(f"device   {args.device} ({describe_machine(args.device)}), {dtype}")
    print(f"prompts  {args.batch}, of {lengths[0]} to {lengths[-1]} characters; {args.tokens} behind each")
    training = copy.copy(args)
    if args.device.type == "cpu":
        training.dtype = torch.float32  # bfloat16 is slow on many CPUs, and it is not the training that is shown
    model = fit("training", causal_attention, corpus, training, args.steps).model.to(args.dtype)

    contiguous, paged = contiguous_caches(model, args.batch), paged_caches(model, args.batch)
    ways = [Way("without a cache"), Way("contiguous cache", contiguous), Way(f"pages of {PAGE}", paged)]
    if args.device.type == "cuda":
        ways += [Way(f"{way.name}, CUDA graph", way.caches, graph=True) for way in ways[1:]]
    with torch.no_grad():
        for way in ways:
            way.run(model, prompts, 2)  # kernels are compiled, or loaded, by their first call
            way.run(model, prompts, args.tokens)
        failed, bound, found = compare(ways, model, args.tokens)

    show(ways[0].texts, args.tokens)
    written = args.batch * args.tokens
    print(f"\nresult{'first tokens':>39s}{'then, tokens/s':>18s}{'':9s}{'equal tokens':>16s}{'logits off by':>16s}")
    for way, (off, parted) in zip(ways, found, strict=True):
        ratio = f"({way.speed / ways[0].speed:.1f} x)" if way.caches else ""
        print(
            f"  {way.name:30s}{way.first * 1e3:10.1f} ms{way.speed:18,.0f} {ratio:8s}"
            f"{f'{written - parted} of {written}':>16s}{off:16.1e}"
        )
    print(f"  the bound: {FACTOR:g} x what PyTorch's MATH attention is off by in {dtype}: {bound:.1e}")
    ties = ", but for ties" if any(parted for _, parted in found) else ""
    return verdict(failed, f"with a cache and without, the same tokens{ties}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
