"""Train a small character-level GPT on the Python standard library, with attention from flash_attn_plus.

The same model, weights and batches are also trained on PyTorch's own attention, restricted to its MATH backend, and
the two are compared: gradients of the first step, then the loss of every step. Run it with no arguments for about
three minutes on two CPU cores; on a CUDA machine it uses the GPU. The model is in gpt.py.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import math
import os
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from gpt import GPT, Config, causal_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

INDENT = " " * 4  # one tab in the training text: a level of indentation is one character to learn, not four
ALPHABET = "\n\t" + "".join(map(chr, range(32, 127)))
PROMPT = "class Reader:\n\tdef __init__(self, file):\n\t\tself.file = file\n\n\tdef "

COMPARED_STEPS = 100
# Both are for float32. In bfloat16 two correct attentions round 65,536 times more coarsely, training amplifies that,
# and the comparison is printed without a verdict.
LOSS_TOLERANCE = 1e-3  # on |loss - reference loss| at every compared step
# On |gradient - reference| / |reference| of each weight at the first step. The losses alone are blind to factors, which
# AdamW divides out again: with dq 2 % too large they differ by 1e-4, the gradients of the query weights by 2e-2.
GRADIENT_TOLERANCE = 1e-4
LEARNED = 0.6  # mean loss of the last 50 steps / mean loss of the first ten


@dataclass
class Corpus:
    train: Tensor  # (characters,) int64 indices into ALPHABET
    validation: Tensor
    files: int


@dataclass
class Run:
    """What one training leaves behind."""

    model: GPT
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_gradients: list[Tensor] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # step -> loss

    def tokens_per_second(self, tokens: int) -> float:
        """Of the median step: the first one compiles, and others may be disturbed."""
        return tokens / statistics.median(self.seconds)


def load_corpus() -> Corpus:
    """The standard library's top-level modules in alphabetical order; every tenth file is for validation."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore").replace(INDENT, "\t") for path in paths]
    index = torch.full((128,), -1)
    index[list(ALPHABET.encode())] = torch.arange(len(ALPHABET))

    def encode(texts: list[str]) -> Tensor:
        characters = index[torch.frombuffer(bytearray("".join(texts), "ascii", "ignore"), dtype=torch.uint8).long()]
        return characters[characters >= 0]

    validation = texts[9::10]
    del texts[9::10]
    return Corpus(encode(texts), encode(validation), len(paths))


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: the textbook formula in PyTorch, with the full (s, s) matrix of scores."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile needs on this machine and does not find."""
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if not shutil.which(compiler.split()[0]):
        return f"no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python headers (Python.h)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no Triton"
    return None


class CountingBackend:
    """A backend of torch.compile, noting how many flash_attn_plus.fwd nodes each graph holds."""

    def __init__(self, name: str = "inductor") -> None:
        self.compile = torch._dynamo.lookup_backend(name)
        self.nodes: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.nodes.append(sum(str(node.target) == "flash_attn_plus.fwd.default" for node in graph.graph.nodes))
        return self.compile(graph, inputs)


class Progress:
    """One line that updates itself on a terminal; a line every 50 steps elsewhere."""

    def __init__(self, title: str, steps: int):
        self.title, self.steps, self.start = title, steps, time.perf_counter()
        self.terminal = sys.stdout.isatty()

    def show(self, step: int, text: str) -> None:
        left = (time.perf_counter() - self.start) / step * (self.steps - step)
        if self.terminal:
            done = 24 * step // self.steps
            bar = "#" * done + "-" * (24 - done)
            line = f"  {self.title} {bar} {step}/{self.steps}  {text}  {left:3.0f} s left"
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
        elif step % 50 == 0 or step in (1, self.steps):
            print(f"  {self.title}  step {step:4d}/{self.steps}  {text}", flush=True)

    def close(self) -> None:
        if self.terminal:
            print(flush=True)


