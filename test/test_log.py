"""The logger ``flash_attn_plus``: what is not taken is said, once, with its reason."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import flash_attn_plus
from flash_attn_plus import cpu, device, gpu, library, log, native
from flash_attn_plus.schemas import Variant


@pytest.fixture
def said(caplog, monkeypatch):
    """What this test has the package say: (level, sentence) of each record."""
    monkeypatch.setattr(log, "_said", set())
    for memory in library._memories.values():
        memory.clear()
    caplog.set_level(logging.INFO, "flash_attn_plus")

    def records() -> list[tuple[str, str]]:
        assert {record.name for record in caplog.records} <= {"flash_attn_plus"}
        return [(record.levelname, record.getMessage()) for record in caplog.records]

    return records


def inputs(dtype: torch.dtype = torch.float32, **options) -> list[torch.Tensor]:
    return [torch.randn(1, 8, 2, 16, dtype=dtype, **options) for _ in range(3)]


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_status", "not built; to build it, ...")
    monkeypatch.setattr(native, "find", lambda: None)


class TestOnce:
    def test_is_once_for_a_reason_and_its_arguments(self, said):
        for _ in range(3):
            log.once("no %s", "windows")
            log.once("no %s", "sinks", level=logging.WARNING)
        assert said() == [("INFO", "no windows"), ("WARNING", "no sinks")]

    def test_is_once_for_all_threads(self, said):
        together = threading.Barrier(8)

        def call() -> None:
            together.wait()
            log.once("no windows")

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said()) == 1

    def test_what_nobody_heard_is_said_later(self, said, caplog):
        caplog.set_level(logging.WARNING, "flash_attn_plus")
        log.once("no windows")
        assert said() == []
        caplog.set_level(logging.INFO, "flash_attn_plus")
        log.once("no windows")
        assert len(said()) == 1

    def test_is_silent_while_a_graph_is_traced(self, said, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        log.once("no windows")
        assert said() == []

    def test_names_the_place_that_says_it(self, said, caplog):
        log.once("no windows")
        assert caplog.records[0].filename == "test_log.py"


class TestCPU:
    def test_a_library_that_is_not_built(self, said, no_library):
        for dtype in (torch.float32, torch.bfloat16):
            flash_attn_plus.flash_attn_func(*inputs(dtype))
        assert said() == [("INFO", "native CPU library: not built; to build it, ...")]

    def test_a_library_that_does_not_load(self, said, no_library, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "find", lambda: tmp_path)
        monkeypatch.setattr(native, "_status", "_native.so failed to load: wrong ELF class")
        flash_attn_plus.flash_attn_func(*inputs())
        assert said() == [("WARNING", "native CPU library: _native.so failed to load: wrong ELF class")]

    @pytest.mark.skipif(not native.loaded(), reason="native library: " + native.status())
    def test_nothing_where_the_fastest_runs(self, said):
        flash_attn_plus.flash_attn_func(*inputs(), causal=True)
        assert said() == []

    def test_row_blocks_once_for_each_reason_and_direction(self, said):
        for seqlen in (8, 9):
            q, k, v = (torch.randn(1, seqlen, 2, 16, requires_grad=True) for _ in range(3))
            for _ in range(3):
                flash_attn_plus.flash_attn_func(q, k, v, softcap=2.0).sum().backward()
        because = "row blocks in plain PyTorch: only they compute softcap"
        rows = [sentence for _, sentence in said() if "row blocks" in sentence]
        assert rows == [f"CPU, forward: {because}", f"CPU, backward: {because}"]
        flash_attn_plus.flash_attn_func(q, k, v, sink=torch.zeros(2))
        assert said()[-1] == ("INFO", "CPU, forward: row blocks in plain PyTorch: only they compute sink")

    def test_the_words_are_those_of_explain(self, said, no_library):
        q, k, v = inputs()
        flash_attn_plus.flash_attn_func(q, k, v, window_size=(2, 2))
        reason = cpu.choose_forward(q, k, v, Variant(window_left=2, window_right=2)).reason
        assert said()[-1] == ("INFO", f"CPU, forward: row blocks in plain PyTorch: {reason}")
        assert "aten: it has no windows" in reason

    def test_packed_and_joint_inputs(self, said):
        offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
        qkv = torch.randn(8, 3, 2, 16, requires_grad=True)
        call = flash_attn_plus.flash_attn_varlen_qkvpacked_func
        for lengths in (offsets, torch.tensor([0, 8], dtype=torch.int32)):
            for _ in range(2):
                call(qkv, lengths, 8, softcap=2.0).sum().backward()
        assert len([sentence for _, sentence in said() if "only they compute softcap" in sentence]) == 2

    def test_a_batch_of_no_sequences(self, said):
        x, offsets = torch.randn(5, 2, 16), torch.tensor([0], dtype=torch.int32)
        flash_attn_plus.flash_attn_varlen_func(x, x, x, offsets, offsets, 0, 0)
        assert [sentence for _, sentence in said() if "row blocks" in sentence] == []

    def test_wrong_arguments_and_explain_say_nothing(self, said, no_library):
        q, k, v = inputs()
        flash_attn_plus.explain(q, k, v, softcap=2.0)
        with pytest.raises(ValueError, match="softcap"):
            flash_attn_plus.flash_attn_func(q, k, v, softcap=-1.0)
        assert said() == []

    def test_repeated_calls_do_not_come_near_it(self, said, monkeypatch):
        q, k, v = inputs()
        flash_attn_plus.flash_attn_func(q, k, v, softcap=2.0)
        monkeypatch.setattr(cpu, "say", None)
        flash_attn_plus.flash_attn_func(q, k, v, softcap=2.0)
        torch.ops.flash_attn_plus.fwd(q, k, v, softcap=2.0)

    def test_tracing_says_nothing(self, said):
        class Attention(torch.nn.Module):
            def forward(self, q, k, v):
                return flash_attn_plus.flash_attn_func(q, k, v, softcap=2.0)

        torch.export.export(Attention(), tuple(inputs()))
        assert said() == []


class TestGPU:
    """Without one: what library.py calls when a signature is new."""

    def test_float64(self, said, monkeypatch):
        monkeypatch.setattr(device, "why_no_triton", lambda: None)
        arguments = (*inputs(torch.float64), Variant())
        gpu.say("forward", *arguments)
        gpu.say("forward", *arguments)
        gpu.say("forward", *inputs(), Variant())
        assert said() == [("INFO", "cpu: row blocks in plain PyTorch: the kernels have no float64")]

    def test_no_triton(self, said, monkeypatch):
        monkeypatch.setattr(device, "why_no_triton", lambda: "Triton 3.5.1 is older than 3.6")
        q, k, v = inputs()
        gpu.say("forward", q, k, v, Variant())
        gpu.say("backward", q, q, k, v, q, q, None, Variant(), True, True, True)
        assert said() == [("WARNING", "cpu: row blocks in plain PyTorch: Triton 3.5.1 is older than 3.6")]

    def test_no_launcher(self, said, monkeypatch):
        pytest.importorskip("triton")
        from flash_attn_plus.kernels import launch

        class Kernel:
            """Compiled and interpreted by nobody."""

            arg_names = ()

            def __getitem__(self, grid):
                return self

            def __call__(self, *args, stream=None, **options):
                return self

        active = SimpleNamespace(get_current_stream=lambda index: 0)
        monkeypatch.setattr(launch.triton.runtime, "driver", SimpleNamespace(active=active))
        monkeypatch.setattr(device, "static_launcher", lambda _: None)
        for _ in range(2):
            launch.Launch(Kernel(), 1, {}, {})((torch.zeros(1),), ())
        ((level, sentence),) = said()
        assert level == "INFO" and sentence.startswith("this PyTorch has no launcher of Triton kernels")


def test_other_devices(said):
    from flash_attn_plus import anywhere

    x = SimpleNamespace(device=torch.device("xpu"))
    for _ in range(2):
        anywhere.say("forward", x, x, x, Variant())
    because = "there are no kernels for device type 'xpu' yet"
    assert said() == [("INFO", f"row blocks in plain PyTorch: {because}")]


def test_adds_no_handler_and_prints_nothing():
    code = """
import logging, torch, flash_attn_plus
x = torch.randn(1, 8, 2, 16)
flash_attn_plus.flash_attn_func(x, x, x, softcap=2.0)
assert not logging.getLogger("flash_attn_plus").handlers and not logging.getLogger().handlers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
