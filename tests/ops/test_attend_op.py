"""`bsa::attend` and its backward: dtypes, head sizes, strides, tiles, determinism, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bsa_compile import cpu, reference
from bsa_compile.ops import block_sparse_attention
from tests.attention_cases import Case, assert_close, assert_identical, dense_mask_attention

HEAD_DIMS = (16, 24, 40, 64, 80, 128, 256)


def random_gradients(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(case.batch, case.heads, case.tokens("q"), case.head_dim, generator=generator)
    return grad_out.to(case.dtype), torch.randn(case.batch, case.heads, case.tokens("q"), generator=generator)


def check_against_the_reference(case: Case) -> None:
    """Forward and backward, judged against torch's own masked attention in the same dtype."""
    q, k, v = case.qkv()
    counts, indices = case.selection()
    grad_out, grad_lse = random_gradients(case)
    ours = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, grad_out, grad_lse))
    assert ours[0].dtype == case.dtype
    assert ours[1].dtype == torch.float32
    truth = (
        *reference.attend(q, k, v, counts, indices, *case.tail),
        *reference.attend_backward(grad_out, grad_lse, q, k, v, counts, indices, *case.tail),
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = reference.token_mask(counts, indices, *case.grids, case.layout)
    out, lse = dense_mask_attention(*leaves, mask, case.scale)
    kept = torch.isfinite(truth[1])
    assert bool(kept.any())
    torchs = (out, lse, *torch.autograd.grad([out, lse[kept]], leaves, [grad_out, grad_lse[kept].to(case.dtype)]))
    size = 1 + float(truth[1][kept].abs().max())  # p is recomputed as exp(s - lse), to an ulp of lse
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), ours, torchs, truth, strict=True):
        terms = size * float(c[torch.isfinite(c)].abs().max()) if name.startswith("d") else 0.0
        assert_close(a, b.detach(), c, name, terms)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    check_against_the_reference(Case(head_dim=head_dim, seed=head_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["raster", "tile"])
def test_dtypes(dtype, layout):
    check_against_the_reference(Case(dtype=dtype, layout=layout, heads=4, head_dim=32))


@pytest.mark.parametrize(
    ("grid_q", "tile_q", "grid_k", "tile_k"),
    [
        ((2, 3, 4), (1, 1, 1), (2, 3, 4), (1, 1, 1)),
        ((2, 5, 6), (2, 5, 3), (2, 5, 6), (2, 3, 5)),  # volume 30, and partial tiles
        ((1, 30, 52), (1, 30, 52), (1, 6, 8), (1, 4, 4)),  # volume 1560: a query tile in two parts
        ((1, 4, 4), (1, 4, 4), (1, 30, 52), (1, 30, 52)),
        ((3, 3, 3), (4, 4, 4), (2, 2, 2), (4, 4, 4)),  # one partial tile each
        ((1, 1, 1), (1, 1, 1), (5, 7, 3), (2, 2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["raster", "tile"])
def test_tiles_of_any_size(grid_q, tile_q, grid_k, tile_k, layout):
    check_against_the_reference(Case(grid_q, tile_q, grid_k, tile_k, layout=layout, seed=4))


@pytest.mark.parametrize("heads", [(6, 1), (6, 2), (6, 3), (6, 6)], ids=str)
def test_grouped_queries(heads):
    check_against_the_reference(Case(heads=heads[0], heads_kv=heads[1], batch=2))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_finite_scale(scale):
    class Scaled(Case):
        @property
        def scale(self) -> float:
            return scale

    check_against_the_reference(Scaled())


def views(x: Tensor, kind: str) -> Tensor:
    """The same values behind other strides."""
    if kind == "fused qkv":
        return torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2)
    if kind == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "sliced":
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), math.nan, dtype=x.dtype)
        wide[..., 8:] = x
        return wide[..., 8:]
    if kind == "every other token":
        return torch.stack([x, torch.full_like(x, math.nan)], 3)[:, :, :, 0]
    assert kind == "unaligned"
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.copy_(x.flatten()).view(x.shape)


@pytest.mark.parametrize("kind", ["fused qkv", "bshd", "sliced", "every other token", "unaligned"])
@pytest.mark.parametrize("layout", ["raster", "tile"])
def test_strides_do_not_matter(kind, layout):
    case = Case(layout=layout, batch=2, heads=4, head_dim=24)
    q, k, v = case.qkv()
    grads = random_gradients(case)
    plain = case.select(q, k)
    results = (*plain, *case.attend(q, k, v, *plain), *case.gradients(q, k, v, *plain, *grads))
    q, k, v = (views(x, kind) for x in (q, k, v))
    assert q.stride(-1) == 1
    assert_identical(plain, case.select(q, k))
    viewed = (*plain, *case.attend(q, k, v, *plain), *case.gradients(q, k, v, *plain, views(grads[0], kind), grads[1]))
    for a, b in zip(results, viewed, strict=True):  # another alignment may round another way
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_expanded_batch_and_expanded_heads():
    case = Case(batch=3, heads=4, heads_kv=4)
    q, k, v = (x[:1, :1].expand_as(x) for x in case.qkv())
    counts, indices = (x[:1, :1].expand_as(x) for x in case.selection())
    out, _ = case.attend(q, k, v, counts, indices)
    alone = case.but(batch=1, heads=1, heads_kv=1)
    expected, _ = alone.attend(q[:1, :1], k[:1, :1], v[:1, :1], counts[:1, :1], indices[:1, :1])
    torch.testing.assert_close(out, expected.expand_as(out))


def test_a_last_stride_other_than_one_is_copied_by_the_function():
    case = Case(grid_k=(2, 5, 6), tile_k=(2, 2, 3))
    q, k, v = case.qkv()
    expected = block_sparse_attention(q, k, v, grid_q=case.grid_q, tile_q=case.tile_q, sparsity=0.5)
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    ours = block_sparse_attention(q, k, v, grid_q=case.grid_q, tile_q=case.tile_q, sparsity=0.5)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_equal_bits_from_call_to_call(deterministic):
    case = Case(grid_q=(4, 8, 8), tile_q=(2, 4, 4), grid_k=(4, 8, 8), tile_k=(2, 4, 4), heads=4, head_dim=64)
    q, k, v = case.qkv()
    grads = random_gradients(case)
    counts, indices = case.selection()
    torch.use_deterministic_algorithms(deterministic)
    try:
        runs = [
            (
                *case.select(q, k),
                *case.attend(q, k, v, counts, indices),
                *case.gradients(q, k, v, counts, indices, *grads),
            )
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert_identical(runs[0], run)


def test_rows_that_select_nothing():
    case = Case(heads=2, heads_kv=1)
    q, k, v = case.qkv()
    counts, indices = case.selection()
    counts = torch.zeros_like(counts)
    out, lse = case.attend(q, k, v, counts, indices)
    assert not bool(out.any())
    assert bool((lse == -math.inf).all())
    for grad in case.gradients(q, k, v, counts, indices, *random_gradients(case)):
        assert not bool(grad.any())


@pytest.mark.parametrize("layout", ["raster", "tile"])
def test_gradcheck_in_fp64(layout):
    case = Case((1, 2, 2), (1, 2, 1), (1, 1, 3), (1, 1, 2), heads_kv=1, layout=layout, dtype=torch.float64, seed=1)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    counts, indices = case.selection()
    finite = torch.isfinite(case.attend(q, k, v, counts, indices)[1])

    def both(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = case.attend(*qkv, counts, indices)
        return out, lse[finite]

    assert bool(finite.any())
    assert torch.autograd.gradcheck(both, (q, k, v), fast_mode=False)
    pool = torch.ops.bsa.pool
    assert torch.autograd.gradcheck(lambda x: pool(x, *case.grids[2:], layout), (k,), fast_mode=True)


def test_a_loss_on_the_lse_alone_or_on_one_input_alone():
    case = Case()
    q, k, v = case.qkv()
    counts, indices = case.selection()
    finite = torch.isfinite(case.attend(q, k, v, counts, indices)[1])
    grad_lse = finite.float()
    expected = reference.attend_backward(torch.zeros_like(q), grad_lse, q, k, v, counts, indices, *case.tail)
    k.requires_grad_()
    (dk,) = torch.autograd.grad(case.attend(q, k, v, counts, indices)[1][finite].sum(), k)
    assert_close(dk, None, expected[1])


def test_the_gradient_of_a_sum_is_an_expanded_scalar():
    case = Case()
    q, k, v = (x.requires_grad_() for x in case.qkv())
    counts, indices = case.selection()
    grads = torch.autograd.grad(case.attend(q, k, v, counts, indices)[0].sum(), (q, k, v))
    ones = torch.ones(case.batch, case.heads, case.tokens("q"), case.head_dim)
    assert_identical(grads, case.gradients(q.detach(), k.detach(), v.detach(), counts, indices, ones, None))


def test_very_negative_scores_next_to_padding_stay_finite():
    # exp(0 - lse) of a slot without a token would overflow, and infinity times its zeros is NaN.
    case = Case((1, 3, 3), (1, 2, 2), (1, 3, 3), (1, 2, 2), heads=1, heads_kv=1)
    shape = (1, 1, 9, 16)
    q, k, v = torch.full(shape, 10.0), torch.full(shape, -10.0), torch.randn(shape, generator=case.generator())
    counts, indices = case.selection(density=2.0)
    grad_out = torch.randn(shape, generator=case.generator())
    ours = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, grad_out, None))
    assert all(bool(torch.isfinite(x).all()) for x in ours)
    truth = reference.attend_backward(grad_out, None, q, k, v, counts, indices, *case.tail)
    assert_close(ours[4], None, truth[2], terms=400.0)


def test_lists_of_very_different_lengths_are_not_padded_to_the_longest(monkeypatch):
    # One long list among short ones: what is gathered stays within twice what is selected.
    case = Case(grid_q=(1, 1, 32), tile_q=(1, 1, 1), grid_k=(1, 1, 64), tile_k=(1, 1, 1), heads=1, heads_kv=1)
    q, k, v = case.qkv()
    counts = torch.tensor([64, *[1] * 20, *[5] * 11], dtype=torch.int32).view(1, 1, 32)
    indices = torch.arange(64, dtype=torch.int32).expand(1, 1, 32, 64).contiguous()
    gathered = []
    original = cpu._chunks

    def counting(*args):
        for rows, selected in original(*args):
            gathered.append(selected.numel())
            yield rows, selected

    monkeypatch.setattr(cpu, "_chunks", counting)
    out, _ = case.attend(q, k, v, counts, indices)
    assert_close(out, None, reference.attend(q, k, v, counts, indices, *case.tail)[0])
    assert sum(gathered) < 2 * int(counts.sum())


def test_memory_is_bounded_when_everything_is_selected(monkeypatch):
    # One gather of all keys for all query tiles would take 64 times the keys.
    case = Case((4, 8, 16), (2, 2, 2), (4, 8, 16), (2, 2, 2), heads=1, heads_kv=1, head_dim=64, sparsity=0.0)
    q, k, v = case.qkv()
    counts, indices = case.select(q, k)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(cpu, "MAX_BYTES", 1 << 16)
    largest = 0
    original = cpu._Keys._gather

    def measuring(self, *args):
        nonlocal largest
        rows = original(self, *args)
        largest = max(largest, rows.numel() * rows.element_size())
        return rows

    monkeypatch.setattr(cpu._Keys, "_gather", measuring)
    out, _ = case.attend(q, k, v, counts, indices)
    case.gradients(q, k, v, counts, indices, *random_gradients(case))
    assert 0 < largest <= 1 << 16
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