def fit(
    title: str,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    corpus: Corpus,
    args: argparse.Namespace,
    steps: int,
    backend: Callable | None = None,
) -> Run:
    """Train the model for ``steps`` of the ``args.steps`` of its schedule; compile its blocks with ``backend``."""
    torch.manual_seed(args.seed)
    config = Config(len(ALPHABET), args.seq, args.layers, args.heads, args.kv_heads, args.dim)
    model = GPT(config, attention).to(args.device)
    if backend is not None:
        # The blocks are alike, so that compiling one compiles all of them, in a fraction of the whole model's time.
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))
    batches = torch.Generator().manual_seed(args.seed)
    windows = torch.arange(args.seq + 1)

    def loss_of(rows: Tensor) -> Tensor:
        rows = rows.to(args.device)
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
            logits = model(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    run, progress = Run(model), Progress(title, steps)
    for step in range(steps):
        began = time.perf_counter()
        warm_up, cosine = (step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(warm_up, 0.05 + 0.95 * cosine)
        starts = torch.randint(len(corpus.train) - args.seq, (args.batch, 1), generator=batches)
        loss = loss_of(corpus.train[starts + windows])
        loss.backward()
        if step == 0:
            run.first_gradients = [weight.grad.clone() for weight in model.parameters()]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - began)
        speed = run.tokens_per_second(args.batch * args.seq)
        progress.show(step + 1, f"loss {run.losses[-1]:.3f}  {speed:7,.0f} tokens/s")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            starts = torch.linspace(0, len(corpus.validation) - args.seq - 1, 16).long()[:, None]
            # Another shape and no gradient: not worth a compilation of its own.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                run.validation[step + 1] = loss_of(corpus.validation[starts + windows]).item()
    progress.close()
    return run


def sample(model: GPT, args: argparse.Namespace, temperature: float = 0.7) -> str:
    """Continue PROMPT, one character after the other."""
    generator = torch.Generator().manual_seed(args.seed)
    text = PROMPT
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(args.sample):
            tokens = torch.tensor([[ALPHABET.index(character) for character in text[-args.seq :]]])
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
                logits = model(tokens.to(args.device))[0, -1].float().cpu()
            text += ALPHABET[int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))]
    return text.replace("\t", INDENT)


def largest_differences(ours: Run, reference: Run) -> tuple[float, float]:
    """Over the compared steps: of the losses (absolute), and of the first step's gradients (relative, per weight)."""
    losses = [abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=False)]
    pairs = zip(ours.first_gradients, reference.first_gradients, strict=True)
    gradients = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return torch.tensor(losses).max().item(), torch.tensor(gradients).max().item()  # unlike max(), these keep a NaN


def first_and_last(run: Run) -> tuple[float, float]:
    return statistics.fmean(run.losses[:10]), statistics.fmean(run.losses[-50:])


def failures(ours: Run, reference: Run, dtype: torch.dtype) -> list[str]:
    """Every criterion that does not hold, in words. A loss that is not a number fails."""
    loss, gradient = largest_differences(ours, reference)
    first, last = first_and_last(ours)
    failed = []
    if dtype == torch.float32 and not gradient <= GRADIENT_TOLERANCE:
        failed.append(f"a gradient differs by {gradient:.1e} of the reference's, more than {GRADIENT_TOLERANCE:g}")
    if dtype == torch.float32 and not loss <= LOSS_TOLERANCE:
        failed.append(f"the losses differ by up to {loss:.1e}, more than {LOSS_TOLERANCE:g}")
    if not last <= LEARNED * first:
        failed.append(f"too little was learned: last 50 losses {last:.3f}, more than {LEARNED} x first ten {first:.3f}")
    return failed


def losses_csv(ours: Run, reference: Run) -> bytes:
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["step", "loss", "reference_loss", "validation_loss"])
    for i, loss in enumerate(ours.losses):
        other = repr(reference.losses[i]) if i < len(reference.losses) else ""
        rows.writerow([i + 1, repr(loss), other, ours.validation.get(i + 1, "")])
    return text.getvalue().encode()


