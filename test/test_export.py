"""torch.export: one node per attention call, sizes that stay free, and programs that outlive their schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from graphs import GPT, Block, inputs, offsets, operator_nodes
from torch import Tensor
from torch.export import Dim, ExportedProgram, export, load, save

import flash_attn_plus as fap

FREE = Dim.DYNAMIC  # unlike Dim.AUTO an error where a size would be specialised
PACKAGE = Path(fap.__file__).parent


class Dense(GPT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, window_size=(6, 0))

    @staticmethod
    def arguments(batch: int, seqlen: int) -> tuple:
        return (inputs(batch, seqlen, 32),)

    free: ClassVar = {"x": {0: FREE, 1: FREE}}
    example, others = (3, 11), ((2, 7), (5, 40), (4, 130), (1, 1))
    nodes: ClassVar = {"fwd": 2}


class Packed(Block):
    def __init__(self) -> None:
        super().__init__(fap.flash_attn_varlen_func)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return super().forward(x, cu_seqlens, cu_seqlens, longest, longest)

    @staticmethod
    def arguments(*lengths: int) -> tuple:
        return inputs(sum(lengths), 32), offsets(*lengths), max(lengths)

    free: ClassVar = {"x": {0: FREE}, "cu_seqlens": {0: FREE}, "longest": FREE}
    example, others = (5, 3, 9), ((2, 4), (20, 0, 7, 8), (3,), (1, 1))
    nodes: ClassVar = {"varlen_fwd": 1}


class Unpadded(Packed):
    """The number of tokens is known when the program runs: an unbacked size."""

    def forward(self, x: Tensor, keep: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return super().forward(x[keep.nonzero().squeeze(1)], cu_seqlens, longest)

    @staticmethod
    def arguments(*lengths: int) -> tuple:
        x, cu_seqlens, longest = Packed.arguments(*lengths)
        keep = torch.arange(len(x) + 5) >= 5
        return torch.cat((inputs(5, 32), x)), keep, cu_seqlens, longest

    free: ClassVar = {"x": {0: FREE}, "keep": {0: FREE}, "cu_seqlens": {0: FREE}, "longest": FREE}


MODELS = [Dense, Packed, Unpadded]


def exported(model: torch.nn.Module, strict: bool = False) -> ExportedProgram:
    return export(model, model.arguments(*model.example), dynamic_shapes=model.free, strict=strict)


class TestModel:
    @pytest.mark.parametrize(
        "kind, strict", [(Dense, True), (Dense, False), (Packed, True), (Packed, False), (Unpadded, False)]
    )
    def test_one_node_per_call_and_equal_on_other_sizes(self, kind: type, strict: bool) -> None:
        model = kind()
        program = exported(model, strict)
        decomposed = program.run_decompositions()
        for stage in (program, decomposed):
            assert operator_nodes(stage.graph_module) == kind.nodes
        run, run_decomposed = program.module(), decomposed.module()
        for sizes in (kind.example, *kind.others):
            arguments = kind.arguments(*sizes)
            expected = model(*arguments)
            torch.testing.assert_close(run(*arguments), expected)
            torch.testing.assert_close(run_decomposed(*arguments), expected)

    @pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
    def test_saved_and_loaded(self, kind: type, tmp_path: Path) -> None:
        model = kind()
        save(exported(model), tmp_path / "model.pt2")
        program = load(tmp_path / "model.pt2")
        assert operator_nodes(program.graph_module) == kind.nodes
        arguments = kind.arguments(*kind.others[0])
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))

    def test_dropout_is_drawn_when_the_program_runs(self) -> None:
        class Model(torch.nn.Module):
            def forward(self, q: Tensor) -> Tensor:
                return fap.flash_attn_func(q, q, q, dropout_p=0.4)

        q = inputs(2, 9, 2, 8)
        program = export(Model(), (q,))
        assert operator_nodes(program.graph_module) == Counter({"fwd": 1})
        run = program.module()
        torch.manual_seed(1)
        one, two = run(q), run(q)
        torch.manual_seed(1)
        assert torch.equal(Model()(q), one)
        assert not torch.equal(one, two)

    def test_wrong_sizes_are_told(self) -> None:
        """What export could not know is asserted by the program, in the words of eager mode."""

        class Model(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor) -> Tensor:
                return fap.flash_attn_func(q, k, k)

        class Wrong(Model):
            def forward(self, q: Tensor, k: Tensor) -> Tensor:
                return super().forward(q, k[..., :4])

        with pytest.raises(Exception, match=r"k: expected head_dim 8 \(q's\), got shape \(2, 9, 2, 4\)"):
            export(Wrong(), (inputs(2, 7, 2, 8), inputs(2, 9, 2, 8)))


SAVE = """
import sys, torch, flash_attn_plus as fap
from torch.export import export, save

