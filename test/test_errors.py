"""Every argument error: its type and its sentence, the same from the function, the operator and the fake.

Run with EXPECTTEST_ACCEPT=1 to rewrite the sentences after a deliberate change.
"""

from __future__ import annotations

import re

import pytest
import torch
from expecttest import TestCase

import flash_attn_plus as fap
from flash_attn_plus import library

ops = torch.ops.flash_attn_plus


def dense(device="cpu", **changes):
    base = {"q": (2, 5, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8)}
    tensors = {name: torch.zeros(changes.pop(name, shape), device=device) for name, shape in base.items()}
    return tensors | changes


def varlen(device="cpu", **changes):
    base = {"q": (5, 4, 8), "k": (6, 2, 8), "v": (6, 2, 8)}
    tensors = {name: torch.zeros(changes.pop(name, shape), device=device) for name, shape in base.items()}
    layout = {
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 2, 6], dtype=torch.int32),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
    }
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in (layout | changes).items()}
    return tensors | moved


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


DENSE = {
    "q has 3 dimensions": dict(q=(5, 4, 8)),
    "v has 5 dimensions": dict(v=(1, 2, 6, 2, 8)),
    "batches differ": dict(k=(3, 6, 2, 8)),
    "key and value lengths differ": dict(v=(2, 7, 2, 8)),
    "head dimensions differ": dict(k=(2, 6, 2, 16), v=(2, 6, 2, 16)),
    "heads do not divide": dict(k=(2, 6, 3, 8), v=(2, 6, 3, 8)),
    "no key heads": dict(k=(2, 6, 0, 8), v=(2, 6, 0, 8)),
    "head_dim 0": dict(q=(2, 5, 4, 0), k=(2, 6, 2, 0)),
    "head_dim 257": dict(q=(2, 5, 4, 257), k=(2, 6, 2, 257)),
    "softcap negative": dict(softcap=-1.0),
    "softcap nan": dict(softcap=float("nan")),
    "dropout_p 1": dict(dropout_p=1.0),
    "dropout_p negative": dict(dropout_p=-0.1),
    "slopes in half precision": dict(alibi_slopes=torch.zeros(4, dtype=torch.float16)),
    "slopes of the wrong length": dict(alibi_slopes=torch.zeros(2)),
    "slopes with 3 dimensions": dict(alibi_slopes=torch.zeros(2, 4, 1)),
    "slopes of the wrong batch": dict(alibi_slopes=torch.zeros(3, 4)),
    "sink of integers": dict(sink=torch.zeros(4, dtype=torch.int64)),
    "sink of the wrong length": dict(sink=torch.zeros(5)),
    "bias of integers": dict(attn_bias=torch.zeros(1, 1, 5, 6, dtype=torch.int64)),
    "bias of the wrong keys": dict(attn_bias=torch.zeros(1, 1, 5, 7)),
    "bias with 5 dimensions": dict(attn_bias=torch.zeros(1, 1, 1, 5, 6)),
}
VARLEN = {
    "q has 4 dimensions": dict(q=(1, 5, 4, 8)),
    "k in pages without a table": dict(k=(2, 3, 2, 8), v=(2, 3, 2, 8)),
    "k in rows with a table": dict(block_table=ints([0], [1])),
    "offsets in int64": dict(cu_seqlens_q=torch.tensor([0, 2, 5])),
    "offsets with 2 dimensions": dict(cu_seqlens_q=ints([0, 2, 5])),
    "no offsets": dict(cu_seqlens_q=ints()),
    "different batches": dict(cu_seqlens_k=ints(0, 6)),
    "negative longest": dict(max_seqlen_q=-1),
    "seqused_k of the wrong length": dict(seqused_k=ints(1)),
    "leftpad with pages": dict(k=(2, 4, 2, 8), v=(2, 4, 2, 8), block_table=ints([0], [1]), leftpad_k=ints(0, 0)),
    "table in int64": dict(k=(2, 4, 2, 8), v=(2, 4, 2, 8), block_table=torch.tensor([[0], [1]])),
    "table of the wrong batch": dict(k=(2, 4, 2, 8), v=(2, 4, 2, 8), block_table=ints([0])),
    "bias of the wrong queries": dict(attn_bias=torch.zeros(1, 1, 5, 4)),
}
VALUES = {
    "offsets that fall": dict(cu_seqlens_q=ints(0, 3, 2)),
    "offsets past the end": dict(cu_seqlens_k=ints(0, 2, 7), max_seqlen_k=5),
    "longest too small": dict(max_seqlen_k=3),
    "seqused_k past its segment": dict(seqused_k=ints(3, 4)),
    "leftpad_k longer than its sequence": dict(leftpad_k=ints(0, 5)),
    "page number out of range": dict(k=(2, 4, 2, 8), v=(2, 4, 2, 8), block_table=ints([0], [2])),
    "too few pages": dict(k=(9, 2, 2, 8), v=(9, 2, 2, 8), block_table=ints([0], [1])),
}


