"""The examples and the GPU benchmark run, write what they say, and notice a wrong attention."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_plus import flash_attn_func, flash_attn_varlen_func, native

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
        ("--sample 0", "--sample: expected at least 1, got 0"),
        (
            "--attention flash",
            "--attention: expected ours and any of flash, cudnn, math, separated by commas, got flash",
        ),
        ("--attention ours,fa2", "separated by commas, got ours,fa2"),
    ],
)
def test_wrong_options_are_told_by_name(train_gpt, capsys, option, message):
    with pytest.raises(SystemExit):
        train_gpt.parse(["--device", "cpu", *option.split()])
    assert message in capsys.readouterr().err


def test_the_comparison_is_larger_on_a_gpu_unless_told_otherwise(train_gpt):
    names = ["steps", "batch", "seq", "dim", "lr", "dtype"]
    small = [400, 8, 256, 192, 2e-3, torch.float32]
    on_gpu = "--attention ours,flash,cudnn --device cuda"

    def sizes(options):
        args = train_gpt.parse(options.split())
        return [getattr(args, name) for name in names]

    assert sizes("--device cpu") == sizes("--device cpu --attention ours,math") == small
    assert sizes("--device cuda") == [*small[:-1], torch.bfloat16]
    assert sizes(on_gpu) == [500, 32, 1024, 768, 1e-3, torch.bfloat16]
    assert sizes(f"{on_gpu} --steps 7 --dtype float32") == [7, 32, 1024, 768, 1e-3, torch.float32]


def test_the_warm_up_is_in_no_speed(train_gpt, fit):
    run = fit(train_gpt.causal_attention)
    run.seconds = [100.0] * train_gpt.WARM_UP + [1.0, 2.0, 3.0] * 4
    assert run.tokens_per_second(64) == 32.0
    run.seconds = [100.0, 100.0, 4.0, 4.0]  # few steps: half of them
    assert run.tokens_per_second(64) == 16.0


@pytest.fixture
def compare(train_gpt, monkeypatch, capsys, tmp_path):
    """Run train_gpt with --attention on the alphabet over and over, which is learned in a few steps: (exit status,
    what was printed, what was said to have failed)."""
    text = torch.arange(len(train_gpt.ALPHABET)).repeat(20)
    monkeypatch.setattr(train_gpt, "load_corpus", lambda: train_gpt.Corpus(text, text, 1))

    def run(names, *options):
        argv = f"{TINY} --steps 60 --lr 0.1 --attention {names} --out {tmp_path}".split()
        return train_gpt.main([*argv, *options]), *capsys.readouterr()

    return run


def _table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_attentions_train_alike_and_what_is_absent_is_said(train_gpt, compare, tmp_path):
    status, out, err = compare("ours,flash,cudnn,math")
    assert (status, err) == (0, "")
    assert "3/4 PyTorch CUDNN_ATTENTION is absent: No viable backend for scaled_dot_product_attention" in out
    assert "passed: flash_attn_plus trains as PyTorch FLASH_ATTENTION, PyTorch MATH, within 0.5%" in out
    names = {"train_gpt_curves.csv", "train_gpt_summary.csv"}
    if importlib.util.find_spec("matplotlib"):
        names.add("train_gpt_curves.png")
    assert {path.name for path in tmp_path.iterdir()} == names
    curves = _table(tmp_path / "train_gpt_curves.csv")
    assert list(curves[0]) == ["step", "ours", "flash", "math"] and len(curves) == 60
    ours = [float(row["ours"]) for row in curves]
    assert ours[-1] < 0.6 * ours[0]
    assert all(abs(float(row[name]) - float(row["ours"])) < 1e-3 for row in curves for name in ("flash", "math"))
    summary = {row["implementation"]: row for row in _table(tmp_path / "train_gpt_summary.csv")}
    assert list(summary) == ["ours", "flash", "math"]
    assert float(summary["ours"]["loss_last_50_steps"]) == pytest.approx(sum(ours[-50:]) / 50)
    assert all(abs(float(row["relative_difference"])) < 1e-3 for row in summary.values())
    assert all(float(row["tokens_per_second"]) > 0 for row in summary.values())


def test_seeds_are_averaged(compare, tmp_path):
    def curves(*options):
        status, out, err = compare("ours,math", *options)
        assert (status, err) == (0, "")
        return _table(tmp_path / "train_gpt_curves.csv"), _table(tmp_path / "train_gpt_summary.csv"), out

    (both, summary, out), (one, *_), (other, *_) = (curves(*o.split()) for o in ("--seeds 2", "--seed 0", "--seed 1"))
    for name in ("ours", "math"):
        means = [(float(a[name]) + float(b[name])) / 2 for a, b in zip(one, other, strict=True)]
        assert [float(row[name]) for row in both] == pytest.approx(means)
    of_seeds = [float(x) for x in summary[0]["loss_last_50_steps_of_each_seed"].split()]
    assert len(of_seeds) == 2 and of_seeds[0] != of_seeds[1]
    assert float(summary[0]["loss_last_50_steps"]) == pytest.approx(sum(of_seeds) / 2)
    assert "60 steps from each of 2 seeds" in out and "last 50 steps of each seed" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_attention_that_ends_elsewhere_fails(train_gpt, compare, monkeypatch, dtype):
    monkeypatch.setitem(train_gpt.IMPLEMENTATIONS, "ours", ("flash_attn_plus", WRONG["not causal"]))
    status, out, err = compare("ours,math", "--dtype", dtype)
    assert status == 1 and "passed" not in out
    assert "FAILED: PyTorch MATH: the mean loss of the last 50 steps differs by +" in err
    assert ("a gradient differs by" in err) == (dtype == "float32")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_fails_the_comparison_in_float32(train_gpt, fit, name):
    runs = {"ours": fit(WRONG[name]), "math": fit(train_gpt.math_attention)}
    assert any("PyTorch MATH: a gradient differs by" in reason for reason in train_gpt.unequal(runs, torch.float32))


def test_the_comparison_needs_something_to_compare_and_a_model_that_learns(compare):
    status, _, err = compare("ours,cudnn", "--steps", "6")
    assert status == 1 and err.count("FAILED") == 2
    assert "there was nothing to compare with" in err and "too little was learned" in err
    assert compare("ours,cudnn", "--steps", "6", "--no-check")[0] == 0


def test_late_losses_are_held_to_half_a_percent(train_gpt):
    def run(late):
        return train_gpt.Run(None, [4.0] * 10 + [late] * 50, first_gradients=[torch.ones(1)])

    def failed(late):
        return train_gpt.unequal({"ours": run(2.0), "flash": run(2.0), "math": run(late)}, torch.bfloat16)

    assert failed(2.009) == failed(1.991) == []
    for late in (2.011, 1.989, float("nan")):
        (reason,) = failed(late)
        assert reason.startswith("PyTorch MATH: the mean loss of the last 50 steps differs by")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_every_name_runs_its_own_kernel(train_gpt, fit, backend):
    operators = {
        "ours": "flash_attn_plus::fwd",
        "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
        "math": "aten::_scaled_dot_product_attention_math",
    }
    if backend is not None:
        del operators["math"]  # decomposed when it is traced
    for name, operator in operators.items():
        torch._dynamo.reset()
        compiled = None if backend is None else train_gpt.CountingBackend(backend)
        # What surrounds the call must not matter.
        with sdpa_kernel(SDPBackend.MATH), torch.profiler.profile() as profile:
            fit(train_gpt.IMPLEMENTATIONS[name][1], backend=compiled)
        seen = {event.key for event in profile.key_averages()} & set(operators.values())
        if name == "ours" and not native.loaded():
            seen.discard(operators["flash"])  # which it may then run
        assert seen == {operator}


@pytest.fixture
def pack_documents(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("pack_documents")


FEW = "--device cpu --steps 3 --documents 4 --context 80 --layers 2 --heads 2 --kv-heads 1 --dim 32"


@pytest.mark.parametrize("dtype, tolerance", [("float32", "1.0e-05"), ("bfloat16", "7.8e-03")])
def test_packed_and_padded_documents_have_the_same_losses(dtype, tolerance):
    done = _python(str(EXAMPLES / "pack_documents.py"), *FEW.split(), "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    facts = dict(re.findall(r"^  (\S.*?)  +(\S.*)$", done.stdout, re.MULTILINE))
    assert facts["tolerance"] == f"{tolerance} ({dtype})"
    assert float(facts["largest difference"].split()[0]) < float(tolerance) / 5
    assert 0 < int(facts["padding"].split("%")[0]) < 100
    assert all("tokens/s" in facts[name] for name in ("packed", "padded"))
    assert done.stdout.endswith("passed: packed and padded documents have the same losses\n")


def _borders_moved(q, k, v, cu_seqlens, max_seqlen):
    """Each document sees the last character of the one before it."""
    cu_seqlens = torch.cat((cu_seqlens[:1], cu_seqlens[1:-1] - 1, cu_seqlens[-1:]))
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen + 1, max_seqlen + 1, causal=True)


WRONGLY_PACKED = {
    "borders moved": _borders_moved,
    "no borders": lambda q, k, v, *layout: flash_attn_func(q[None], k[None], v[None], causal=True)[0],
    "not causal": lambda q, k, v, c, m: flash_attn_varlen_func(q, k, v, c, c, m, m),
    "not a number": lambda q, k, v, *layout: q * torch.nan,
}


@pytest.mark.parametrize("name", WRONGLY_PACKED)
def test_documents_that_see_each_other_are_caught(pack_documents, monkeypatch, capsys, name):
    monkeypatch.setattr(pack_documents, "packed_attention", WRONGLY_PACKED[name])
    assert pack_documents.main(FEW.split()) == 1
    out, err = capsys.readouterr()
    assert "FAILED: step 1: the losses of a document differ by" in err and "passed" not in out


def test_a_gradient_that_only_packing_gets_wrong_is_caught(pack_documents, monkeypatch, capsys):
    right = pack_documents.packed_attention
    monkeypatch.setattr(pack_documents, "packed_attention", lambda q, k, v, *layout: right(q, k, v.detach(), *layout))
    assert pack_documents.main(FEW.split()) == 1
    assert "FAILED: step 2: the losses of a document differ by" in capsys.readouterr().err


def test_documents_are_laid_out_without_loss(pack_documents):
    documents = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10]), torch.tensor([11, 12, 13])]
    packed = pack_documents.pack(documents, torch.device("cpu"))
    tokens, positions, cu_seqlens, longest = packed.inputs
    assert tokens.tolist() == [5, 6, 7, 9, 11, 12] and packed.targets.tolist() == [6, 7, 8, 10, 12, 13]
    assert positions.tolist() == [0, 1, 2, 0, 0, 1] and packed.document.tolist() == [0, 0, 0, 1, 2, 2]
    assert cu_seqlens.tolist() == [0, 3, 4, 6] and cu_seqlens.dtype == torch.int32 and longest == 3
    padded = pack_documents.pad(documents, torch.device("cpu"))
    assert padded.inputs[0].tolist() == [[5, 6, 7], [9, 0, 0], [11, 12, 0]]
    none = pack_documents.NO_TARGET
    assert padded.targets.tolist() == [6, 7, 8, 10, none, none, 12, 13, none]
    assert packed.lengths.tolist() == padded.lengths.tolist() == [3, 1, 2]


def test_documents_are_real_and_of_different_lengths(pack_documents, train_gpt):
    documents = pack_documents.load_documents(1024)
    lengths = sorted(map(len, documents))
    assert len(documents) > 1000 and lengths[0] > 1 and lengths[-1] == 1025
    assert lengths[len(lengths) // 2] < 512
    texts = ["".join(train_gpt.ALPHABET[i] for i in document.tolist()) for document in documents[:500]]
    assert sum(text.lstrip().startswith(("def ", "class ")) for text in texts) > 400


def test_waits_for_the_gpu_in_packed_steps_fail(pack_documents, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    training = pack_documents.begin(pack_documents.parse(FEW.split()), pack_documents.packed_attention)
    training.losses = [torch.zeros(4)]
    with pack_documents.noting_waits(torch.device("cuda"), training.waits):
        warnings.warn("another warning", stacklevel=1)
    assert modes == ["warn", "default"] and pack_documents.failures(training, training, torch.float32) == []
    with pack_documents.noting_waits(torch.device("cuda"), training.waits):
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
    (reason,) = pack_documents.failures(training, training, torch.float32)
    assert reason.startswith("packed steps made the host wait for the GPU 1 times: ") and "test_examples.py" in reason


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


GENERATE = "--device cpu --steps 10 --batch 3 --seq 48 --tokens 12 --layers 1 --heads 2 --kv-heads 1 --dim 32"


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("generate")


def test_generate_writes_the_same_with_every_cache(generate, capsys):
    assert generate.main(GENERATE.split()) == 0
    said = capsys.readouterr().out
    for way in ("without a cache", "contiguous cache", "pages of 16"):
        assert re.search(rf"^  {way} .* 36 of 36 ", said, re.M), said
    assert "passed: with a cache and without, the same tokens" in said


WRONG_CACHES = {
    "last key unseen": lambda right: lambda *args, **options: right(*args, **options, window_size=(5, 0)),
    "scale 3 % off": lambda right: lambda *args, **options: right(*args, **options, softmax_scale=1.03 * 16**-0.5),
    "not a number": lambda right: lambda *args, **options: right(*args, **options) * torch.nan,
}


@pytest.mark.parametrize("name", WRONG_CACHES)
def test_generate_catches_a_wrong_cache(generate, monkeypatch, capsys, name):
    monkeypatch.setattr(generate, "flash_attn_with_kvcache", WRONG_CACHES[name](generate.flash_attn_with_kvcache))
    assert generate.main(GENERATE.split()) == 1
    assert "a logit is off by" in capsys.readouterr().err


def test_the_decode_benchmark_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = _python(str(BENCHMARK / "decode.py"))
    assert done.returncode == 1 and "GPU" in done.stderr + done.stdout


@pytest.mark.parametrize("words", [64, 4096, 100_096])
def test_what_only_reads_adds_up_every_word(bench, device, words):
    pytest.importorskip("triton")
    reading = importlib.import_module("reading")
    k, v = torch.randint(-(2**31), 2**31, (2, words), dtype=torch.int32, device=device)
    for shape in reading.SHAPES:
        assert torch.equal(reading.add_up(k, v, shape), reading.expected(k, v)), shape
    changed = v.clone()
    changed[-1] += 1
    assert not torch.equal(reading.add_up(k, changed, reading.SHAPES[0]), reading.expected(k, v))
