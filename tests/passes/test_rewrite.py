"""Dynamo graphs before and after: what is inserted, what is left alone, and that the numbers are dense attention's."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn

from bsa_compile.passes import rewrite
from bsa_compile.passes.calls import qualified_name

from .support import (
    ALL,
    HALF,
    SDPA,
    Block,
    Recorder,
    SelfAttention,
    Video,
    attention_of,
    capture,
    count,
    latents,
    ops,
    outcomes,
    text_of,
)

GATED = ["aten::detach", "aten::detach", "bsa::pool", "bsa::pool", "bsa::select", "_operator.getitem"]
GATED += ["_operator.getitem", "bsa::attend", "_operator.getitem"]


def test_before_and_after():
    before = capture(Video(depth=1), latents())
    after, report = rewrite(before, HALF)
    plain, gated = ops(before), ops(after)
    at = plain.index(SDPA)
    assert gated == [*plain[:at], *GATED, *plain[at + 1 :]]
    attend = attention_of(after)
    q, k, v, counts, indices, *rest = attend.args
    assert rest == [[4, 4, 6], [2, 2, 2], [4, 4, 6], [2, 2, 2], 0.25, "raster", "native"]
    select = counts.args[0]
    assert select is indices.args[0]
    assert select.args[2:] == (0.5, None, 0.25)
    for pool, x in zip(select.args[:2], (q, k), strict=True):
        assert pool.args[1:] == ([4, 4, 6], [2, 2, 2], "raster")
        assert pool.args[0].target is torch.ops.aten.detach.default
        assert pool.args[0].args == (x,)
    old = next(n for n in before.graph.nodes if n.op == "call_function" and qualified_name(n.target) == SDPA)
    assert [x.name for x in (q, k, v)] == [x.name for x in old.args]
    (site,) = report.sites
    assert (site.module, site.role, site.reason) == ("blocks.0.attn", "self", "rewritten")
    assert (site.grid_q, site.grid_k, site.grid_source) == ((4, 4, 6), (4, 4, 6), "patch_embedding")
    assert (site.batch, site.heads, site.head_dim, site.tokens_q, site.tokens_k) == (1, 2, 16, 96, 96)
    assert (site.tile_q, site.tile_k, site.sparsity, site.op) == ((2, 2, 2), (2, 2, 2), 0.5, "sdpa")
    assert site.source.rpartition(":")[0].endswith("support.py")
    assert report.graphs == 1


def test_the_input_is_not_modified_and_weights_are_shared():
    before = capture(Video(), latents())
    text = str(before.graph)
    meta = {n.name: dict(n.meta) for n in before.graph.nodes}
    after, _ = rewrite(before, ALL)
    assert after is not before
    assert str(before.graph) == text
    assert {n.name: dict(n.meta) for n in before.graph.nodes} == meta
    assert after.training == before.training
    assert after.meta == before.meta


def test_parameters_held_by_the_graph_module_are_shared():
    exported = torch.export.export(Video(depth=1), (latents(),)).module()
    after, report = rewrite(exported, ALL)
    assert outcomes(report) == [("blocks.0.attn", "self", "rewritten")]
    assert {n: p.data_ptr() for n, p in after.named_parameters()} == {
        n: p.data_ptr() for n, p in exported.named_parameters()
    }


def test_every_new_node_has_metadata():
    before = capture(Video(depth=1), latents())
    after, _ = rewrite(before, HALF)
    site = next(n for n in before.graph.nodes if n.op == "call_function" and qualified_name(n.target) == SDPA)
    old = {n.name for n in before.graph.nodes}
    new = [n for n in after.graph.nodes if n.name not in old]
    assert len(new) == len(GATED)
    for node in new:
        assert node.meta["nn_module_stack"] == site.meta["nn_module_stack"]
        assert node.meta["stack_trace"] == site.meta["stack_trace"]
        assert node.meta["example_value"] is not None
        assert isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    attend = attention_of(after)
    out, lse = attend.meta["example_value"]
    assert out.shape == site.meta["example_value"].shape
    assert out.dtype == site.meta["example_value"].dtype
    assert lse.shape == (1, 2, 96)


def test_a_graph_without_sites_comes_back_itself():
    before = capture(nn.Linear(8, 8), torch.randn(2, 8))
    after, report = rewrite(before, ALL)
    assert after is before
    assert report.sites == []


def test_idempotent_and_deterministic():
    before = capture(Video(), latents(), text_of(5))
    after, report = rewrite(before, ALL)
    again, second = rewrite(after, ALL)
    assert again is after
    assert not second.rewritten
    assert [s.reason for s in second.sites] == ["cross_attention"] * 2
    assert [s.detail for s in second.sites] == [s.detail for s in report.dense]
    other, _ = rewrite(before, ALL)
    assert str(other.graph) == str(after.graph)
    assert len(report.rewritten) == 2


def test_sparsity_zero_is_dense():
    model, video, text = Video().eval(), latents(3, 4, 6, batch=2), text_of(7, batch=2)
    recorder = Recorder()
    with torch.no_grad():
        got = recorder.run(model, video, text)
        torch.testing.assert_close(got, model(video, text), atol=1e-5, rtol=1e-5)
    assert count(recorder.after[0], "bsa::attend") == 2


def test_gradients_at_sparsity_zero():
    model, video = Video(depth=1), latents()
    Recorder().run(model, video).square().mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(video).square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_half_sparsity_is_the_reference():
    from bsa_compile import reference

    def attend(q, k, v):
        grid, tile = (4, 4, 6), (2, 2, 2)
        out, _ = reference.block_sparse_attention(
            q, k, v, grid_q=grid, grid_k=grid, tile_q=tile, tile_k=tile, sparsity=0.5
        )
        return out.to(q.dtype)

    model, video = Video(depth=1).eval(), latents()
    with torch.no_grad():
        got = Recorder(HALF).run(model, video)
        model.blocks[0].attn.attend = attend
        torch.testing.assert_close(got, model(video), atol=1e-5, rtol=1e-5)


# -- memory and dtypes ------------------------------------------------------------------------------------------------


def test_a_last_stride_that_is_not_one_is_made_so():
    def attend(q, k, v):
        strided = torch.stack([k, k], dim=-1)[..., 0]
        return F.scaled_dot_product_attention(q, strided, v)

    model, video = Video(Block(SelfAttention(attend))).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    assert count(recorder.after[0], "aten::contiguous") == 1
    assert qualified_name(attention_of(recorder.after[0]).args[1].target) == "aten::contiguous"


def test_a_view_that_relies_on_the_old_strides_still_works():
    """The math kernel writes [B, H, S, D]: there `.view` may merge H and S."""

    def attend(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.view(1, 2 * 96, 16).view(1, 2, 96, 16)

    model, video = Video(Block(SelfAttention(attend))).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    assert count(recorder.after[0], "aten::clone") == 1


def test_an_output_that_leaves_the_graph_keeps_its_strides():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))

        def forward(self, video):
            x = self.patch(video).flatten(2).transpose(1, 2).unflatten(-1, (2, 16)).transpose(1, 2)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(x, x, x)

    model, video = Bare().eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        got, expected = recorder.run(model, video), model(video)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    node = next(
        n for n in recorder.before[0].graph.nodes if n.op == "call_function" and qualified_name(n.target) == SDPA
    )
    assert got.stride() == node.meta["example_value"].stride()


def test_autocast_casts_the_operands():
    model, video = Video(depth=1).eval(), latents()

    def run(video):
        with torch.autocast("cpu", torch.bfloat16):
            x = model.patch(video).flatten(2).transpose(1, 2)
            q = x.float().unflatten(-1, (2, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)

    recorder = Recorder()
    with torch.no_grad():
        got = recorder.run(run, video)
        expected = run(video)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    assert count(recorder.after[0], "aten::to") == 3
