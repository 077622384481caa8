"""The schemas as registered. Exported programs store calls by them: what is written here may grow at its end, only."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

import flash_attn_plus  # noqa: F401  (registers the schemas)
from flash_attn_plus import schemas
from flash_attn_plus.schemas import SCHEMAS, Rotation, Variant, Varlen

FLAG_GEMS = ["flag_gems_fwd", "flag_gems_varlen_fwd"]
ATTENTION = ["fwd", "bwd", "bwd_into", "varlen_fwd", "varlen_bwd", "varlen_bwd_into", *FLAG_GEMS]
VARLEN = [name for name in ATTENTION if "varlen" in name]
NEEDS = {"need_dq": True, "need_dkv": True, "need_dbias": True}


def registered(name: str) -> torch._C.FunctionSchema:
    return getattr(torch.ops.flash_attn_plus, name).default._schema


def defaults(name: str) -> dict[str, object]:
    """Every argument that has a default, in order."""
    return {a.name: a.default_value for a in registered(name).arguments if a.has_default_value()}


def one_argument_a_line(name: str) -> str:
    arguments, results = str(registered(name)).split(" -> ")
    return f"{arguments[:-1]}\n) -> {results}".replace("(", "(\n", 1).replace(", ", ",\n", arguments.count(", "))


class TestSnapshots:
    """Changing, moving or removing a line breaks exported programs; appending an argument with a default does not."""

    def test_operators(self) -> None:
        names = torch._C._dispatch_get_all_op_names()
        ours = sorted(name for name in names if name.startswith("flash_attn_plus::"))
        assert ours == sorted(f"flash_attn_plus::{name}" for name in SCHEMAS)
        assert_expected_inline(
            "\n".join(ours),
            """\
flash_attn_plus::_cpu_forward
flash_attn_plus::append_kv
flash_attn_plus::bwd
flash_attn_plus::bwd_into
flash_attn_plus::combine
flash_attn_plus::decode
flash_attn_plus::flag_gems_fwd
flash_attn_plus::flag_gems_varlen_fwd
flash_attn_plus::fwd
flash_attn_plus::merge_states
flash_attn_plus::rotary
flash_attn_plus::rotary_
flash_attn_plus::varlen_bwd
flash_attn_plus::varlen_bwd_into
flash_attn_plus::varlen_fwd""",
        )

    def test_fwd(self) -> None:
        assert_expected_inline(
            one_argument_a_line("fwd"),
            """\
flash_attn_plus::fwd(
Tensor q,
Tensor k,
Tensor v,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False
) -> (Tensor out, Tensor lse)""",
        )

    def test_bwd(self) -> None:
        assert_expected_inline(
            one_argument_a_line("bwd"),
            """\
flash_attn_plus::bwd(
Tensor dout,
Tensor q,
Tensor k,
Tensor v,
Tensor out,
Tensor lse,
Tensor? dlse,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False,
bool need_dq=True,
bool need_dkv=True,
bool need_dbias=True
) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink, Tensor dbias)""",
        )

    def test_append_kv(self) -> None:
        assert_expected_inline(
            one_argument_a_line("append_kv"),
            """\
flash_attn_plus::append_kv(
Tensor(a!) k_cache,
Tensor(b!) v_cache,
Tensor k,
Tensor v,
Tensor cache_seqlens,
Tensor? cache_batch_idx=None,
Tensor? block_table=None,
Tensor? rotary_cos=None,
Tensor? rotary_sin=None,
bool rotary_interleaved=True
) -> ()""",
        )

    def test_decode(self) -> None:
        assert_expected_inline(
            one_argument_a_line("decode"),
            """\
flash_attn_plus::decode(
Tensor q,
Tensor k_cache,
Tensor v_cache,
Tensor? cache_seqlens=None,
SymInt seqlen_new=0,
Tensor? cache_batch_idx=None,
Tensor? cache_leftpad=None,
Tensor? block_table=None,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False,
SymInt num_splits=0
) -> (Tensor out, Tensor lse)""",
        )

    def test_varlen_fwd(self) -> None:
        assert_expected_inline(
            one_argument_a_line("varlen_fwd"),
            """\
