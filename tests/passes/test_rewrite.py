"""Dynamo graphs before and after: what is inserted, what is left alone, and that the numbers are dense attention's."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from bsa_compile.passes import BlockSparseAttention, rewrite
from bsa_compile.passes.calls import qualified_name
from bsa_compile.policy import BSAPolicy

from .support import (
    ALL,
    HALF,
    SDPA,
    Block,
    Recorder,
    SelfAttention,
    Video,
    capture,
    count,
    latents,
    ops,
    outcomes,
    text_of,
)

GATED = ["aten::detach", "aten::detach", "bsa::pool", "bsa::pool", "bsa::select", "_operator.getitem"]
GATED += ["_operator.getitem", "bsa::attend", "_operator.getitem"]


def attention_of(module):
    return next(n for n in module.graph.nodes if n.op == "call_function" and qualified_name(n.target) == "bsa::attend")


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


# -- how attention is called ------------------------------------------------------------------------------------------


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


# -- regions ----------------------------------------------------------------------------------------------------------


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


# -- symbolic sizes ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("grid", [(2, 4, 6), (3, 5, 7)], ids=["whole tiles", "partial tiles"])
def test_tile_order_is_the_same_attention(grid):
    model, video = Video(depth=1).eval(), latents(*grid)
    with torch.no_grad():
        raster = Recorder(HALF).run(model, video)
        torch._dynamo.reset()
        recorder = Recorder(HALF, layout="tile")
        torch.testing.assert_close(recorder.run(model, video), raster, atol=1e-5, rtol=1e-5)
    names = ops(recorder.after[0])
    assert names.count("aten::permute") == 4
    assert names.count("aten::constant_pad_nd") == (0 if grid == (2, 4, 6) else 3)
    assert attention_of(recorder.after[0]).args[10] == "tile"


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
