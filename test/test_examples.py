"""The demo and the GPU benchmark run, write what they say, and notice a wrong attention."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attn_plus import flash_attn_func

EXAMPLES = Path(__file__).parent.parent / "examples"
BENCHMARK = EXAMPLES.parent / "benchmark"
TINY = "--device cpu --no-compile --steps 6 --batch 2 --seq 32 --layers 1 --heads 2 --kv-heads 1 --dim 32 --sample 20"


@pytest.fixture
def train_gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_gpt")


@pytest.fixture
def fit(train_gpt):
    """Train on a text that is read from no file: the alphabet over and over."""
    text = torch.arange(len(train_gpt.ALPHABET)).repeat(20)
    corpus = train_gpt.Corpus(text, text, 1)
    args = train_gpt.parse(TINY.split())

    def run(attention, layers=1, backend=None):
        args.layers = layers
        return train_gpt.fit("test", attention, corpus, args, args.steps, backend)

    return run


def _python(*command):
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)


def _run(*options, out):
    return _python(str(EXAMPLES / "train_gpt.py"), *TINY.split(), "--out", str(out), *options)


def test_train_gpt_writes_its_results(tmp_path):
    done = _run("--no-check", out=tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    names = {"train_gpt.csv", "train_gpt.txt"}
    if importlib.util.find_spec("matplotlib"):
        names.add("train_gpt.png")
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == names
    with open(tmp_path / "new" / "folder" / "train_gpt.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list("123456")
    assert all(abs(float(row["loss"]) - float(row["reference_loss"])) < 1e-3 for row in rows)
    assert "class " in done.stdout and "tokens/s" in done.stdout


def test_train_gpt_fails_when_too_little_is_learned(tmp_path):
    done = _run(out=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("FAILED") == 1 and "too little was learned" in done.stderr
    assert "passed" not in done.stdout


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that is 2 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.02 * grad


WRONG = {
    "not causal": lambda q, k, v: flash_attn_func(q, k, v),
    "scale 2 % off": lambda q, k, v: flash_attn_func(q, k, v, causal=True, softmax_scale=1.02 * q.shape[-1] ** -0.5),
    "dq 2 % off": lambda q, k, v: flash_attn_func(_Scaled.apply(q), k, v, causal=True),
    "dk 2 % off": lambda q, k, v: flash_attn_func(q, _Scaled.apply(k), v, causal=True),
    "dv 2 % off": lambda q, k, v: flash_attn_func(q, k, _Scaled.apply(v), causal=True),
    "dk missing": lambda q, k, v: flash_attn_func(q, k.detach() + 0 * k, v, causal=True),
    "last key unseen": lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(30, 0)),
    "not a number": lambda q, k, v: flash_attn_func(q, k, v, causal=True) * torch.nan,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_attention_is_caught(train_gpt, fit, name):
    found = train_gpt.failures(fit(WRONG[name]), fit(train_gpt.math_attention), torch.float32)
    assert any("gradient" in reason for reason in found), found


def test_the_right_attention_passes_the_comparison(train_gpt, fit):
    ours, reference = fit(train_gpt.causal_attention), fit(train_gpt.math_attention)
    ours.losses = [*ours.losses, *[0.1] * 50]  # as if it had learned
    assert train_gpt.failures(ours, reference, torch.float32) == []
    ours.losses[3] += 0.01
    (reason,) = train_gpt.failures(ours, reference, torch.float32)
    assert "losses differ by up to 1.0e-02" in reason
    assert train_gpt.failures(ours, reference, torch.bfloat16) == []


def test_one_graph_with_one_node_serves_every_layer(train_gpt, fit):
    torch._dynamo.reset()
    backend = train_gpt.CountingBackend("aot_eager")
    compiled = fit(train_gpt.causal_attention, layers=3, backend=backend)
    assert backend.nodes == [1]
    assert compiled.losses == pytest.approx(fit(train_gpt.causal_attention, layers=3).losses, abs=1e-4)


def test_corpus_is_the_same_every_time_and_split_by_file(train_gpt):
    one, two = train_gpt.load_corpus(), train_gpt.load_corpus()
    assert torch.equal(one.train, two.train) and torch.equal(one.validation, two.validation)
    assert one.files > 50 and len(one.train) > 5 * len(one.validation) > 100_000
    assert one.train.min() >= 0 and one.train.max() < len(train_gpt.ALPHABET)
    text = "".join(train_gpt.ALPHABET[i] for i in one.train[:100_000].tolist())
    assert "import " in text and "\n\tdef " in text


def test_an_interrupt_while_writing_leaves_the_old_files(train_gpt, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    write = Path.write_bytes

    def interrupted(path, content):
        if content == b"second":
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_gpt.write_all(tmp_path, {"a": b"first", "b": b"second"})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_without_matplotlib_there_is_no_picture(train_gpt, fit, monkeypatch):
    run = fit(train_gpt.causal_attention)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train_gpt.losses_png(run, run) is None


@pytest.mark.parametrize(
    "option, message",
    [
        ("--kv-heads 3", "--kv-heads: expected a divisor of --heads 4, got 3"),
        ("--dim 100", "--dim: expected a multiple of 2 x --heads 4, got 100"),
        ("--steps 0", "--steps: expected at least 1, got 0"),
    ],
)
def test_wrong_options_are_told_by_name(train_gpt, capsys, option, message):
    with pytest.raises(SystemExit):
        train_gpt.parse(option.split())
    assert message in capsys.readouterr().err


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return importlib.import_module("attention")


def test_benchmark_writes_its_results(tmp_path):
    done = _python(BENCHMARK / "attention.py", "--device=cpu", "--backward", "--commit=abc123", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "attention.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["implementation"] == "ours"]
    assert len(ours) == 5 * 2 + 3  # problems in two directions, and the host times
    assert all(float(row["error"]) < 2e-2 and float(row["us"]) > 0 and row["commit"] == "abc123" for row in ours)
    assert (tmp_path / "attention.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert "| problem | what | ours | fa2 | kernel |" in done.stdout
    assert "ours / fa2, backward: geometric mean" in done.stdout
    assert done.stdout.count("Could not run 'aten::_flash_attention_forward'") == 1


def _scaled(factor):
    return lambda problem, device: lambda q, k, v: factor * flash_attn_func(q, k, v, causal=problem.causal)


def _raising(problem, device):
    raise RuntimeError("no such kernel\nsecond line")


def test_benchmark_shows_no_speed_of_wrong_values(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CHUNK", 2 * 64 * 20)  # several blocks of rows, the last one shorter
    prepared = {"ours": _scaled(1.0), "louder": _scaled(1.03), "nothing": _scaled(torch.nan), "broken": _raising}
    for name, prepare in prepared.items():
        monkeypatch.setitem(bench.PEERS, name, bench.Peer(name, bench.Call(prepare), gpu_only=False))
    monkeypatch.setitem(bench.PEERS, "missing", bench.Peer("missing", bench.Call(_raising), None, "no_such", False))
    argv = "--device cpu --rounds 1 --backward --only s64 --peers ours,louder,nothing,broken,missing"
    assert bench.main(argv.split()) == 0
    shown = capsys.readouterr().out
    for mask in ("full", "causal"):
        for direction, last in (("forward", "raised"), ("backward", "")):
            rows = (line.split(" | ") for line in shown.splitlines() if f"| d64 s64 {mask} | {direction} |" in line)
            _, _, ours, *others = next(rows)  # of the first table, the speeds
            assert float(ours) > 0 and others[:4] == ["wrong", "wrong", last, ""]
    assert shown.count("RuntimeError: no such kernel (d64 s64 full, forward; and 1 more)") == 1
    assert shown.count("missing is absent: ModuleNotFoundError") == 1
    monkeypatch.setitem(bench.PEERS, "ours", bench.Peer("ours", bench.Call(_scaled(1.03)), gpu_only=False))
    assert bench.main([*argv.split()[:-1], "ours"]) == 1
    assert "FAILED: ours is wrong or raised in 4 rows" in capsys.readouterr().out


def test_benchmark_counts_the_true_work(bench):
    names = [problem.name for problem in bench.GPU]
    assert len(set(names)) == len(names) == 14
    full, causal = bench.GPU[4:6]
    assert full.name == "d128 s4096 full"
    assert full.flops("forward") == 4 * 4 * 16 * 4096**2 * 128 == 2 * causal.flops("forward")
    assert full.flops("backward") == 2.5 * full.flops("forward")
    assert sum(bench.UNEVEN) == 16384
    even, packed = bench.GPU[10:12]
    assert packed.varlen and not even.varlen and even.flops("forward") == packed.flops("forward")
    assert packed.offsets("cpu").tolist() == list(range(0, 16385, 2048))


def test_benchmark_summary_and_ratios(bench):
    names = ("d128 s2048 causal", "d128 varlen 8x2048 causal", "d64 s64 full")
    speeds = {"ours": (400.0, 300.0, 100.0), "fa2": (100.0, 300.0, "raised"), "fa4": (500.0, "", "")}
    records = [
        bench.record(problem, "forward", name, **{"TFLOP/s": value})
        for name, values in speeds.items()
        for problem, value in zip(names, values, strict=True)
    ]
    rows = bench.speeds(records, list(speeds))
    assert [row[-2:] for row in rows[1:]] == [["4.00", "0.80"], ["1.00", "1.00"], ["", ""]]
    assert bench.summary(records) == [
        "ours / fa2, forward: geometric mean 2.00 over 2 rows, smallest 1.00 (d128 varlen 8x2048 causal)",
        "varlen / dense of the same sequences, forward, ours: 0.75 (d128 varlen 8x2048 causal)",
        "varlen / dense of the same sequences, forward, fa2: 3.00 (d128 varlen 8x2048 causal)",
    ]