flash_attn_plus::varlen_fwd(
Tensor q,
Tensor k,
Tensor v,
Tensor cu_seqlens_q,
Tensor cu_seqlens_k,
SymInt max_seqlen_q,
SymInt max_seqlen_k,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False,
Tensor? seqused_q=None,
Tensor? seqused_k=None,
Tensor? leftpad_k=None,
Tensor? block_table=None
) -> (Tensor out, Tensor lse)""",
        )

    def test_varlen_bwd(self) -> None:
        assert_expected_inline(
            one_argument_a_line("varlen_bwd"),
            """\
flash_attn_plus::varlen_bwd(
Tensor dout,
Tensor q,
Tensor k,
Tensor v,
Tensor out,
Tensor lse,
Tensor? dlse,
Tensor cu_seqlens_q,
Tensor cu_seqlens_k,
SymInt max_seqlen_q,
SymInt max_seqlen_k,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False,
Tensor? seqused_q=None,
Tensor? seqused_k=None,
Tensor? leftpad_k=None,
Tensor? block_table=None,
bool need_dq=True,
bool need_dkv=True,
bool need_dbias=True
) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink, Tensor dbias)""",
        )

    def test_bwd_into(self) -> None:
        assert_expected_inline(
            one_argument_a_line("bwd_into"),
            """\
flash_attn_plus::bwd_into(
Tensor dout,
Tensor q,
Tensor k,
Tensor v,
Tensor out,
Tensor lse,
Tensor? dlse,
Tensor(a!)? dq,
Tensor(b!)? dk,
Tensor(c!)? dv,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False,
bool need_dbias=True
) -> (Tensor dsink, Tensor dbias)""",
        )

    def test_varlen_bwd_into(self) -> None:
        assert_expected_inline(
            one_argument_a_line("varlen_bwd_into"),
            """\
flash_attn_plus::varlen_bwd_into(
Tensor dout,
Tensor q,
Tensor k,
Tensor v,
Tensor out,
Tensor lse,
Tensor? dlse,
Tensor(a!)? dq,
Tensor(b!)? dk,
Tensor(c!)? dv,
Tensor cu_seqlens_q,
Tensor cu_seqlens_k,
SymInt max_seqlen_q,
SymInt max_seqlen_k,
float? softmax_scale=None,
bool causal=False,
SymInt window_left=-1,
SymInt window_right=-1,
SymInt? diagonal=None,
float softcap=0.,
Tensor? alibi_slopes=None,
Tensor? attn_bias=None,
Tensor? sink=None,
float dropout_p=0.,
Tensor? rng_state=None,
bool deterministic=False,
Tensor? seqused_q=None,
Tensor? seqused_k=None,
Tensor? leftpad_k=None,
Tensor? block_table=None,
bool need_dbias=True
) -> (Tensor dsink, Tensor dbias)""",
        )

    def test_merge_states(self) -> None:
        assert_expected_inline(
            one_argument_a_line("merge_states"),
            """\
flash_attn_plus::merge_states(
Tensor out1,
Tensor lse1,
Tensor out2,
Tensor lse2
) -> (Tensor out, Tensor lse)""",
        )

    def test_combine(self) -> None:
        assert_expected_inline(
            one_argument_a_line("combine"),
            """\
flash_attn_plus::combine(
Tensor out_partial,
Tensor lse_partial,
ScalarType? out_dtype=None
) -> (Tensor out, Tensor lse)""",
        )

    @pytest.mark.parametrize("name", ["rotary", "rotary_"])
    def test_rotary(self, name: str) -> None:
        shown = one_argument_a_line(name)
        if name == "rotary_":
            shown = shown.replace("rotary_(\nTensor(a!) x", "rotary(\nTensor x").replace("-> ()", "-> Tensor")
        assert_expected_inline(
            shown,
            """\
