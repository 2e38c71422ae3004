"""Each defect of the public block-sparse attentions that selection or attention can have, as a test of ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bsa_compile import reference
from bsa_compile.ops import block_sparse_attention
from tests.attention_cases import Case, assert_close, pack, select, unpack

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "bsa.safetensors"


@pytest.mark.parametrize("num_kv", [1, 2, 5, 10, 15])
def test_a_count_that_rounds_to_zero_keeps_one_tile(num_kv):
    # int((1 - 0.9375) * 15) is 0: the output was silently zero.
    scores = torch.randn(1, 1, 3, num_kv, generator=torch.Generator().manual_seed(0))
    counts, indices = select(scores, 0.9375)
    assert bool((counts == 1).all())
    assert torch.equal(indices[..., 0].long(), scores.argmax(-1))
    x = torch.randn(1, 2, 8, 16)
    out = block_sparse_attention(x, x, x, grid_q=(2, 2, 2), tile_q=(1, 1, 2), sparsity=0.9375)
    assert bool(out.abs().amax(-1).gt(0).all())


@pytest.mark.parametrize(
    ("sparsity", "num_kv", "count"),
    [(0.9, 10, 1), (0.8, 5, 1), (0.9, 20, 2), (0.8, 10, 2), (0.9, 1320, 132), (0.7, 10, 3)],
)
def test_the_count_is_that_of_the_decimal_number(sparsity, num_kv, count):
    # (1 - 0.9) * 10 is 0.9999999999999998 in floats.
    scores = torch.arange(num_kv).float().expand(1, 1, 1, num_kv)
    counts, indices = select(scores, sparsity)
    assert indices.shape[-1] == int(counts) == count
    assert indices.flatten().tolist() == list(range(num_kv - count, num_kv))


def test_by_mass_the_tile_that_crosses_the_threshold_is_kept():
    # A peaked row kept no tile at all.
    scores = torch.tensor([[[[0.0, 50.0, 0.0, 0.0]]]])
    for p in (0.1, 0.5, 0.95, 0.999):
        counts, indices = select(scores, None, p)
        assert int(counts) == 1
        assert int(indices[0, 0, 0, 0]) == 1


def test_by_mass_as_much_is_kept_as_was_asked_for():
    # Masses .5, .4, .06, .04: 0.90 was kept where 0.95 was asked for.
    mass = torch.tensor([0.04, 0.5, 0.06, 0.4], dtype=torch.float64)
    kept = unpack(*select(mass.log().view(1, 1, 1, 4), None, 0.95), 4)[0, 0, 0]
    assert kept.tolist() == [False, True, True, True]
    assert float(mass[kept].sum()) >= 0.95


def test_by_mass_it_compiles():
    # The public one fails in inductor on its searchsorted.
    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))

    def f(x):
        return block_sparse_attention(x, x, x, grid_q=(4, 4, 4), tile_q=(2, 2, 2), cdf_threshold=0.7)

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x), f(x))


def test_by_mass_the_gradients_are_those_of_the_selected_tiles():
    # The mask was rebuilt from all indices, the unused tail included: dk and dv of dense attention.
    case = Case(sparsity=None, cdf_threshold=0.3)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    counts, indices = case.select(q.detach(), k.detach())
    assert bool((counts < case.num_k).any())
    out, _ = case.attend(q, k, v, counts, indices)
    grad_out = torch.randn(out.shape, generator=case.generator())
    ours = torch.autograd.grad(out, (q, k, v), grad_out)
    truth = reference.attend_backward(grad_out, None, q.detach(), k.detach(), v.detach(), counts, indices, *case.tail)
    everything = torch.full_like(counts, case.num_k), torch.arange(case.num_k).expand(*counts.shape, -1).int()
    dense = reference.attend_backward(grad_out, None, q.detach(), k.detach(), v.detach(), *everything, *case.tail)
    for a, b, c in zip(ours, truth, dense, strict=True):
        assert_close(a, None, b, terms=4.0)
        assert float((b - c).abs().max()) > 1e-2  # and they do differ here


def test_scores_of_bf16_inputs_do_not_tie():
    # Rounded to bf16, about two thirds of the rows tie at the boundary of the top k.
    generator = torch.Generator().manual_seed(0)
    case = Case((4, 16, 16), (4, 4, 4), (4, 16, 16), (4, 4, 4), head_dim=64, dtype=torch.bfloat16, sparsity=0.75)
    base = torch.randn(1, 2, 1, 64, generator=generator)
    q, k = ((base + 0.2 * torch.randn(1, 2, 1024, 64, generator=generator)).bfloat16() for _ in range(2))
    scores = reference.scores(*(reference.pool(x, *case.grids[:2]) for x in (q, k)))
    rounded = scores.bfloat16()
    edge = rounded.sort(-1, descending=True).values
    assert float((edge[..., 3] == edge[..., 4]).float().mean()) > 0.5  # bf16 would decide these by chance
    kept = unpack(*case.select(q, k), case.num_k)
    assert torch.equal(kept, scores >= scores.topk(4).values[..., -1:])


def test_large_activations_have_right_gradients():
    # k times scale was rounded to bf16 before the product with q.
    case = Case(dtype=torch.bfloat16, head_dim=128, seed=3)  # a scale that is no power of two
    q, k, v = case.qkv(std=6.0)
    counts, indices = case.selection()
    grad_out = torch.randn(q.shape, generator=case.generator()).bfloat16()
    ours = case.gradients(q, k, v, counts, indices, grad_out, None)
    # `out` is rounded to bf16, and the gradient through the softmax cancels to what that rounding leaves: so the truth
    # for our backward is the one at that `out`. Rounding k times scale moves scores by whole units instead.
    exact = reference.attend_backward(grad_out, None, q, k, v, counts, indices, *case.tail)
    rounded_keys = (k * case.scale).bfloat16() / case.scale
    public = reference.attend_backward(grad_out, None, q, rounded_keys, v, counts, indices, *case.tail)
    for a, b, c in zip(ours, exact, public, strict=True):
        error, theirs = (float((x.double() - b).abs().max() / b.abs().max()) for x in (a, c))
        assert error < 0.02, error
        assert theirs > 3 * error, (theirs, error)


@pytest.mark.parametrize("tile", [(3, 3, 3), (1, 5, 7), (2, 3, 5), (6, 10, 1)], ids=str)
def test_tiles_whose_volume_is_no_power_of_two(tile):
    case = Case((4, 6, 10), tile, (4, 6, 10), tile)
    q, k, v = case.qkv()
    out, lse = block_sparse_attention(q, k, v, grid_q=case.grid_q, tile_q=tile, sparsity=0.5, return_lse=True)
    truth = reference.attend(q, k, v, *case.select(q, k), *case.tail)
    assert_close(out, None, truth[0])
    assert_close(lse, None, truth[1])


@pytest.mark.parametrize("grid", [(4, 30, 52), (4, 45, 80), (3, 30, 52), (5, 7, 9)], ids=str)
def test_grids_that_the_tile_does_not_divide(grid):
    # 480p and the literal 720x1280, at a small T: the public code asserts.
    tokens = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=generator) for _ in range(3))
    dense = block_sparse_attention(q, k, v, grid_q=grid, sparsity=0.0)
    torch.testing.assert_close(dense, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)
    case = Case(grid, (4, 4, 4), grid, (4, 4, 4), sparsity=0.9)
    out = block_sparse_attention(q, k, v, grid_q=grid, sparsity=0.9)
    _, indices = case.select(q, k)
    table = case.table("q")
    for n in (0, case.num_q - 1):  # the last tile is the most partial one
        rows = table[n][table[n] >= 0]
        keys = table[indices[0, 0, n].long()].flatten()
        keys = keys[keys >= 0]
        expected = F.scaled_dot_product_attention(*(x.double() for x in (q[:, :, rows], k[:, :, keys], v[:, :, keys])))
        torch.testing.assert_close(out[:, :, rows].double(), expected, rtol=1e-4, atol=1e-5)


def test_strided_inputs():
    # Contiguity was assumed and not checked.
    case = Case((2, 4, 6), (2, 2, 3), (2, 4, 6), (2, 2, 3), heads=3, heads_kv=3, batch=2)
    fused = torch.randn(2, 48, 3, 3, 16, generator=case.generator())
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    options = {"grid_q": case.grid_q, "tile_q": case.tile_q, "sparsity": 0.5}
    assert not q.is_contiguous()
    expected = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), **options)
    torch.testing.assert_close(block_sparse_attention(q, k, v, **options), expected, rtol=1e-6, atol=1e-6)


def test_rectangular_calls_run_block_sparse():
    # Image-conditioned and KV-cache calls (Sq != Sk) assert, or silently run dense.
    case = Case((3, 4, 4), (1, 2, 2), (4, 4, 4), (2, 2, 2), sparsity=0.5)
    q, k, v = case.qkv()
    out = block_sparse_attention(
        q, k, v, grid_q=case.grid_q, grid_k=case.grid_k, tile_q=case.tile_q, tile_k=case.tile_k, sparsity=0.5
    )
    assert_close(out, None, reference.attend(q, k, v, *case.select(q, k), *case.tail)[0])
    assert float((out - F.scaled_dot_product_attention(q, k, v)).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("name", "grid_q", "grid_k", "sparsity"),
    [("square", (4, 8, 12), (4, 8, 12), 0.5), ("rect", (4, 8, 8), (8, 8, 8), 0.75)],
)
def test_the_official_selection_and_output(name, grid_q, grid_k, sparsity):
    # Not a defect: where the official code works, we select exactly what it selects.
    data = load_file(GOLDEN)
    q, k, v = (data[f"{name}.{x}"] for x in "qkv")
    case = Case(grid_q, (4, 4, 4), grid_k, (4, 4, 4), head_dim=64, sparsity=sparsity)
    counts, indices = case.select(q, k)
    assert torch.equal(indices, data[f"{name}.kv_indices"])
    assert bool((counts == indices.shape[-1]).all())
    out = block_sparse_attention(q, k, v, grid_q=grid_q, grid_k=grid_k, sparsity=sparsity)
    assert float((out - data[f"{name}.out"]).abs().max()) < 1e-5
    truth, _ = reference.block_sparse_attention(
        q, k, v, grid_q=grid_q, grid_k=grid_k, tile_q=(4, 4, 4), tile_k=(4, 4, 4), sparsity=sparsity
    )
    assert float((truth - data[f"{name}.out"]).abs().max()) < 1e-5


def test_lists_may_hold_anything_beyond_their_count():
    case = Case()
    q, k, v = case.qkv()
    counts, poisoned = pack(unpack(*case.selection(), case.num_k))
    used = torch.arange(poisoned.shape[-1]) < counts[..., None]
    for garbage in (0, -1, -(2**31), case.num_k):
        other = torch.where(used, poisoned, garbage).int()
        for a, b in zip(case.attend(q, k, v, counts, poisoned), case.attend(q, k, v, counts, other), strict=True):
            assert torch.equal(a, b)
        grads = [case.gradients(q, k, v, counts, x, torch.ones_like(q), None) for x in (poisoned, other)]
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def test_nan_scores_select_in_bounds_and_the_same_every_time():
    q, k, _ = Case().qkv()
    k[0, 0, 7, 3] = math.nan
    runs = [Case().select(q, k) for _ in range(2)]
    unpack(*runs[0], Case().num_k)
    assert torch.equal(runs[0][1], runs[1][1])
