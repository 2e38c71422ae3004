"""flash-attn, xformers and their like, by name alone: fake modules stand in for libraries that are not installed."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from bsa_compile.passes import rewrite

from .support import ALL, Block, Opaque, Recorder, SelfAttention, Video, capture, count, latents, outcomes

FLASH_2 = """
import torch.nn.functional as F

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=True)
    out = out.transpose(1, 2).contiguous()
    return (out, q.float().sum(-1), None) if return_attn_probs else out

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
"""

FLASH_3 = """
import torch.nn.functional as F

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                    deterministic=False, sm_margin=0):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal)
    return out.transpose(1, 2).contiguous(), q.float().sum(-1)
"""

XFORMERS = """
import torch.nn.functional as F

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2)
"""


def fake(monkeypatch, name, source):
    """A module of this name whose functions Dynamo keeps as single nodes."""
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    for part in [name[: i or None] for i in (*(i for i, c in enumerate(name) if c == "."), 0)]:
        monkeypatch.setitem(sys.modules, part, module if part == name else types.ModuleType(part))
    for value in list(module.__dict__.values()):
        if isinstance(value, types.FunctionType):
            torch._dynamo.allow_in_graph(value)
    return module


def check(attend, bshd=True):
    """Rewritten and right."""
    model, video = Video(SelfAttention(attend, bshd=bshd)).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    assert outcomes(recorder.reports[0]) == [("blocks.0", "self", "rewritten")]
    return recorder.after[0]


def refused(attend):
    model = Video(SelfAttention(attend, bshd=True))
    before = capture(model, latents())
    after, report = rewrite(before, ALL)
    assert after is before
    (site,) = report.sites
    return site.reason, site.detail


def test_flash_attention_2(monkeypatch):
    flash = fake(monkeypatch, "flash_attn.flash_attn_interface", FLASH_2).flash_attn_func
    after = check(lambda q, k, v: flash(q, k, v, dropout_p=0.0, softmax_scale=0.3))
    assert count(after, "aten::transpose") == 4
    assert count(after, "aten::clone") == 0
    attend = next(n for n in after.graph.nodes if n.target is torch.ops.bsa.attend.default)
    assert attend.args[9] == 0.3
    check(lambda q, k, v: flash(q, k[:, :, :1], v[:, :, :1]))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"causal": True}, "causal"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"window_size": (64, 0)}, "variant"),
        ({"softcap": 30.0}, "variant"),
    ],
)
def test_flash_attention_2_variants(monkeypatch, arguments, reason):
    flash = fake(monkeypatch, "flash_attn.flash_attn_interface", FLASH_2).flash_attn_func
    found, detail = refused(lambda q, k, v: flash(q, k, v, **arguments))
    assert found == reason
    assert next(iter(arguments)) in detail


def test_flash_attention_probabilities(monkeypatch):
    flash = fake(monkeypatch, "flash_attn.flash_attn_interface", FLASH_2).flash_attn_func
    assert refused(lambda q, k, v: flash(q, k, v, return_attn_probs=True)[0])[0] == "variant"


def test_flash_attention_varlen(monkeypatch):
    flash = fake(monkeypatch, "flash_attn.flash_attn_interface", FLASH_2).flash_attn_varlen_func
    lengths = torch.tensor([0, 96], dtype=torch.int32)
    assert refused(lambda q, k, v: flash(q[0], k[0], v[0], lengths, lengths, 96, 96)[None])[0] == "variant"


def test_flash_attention_3_returns_a_tuple(monkeypatch):
    flash = fake(monkeypatch, "flash_attn_interface", FLASH_3).flash_attn_func

    def first(q, k, v):
        x, *_ = flash(q.contiguous(), k.contiguous(), v.contiguous(), softmax_scale=0.25)
        return x

    check(first)

    def both(q, k, v):
        out, lse = flash(q, k, v)
        return out + lse.mean()

    assert refused(both) == ("variant", "its log-sum-exp is used")


def test_xformers(monkeypatch):
    attention = fake(monkeypatch, "xformers.ops.fmha", XFORMERS).memory_efficient_attention
    check(lambda q, k, v: attention(q, k, v, attn_bias=None, op=None))
    assert refused(lambda q, k, v: attention(q, k, v, attn_bias=torch.zeros(1, 2, 96, 96)))[0] == "mask"
    assert refused(lambda q, k, v: attention(q, k, v, p=0.5))[0] == "dropout"


def test_the_custom_op_of_flash_attention():
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define(
            "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal,"
            " int window_size_left, int window_size_right, float softcap, Tensor? alibi_slopes, bool return_softmax)"
            " -> (Tensor, Tensor, Tensor, Tensor)"
        )

        def forward(q, k, v, dropout_p, scale, causal, left, right, softcap, slopes, return_softmax):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
            return out.transpose(1, 2).contiguous(), q.float().sum(-1), q.new_empty(0), q.new_empty(0)

        library.impl("_flash_attn_forward", forward, "CPU")
        library.impl("_flash_attn_forward", forward, "Meta")
        op = torch.ops.flash_attn._flash_attn_forward

        def attend(left, q, k, v):
            return op(q, k, v, 0.0, 0.25, False, left, -1, 0.0, None, False)[0]

        check(lambda q, k, v: attend(-1, q, k, v))
        assert refused(lambda q, k, v: attend(0, q, k, v)) == ("variant", "window_size_left=0")


# -- attention that cannot be seen ------------------------------------------------------------------------------------


def test_multihead_attention_is_opaque():
    before = capture(Video(Block(Opaque())), latents())
    after, report = rewrite(before, ALL)
    assert after is before
    assert outcomes(report) == [("blocks.0.attn.mha", "self", "opaque")]


def test_flex_attention_is_opaque():
    model = Video(Block(SelfAttention(flex_attention))).requires_grad_(False)
    with torch.no_grad():
        _, report = rewrite(capture(model, latents()), ALL)
    assert [s.reason for s in report.sites] == ["opaque"]


def test_attention_written_out_is_reported():
    def attend(q, k, v):
        return ((q * 0.25) @ k.transpose(-1, -2)).float().softmax(-1).to(v.dtype) @ v

    _, report = rewrite(capture(Video(Block(SelfAttention(attend))), latents()), ALL)
    (site,) = report.sites
    assert (site.module, site.reason, site.op) == ("blocks.0.attn", "opaque", "matmul-softmax-matmul")


def test_another_library_s_attention_is_reported():
    with torch.library._scoped_library("sage", "FRAGMENT") as library:
        library.define("sageattn(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.impl("sageattn", lambda q, k, v: q + k + v, "CompositeExplicitAutograd")
        _, report = rewrite(capture(Video(Block(SelfAttention(torch.ops.sage.sageattn))), latents()), ALL)
    (site,) = report.sites
    assert (site.reason, site.detail) == ("opaque", "sage::sageattn")


def test_a_lowered_attention_is_reported():
    def attend(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    _, report = rewrite(capture(Video(Block(SelfAttention(attend))), latents()), ALL)
    (site,) = report.sites
    assert site.reason == "variant"
    assert "run_decompositions" in site.detail
