"""Where the grid comes from, what the anchor says, and what is said when sources disagree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bsa_compile.ops
from bsa_compile.context import latent_grid
from bsa_compile.errors import GridError, PolicyError, UsageError
from bsa_compile.grid import TokenGrid
from bsa_compile.passes import rewrite
from bsa_compile.policy import BSAPolicy

from .support import ALL, HALF, Block, Recorder, SelfAttention, Video, capture, count, latents, outcomes, text_of

GRID = (4, 4, 6)


def anchor(grid_q, grid_k=None, role="self", scale=None):
    return lambda q, k, v: bsa_compile.ops.attention(q, k, v, grid_q=grid_q, grid_k=grid_k, role=role, scale=scale)


def qkv(q_tokens=96, k_tokens=96):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, n, 16, generator=generator) for n in (q_tokens, k_tokens, k_tokens)]


# -- agreement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [TokenGrid(*GRID), list(GRID)])
def test_a_given_grid_that_agrees_with_the_patch_embedding(grid):
    _, report = rewrite(capture(Video(depth=1), latents()), ALL, grid)
    (site,) = report.sites
    assert (site.reason, site.grid_source, site.grid_q) == ("rewritten", "argument", GRID)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"grid": (4, 6, 4)}, ["4x6x4 (argument)", "4x4x6 (patch_embedding)"]),
        ({"context_grid": (4, 6, 4)}, ["4x6x4 (context)", "4x4x6 (patch_embedding)"]),
        ({"grid": (4, 4, 6), "context_grid": (4, 6, 4)}, ["4x4x6 (argument)", "4x6x4 (context)"]),
    ],
)
def test_sources_that_disagree(options, named):
    with pytest.raises(GridError, match=r"blocks\.0\.attn") as error:
        rewrite(capture(Video(depth=1), latents()), ALL, **options)
    text = str(error.value)
    assert "support.py:" in text
    assert all(name in text for name in named)


def test_a_grid_with_another_number_of_tokens():
    block = capture(Block(), text_of(96))
    with pytest.raises(GridError, match=r"grid 4x4x5 .argument. must hold as many tokens .* at attn .*support.py"):
        rewrite(block, ALL, (4, 4, 5))
    _, report = rewrite(block, BSAPolicy.dense(), (4, 4, 5))
    assert [s.reason for s in report.sites] == ["disabled"]


def test_a_malformed_grid():
    with pytest.raises(GridError, match="three positive integers"):
        rewrite(capture(Video(depth=1), latents()), ALL, (4, 4))


@pytest.mark.parametrize("graph", [nn.Linear(2, 2), nn.Linear, None, "graph"], ids=["module", "class", "none", "text"])
def test_what_is_no_graph_is_refused(graph):
    with pytest.raises(UsageError, match=r"graph_module must be an fx\.GraphModule or an ExportedProgram"):
        rewrite(graph, ALL)


def test_what_is_no_policy_or_step_is_refused():
    graph = capture(Video(depth=1), latents())
    with pytest.raises(PolicyError, match="policy must be a BSAPolicy, got dict"):
        rewrite(graph, {"sparsity": 0.5})
    with pytest.raises(UsageError, match="step must be"):
        rewrite(graph, ALL, step=3)


def test_a_given_grid_guards_symbolic_tokens():
    """A block with a symbolic number of tokens: the code made for one grid must not run on another number."""
    block = Block().eval()
    recorder = Recorder(grid=GRID)
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        x = text_of(96)
        torch.testing.assert_close(compiled(x), block(x), atol=1e-5, rtol=1e-5)
        with pytest.raises(Exception, match="must hold as many tokens"):
            compiled(text_of(120))


def test_a_symbolic_patch_embedding_needs_no_guard():
    """The grid given is the one traced with; the code computes the grid of whatever comes."""
    model = Video(depth=1).eval()
    recorder = Recorder(grid=(3, 4, 6))
    compiled = torch.compile(model, backend=recorder, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for grid in ((3, 4, 6), (5, 6, 8)):
            video = latents(*grid)
            torch.testing.assert_close(compiled(video), model(video), atol=1e-5, rtol=1e-5)
    assert len(recorder.reports) == 1


# -- the anchor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "tokens", "grid_q", "grid_k"),
    [
        ("self", (96, 96), (4, 4, 6), None),
        ("noise", (72, 96), (3, 4, 6), (4, 4, 6)),
        ("cond", (24, 24), (1, 4, 6), None),
        ("cached", (48, 96), (2, 4, 6), (4, 4, 6)),
    ],
)
def test_an_anchor_alone_in_its_graph(role, tokens, grid_q, grid_k):
    call = anchor(grid_q, grid_k, role, 0.3)
    recorder = Recorder()
    q, k, v = qkv(*tokens)
    got = recorder.run(lambda q, k, v: call(q, k, v), q, k, v)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, scale=0.3), atol=1e-5, rtol=1e-5)
    (site,) = recorder.reports[0].sites
    assert (site.role, site.reason, site.op, site.grid_source) == (role, "rewritten", "bsa.attention", "anchor")
    assert (site.grid_q, site.grid_k) == (grid_q, grid_k or grid_q)
    assert count(recorder.after[0], "bsa::attention") == 0


def test_an_anchor_with_symbolic_grids():
    def run(video):
        t, h, w = video.shape[2:]
        q = video.flatten(2).transpose(1, 2).unflatten(-1, (2, 16)).transpose(1, 2)
        return anchor((t, h, w))(q, q, q)

    recorder = Recorder()
    compiled = torch.compile(run, backend=recorder, fullgraph=True, dynamic=True)
    for grid in ((3, 4, 6), (5, 2, 6)):
        video = torch.randn(1, 32, *grid)
        torch.testing.assert_close(compiled(video), run(video), atol=1e-5, rtol=1e-5)
    assert len(recorder.reports) == 1
    attend = next(n for n in recorder.after[0].graph.nodes if n.target is torch.ops.bsa.attend.default)
    assert all(isinstance(size, torch.fx.Node) for size in attend.args[5])


@pytest.mark.parametrize(
    ("policy", "call", "reason"),
    [
        (ALL, anchor(GRID, role="cross"), "cross_attention"),
        (BSAPolicy.dense(), anchor(GRID), "disabled"),
        (BSAPolicy(min_tokens=97), anchor(GRID), "min_tokens"),
        (ALL, anchor((1, 8, 12)), "image"),
        (BSAPolicy(rules=({"role": "self", "dense": True},)), anchor(GRID), "rule"),
    ],
)
def test_an_anchor_that_stays_dense(policy, call, reason):
    graph = capture(lambda q, k, v: call(q, k, v), *qkv()) if reason != "cross_attention" else _cross_anchor()
    after, report = rewrite(graph, policy)
    assert after is graph
    assert [s.reason for s in report.sites] == [reason]


def _cross_anchor():
    """Built by hand: the op itself refuses the role."""
    graph = capture(lambda q, k, v: anchor(GRID)(q, k, v), *qkv())
    node = next(n for n in graph.graph.nodes if "attention" in n.name)
    node.args = (*node.args[:5], "cross", *node.args[6:])
    return graph


def test_a_single_cond_frame_of_an_anchor_is_no_image():
    call = anchor((1, 8, 12), role="cond")
    _, report = rewrite(capture(lambda q, k, v: call(q, k, v), *qkv()), ALL)
    assert [s.reason for s in report.sites] == ["rewritten"]


def test_an_anchor_inside_a_model():
    _, report = rewrite(capture(Video(Block(SelfAttention(anchor(GRID)))), latents()), ALL)
    assert outcomes(report) == [("blocks.0.attn", "self", "rewritten")]


def test_an_anchor_that_the_graph_contradicts():
    graph = capture(Video(Block(SelfAttention(anchor((4, 6, 4))))), latents())
    with pytest.raises(GridError, match=r"4x6x4 .anchor. and 4x4x6 .patch_embedding."):
        rewrite(graph, ALL)
    graph = capture(lambda q, k, v: anchor(GRID)(q, k, v), *qkv())
    with pytest.raises(GridError, match=r"4x4x6 .anchor. and 4x6x4 .argument."):
        rewrite(graph, ALL, (4, 6, 4))


def test_the_policy_s_parameters_reach_the_op():
    policy = BSAPolicy(
        cdf_threshold=0.9,
        chunk_3d_shape_q=(2, 4, 2),
        chunk_3d_shape_k=(4, 4, 2),
        rules=({"role": "noise", "sparsity": 0.75, "chunk_3d_shape_k": (2, 2, 2)},),
    )
    q, k, v = qkv(72, 96)
    call = anchor((3, 4, 6), (4, 4, 6), "noise")
    after, report = rewrite(capture(lambda q, k, v: call(q, k, v), q, k, v), policy)
    attend = next(n for n in after.graph.nodes if n.target is torch.ops.bsa.attend.default)
    assert attend.args[5:9] == ([3, 4, 6], [2, 4, 2], [4, 4, 6], [2, 2, 2])
    assert attend.args[3].args[0].args[2:4] == (0.75, None)
    assert (report.sites[0].sparsity, report.sites[0].cdf_threshold, report.sites[0].detail) == (0.75, None, "rule 0")


# -- the surrounding grid ---------------------------------------------------------------------------------------------


def test_inside_latent_grid():
    """Every plain attention is an anchor of role `auto`: self-attention is rewritten, cross-attention is not."""
    block, x, text = Block().eval(), text_of(96), text_of(96)
    recorder = Recorder()
    with torch.no_grad(), latent_grid(*GRID):
        got = recorder.run(lambda x, text: block(x, text), x, text)
    with torch.no_grad():
        torch.testing.assert_close(got, block(x, text), atol=1e-5, rtol=1e-5)
    site, cross = recorder.reports[0].sites
    assert (site.module, site.role, site.reason, site.grid_source) == ("attn", "self", "rewritten", "context")
    assert (cross.role, cross.reason) == ("cross", "cross_attention")
    assert count(recorder.after[0], "bsa::attention") == 1


def test_inside_a_latent_grid_that_is_wrong():
    model = Video(depth=1)
    recorder = Recorder(HALF)
    with latent_grid(4, 6, 4), pytest.raises(Exception, match=r"4x6x4 .context. and 4x4x6 .patch_embedding."):
        recorder.run(model, latents())
