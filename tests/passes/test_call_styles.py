"""How `F.scaled_dot_product_attention` is called, and which calls cannot be rewritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bsa_compile.passes import rewrite

from .support import (
    ALL,
    Block,
    Recorder,
    SelfAttention,
    Video,
    attention_of,
    capture,
    latents,
    outcomes,
)

CALLS = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "all keywords": lambda q, k, v: F.scaled_dot_product_attention(
        value=v, key=k, query=q, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
    "mixed": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v, dropout_p=0.0),
    "all positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
    "C function": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v),
    "aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
    "aten packet": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.parametrize("attend", CALLS.values(), ids=CALLS)
def test_call_styles(attend):
    _, report = rewrite(capture(Video(SelfAttention(attend)), latents()), ALL)
    assert outcomes(report) == [("blocks.0", "self", "rewritten")]


def test_scale_is_kept():
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7)  # noqa: E731
    after, _ = rewrite(capture(Video(Block(SelfAttention(attend))), latents()), ALL)
    node = attention_of(after)
    assert node.args[9] == 0.7
    assert node.args[3].args[0].args[4] == 0.7


REFUSED = {
    "mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(96, 96).bool()), "mask"),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), "dropout"),
    "head_dim": (
        lambda q, k, v: F.pad(F.scaled_dot_product_attention(q[..., :12], k[..., :12], v[..., :12]), (0, 4)),
        "head_dim",
    ),
    "value width": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]).repeat(1, 1, 1, 2), "shape"),
    "rank": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0])[None], "shape"),
}


@pytest.mark.parametrize(("attend", "reason"), REFUSED.values(), ids=REFUSED)
def test_calls_that_stay_dense(attend, reason):
    before = capture(Video(SelfAttention(attend)), latents())
    after, report = rewrite(before, ALL)
    assert after is before
    assert outcomes(report) == [("blocks.0", "self", reason)]


@pytest.mark.parametrize(("device", "reason"), [("cpu", "rewritten"), ("meta", "dtype")])
def test_float64_is_for_the_cpu_alone(device, reason):
    model, video = Video(depth=1).double().to(device), latents().double().to(device)
    _, report = rewrite(capture(model, video), ALL)
    assert outcomes(report) == [("blocks.0.attn", "self", reason)]


def test_fewer_key_heads():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)

    model, video = Video(Block(SelfAttention(attend))).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    assert outcomes(recorder.reports[0]) == [("blocks.0.attn", "self", "rewritten")]
