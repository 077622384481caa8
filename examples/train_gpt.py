"""Train a small character-level GPT on the Python standard library, with attention from flash_attn_plus.

The same model, weights and batches are also trained on PyTorch's own attention, restricted to its MATH backend, and
the two are compared: gradients of the first step, then the loss of every step. Run it with no arguments for about
three minutes on two CPU cores; on a CUDA machine it uses the GPU. The model is in gpt.py.

With --attention the whole training is compared instead: one after the other, the implementations that it names train
the same model from the same weights on the same batches, and must end at the same loss. In bfloat16 two right
attentions part ways after some fifty steps, as training amplifies how they round; so each trains from several seeds,
and their means are compared. On a CUDA machine this is 500 steps in bfloat16 from four seeds:

    python examples/train_gpt.py --attention ours,flash,cudnn
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
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpt import GPT, Config, causal_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_plus import explain

INDENT = " " * 4  # one tab in the training text: a level of indentation is one character to learn, not four
ALPHABET = "\n\t" + "".join(map(chr, range(32, 127)))
INDEX = torch.tensor([ALPHABET.find(chr(code)) for code in range(128)])  # ASCII code -> place in ALPHABET, or -1
PROMPT = "class Reader:\n\tdef __init__(self, file):\n\t\tself.file = file\n\n\tdef "

COMPARED_STEPS = 100
# Both are for float32. In bfloat16 two correct attentions round 65,536 times more coarsely, training amplifies that,
# and the comparison is printed without a verdict.
LOSS_TOLERANCE = 1e-3  # on |loss - reference loss| at every compared step
# On |gradient - reference| / |reference| of each weight at the first step. The losses alone are blind to factors, which
# AdamW divides out again: with dq 2 % too large they differ by 1e-4, the gradients of the query weights by 2e-2.
GRADIENT_TOLERANCE = 1e-4
LEARNED = 0.6  # mean loss of the last 50 steps / mean loss of the first ten
# On |loss / our loss - 1|, means of the last 50 steps of all seeds, in any dtype: what --attention judges. In bfloat16
# single steps differ by more, and so do single seeds.
LATE_LOSS_TOLERANCE = 0.005
WARM_UP = 10  # steps that no speed is taken from: the first one compiles, the next ones still allocate

Sizes = tuple[tuple[str, str, float, float], ...]
# option, meaning, default, default of --attention on CUDA
SIZES: Sizes = (
    ("steps", "training steps", 400, 500),
    ("batch", "sequences per step", 8, 32),
    ("seq", "characters per sequence", 256, 1024),
    ("layers", "transformer blocks", 4, 6),
    ("heads", "query heads", 4, 12),
    ("kv-heads", "key/value heads; divides --heads", 2, 12),
    ("dim", "model width; an even multiple of --heads", 192, 768),
    ("lr", "highest learning rate", 2e-3, 1e-3),
    ("seeds", "trainings of each implementation of --attention, whose losses are averaged", 1, 4),
)


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
    last: list[float] = field(default_factory=list)  # of each seed: the mean loss of the last 50 steps

    @classmethod
    def mean(cls, runs: list[Run]) -> Run:
        """Of several seeds: every step's mean loss and median time. Gradients and model are the first one's."""
        losses = [statistics.fmean(step) for step in zip(*(run.losses for run in runs), strict=True)]
        seconds = [statistics.median(step) for step in zip(*(run.seconds for run in runs), strict=True)]
        last = [statistics.fmean(run.losses[-50:]) for run in runs]
        return cls(runs[0].model, losses, seconds, runs[0].first_gradients, {}, last)

    def tokens_per_second(self, tokens: int) -> float:
        """Of the median step after the warm-up."""
        return tokens / statistics.median(after_warm_up(self.seconds))


def after_warm_up(steps: list) -> list:
    return steps[min(WARM_UP, len(steps) // 2) :]


def library_sources() -> list[str]:
    """The standard library's top-level modules in alphabetical order."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return [path.read_text(encoding="utf-8", errors="ignore").replace(INDENT, "\t") for path in paths]


def encode(text: str) -> Tensor:
    """(characters,) int64 indices into ALPHABET; other characters are left out."""
    content = bytearray(text, "ascii", "ignore")
    if not content:  # frombuffer refuses it
        return torch.empty(0, dtype=torch.int64)
    characters = INDEX[torch.frombuffer(content, dtype=torch.uint8).long()]
    return characters[characters >= 0]


def load_corpus() -> Corpus:
    """Every tenth of the modules is for validation."""
    texts = library_sources()
    training = [text for i, text in enumerate(texts) if i % 10 != 9]
    return Corpus(encode("".join(training)), encode("".join(texts[9::10])), len(texts))


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's attention restricted to one backend, which raises where it cannot run: it never takes another."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attention


