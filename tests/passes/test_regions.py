"""Subgraphs: checkpoints, grad and autocast regions, branches, nested regions, autograd functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from bsa_compile.passes import rewrite

from .support import (
    ALL,
    SDPA,
    Block,
    Recorder,
    SelfAttention,
    Video,
    capture,
    count,
    latents,
    outcomes,
    text_of,
)


def checkpointed(block, x, text):
    return checkpoint(block, x, text, use_reentrant=False)


def without_grad(block, x, text):
    with torch.no_grad():
        return block(x, text)


def in_bfloat16(block, x, text):
    with torch.autocast("cpu", torch.bfloat16):
        return block(x, text).float()


REGIONS = {"checkpoint": checkpointed, "no_grad": without_grad, "autocast": in_bfloat16}


@pytest.mark.parametrize(
    ("call", "dynamic"), [*((call, None) for call in REGIONS.values()), (checkpointed, True)], ids=[*REGIONS, "dynamic"]
)
def test_regions_are_rewritten_inside(call, dynamic):
    model, video, text = Video(call=call), latents(3, 4, 6), text_of(72)
    recorder = Recorder()
    got = recorder.run(model, video, text, dynamic=dynamic)
    torch.testing.assert_close(got, model(video, text), atol=3e-2, rtol=3e-2)
    assert outcomes(recorder.reports[0]) == [
        ("blocks.0.attn", "self", "rewritten"),
        ("blocks.0.cross", "cross", "cross_attention"),
        ("blocks.1.attn", "self", "rewritten"),
        ("blocks.1.cross", "cross", "cross_attention"),
    ]
    assert count(recorder.after[0], "bsa::attend") == 2
    assert count(recorder.before[0], "bsa::attend") == 0
    assert count(recorder.after[0], SDPA) == 2


def test_gradients_through_a_checkpointed_block():
    model, video = Video(depth=1, call=checkpointed), latents()
    Recorder().run(model, video).square().mean().backward()
    got = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    model(video).square().mean().backward()
    torch.testing.assert_close(got, model.blocks[0].attn.qkv.weight.grad, atol=1e-5, rtol=1e-4)


def test_a_graph_module_called_as_a_module():
    inner = capture(Video(depth=1), latents())
    graph = fx.Graph()
    inputs = []
    for node in inner.graph.nodes:
        if node.op == "placeholder":
            inputs.append(graph.placeholder(node.name))
            inputs[-1].meta = node.meta.copy()
    call = graph.call_module("part.inner", tuple(inputs))
    call.meta["example_value"] = tuple(n.meta["example_value"] for n in next(iter(reversed(inner.graph.nodes))).args[0])
    graph.output(call)
    root = nn.Module()
    root.part = nn.Module()
    root.part.inner = inner
    outer = fx.GraphModule(root, graph)
    after, report = rewrite(outer, ALL)
    assert outcomes(report) == [("blocks.0.attn", "self", "rewritten")]
    assert count(after, "bsa::attend") == 1
    assert after.get_submodule("part.inner") is not outer.get_submodule("part.inner")
    assert count(outer, "bsa::attend") == 0


def test_branches():
    def either(block, x, text):
        return torch.cond(x.sum() > 0, lambda x: block(x) + 0, lambda x: x * 2, (x,))

    model, video = Video(depth=1, call=either).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    assert outcomes(recorder.reports[0]) == [("blocks.0.attn", "self", "rewritten")]
    assert count(recorder.after[0], "bsa::attend") == 1


def test_a_shared_subgraph_gets_one_body_per_outcome():
    """Two calls of one subgraph: the video attends to itself in the first, other tokens do in the second."""

    attn = SelfAttention()
    region = torch.compiler.nested_compile_region(lambda x: attn(x))
    model = Video(attn, call=lambda _, x, text: region(x) + 0 * region(text).sum()).eval()
    video, text = latents(), text_of(96)
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video, text), model(video, text), atol=1e-5, rtol=1e-5)
    assert [s.reason for s in recorder.reports[0].sites] == ["rewritten", "not_video"]
    assert count(recorder.after[0], "bsa::attend") == 1
    assert count(recorder.after[0], SDPA) == 1


def test_an_autograd_function_is_left_alone():
    """Its backward is written by hand: rewriting the forward alone would give wrong gradients."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return F.scaled_dot_product_attention(q, k, v)

        @staticmethod
        def backward(ctx, grad):
            q, k, v = ctx.saved_tensors
            return grad * k, grad * q, grad * v

    before = capture(Video(Block(SelfAttention(lambda q, k, v: Own.apply(q, k, v)))), latents())
    after, report = rewrite(before, ALL)
    assert after is before
    assert [s.reason for s in report.sites] == ["opaque"]