class Model(torch.nn.Module):
    def forward(self, q, sink, cu_seqlens):
        out, lse = fap.flash_attn_func(q, q, q, causal=True, sink=sink, return_lse=True)
        total = q.flatten(0, 1)
        packed = fap.flash_attn_varlen_func(total, total, total, cu_seqlens, cu_seqlens, 9, 9, window_size=(3, -1))
        merged, _ = fap.merge_states(out, lse, out, lse)
        return out, lse, packed, merged, fap.flash_attn_combine(out[None], lse[None])[0]

torch.manual_seed(0)
arguments = torch.randn(2, 9, 2, 8), torch.randn(2), torch.tensor([0, 9, 18], dtype=torch.int32)
save(export(Model(), arguments), sys.argv[1])
torch.save((arguments, Model()(*arguments)), sys.argv[2])
"""

APPEND = """
import importlib.util, sys
from pathlib import Path

# schemas.py as of a later release: one more option, at the end of every operator and of Variant.
path = Path(importlib.util.find_spec("flash_attn_plus").origin).with_name("schemas.py")
spec = importlib.util.spec_from_file_location("flash_attn_plus.schemas", path)
schemas = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = schemas
last = "    deterministic: bool = False\\n"
source = path.read_text().replace(last, last + "    extra_option: float = 0.0\\n")
exec(compile(source, path, "exec"), schemas.__dict__)
assert schemas.Variant._fields[-1] == "extra_option"
attention = ("fwd", "bwd", "bwd_into", "varlen_fwd", "varlen_bwd", "varlen_bwd_into")
for name in (*attention, "flag_gems_fwd", "flag_gems_varlen_fwd"):
    schemas.SCHEMAS[name] = schemas.SCHEMAS[name].replace(") -> ", ", float extra_option=0.0) -> ")
"""

LOAD = """
import torch, flash_attn_plus as fap
from flash_attn_plus import cpu
from torch.export import load

seen = []  # what reached the kernels
for name in ("forward", "backward", "backward_into", "varlen_forward", "varlen_backward", "varlen_backward_into"):
    def watched(*args, original=getattr(cpu, name)):
        seen.extend(arg.extra_option for arg in args if isinstance(arg, schemas.Variant))
        return original(*args)
    setattr(cpu, name, watched)

for name in ("fwd", "bwd", "bwd_into", "varlen_fwd", "varlen_bwd", "varlen_bwd_into"):
    assert getattr(torch.ops.flash_attn_plus, name).default._schema.arguments[-1].name == "extra_option"
arguments, expected = torch.load(sys.argv[2])
actual = load(sys.argv[1]).module()(*arguments)
assert len(actual) == len(expected)
assert all(map(torch.equal, actual, expected))
assert seen and not any(seen), seen
"""

USE = """
ops = torch.ops.flash_attn_plus
q, sink, cu_seqlens = arguments
pads = torch.ones(2, dtype=torch.int32)

def gradients(**options):
    leaves = q.clone().requires_grad_(), sink.clone().requires_grad_()
    total = leaves[0].flatten(0, 1)
    out, lse = ops.fwd(leaves[0], leaves[0], leaves[0], causal=True, sink=leaves[1], **options)
    layout = cu_seqlens, cu_seqlens, 9, 9
    packed, _ = ops.varlen_fwd(total, total, total, *layout, sink=leaves[1], leftpad_k=pads, **options)
    return torch.autograd.grad(out.square().sum() + lse.sum() + packed.square().sum(), leaves)

seen.clear()
assert all(map(torch.equal, gradients(), gradients(extra_option=2.5)))
assert [option for option in seen if option] == [2.5] * (len(seen) // 2) != [], seen

seen.clear()
with torch.no_grad():
    out, lse = ops.fwd(q, q, q)
    given = [torch.empty_like(q) for _ in range(3)]
    ops.bwd_into(out, q, q, q, out, lse, None, *given, extra_option=2.5)
    assert all(map(torch.equal, given, ops.bwd(out, q, q, q, out, lse, None, extra_option=2.5)))
assert seen.count(2.5) >= 2, seen

seen.clear()
grad = lambda q: torch.func.grad(lambda q: ops.fwd(q, q, q, extra_option=2.5)[0].square().sum())(q)
torch.testing.assert_close(torch.func.vmap(grad)(q[None])[0], grad(q))
assert set(seen) == {2.5}, seen
"""


def run_fresh(code: str, *arguments: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


class TestAppendedOption:
    """Schemas grow at their ends: programs that were saved before run after, with the same numbers."""

    def test_old_programs_run_and_the_option_reaches_the_kernels(self, tmp_path: Path) -> None:
        files = tmp_path / "model.pt2", tmp_path / "results.pt"
        run_fresh(SAVE, *files)
        run_fresh(APPEND + LOAD + USE, *files)