flash_attn_plus::rotary(
Tensor x,
Tensor cos,
Tensor sin,
SymInt offset=0,
Tensor? seqlen_offsets=None,
Tensor? cu_seqlens=None,
SymInt? max_seqlen=None,
bool interleaved=False,
bool conjugate=False
) -> Tensor""",
        )


class TestShape:
    @pytest.mark.parametrize("name", SCHEMAS)
    def test_registered_as_written(self, name: str) -> None:
        assert registered(name) == torch._C.parse_schema(f"flash_attn_plus::{name}{SCHEMAS[name]}")

    @pytest.mark.parametrize("name", SCHEMAS)
    def test_no_keyword_only_arguments(self, name: str) -> None:
        """They would reach kernels as kwargs, and the dispatcher drops trailing arguments that equal their defaults."""
        assert not [argument.name for argument in registered(name).arguments if argument.kwarg_only]

    @pytest.mark.parametrize("name", SCHEMAS)
    def test_pure_but_for_what_its_name_says(self, name: str) -> None:
        """No argument is written to but the gradients of ``*_into``, the caches of ``append_kv``, and the first one of
        ``*_``; no result is a view of one.
        """
        schema = registered(name)
        written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
        expected = {"into": ["dq", "dk", "dv"], "": ["x"], "kv": ["k_cache", "v_cache"]}
        assert written == expected.get(name.rpartition("_")[2], [])
        assert schema.is_mutable == bool(written)
        assert not [value.name for value in schema.returns if value.alias_info is not None]

    @pytest.mark.parametrize("name", SCHEMAS)
    def test_tags(self, name: str) -> None:
        assert getattr(torch.ops.flash_attn_plus, name).default.tags == [torch.Tag.pt2_compliant_tag]

    @pytest.mark.parametrize("name", ATTENTION)
    def test_lengths_and_windows_are_symbolic(self, name: str) -> None:
        """As plain ints they would recompile for every value."""
        symbolic = set(re.findall(r"SymInt\??\s(\w+)", str(registered(name))))
        lengths = {"max_seqlen_q", "max_seqlen_k"} if name in VARLEN else set()
        assert symbolic == {"window_left", "window_right", "diagonal", *lengths}


class TestStructuredArguments:
    """Variant, Varlen and Rotation hold the schemas' arguments: the same names, order and defaults."""

    @pytest.mark.parametrize(
        "name, structure",
        [
            *((name, Variant) for name in ATTENTION),
            *((name, Varlen) for name in VARLEN),
            *((name, Rotation) for name in ("rotary", "rotary_")),
        ],
    )
    def test_fields_are_arguments(self, name: str, structure: type) -> None:
        names = [argument.name for argument in registered(name).arguments if argument.name in structure._fields]
        assert tuple(names) == structure._fields
        given = [(n, default) for n, default in defaults(name).items() if n in structure._fields]
        assert given == list(structure._field_defaults.items())

    @pytest.mark.parametrize("name", ATTENTION)
    def test_every_option_is_a_field(self, name: str) -> None:
        """Only the gradients that somebody needs are told beside them."""
        others = {n: default for n, default in defaults(name).items() if n not in (*Variant._fields, *Varlen._fields)}
        needs = {"bwd": list(NEEDS), "into": ["need_dbias"]}.get(name.rpartition("_")[2], [])
        assert others == {need: NEEDS[need] for need in needs}

    @pytest.mark.parametrize("name", VARLEN)
    def test_the_layout_comes_first(self, name: str) -> None:
        names = [argument.name for argument in registered(name).arguments if not argument.has_default_value()]
        assert tuple(names[-4:]) == Varlen._fields[:4]

    def test_every_field_of_variant_has_a_default(self) -> None:
        assert tuple(Variant._field_defaults) == Variant._fields
        assert Variant() == tuple(Variant._field_defaults.values())


def test_readable_without_pytorch() -> None:
    """Tools read the schemas and diff them where PyTorch is not installed."""
    path = Path(schemas.__file__)
    code = f"""if True:
        import runpy, sys
        sys.modules["torch"] = None
        names = runpy.run_path({str(path)!r})
        assert names["Variant"]().window_left == -1
        print(*names["SCHEMAS"])
    """
    printed = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == list(SCHEMAS)


class TestBand:
    """``band`` is the one place that turns options into (left, right, diagonal)."""

    @pytest.mark.parametrize(
        "options, expected",
        [
            ({}, (-1, -1, 3)),
            ({"causal": True}, (-1, 0, 3)),
            ({"causal": True, "window_left": 4, "window_right": 9}, (4, 0, 3)),
            ({"window_left": 4, "window_right": 9}, (4, 9, 3)),
            ({"window_left": -7, "window_right": -2}, (-1, -1, 3)),
            ({"window_left": 0, "window_right": 0, "diagonal": 0}, (0, 0, 0)),
            ({"causal": True, "diagonal": -5}, (-1, 0, -5)),
        ],
    )
    def test_band(self, options: dict, expected: tuple[int, int, int]) -> None:
        assert schemas.band(Variant(**options), 5, 8) == expected