def losses_png(ours: Run, reference: Run) -> bytes | None:
    """The curves as a picture; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # not pyplot: no display is asked for

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
    top.plot(range(1, len(ours.losses) + 1), ours.losses, color="tab:blue", lw=1, label="flash_attn_plus")
    top.plot(range(1, len(reference.losses) + 1), reference.losses, "k--", lw=1, label="PyTorch MATH")
    top.plot(*zip(*ours.validation.items(), strict=True), "o-", color="tab:orange", ms=4, label="validation")
    top.set(title="character-level GPT on the Python standard library", ylabel="loss (nats per character)")
    top.legend()
    differences = [abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=False)]
    bottom.semilogy(range(1, len(differences) + 1), [max(x, 1e-8) for x in differences], color="tab:blue", lw=1)
    bottom.axhline(LOSS_TOLERANCE, color="tab:red", lw=1, ls=":", label="tolerance (float32)")
    bottom.set(xlabel="step", ylabel="|difference|")
    bottom.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def write_all(folder: Path, contents: dict[str, bytes]) -> None:
    """Write every file aside, then rename: an interrupt leaves the old file or the new one, never a part."""
    aside = {folder / name: folder / f".{name}.{os.getpid()}" for name in contents}
    try:
        for path, temporary in aside.items():
            temporary.write_bytes(contents[path.name])
        for path, temporary in aside.items():
            temporary.replace(path)
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cuda = torch.cuda.is_available()
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu", help="where to train")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=argparse.SUPPRESS,
        help="bfloat16 trains under autocast and is not held against the reference "
        "(default: bfloat16 on CUDA, float32 elsewhere)",
    )
    parser.add_argument("--steps", **whole, default=400, help="training steps")
    parser.add_argument("--batch", **whole, default=8, help="sequences per step")
    parser.add_argument("--seq", **whole, default=256, help="characters per sequence")
    parser.add_argument("--layers", **whole, default=4, help="transformer blocks")
    parser.add_argument("--heads", **whole, default=4, help="query heads")
    parser.add_argument("--kv-heads", **whole, default=2, help="key/value heads; divides --heads")
    parser.add_argument("--dim", **whole, default=192, help="model width; an even multiple of --heads")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--sample", **whole, default=500, help="characters of text to write at the end")
    parser.add_argument("--seed", **whole, default=0, help="of the weights, the batches and the sample")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use torch.compile where a compiler is found",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="exit with 1 if the reference is not matched or too little is learned",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the results")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "seq", "layers", "heads", "kv_heads", "dim", "sample"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads: expected a divisor of --heads {args.heads}, got {args.kv_heads}")
    if args.dim % (2 * args.heads):
        parser.error(f"--dim: expected a multiple of 2 x --heads {args.heads}, got {args.dim}")
    default = "bfloat16" if args.device.type == "cuda" else "float32"
    args.dtype = getattr(torch, getattr(args, "dtype", default))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, not after three minutes: the path may be wrong
    corpus = load_corpus()
    missing = missing_for_compile(args.device)
    backend = CountingBackend() if args.compile and missing is None else None
    mode = "torch.compile" if backend else f"eager, {missing}" if args.compile else "eager"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name(args.device)
    else:
        machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    config = Config(len(ALPHABET), args.seq, args.layers, args.heads, args.kv_heads, args.dim)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in GPT(config).parameters())
    print(
        f"model   {weights / 1e6:.2f} M weights: {args.layers} layers, width {args.dim}, "
        f"{args.heads} query heads on {args.kv_heads} key/value heads of {config.head_dim}"
    )
    print(
        f"data    {corpus.files} modules of Python {sysconfig.get_python_version()}: {len(corpus.train):,} "
        f"characters to train on, {len(corpus.validation):,} to validate"
    )
    print(f"batch   {args.batch} sequences of {args.seq} characters")
    print(f"device  {args.device} ({machine}), {str(args.dtype).removeprefix('torch.')}, {mode}")
    compared = min(COMPARED_STEPS, args.steps)
    print(f"\n1/2 reference: PyTorch's MATH attention, eager, {compared} steps")
    reference = fit("PyTorch MATH   ", math_attention, corpus, args, compared)
    print(f"2/2 flash_attn_plus: the same weights and batches, {args.steps} steps")
    ours = fit("flash_attn_plus", causal_attention, corpus, args, args.steps, backend)
    text = sample(ours.model, args)

    contents = {"train_gpt.csv": losses_csv(ours, reference), "train_gpt.txt": (text + "\n").encode()}
    png = losses_png(ours, reference)
    if png is not None:
        contents["train_gpt.png"] = png
    write_all(args.out, contents)

    print("\nsample\n" + "\n".join("  | " + line for line in text.splitlines()))
    loss, gradient = largest_differences(ours, reference)
    first, last = first_and_last(ours)
    tokens = args.batch * args.seq
    rows = [
        ("loss, first 10 steps", f"{first:.3f}"),
        ("loss, last 50 steps", f"{last:.3f} ({last / first:.2f} x)"),
        ("validation loss", f"{ours.validation[args.steps]:.3f}"),
        ("largest gradient difference", f"{gradient:.1e} (relative, first step)"),
        ("largest loss difference", f"{loss:.1e} (first {compared} steps)"),
        ("flash_attn_plus", f"{ours.tokens_per_second(tokens):,.0f} tokens/s ({mode})"),
        ("PyTorch MATH", f"{reference.tokens_per_second(tokens):,.0f} tokens/s (eager)"),
        ("written", ", ".join(str(args.out / name) for name in contents)),
    ]
    if backend:
        nodes = ", ".join(map(str, backend.nodes))
        text = f"{len(backend.nodes)} for all {args.layers} layers, with this many flash_attn_plus.fwd nodes: {nodes}"
        rows.insert(5, ("compiled graphs", text))
    print("\nresult")
    for name, value in rows:
        print(f"  {name:28s} {value}")
    if png is None:
        print("  matplotlib is not installed: no picture of the losses")
    if not args.check:
        return 0
    failed = failures(ours, reference, args.dtype)
    if not failed:
        verdict = "matches the reference" if args.dtype == torch.float32 else "is not judged in bfloat16"
        print(f"passed: the model has learned; its attention {verdict}")
    sys.stdout.flush()
    for reason in failed:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
