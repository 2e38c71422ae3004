"""The ops under autocast, `torch.compile`, `torch.export` and with dynamic shapes; the anchor stays one node."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsa_compile import reference
from bsa_compile.errors import GridError
from bsa_compile.grid import TokenGrid, from_tiles, tile_volume, to_tiles
from bsa_compile.ops import attention, block_sparse_attention
from bsa_compile.selection import BlockSelection
from tests.attention_cases import Case, assert_close, assert_identical

GRID = (4, 4, 6)
CASE = Case(GRID, (2, 2, 3), GRID, (2, 2, 3), batch=2, heads=4, heads_kv=2, sparsity=0.6)


def sparse(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> Tensor:
    return block_sparse_attention(q, k, v, **{"grid_q": GRID, "tile_q": (2, 2, 3), "sparsity": 0.6, **kwargs})


class Anchored(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.sin(), k, v, grid_q=GRID).cos()


def anchors(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if n.target in (torch.ops.bsa.attention, torch.ops.bsa.attention.default)]


def with_gradients(f, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = f(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((r.float() * torch.arange(1, r.shape[-1] + 1)).sum() for r in results)
    return *(r.detach() for r in results), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.6}, {"sparsity": None, "cdf_threshold": 0.7}, {"cdf_threshold": 0.3, "return_lse": True}],
    ids=["sparsity", "cdf", "both"],
)
def test_compiled_as_one_graph_it_computes_what_eager_does(options):
    def f(q, k, v):
        return sparse(q * 1, k, v, **options)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_identical(with_gradients(compiled, *CASE.qkv()), with_gradients(f, *CASE.qkv()))


def test_inductor_computes_what_eager_does():
    def f(q, k, v):
        return sparse(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2) + 1

    inputs = [x.transpose(1, 2).contiguous() for x in CASE.qkv()]
    compiled = torch.compile(f, fullgraph=True)
    for a, b in zip(with_gradients(compiled, *inputs), with_gradients(f, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_grids_compile_once():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def f(q, k, v, t, h, w):
        return block_sparse_attention(q, k, v, grid_q=(t, h, w), tile_q=(2, 2, 2), sparsity=0.5)

    for grid in ((4, 4, 4), (5, 6, 7), (3, 8, 9)):
        case = Case(grid, (2, 2, 2), grid, (2, 2, 2))
        q, k, v = case.qkv()
        expected = block_sparse_attention(q, k, v, grid_q=grid, tile_q=(2, 2, 2), sparsity=0.5)
        assert torch.equal(f(q, k, v, *grid), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("sparsity", [0.9, 0.6, 0.0])
def test_the_fake_width_of_the_lists_is_the_real_one(sparsity):
    case = CASE.but(sparsity=sparsity)
    q, k, _ = case.qkv()
    _, indices = case.select(q, k)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = case.select(*(mode.from_tensor(x) for x in (q, k)))
    assert fake[1].shape == indices.shape
    assert fake[1].stride() == indices.stride()


def test_grids_given_as_token_grids():
    q, k, v = CASE.qkv()
    assert torch.equal(sparse(q, k, v, grid_q=TokenGrid(*GRID), grid_k=TokenGrid(*GRID)), sparse(q, k, v))
    assert torch.equal(attention(q, k, v, grid_q=TokenGrid(*GRID)), attention(q, k, v, grid_q=GRID))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_as_dense_attention_does_and_scores_stay_fp32(compiled):
    q, k, v = CASE.qkv()
    f = torch.compile(sparse, fullgraph=True, backend="aot_eager") if compiled else sparse
    with torch.autocast("cpu", torch.bfloat16):
        out = f(q, k, v)
        dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        pooled = CASE.pooled(q, k)
        inside = torch.ops.bsa.select(*pooled, 0.6, None, CASE.scale)
    assert out.dtype == dense.dtype == torch.bfloat16
    assert torch.equal(out, sparse(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert_identical(inside, torch.ops.bsa.select(*pooled, 0.6, None, CASE.scale))
    assert pooled[0].dtype == torch.float32
    assert_identical(pooled, CASE.pooled(q, k))


def test_autocast_leaves_the_ops_alone():
    q, k, v = CASE.qkv()
    counts, indices = CASE.selection()
    grad_out = torch.randn(q.shape, generator=CASE.generator())
    expected = (*CASE.attend(q, k, v, counts, indices), *CASE.gradients(q, k, v, counts, indices, grad_out, None))
    with torch.autocast("cpu", torch.bfloat16):
        ours = (*CASE.attend(q, k, v, counts, indices), *CASE.gradients(q, k, v, counts, indices, grad_out, None))
    assert_identical(ours, expected)


def test_low_matmul_precision_does_not_reach_the_scores():
    q, k, _ = CASE.qkv()
    expected = CASE.select(q, k)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_identical(CASE.select(q, k), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_selection_gets_no_gradient():
    q, k, v = (x.requires_grad_() for x in CASE.qkv())
    counts, indices = CASE.select(q.detach(), k.detach())
    held = torch.autograd.grad(CASE.attend(q, k, v, counts, indices)[0].square().sum(), (q, k, v))
    whole = torch.autograd.grad(sparse(q, k, v).square().sum(), (q, k, v))
    assert_identical(held, whole)


def test_the_anchor_is_dense_attention():
    q, k, v = CASE.qkv()
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)
    assert torch.equal(attention(q, k, v, grid_q=GRID, role="noise", scale=0.3), expected)


def test_the_anchor_stays_one_node_in_a_dynamo_graph():
    graphs = []

    def backend(module, _):
        graphs.append(module.graph)
        return module

    q, k, v = CASE.qkv()
    torch.compile(Anchored(), fullgraph=True, backend=backend)(q, k, v)
    (graph,) = graphs
    (node,) = anchors(graph)
    assert list(node.args[3]) == list(GRID)
    assert not [n for n in graph.nodes if "scaled_dot_product" in str(n.target)]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_anchor_stays_one_node_in_an_exported_graph_until_it_is_decomposed(strict, dynamic):
    q, k, v = CASE.qkv()
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = ({0: batch}, {0: batch}, {0: batch}) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree, on copying an exported program
        program = torch.export.export(Anchored(), (q, k, v), strict=strict, dynamic_shapes=shapes)
        assert len(anchors(program.graph)) == 1
        decomposed = program.run_decompositions()
    assert not anchors(decomposed.graph)
    expected = Anchored()(q, k, v)
    torch.testing.assert_close(program.module()(q, k, v), expected)
    torch.testing.assert_close(decomposed.module()(q, k, v), expected)


def test_the_anchor_decomposes_by_itself_where_no_pass_lowers_it():
    seen = []

    def inner(module, _):
        seen.append(module.graph)
        return module

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(Anchored(), fullgraph=True, backend=aot_autograd(fw_compiler=inner, bw_compiler=inner))
    assert_identical(with_gradients(compiled, *CASE.qkv()), with_gradients(Anchored(), *CASE.qkv()))
    assert seen
    assert not any(anchors(graph) for graph in seen)


def test_the_anchor_under_autocast():
    q, k, v = CASE.qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(Anchored(), fullgraph=True, backend="aot_eager")(q, k, v)
        assert attention(q, k, v, grid_q=GRID).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16


def test_the_auto_role_takes_whatever_dense_attention_takes():
    # `latent_grid` traces every plain attention with it, cross-attention to a text of any length included.
    q, k, v = CASE.qkv()
    text = k[:, :, :7]
    expected = F.scaled_dot_product_attention(q, text, v[:, :, :7], enable_gqa=True)
    assert torch.equal(torch.ops.bsa.attention(q, text, v[:, :, :7], list(GRID), list(GRID), "auto"), expected)
    with pytest.raises(GridError):
        attention(q, text, v[:, :, :7], grid_q=GRID)


@pytest.mark.filterwarnings("ignore")  # eager flex_attention warns that it is slow
@pytest.mark.parametrize("criteria", [(0.6, None), (None, 0.6)], ids=["sparsity", "cdf"])
def test_flex_attention_with_the_same_block_mask_computes_the_same(criteria):
    from torch.nn.attention.flex_attention import flex_attention

    case = Case(
        (3, 5, 4),
        (2, 2, 3),
        (4, 3, 5),
        (2, 3, 2),
        batch=2,
        heads=4,
        heads_kv=2,
        sparsity=criteria[0],
        cdf_threshold=criteria[1],
    )
    q, k, v = case.qkv()
    counts, indices = case.select(q, k)
    selection = BlockSelection(counts, indices, case.num_k)
    mask = selection.to_block_mask(*case.grids)
    assert torch.equal(mask.to_dense().bool(), selection.to_dense())
    back = BlockSelection.from_block_mask(mask)
    assert torch.equal(back.to_dense(), selection.to_dense())
    tiled = [
        to_tiles(x, g, t).flatten(2, 3)
        for x, g, t in ((q, *case.grids[:2]), (k, *case.grids[2:]), (v, *case.grids[2:]))
    ]
    flex = flex_attention(*tiled, block_mask=mask, scale=case.scale, enable_gqa=True)
    flex = from_tiles(flex.unflatten(2, (-1, tile_volume(case.tile_q))), *case.grids[:2])
    out, _ = case.attend(q, k, v, counts, indices)
    truth, _ = reference.attend(q, k, v, counts, indices, *case.tail)
    assert_close(flex, None, truth, "flex_attention")
    assert_close(out, None, truth, "ours")
    # The transposed lists are those of FlexAttention's backward.
    dense = selection.transposed()
    assert torch.equal(dense.kv_num_blocks, mask.full_q_num_blocks if mask.q_num_blocks is None else mask.q_num_blocks)
    for b, h, n in torch.cartesian_prod(*(torch.arange(s) for s in dense.kv_num_blocks.shape)).tolist():
        used = int(dense.kv_num_blocks[b, h, n])
        assert torch.equal(dense.kv_indices[b, h, n, :used], mask.q_indices[b, h, n, :used])
