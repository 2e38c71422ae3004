"""What attention over a selection must satisfy, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsa_compile import cpu, reference
from bsa_compile.grid import from_tiles, tile_volume, to_tiles
from tests.attention_cases import Case, assert_close, assert_identical, cases, dense_mask_attention, pack, unpack

NAMES = ("out", "lse", "dq", "dk", "dv")
few = settings(max_examples=30)


def gradients_wanted(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad_out = torch.randn(case.batch, case.heads, case.tokens("q"), case.head_dim, generator=generator)
    grad_lse = torch.randn(case.batch, case.heads, case.tokens("q"), generator=generator)
    return grad_out.to(case.dtype), grad_lse


def own_token_mask(case: Case, counts: Tensor, indices: Tensor) -> Tensor:
    return reference.token_mask(counts, indices, *case.grids, case.layout)


@few
@given(cases(), st.booleans())
@example(Case(grid_q=(1, 1, 1), tile_q=(4, 4, 4), grid_k=(1, 1, 1), tile_k=(1, 1, 1)), True)
@example(Case(grid_q=(4, 5, 6), tile_q=(4, 5, 6), grid_k=(4, 6, 6), tile_k=(4, 3, 6)), True)
def test_output_lse_and_gradients_are_those_of_the_reference(case, with_lse_gradient):
    q, k, v = case.qkv()
    counts, indices = case.selection()
    grad_out, grad_lse = gradients_wanted(case)
    grad_lse = grad_lse if with_lse_gradient else None
    ours = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, grad_out, grad_lse))
    truth = (
        *reference.attend(q, k, v, counts, indices, *case.tail),
        *reference.attend_backward(grad_out, grad_lse, q, k, v, counts, indices, *case.tail),
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense_mask_attention(*leaves, own_token_mask(case, counts, indices), case.scale)
    loss = (out * grad_out).sum()
    if grad_lse is not None:
        loss = loss + torch.where(torch.isinf(lse), 0, lse * grad_lse).sum()
    torchs = (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))
    # A backward recomputes p = exp(s - lse), to an ulp of lse; dO . V and its mean cancel in the gradients of q and k.
    size = 1 + float(truth[1].masked_fill(torch.isinf(truth[1]), 0).abs().max())
    terms = size * float(grad_out.abs().max() * v.abs().max() * max(q.abs().max(), k.abs().max()))
    largest = {"dq": terms, "dk": terms, "dv": size * float(truth[4].abs().max())}
    for name, a, b, c in zip(NAMES, ours, torchs, truth, strict=True):
        assert_close(a, b, c, name, largest.get(name, 0.0))


@few
@given(cases(sparsity=0.0, cdf_threshold=None, layout="raster"))
def test_sparsity_zero_is_dense_attention(case):
    q, k, v = case.qkv()
    out, lse = case.attend(q, k, v, *case.select(q, k))
    group = case.heads // case.heads_kv
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    truth = torch.nn.functional.scaled_dot_product_attention(q.double(), keys.double(), values.double())
    torchs = torch.nn.functional.scaled_dot_product_attention(q, keys, values)
    assert_close(out, torchs, truth, "out")
    logits = q.double() @ keys.double().transpose(-1, -2) * case.scale
    assert_close(lse, (q @ keys.transpose(-1, -2) * case.scale).logsumexp(-1), logits.logsumexp(-1), "lse")


@few
@given(cases(), st.sampled_from([0.0, 100.0, math.nan, math.inf]))
def test_what_nobody_selected_changes_no_bit_and_gets_no_gradient(case, poison):
    q, k, v = case.qkv()
    counts, indices = case.selection(density=0.3)
    mask = unpack(counts, indices, case.num_k)
    group = case.heads // case.heads_kv
    used = mask.unflatten(1, (case.heads_kv, group)).any(2).any(2)  # [B, Hkv, Nk]
    table = case.table("k")
    unused = torch.ones(case.batch, case.heads_kv, case.tokens("k"), dtype=torch.bool)  # padding is nobody's either
    for b in range(case.batch):
        for h in range(case.heads_kv):
            tokens = table[used[b, h]]
            unused[b, h, tokens[tokens >= 0]] = False
    grad_out, grad_lse = gradients_wanted(case)
    other_k, other_v = (torch.where(unused[..., None], poison, x) for x in (k, v))
    before = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, grad_out, grad_lse))
    after = (
        *case.attend(q, other_k, other_v, counts, indices),
        *case.gradients(q, other_k, other_v, counts, indices, grad_out, grad_lse),
    )
    assert_identical(before, after)
    for grad in before[3:]:
        assert not bool(grad[unused].any())


@few
@given(cases(), st.integers(0, 2**10), st.sampled_from([math.nan, math.inf]), st.sampled_from(["q", "k", "v"]))
def test_a_bad_number_reaches_only_the_rows_that_depend_on_it(case, where, bad, which):
    tensors = dict(zip("qkv", case.qkv(), strict=True))
    counts, indices = case.selection()
    before, before_lse = case.attend(*tensors.values(), counts, indices)
    side = "q" if which == "q" else "k"
    table = case.table(side)
    tile, position = (table >= 0).nonzero()[where % int((table >= 0).sum())].tolist()
    x = tensors[which]
    b, h, token = where % case.batch, where % x.shape[1], int(table[tile, position])
    x[b, h, token, where % case.head_dim] = bad
    after, after_lse = case.attend(*tensors.values(), counts, indices)
    touched = torch.zeros(case.batch, case.heads, case.tokens("q"), dtype=torch.bool)
    if which == "q":
        touched[b, h, token] = True
    else:
        group = case.heads // case.heads_kv
        mask = unpack(counts, indices, case.num_k)
        q_table = case.table("q")
        for head in range(h * group, (h + 1) * group):
            tokens = q_table[mask[b, head, :, tile]]
            touched[b, head, tokens[tokens >= 0]] = True
    assert torch.equal(before[~touched], after[~touched])
    assert torch.equal(before_lse[~touched], after_lse[~touched])
    if which == "v" or (which == "k" and math.isnan(bad)):
        assert not bool(torch.isfinite(after[touched]).all(-1).any())


@few
@given(cases(layout="tile"))
def test_nan_in_padding_never_shows(case):
    q, k, v = case.qkv()
    counts, indices = case.selection()
    grads = gradients_wanted(case)
    clean = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, *grads))
    hidden = []
    for side in "qk":
        table = case.table(side)
        pad = torch.ones(case.tokens(side), dtype=torch.bool)
        pad[table[table >= 0]] = False
        hidden.append(pad)
    q, k, v, grad_out = (
        x.masked_fill(pad[:, None], math.nan)
        for x, pad in ((q, hidden[0]), (k, hidden[1]), (v, hidden[1]), (grads[0], hidden[0]))
    )
    grad_lse = grads[1].masked_fill(hidden[0], math.nan)
    dirty = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, grad_out, grad_lse))
    assert_identical(clean, dirty)
    assert not bool(dirty[0][:, :, hidden[0]].any())
    assert bool((dirty[1][:, :, hidden[0]] == -math.inf).all())
    assert not bool(dirty[2][:, :, hidden[0]].any())


@few
@given(cases())
def test_both_layouts_compute_the_same(case):
    tiled = case.but(layout="tile")
    raster = case.but(layout="raster")
    q, k, v = raster.qkv()
    counts, indices = raster.selection()
    (gq, tq), (gk, tk) = case.grids[:2], case.grids[2:]
    inside = [to_tiles(x, g, t).flatten(2, 3) for x, g, t in ((q, gq, tq), (k, gk, tk), (v, gk, tk))]
    out, lse = raster.attend(q, k, v, counts, indices)
    out_tiled, lse_tiled = tiled.attend(*inside, counts, indices)
    back = from_tiles(out_tiled.unflatten(2, (-1, tile_volume(tq))), gq, tq)
    back_lse = from_tiles(lse_tiled.unflatten(2, (-1, tile_volume(tq)))[..., None], gq, tq)[..., 0]
    assert torch.equal(out, back)
    assert torch.equal(lse, back_lse)


@few
@given(cases(), st.floats(-3, 3))
def test_a_constant_value_comes_back(case, constant):
    q, k, _ = case.qkv()
    counts, indices = case.selection()
    v = torch.full((case.batch, case.heads_kv, case.tokens("k"), case.head_dim), constant)
    out, lse = case.attend(q, k, v, counts, indices)
    attended = torch.isfinite(lse)
    torch.testing.assert_close(out[attended], torch.full_like(out[attended], constant), rtol=1e-5, atol=1e-6)
    assert not bool(out[~attended].any())


@few
@given(cases(), st.integers(0, 2**10))
def test_permuted_heads_and_batch_give_the_permuted_output(case, seed):
    case = case.but(heads=case.heads_kv)
    q, k, v = case.qkv()
    counts, indices = case.selection()
    out, lse = case.attend(q, k, v, counts, indices)
    for axis in (0, 1):
        order = torch.randperm(q.shape[axis], generator=torch.Generator().manual_seed(seed))
        moved = [x.index_select(axis, order) for x in (q, k, v, counts, indices)]
        permuted, permuted_lse = case.attend(*moved)
        assert torch.equal(permuted, out.index_select(axis, order))
        assert torch.equal(permuted_lse, lse.index_select(axis, order))


@few
@given(cases(layout="tile"), st.integers(0, 2**10))
def test_key_tiles_listed_elsewhere_give_the_same_output(case, seed):
    # Whole tiles, so that key tiles can change places in padded tile order.
    grid = tuple(-(-g // t) * t for g, t in zip(case.grid_k, case.tile_k, strict=True))
    case = case.but(grid_k=grid)
    q, k, v = case.qkv()
    mask = unpack(*case.selection(), case.num_k)
    order = torch.randperm(case.num_k, generator=torch.Generator().manual_seed(seed))
    moved = [x.unflatten(2, (case.num_k, -1))[:, :, order].flatten(2, 3) for x in (k, v)]
    out, lse = case.attend(q, k, v, *pack(mask))
    permuted, permuted_lse = case.attend(q, *moved, *pack(mask[..., order]))
    torch.testing.assert_close(permuted, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted_lse, lse, rtol=1e-5, atol=1e-5)


@few
@given(cases(), st.integers(0, 2**10))
def test_a_partition_of_the_lists_merges_by_lse(case, seed):
    # Parts of a selection have rows without any tile; sequence-parallel attention relies on them.
    q, k, v = case.qkv()
    mask = unpack(*case.selection(), case.num_k)
    part = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    out, lse = case.attend(q, k, v, *pack(mask))
    parts = [case.attend(q, k, v, *pack(mask & p)) for p in (part, ~part)]
    weights = torch.stack([p[1] for p in parts]).sub(torch.where(torch.isinf(lse), 0, lse)).exp()
    merged = sum(w[..., None] * p[0] for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)


@few
@given(cases())
def test_one_vector_added_to_all_keys_moves_only_the_lse(case):
    q, k, v = case.qkv()
    counts, indices = case.selection()
    shift = torch.randn(case.head_dim, generator=case.generator())
    out, lse = case.attend(q, k, v, counts, indices)
    shifted, shifted_lse = case.attend(q, k + shift, v, counts, indices)
    torch.testing.assert_close(shifted, out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(shifted_lse, lse + (q @ shift) * case.scale, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "limits",
    [{"CHUNK_BYTES": 1}, {"MAX_BYTES": 2000}, {"MAX_POSITIONS": 3}, {"MAX_BYTES": 2000, "MAX_POSITIONS": 3}],
    ids=lambda limits: "+".join(limits),
)
@settings(max_examples=12)
@given(case=cases())
@example(case=Case(grid_k=(3, 4, 5), tile_k=(2, 3, 2)))
def test_small_limits_on_memory_change_only_rounding(limits, case):
    # Forces chunks of one row, lists cut into parts merged by LSE, and query tiles cut into parts.
    q, k, v = case.qkv()
    counts, indices = case.selection()
    grads = gradients_wanted(case)
    whole = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, *grads))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(cpu, name, value)
        cut = (*case.attend(q, k, v, counts, indices), *case.gradients(q, k, v, counts, indices, *grads))
    for name, a, b in zip(NAMES, cut, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@few
@given(cases(), st.integers(0, 2**10))
def test_a_bad_query_spoils_only_the_gradients_of_what_it_attends_to(case, where):
    q, k, v = case.qkv()
    counts, indices = case.selection()
    grads = gradients_wanted(case)
    before = case.gradients(q, k, v, counts, indices, *grads)
    table, q_table = case.table("k"), case.table("q")
    tile, position = (q_table >= 0).nonzero()[where % int((q_table >= 0).sum())].tolist()
    b, h, token = where % case.batch, where % case.heads, int(q_table[tile, position])
    q[b, h, token] = math.nan
    after = case.gradients(q, k, v, counts, indices, *grads)
    attended = table[unpack(counts, indices, case.num_k)[b, h, tile]]
    touched_k = torch.zeros(case.batch, case.heads_kv, case.tokens("k"), dtype=torch.bool)
    touched_k[b, h // (case.heads // case.heads_kv), attended[attended >= 0]] = True
    touched_q = torch.zeros(case.batch, case.heads, case.tokens("q"), dtype=torch.bool)
    touched_q[b, h, token] = True
    for a, b_, touched in zip(before, after, (touched_q, touched_k, touched_k), strict=True):
        assert torch.equal(a[~touched], b_[~touched])