def sentence(function, *args, **kwargs) -> str:
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        function(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


class Sentences(TestCase):
    maxDiff = None

    def test_dense(self):
        found = "\n".join(f"{name} -> {sentence(fap.flash_attn_func, **dense(**c))}" for name, c in DENSE.items())
        self.assertExpectedInline(
            found,
            """\
q has 3 dimensions -> ValueError: q: expected 4 dimensions (batch, seqlen, heads, head_dim), got shape (5, 4, 8)
v has 5 dimensions -> ValueError: v: expected 4 dimensions (batch, seqlen, heads, head_dim), got shape (1, 2, 6, 2, 8)
batches differ -> ValueError: k: expected shape (batch, seqlen_k, heads_k, head_dim) = (2, 6, 2, 8), got (3, 6, 2, 8)
key and value lengths differ -> ValueError: v: expected shape (batch, seqlen_k, heads_k, head_dim_v) = (2, 6, 2, 8), got (2, 7, 2, 8)
head dimensions differ -> ValueError: k: expected head_dim 8 (q's), got shape (2, 6, 2, 16)
heads do not divide -> ValueError: q: expected the number of heads to be a multiple of k's (3), got 4 (shape (2, 5, 4, 8))
no key heads -> ValueError: k: expected at least one head, got shape (2, 6, 0, 8)
head_dim 0 -> ValueError: q: expected head_dim of at least 1, got shape (2, 5, 4, 0)
head_dim 257 -> NotImplementedError: q: head_dim up to 256 is implemented, got 257
softcap negative -> ValueError: softcap: expected 0 (off) or a positive number, got -1.0
softcap nan -> ValueError: softcap: expected 0 (off) or a positive number, got nan
dropout_p 1 -> ValueError: dropout_p: expected a probability in [0, 1), got 1.0
dropout_p negative -> ValueError: dropout_p: expected a probability in [0, 1), got -0.1
slopes in half precision -> TypeError: alibi_slopes: expected dtype torch.float32, got torch.float16
slopes of the wrong length -> ValueError: alibi_slopes: expected shape (heads,) = (4,), got (2,)
slopes with 3 dimensions -> ValueError: alibi_slopes: expected shape (heads,) or (batch, heads), got (2, 4, 1)
slopes of the wrong batch -> ValueError: alibi_slopes: expected shape (batch, heads) = (2, 4), got (3, 4)
sink of integers -> TypeError: sink: expected a floating dtype of 16, 32 or 64 bits, got torch.int64
sink of the wrong length -> ValueError: sink: expected shape (heads,) = (4,), got (5,)
bias of integers -> TypeError: attn_bias: expected a floating dtype of 16, 32 or 64 bits or torch.bool (True keeps), got torch.int64
bias of the wrong keys -> ValueError: attn_bias: expected each dimension of (batch, heads, seqlen_q, seqlen_k) = (2, 4, 5, 6) or 1, got (1, 1, 5, 7)
bias with 5 dimensions -> ValueError: attn_bias: expected 4 dimensions (batch, heads, seqlen_q, seqlen_k), got shape (1, 1, 1, 5, 6)""",
        )

    def test_varlen(self):
        found = "\n".join(
            f"{name} -> {sentence(fap.flash_attn_varlen_func, **varlen(**c))}" for name, c in VARLEN.items()
        )
        self.assertExpectedInline(
            found,
            """\
q has 4 dimensions -> ValueError: q: expected 3 dimensions (total_q, heads, head_dim), got shape (1, 5, 4, 8)
k in pages without a table -> ValueError: k: expected 3 dimensions (total_k, heads_k, head_dim), got shape (2, 3, 2, 8)
k in rows with a table -> ValueError: k: expected 4 dimensions (num_pages, page_size, heads_k, head_dim), got shape (6, 2, 8)
offsets in int64 -> TypeError: cu_seqlens_q: expected dtype torch.int32, got torch.int64
offsets with 2 dimensions -> ValueError: cu_seqlens_q: expected shape (batch + 1,), got (1, 3)
no offsets -> ValueError: cu_seqlens_q: expected shape (batch + 1,) with at least one entry, got (0,)
different batches -> ValueError: cu_seqlens_k: expected shape (batch + 1,) = (3,), got (2,)
negative longest -> ValueError: max_seqlen_q: expected a length of at least 0, got -1
seqused_k of the wrong length -> ValueError: seqused_k: expected shape (batch,) = (2,), got (1,)
leftpad with pages -> NotImplementedError: leftpad_k: expected None beside block_table, got a tensor
table in int64 -> TypeError: block_table: expected dtype torch.int32, got torch.int64
table of the wrong batch -> ValueError: block_table: expected shape (batch, max_pages) = (2, 1), got (1, 1)
bias of the wrong queries -> ValueError: attn_bias: expected each dimension of (batch, heads, seqlen_q, seqlen_k) = (2, 4, 3, 4) or 1, got (1, 1, 5, 4)""",
        )

    def test_varlen_values_on_the_cpu(self):
        found = "\n".join(
            f"{name} -> {sentence(fap.flash_attn_varlen_func, **varlen(**c))}" for name, c in VALUES.items()
        )
        self.assertExpectedInline(
            found,
            """\
offsets that fall -> ValueError: cu_seqlens_q: expected offsets that are not negative and never fall, got [0, 3, 2]
offsets past the end -> ValueError: cu_seqlens_k: expected to end at or before the 6 rows of k, got 7
longest too small -> ValueError: max_seqlen_k: expected at least the longest sequence (4), got 3
seqused_k past its segment -> ValueError: seqused_k: expected lengths between 0 and the segment's 2, got [3, 4]
leftpad_k longer than its sequence -> ValueError: leftpad_k: expected padding between 0 and the sequence's 4 keys, got [0, 5]
page number out of range -> ValueError: block_table: expected page numbers between 0 and 1, got [2]
too few pages -> ValueError: block_table: expected enough pages of 2 for 4 keys, got 1 pages""",
        )

    def test_dtypes(self):
        q, k, v = dense().values()
        found = "\n".join(
            sentence(fap.flash_attn_func, *args)
            for args in ((q.long(), k, v), (q, k.half(), v), (q, k, v.double()), (q.to_sparse(), k, v))
        )
        self.assertExpectedInline(
            found,
            """\
TypeError: q: expected dtype float16, bfloat16, float32 or float64, got torch.int64
TypeError: k: expected dtype torch.float32 (q's), got torch.float16
TypeError: v: expected dtype torch.float32 (q's), got torch.float64
TypeError: q: expected a strided tensor, got layout torch.sparse_coo""",
        )

    def test_rng_state(self):
        q, k, v = dense().values()
        states = (None, torch.zeros(2), torch.zeros(3, dtype=torch.int64))
        found = "\n".join(sentence(ops.fwd, q, k, v, dropout_p=0.5, rng_state=state) for state in states)
        self.assertExpectedInline(
            found,
            """\
ValueError: rng_state: expected an int64 tensor (seed, offset) because dropout_p is 0.5, got None
TypeError: rng_state: expected dtype torch.int64, got torch.float32
ValueError: rng_state: expected shape (seed, offset) = (2,), got (3,)""",
        )

    def test_backward(self):
        q, k, v = dense().values()
        out, lse = ops.fwd(q, k, v)
        found = "\n".join(
            sentence(ops.bwd, *saved)
            for saved in (
                (out[:, :4], q, k, v, out, lse, None),
                (out.half(), q, k, v, out, lse, None),
                (out, q, k, v, out[..., :4], lse, None),
                (out, q, k, v, out, lse.double(), None),
                (out, q, k, v, out, lse.transpose(1, 2), None),
                (out, q, k, v, out, lse, lse[:1]),
            )
        )
        self.assertExpectedInline(
            found,
            """\
ValueError: dout: expected shape of the output = (2, 5, 4, 8), got (2, 4, 4, 8)
TypeError: dout: expected dtype torch.float32 (q's) or torch.float32, got torch.float16
ValueError: out: expected shape of the output = (2, 5, 4, 8), got (2, 5, 4, 4)
TypeError: lse: expected dtype torch.float32, got torch.float64
ValueError: lse: expected shape of the log-sum-exp = (2, 4, 5), got (2, 5, 4)
ValueError: dlse: expected shape of the log-sum-exp = (2, 4, 5), got (1, 4, 5)""",
        )

    def test_states(self):
        out, lse = torch.zeros(2, 5, 4, 8), torch.zeros(2, 4, 5)
        found = "\n".join(
            [
                sentence(fap.merge_states, out, lse, out[:1], lse[:1]),
                sentence(fap.merge_states, out, lse.transpose(1, 2), out, lse),
                sentence(fap.merge_states, out, lse, out, lse.half()),
                sentence(fap.merge_states, out[0, 0], lse, out[0, 0], lse),
                sentence(fap.flash_attn_combine, out, lse[0]),
                sentence(fap.flash_attn_combine, out[0, 0], lse[0, 0]),
                sentence(fap.flash_attn_combine, out[None], lse[None].repeat(2, 1, 1, 1)),
                sentence(fap.flash_attn_combine, out[None][:0], lse[None][:0]),
                sentence(fap.flash_attn_combine, out[None], lse[None], out_dtype=torch.int32),
            ]
        )
        self.assertExpectedInline(
            found,
            """\
ValueError: out2: expected shape of out1 = (2, 5, 4, 8), got (1, 5, 4, 8)
ValueError: lse1: expected shape (batch, heads, seqlen) = (2, 4, 5), got (2, 5, 4)
TypeError: lse2: expected dtype torch.float32 or torch.float64, got torch.float16
ValueError: out1: expected shape (batch, seqlen, heads, head_dim) or (total, heads, head_dim), got (4, 8)
ValueError: lse_partial: expected 3 dimensions beside out_partial (2, 5, 4, 8), got shape (4, 5)
ValueError: out_partial: expected shape (splits, batch, seqlen, heads, head_dim) or (splits, total, heads, head_dim), got (4, 8)
ValueError: lse_partial: expected 1 splits (out_partial's), got shape (2, 2, 4, 5)
ValueError: out_partial: expected at least one split, got shape (0, 2, 5, 4, 8)
TypeError: out_dtype: expected a floating dtype, got torch.int32""",
        )

    def test_functions(self):
        q, k, v = dense().values()
        found = "\n".join(
            [
                sentence(fap.flash_attn_func, q, k, v, return_lse=True, return_attn_probs=True),
                sentence(fap.flash_attn_func, q, k, v, window_size=(1,)),
                sentence(fap.flash_attn_qkvpacked_func, torch.zeros(2, 5, 2, 4, 8)),
                sentence(fap.flash_attn_qkvpacked_func, torch.zeros(2, 5, 3, 8)),
                sentence(fap.flash_attn_kvpacked_func, q, torch.zeros(2, 5, 3, 4, 8)),
                sentence(fap.flash_attn_varlen_qkvpacked_func, torch.zeros(5, 4, 4, 8), ints(0, 5), 5),
                sentence(fap.flash_attn_varlen_kvpacked_func, q[0], torch.zeros(5, 4, 8), ints(0, 5), ints(0, 5), 5, 5),
            ]
        )
        self.assertExpectedInline(
            found,
            """\
ValueError: return_lse: expected at most one of return_lse and return_attn_probs, got both
ValueError: window_size: expected (left, right), got (1,)
ValueError: qkv: expected shape (batch, seqlen, 3, heads, head_dim), got (2, 5, 2, 4, 8)
ValueError: qkv: expected shape (batch, seqlen, 3, heads, head_dim), got (2, 5, 3, 8)
ValueError: kv: expected shape (batch, seqlen_k, 2, heads_k, head_dim), got (2, 5, 3, 4, 8)
ValueError: qkv: expected shape (total, 3, heads, head_dim), got (5, 4, 4, 8)
ValueError: kv: expected shape (total_k, 2, heads_k, head_dim), got (5, 4, 8)""",
        )


@pytest.mark.parametrize("name", DENSE)
def test_operator_fake_and_meta_say_the_same(name):
    expected = sentence(fap.flash_attn_func, **dense(**DENSE[name]))
    options = dict(DENSE[name])
    shapes = {n: options.pop(n) for n in ("q", "k", "v") if n in options}
    if "dropout_p" in options:
        options["rng_state"] = torch.tensor([1, 2])
    moved = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    if not ("bias" in name and "5 dimensions" in name):
        assert sentence(ops.fwd, **dense(**shapes), **options) == expected
    assert sentence(ops.fwd, **dense("meta", **shapes), **moved) == expected.replace("cpu", "meta")


@pytest.mark.parametrize("name", VARLEN)
def test_varlen_meta_says_the_same(name):
    expected = sentence(fap.flash_attn_varlen_func, **varlen(**VARLEN[name]))
    assert sentence(fap.flash_attn_varlen_func, **varlen("meta", **VARLEN[name])) == expected


@pytest.mark.parametrize("name", ["q has 3 dimensions", "sink of the wrong length", "softcap negative"])
def test_compile_carries_the_sentence(name):
    arguments = dense(**DENSE[name])
    expected = sentence(fap.flash_attn_func, **arguments).split(": ", 1)[1]
    torch._dynamo.reset()  # sizes seen in another test would stand in the sentence as symbols
    compiled = torch.compile(fap.flash_attn_func, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=re.escape(expected)):
        compiled(**arguments)


def test_nothing_runs_before_the_checks(monkeypatch):
    """A wrong argument never reaches a device's module."""
    monkeypatch.setattr("flash_attn_plus.cpu.forward", None)
    assert library.BACKENDS["CPU"] == "cpu"
    with pytest.raises(ValueError, match="sink"):
        fap.flash_attn_func(**dense(sink=torch.zeros(5)))


def test_other_devices_are_named():
    q, k, v = dense().values()
    with pytest.raises(ValueError, match="k: expected device cpu"):
        ops.fwd(q, k.to("meta"), v)
