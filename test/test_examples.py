"""The demo runs, writes what it says, and its check notices a wrong attention."""

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


def _run(*options, out):
    command = [sys.executable, str(EXAMPLES / "train_gpt.py"), *TINY.split(), "--out", str(out), *options]
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


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
