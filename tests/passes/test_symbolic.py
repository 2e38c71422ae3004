"""Symbolic sizes stay symbolic."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bsa_compile.passes import BlockSparseAttention, rewrite
from bsa_compile.policy import BSAPolicy

from .support import (
    ALL,
    HALF,
    Recorder,
    SelfAttention,
    Video,
    attention_of,
    capture,
    count,
    latents,
)


def test_automatic_dynamic_grids_are_nodes():
    model = Video(depth=1).eval()
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    with torch.no_grad():
        for grid in ((2, 4, 6), (3, 4, 6), (5, 6, 4), (4, 2, 8)):
            video = latents(*grid)
            torch.testing.assert_close(compiled(video), model(video), atol=1e-5, rtol=1e-5)
    assert len(recorder.after) < 4
    grid = attention_of(recorder.after[-1]).args[5]
    assert all(isinstance(size, torch.fx.Node) for size in grid)


def test_equal_height_and_width_share_a_symbol():
    """Duck shaping merges H and W; the order of the axes must not come from sizes."""
    model = Video(depth=1).eval()
    recorder = Recorder()
    with torch.no_grad():
        video = latents(3, 4, 4)
        got = recorder.run(model, video, dynamic=True)
        torch.testing.assert_close(got, model(video), atol=1e-5, rtol=1e-5)
    t, h, w = attention_of(recorder.after[0]).args[5]
    assert h is w
    assert t is not h


def test_width_before_height_is_not_raster_order_even_where_they_are_equal():
    class Transposed(Video):
        def forward(self, video):
            x = self.patch(video).transpose(3, 4).flatten(2).transpose(1, 2)
            return self.blocks[0](x)

    _, report = rewrite(capture(Transposed(), latents(3, 4, 4)), ALL)
    (site,) = report.sites
    assert site.reason == "unknown_grid"
    assert "transpose" in site.detail


def test_a_policy_that_compares_sizes_guards_them():
    policy = BSAPolicy(sparsity=0.0, min_tokens=100)
    model = Video(depth=1).eval()
    recorder = Recorder(policy)
    compiled = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grid, reason in (((2, 4, 6), "min_tokens"), ((8, 4, 6), "rewritten"), ((3, 2, 4), "min_tokens")):
            video = latents(*grid)
            compiled(video)
            assert recorder.reports[-1].sites[0].reason == reason or grid == (3, 2, 4)
    assert len(recorder.reports) == 2


def test_attention_over_attention():
    """The first result is the second's operand, with nothing between."""

    def attend(q, k, v):
        q = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, q, q)

    model, video = Video(SelfAttention(attend)).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    assert count(recorder.after[0], "bsa::attend") == 2


def test_uuid_tells_passes_apart():
    assert BlockSparseAttention(ALL).uuid() == BlockSparseAttention(ALL).uuid()
    assert BlockSparseAttention(ALL).uuid() != BlockSparseAttention(HALF).uuid()
    assert BlockSparseAttention(ALL, module_prefix="a").uuid() != BlockSparseAttention(ALL).uuid()