math_attention = sdpa(SDPBackend.MATH)  # the reference: the textbook formula, with the full (s, s) matrix of scores

# --attention's names: the name in results, and what it is
IMPLEMENTATIONS = {
    "ours": ("flash_attn_plus", causal_attention),
    "flash": ("PyTorch FLASH_ATTENTION", sdpa(SDPBackend.FLASH_ATTENTION)),
    "cudnn": ("PyTorch CUDNN_ATTENTION", sdpa(SDPBackend.CUDNN_ATTENTION)),
    "math": ("PyTorch MATH", math_attention),
}
NAMES = "ours and any of flash, cudnn, math, separated by commas"


def example_inputs(args: argparse.Namespace) -> list[Tensor]:
    """q, k and v of one sequence, as the model passes them to its attention."""
    shapes = [(1, args.seq, heads, args.dim // args.heads) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    return [torch.zeros(shape, dtype=args.dtype, device=args.device, requires_grad=True) for shape in shapes]


def why_absent(attention: Callable[[Tensor, Tensor, Tensor], Tensor], args: argparse.Namespace) -> str | None:
    """Why PyTorch has no such backend for this model on this device, in its own words; None where it has one."""
    with warnings.catch_warnings(record=True) as told:  # on CUDA the reasons come as warnings, before the error
        warnings.simplefilter("always")
        try:
            attention(*example_inputs(args)).sum().backward()
        except RuntimeError as error:
            sentences = [*(str(warning.message) for warning in told), str(error)]
            return " ".join(sentence.partition("\n")[0].split(" (Triggered internally")[0] for sentence in sentences)
    return None


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
    seed: int | None = None,
) -> Run:
    """Train the model for ``steps`` of the ``args.steps`` of its schedule; compile its blocks with ``backend``."""
    seed = args.seed if seed is None else seed
    torch.manual_seed(seed)
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
    batches = torch.Generator().manual_seed(seed)
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
        run.losses.append(loss.item())  # waits for all that was queued before: the clocks are read on an idle device
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


def too_little_learned(run: Run) -> list[str]:
    first, last = first_and_last(run)
    if last <= LEARNED * first:
        return []
    return [f"too little was learned: last 50 losses {last:.3f}, more than {LEARNED} x first ten {first:.3f}"]


def failures(ours: Run, reference: Run, dtype: torch.dtype) -> list[str]:
    """Every criterion that does not hold, in words. A loss that is not a number fails."""
    loss, gradient = largest_differences(ours, reference)
    failed = []
    if dtype == torch.float32 and not gradient <= GRADIENT_TOLERANCE:
        failed.append(f"a gradient differs by {gradient:.1e} of the reference's, more than {GRADIENT_TOLERANCE:g}")
    if dtype == torch.float32 and not loss <= LOSS_TOLERANCE:
        failed.append(f"the losses differ by up to {loss:.1e}, more than {LOSS_TOLERANCE:g}")
    return failed + too_little_learned(ours)


def late_difference(ours: Run, other: Run) -> float:
    """Of the mean loss of the last 50 steps, relative to ours."""
    return first_and_last(other)[1] / first_and_last(ours)[1] - 1


def unequal(runs: dict[str, Run], dtype: torch.dtype) -> list[str]:
    """What --attention judges, as :func:`failures`. A model that does not learn has equal losses with any attention."""
    ours, failed = runs["ours"], []
    for name, run in runs.items():
        title, difference = IMPLEMENTATIONS[name][0], late_difference(ours, run)
        if not abs(difference) <= LATE_LOSS_TOLERANCE:
            bar = f"more than {LATE_LOSS_TOLERANCE:.1%}"
            failed.append(f"{title}: the mean loss of the last 50 steps differs by {difference:+.2%}, {bar}")
        gradient = largest_differences(ours, run)[1]
        if dtype == torch.float32 and not gradient <= GRADIENT_TOLERANCE:
            failed.append(f"{title}: a gradient differs by {gradient:.1e}, more than {GRADIENT_TOLERANCE:g}")
    if len(runs) == 1:
        failed.append("there was nothing to compare with")
    return failed + too_little_learned(ours)


def as_csv(rows: list[list]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def losses_csv(ours: Run, reference: Run) -> bytes:
    rows: list[list] = [["step", "loss", "reference_loss", "validation_loss"]]
    for i, loss in enumerate(ours.losses):
        other = repr(reference.losses[i]) if i < len(reference.losses) else ""
        rows.append([i + 1, repr(loss), other, ours.validation.get(i + 1, "")])
    return as_csv(rows)


def curves_csv(runs: dict[str, Run]) -> bytes:
    losses = zip(*(run.losses for run in runs.values()), strict=True)
    return as_csv([["step", *runs], *([i, *map(repr, row)] for i, row in enumerate(losses, 1))])


def summary_csv(runs: dict[str, Run], tokens: int) -> bytes:
    """One row for each implementation; ``tokens`` are those of a step."""
    names = ["loss_last_50_steps", "relative_difference", "first_gradient_difference", "tokens_per_second"]
    names.append("loss_last_50_steps_of_each_seed")
    rows = [["implementation", *names]]
    for name, run in runs.items():
        of_ours = late_difference(runs["ours"], run), largest_differences(runs["ours"], run)[1]
        figures = (first_and_last(run)[1], *of_ours, run.tokens_per_second(tokens))
        rows.append([name, *map(repr, figures), " ".join(map(repr, run.last))])
    return as_csv(rows)


def two_axes() -> tuple[Any, Any, Any] | None:
    """A figure with a large and a small part below it; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # not pyplot: no display is asked for

    figure = Figure(figsize=(8, 6), layout="constrained")
    return figure, *figure.subplots(2, 1, height_ratios=(3, 1))


def as_png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def losses_png(ours: Run, reference: Run) -> bytes | None:
    """The curves as a picture; None where matplotlib is not installed."""
    axes = two_axes()
    if axes is None:
        return None
    figure, top, bottom = axes
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
    return as_png(figure)


def curves_png(runs: dict[str, Run], title: str) -> bytes | None:
    """All losses, and the differences of their means of 50 steps to ours; None where matplotlib is not installed."""
    axes = two_axes()
    if axes is None:
        return None
    figure, top, bottom = axes

    def means(run: Run) -> Tensor:
        return torch.tensor(run.losses).unfold(0, min(50, len(run.losses)), 1).mean(1)

    for i, (name, run) in enumerate(runs.items()):
        # Curves that lie on each other: ours below, the others dashed over it, each with its dashes in another place.
        style = {"color": f"C{i}", "lw": 1, "ls": "-" if name == "ours" else (2 * i, (4, 4))}
        top.plot(range(1, len(run.losses) + 1), run.losses, label=IMPLEMENTATIONS[name][0], **style)
        if name != "ours":
            difference = 100 * (means(run) / means(runs["ours"]) - 1)
            steps = range(len(run.losses) - len(difference) + 1, len(run.losses) + 1)
            bottom.plot(steps, difference.tolist(), color=f"C{i}", lw=1)
    top.set(title=title, ylabel="loss (nats per character)")
    top.legend()
    for bar in (-100 * LATE_LOSS_TOLERANCE, 100 * LATE_LOSS_TOLERANCE):
        bottom.axhline(bar, color="tab:red", lw=1, ls=":")
    bottom.set(xlabel="step", ylabel="mean of 50 steps\n- ours, %", xlim=top.get_xlim())
    return as_png(figure)


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


def add_sizes(parser: argparse.ArgumentParser, sizes: Sizes, large_when: str) -> None:
    for option, meaning, small, large in sizes:
        parser.add_argument(
            f"--{option}",
            type=type(small),
            metavar="X" if isinstance(small, float) else "N",
            default=argparse.SUPPRESS,
            help=f"{meaning} (default: {small}, or {large} {large_when})",
        )


def complete_sizes(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: Sizes, large: bool) -> None:
    """Fill in the sizes that were not given, and refuse those that make no model."""
    for option, _, *defaults in sizes:
        name = option.replace("-", "_")
        vars(args).setdefault(name, defaults[large])
        if isinstance(defaults[0], int) and getattr(args, name) < 1:
            parser.error(f"--{option}: expected at least 1, got {getattr(args, name)}")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads: expected a divisor of --heads {args.heads}, got {args.kv_heads}")
    if args.dim % (2 * args.heads):
        parser.error(f"--dim: expected a multiple of 2 x --heads {args.heads}, got {args.dim}")


def add_device_and_dtype(parser: argparse.ArgumentParser, dtype_note: str) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", type=torch.device, default="cuda" if cuda else "cpu", help="where to train")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=argparse.SUPPRESS,
        help=f"bfloat16 trains under autocast{dtype_note} (default: bfloat16 on CUDA, float32 elsewhere)",
    )


def complete_dtype(args: argparse.Namespace) -> None:
    default = "bfloat16" if args.device.type == "cuda" else "float32"
    args.dtype = getattr(torch, getattr(args, "dtype", default))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    whole = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--attention",
        metavar="NAMES",
        default=argparse.SUPPRESS,
        help=f"train with each of these for all steps and compare how they end: {NAMES} "
        "(default: the demo, which trains ours and compares the beginning with math)",
    )
    add_device_and_dtype(parser, ", and the demo does not hold it against its reference")
    add_sizes(parser, SIZES, "for --attention on CUDA")
    parser.add_argument("--sample", **whole, default=500, help="characters of text to write at the end of the demo")
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
    args = argparse.Namespace(attention="")
    parser.parse_args(argv, args)
    complete_sizes(parser, args, SIZES, bool(args.attention) and args.device.type == "cuda")
    args.attention = list(dict.fromkeys(args.attention.split(","))) if args.attention else []
    if args.attention and not {"ours"} <= set(args.attention) <= IMPLEMENTATIONS.keys():
        parser.error(f"--attention: expected {NAMES}, got {','.join(args.attention)}")
    if args.sample < 1:
        parser.error(f"--sample: expected at least 1, got {args.sample}")
    complete_dtype(args)
    return args


def verdict(failed: list[str], passed: str) -> int:
    """Say it, and return the exit status."""
    if not failed:
        print(f"passed: {passed}")
    sys.stdout.flush()
    for reason in failed:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if failed else 0


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def demo(args: argparse.Namespace, corpus: Corpus, backend: CountingBackend | None, mode: str) -> int:
    """Train ours, and compare its beginning with the reference."""
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
    matches = "matches the reference" if args.dtype == torch.float32 else "is not judged in bfloat16"
    return verdict(failures(ours, reference, args.dtype), f"the model has learned; its attention {matches}")


def compare(args: argparse.Namespace, corpus: Corpus, compiles: bool, mode: str) -> int:
    """Train with every implementation of --attention that is there, and compare how they end."""
    print("\n" + explain(*example_inputs(args), causal=True))
    runs: dict[str, Run] = {}
    for number, name in enumerate(args.attention, 1):
        title, attention = IMPLEMENTATIONS[name]
        place = f"\n{number}/{len(args.attention)} {title}"
        # Ours runs on every device: an error of it is no reason to leave it out.
        if name != "ours" and (reason := why_absent(attention, args)):
            print(f"{place} is absent: {reason}")
            continue
        seeds = range(args.seed, args.seed + args.seeds)
        count = f"{args.steps} steps" + (f" from each of {args.seeds} seeds" if args.seeds > 1 else "")
        print(f"{place}: the same weights and batches, {count}, {mode}")
        torch._dynamo.reset()  # the blocks differ only in the attention that they call: none may run another's graph
        backend = CountingBackend() if compiles else None
        runs[name] = Run.mean([fit(f"{title:23s}", attention, corpus, args, args.steps, backend, s) for s in seeds])

    tokens = args.batch * args.seq
    contents = {"train_gpt_curves.csv": curves_csv(runs), "train_gpt_summary.csv": summary_csv(runs, tokens)}
    dtype = str(args.dtype).removeprefix("torch.")
    png = curves_png(runs, f"{args.layers} layers, width {args.dim}, {dtype}, {describe_machine(args.device)}, {mode}")
    if png is not None:
        contents["train_gpt_curves.png"] = png
    write_all(args.out, contents)

    print(f"\nresult{'loss, first step':>37s}{'last 50 steps':>15s}{'to ours':>10s}{'gradients':>11s}{'tokens/s':>12s}")
    for name in args.attention:
        if name not in runs:
            print(f"  {IMPLEMENTATIONS[name][0]:25s} absent")
            continue
        run = runs[name]
        gradient = largest_differences(runs["ours"], run)[1]
        print(
            f"  {IMPLEMENTATIONS[name][0]:25s}{run.losses[0]:16.4f}{first_and_last(run)[1]:15.4f}"
            f"{late_difference(runs['ours'], run):+10.3%}{gradient:11.1e}{run.tokens_per_second(tokens):12,.0f}"
        )
    if args.seeds > 1:
        print("  last 50 steps of each seed, to the mean of all implementations:")
        for name, run in runs.items():
            means = [
                statistics.fmean(of_seed) for of_seed in zip(*(other.last for other in runs.values()), strict=True)
            ]
            differences = " ".join(f"{last / mean - 1:+.2%}" for last, mean in zip(run.last, means, strict=True))
            print(f"  {IMPLEMENTATIONS[name][0]:25s} {differences}")
    print(f"  written: {', '.join(str(args.out / name) for name in contents)}")
    if png is None:
        print("  matplotlib is not installed: no picture of the losses")
    if not args.check:
        return 0
    others = ", ".join(IMPLEMENTATIONS[name][0] for name in runs if name != "ours")
    return verdict(unequal(runs, args.dtype), f"flash_attn_plus trains as {others}, within {LATE_LOSS_TOLERANCE:.1%}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, not after three minutes: the path may be wrong
    corpus = load_corpus()
    missing = missing_for_compile(args.device)
    compiles = args.compile and missing is None
    mode = "torch.compile" if compiles else f"eager, {missing}" if args.compile else "eager"
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
    dtype = str(args.dtype).removeprefix("torch.")
    print(f"device  {args.device} ({describe_machine(args.device)}), {dtype}, {mode}")
    if args.attention:
        return compare(args, corpus, compiles, mode)
    return demo(args, corpus, CountingBackend() if compiles else None, mode)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
