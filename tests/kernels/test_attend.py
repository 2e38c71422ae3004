"""`attend_forward` and `attend_backward` against the fp64 reference: structures, dtypes, memory layouts, bad data."""

from __future__ import annotations

import math

import pytest
import torch

from bsa_compile import reference
from bsa_compile.kernels.attend_backward import attend_backward
from bsa_compile.kernels.attend_forward import attend_forward
from bsa_compile.kernels.config import Launch, forward_path
from tests.attention_cases import INT32_MAX, Case, assert_identical, pack
from tests.kernels.support import check, gradients_for, run

pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = Case(grid_q=(2, 3, 5), tile_q=(2, 2, 4), grid_k=(3, 2, 5), tile_k=(2, 2, 4), heads=2, heads_kv=1, head_dim=16)
STRUCTURES = {
    "partial tiles on every axis": SMALL.but(grid_q=(3, 5, 5), tile_q=(2, 4, 8), grid_k=(3, 5, 5), tile_k=(2, 4, 8)),
    "tile 3x5x2": SMALL.but(grid_q=(4, 4, 3), tile_q=(3, 5, 2), grid_k=(4, 4, 3), tile_k=(3, 5, 2)),
    "tile of one token": SMALL.but(grid_q=(1, 2, 2), tile_q=(1, 1, 1), grid_k=(1, 1, 3), tile_k=(1, 1, 1)),
    "tile of 160 tokens, in blocks": SMALL.but(
        grid_q=(4, 5, 9), tile_q=(4, 5, 8), grid_k=(4, 5, 9), tile_k=(4, 5, 8), heads=1
    ),
    "tile larger than the grid": SMALL.but(grid_q=(2, 3, 3), tile_q=(4, 4, 4), grid_k=(2, 3, 3), tile_k=(4, 4, 4)),
    "image": SMALL.but(grid_q=(1, 8, 8), tile_q=(1, 4, 4), grid_k=(1, 8, 8), tile_k=(1, 4, 4)),
    "rectangular, tiles differ": SMALL.but(grid_q=(2, 4, 4), tile_q=(2, 2, 4), grid_k=(5, 4, 4), tile_k=(2, 4, 4)),
    "4 query heads a key head, 2 key heads": SMALL.but(heads=8, heads_kv=2, grid_q=(2, 2, 4), grid_k=(2, 2, 8)),
    "batch 2": SMALL.but(batch=2, heads_kv=2, grid_q=(2, 2, 5)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure(structure, device):
    check(STRUCTURES[structure].but(seed=3), device)


@pytest.mark.parametrize("structure", ["tile 3x5x2", "rectangular, tiles differ", "tile larger than the grid"])
def test_structure_in_tile_order(structure, device):
    check(STRUCTURES[structure].but(layout="tile", seed=3), device)


@pytest.mark.parametrize(
    ("dtype", "path"), [(torch.bfloat16, None), (torch.float16, "pointer")], ids=["box", "pointer"]
)
@pytest.mark.parametrize("structure", ["partial tiles on every axis", "image", "rectangular, tiles differ", "batch 2"])
def test_half_precision(structure, path, dtype, device):
    check(STRUCTURES[structure].but(dtype=dtype, head_dim=32, heads=1, heads_kv=1, seed=4), device, path=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 40, 64, 80, 128, 256])
def test_head_dim(head_dim, dtype, device):
    check(SMALL.but(head_dim=head_dim, dtype=dtype, heads=1, grid_q=(2, 2, 5)), device)


def test_tile_order_without_padding_takes_the_box_path(device):
    case = SMALL.but(grid_q=(2, 4, 4), grid_k=(2, 4, 8), layout="tile", dtype=torch.float16)
    q, k, v = case.qkv()
    assert forward_path(q, k, v, case.grid_q, case.tile_q, case.grid_k, case.tile_k, 1.0, "tile").name == "box"
    check(case, device)


@pytest.mark.parametrize("path", [None, "pointer"], ids=["box", "pointer"])
def test_boxes_smaller_than_the_tile(path, device):
    case = SMALL.but(grid_q=(4, 4, 5), tile_q=(4, 4, 4), grid_k=(4, 4, 5), tile_k=(4, 4, 4), dtype=torch.float16)
    grads, lists = gradients_for(case), case.selection()
    whole = run(case, device, case.qkv(), lists, grads, path=path)
    q, k, v, counts, indices = (x.to(device) for x in (*case.qkv(), *lists))
    launch = Launch(16, 32)
    tail = (case.grid_q, case.tile_q, case.grid_k, case.tile_k, case.scale)
    out, lse = attend_forward(q, k, v, counts, indices, *tail, launch=launch, path=path)
    grad_out, grad_lse = (x.to(device) for x in grads)
    parts = attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, counts, indices, *tail, launch_q=launch, launch_k=launch, path=path
    )
    for a, b in zip(whole, (out, lse, *parts), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3], ids=str)
@pytest.mark.parametrize("grid", [(2, 4, 4), (2, 4, 5)], ids=["even", "partial"])
def test_scale(scale, grid, device):
    check(SMALL.but(grid_q=grid, grid_k=grid, heads=1), device, scale=scale)


def fused_qkv(case: Case):
    """Views of one [B, S, 3, H, D] tensor."""
    fused = torch.randn(case.batch, case.tokens("q"), 3, case.heads, case.head_dim, generator=case.generator())
    return tuple(x.transpose(1, 2) for x in fused.to(case.dtype).unbind(2))


def tokens_first(case: Case):
    """Contiguous [B, S, H, D] seen as [B, H, S, D]."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.qkv())


def expanded_batch(case: Case):
    """One batch element for all, stride 0."""
    return tuple(x[:1].expand(case.batch, -1, -1, -1) for x in case.qkv())


def expanded_heads(case: Case):
    return tuple(x[:, :1].expand(-1, case.heads, -1, -1) for x in case.qkv())


def cut_head_dim(case: Case):
    """Rows of a wider tensor, not aligned to 16 bytes."""
    return tuple(torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in case.qkv())


MEMORY = {
    "fused qkv": (fused_qkv, "box"),
    "tokens first": (tokens_first, "box"),
    "expanded batch": (expanded_batch, "pointer"),
    "expanded heads": (expanded_heads, "pointer"),
    "cut head_dim": (cut_head_dim, "pointer"),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("grid", [(2, 2, 5), (3, 2, 4)], ids=["whole frames", "partial frames"])
def test_memory_layout(memory, grid, device):
    make, expected = MEMORY[memory]
    case = SMALL.but(batch=2, heads_kv=2, grid_q=grid, grid_k=grid, dtype=torch.float16)
    qkv = make(case)
    frames_follow_frames = memory in ("fused qkv", "tokens first") and grid[0] % case.tile_k[0]
    path = forward_path(*qkv, grid, case.tile_q, grid, case.tile_k, 1.0, "raster")
    assert path.name == ("pointer" if frames_follow_frames else expected), path.reason
    ours = check(case, device, qkv)
    for x in (ours[0], *ours[2:]):
        assert x.transpose(1, 2).is_contiguous()


def test_gradient_of_a_sum_and_no_gradient_of_lse(device):
    case = SMALL.but(dtype=torch.float16, heads=1)
    qkv, lists, like = case.qkv(), case.selection(), gradients_for(case)[0]
    expanded = torch.ones((), dtype=torch.float16).expand(like.shape)
    got = run(case, device, qkv, lists, (expanded, None))
    want = run(case, device, qkv, lists, (torch.ones_like(like), None))
    assert_identical(got, want)
    check(case, device, grad_lse=False)


@pytest.mark.parametrize("path", [None, "pointer"], ids=["box", "pointer"])
def test_lists_without_entries_and_unselected_tiles_are_exact_zeros(path, device):
    case = SMALL.but(dtype=torch.float16)
    mask = torch.zeros(1, case.heads, case.num_q, case.num_k, dtype=torch.bool)
    mask[:, 0, 0, [0, 2]] = True  # one list of one head; all other lists are empty
    out, lse, dq, dk, dv = run(case, device, case.qkv(), pack(mask), gradients_for(case), path=path)
    first = case.table("q")[0]
    first = first[first >= 0]
    others = torch.ones(case.tokens("q"), dtype=torch.bool)
    others[first] = False
    assert out[:, 0, first].abs().min() > 0
    assert bool(torch.isfinite(lse[:, 0, first]).all())
    for x in (out, dq):
        assert not x[:, 0, others].any()
        assert not x[:, 1:].any()
    assert bool((lse[:, 0, others] == -math.inf).all())
    assert bool((lse[:, 1:] == -math.inf).all())
    seen = torch.zeros(case.tokens("k"), dtype=torch.bool)
    for tile in (0, 2):
        tokens = case.table("k")[tile]
        seen[tokens[tokens >= 0]] = True
    for x in (dk, dv):
        assert not x[:, :, ~seen].any()
        assert x[:, :, seen].any(-1).all()


@pytest.mark.parametrize(
    ("bad", "path"),
    [(math.nan, None), (math.nan, "pointer"), (math.inf, None), (1e4, "pointer")],
    ids=["nan, box", "nan, pointer", "inf, box", "finite, pointer"],
)
def test_what_a_list_does_not_hold_changes_no_bit(bad, path, device):
    case = SMALL.but(grid_q=(2, 2, 5), grid_k=(3, 2, 5), dtype=torch.float16, heads=1)
    mask = torch.ones(1, 1, case.num_q, case.num_k, dtype=torch.bool)
    mask[..., 1] = False
    q, k, v = case.qkv()
    hidden = case.table("k")[1]
    hidden = hidden[hidden >= 0]
    grads = gradients_for(case)
    before = run(case, device, (q, k, v), pack(mask), grads, path=path)
    k, v = k.clone(), v.clone()
    k[:, :, hidden] = bad
    v[:, :, hidden] = bad
    after = run(case, device, (q, k, v), pack(mask), grads, path=path)
    assert_identical(before, after)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_stays_in_the_rows_that_depend_on_it(which, device):
    case = SMALL.but(grid_k=(2, 4, 5), dtype=torch.float16, heads_kv=2, seed=5)
    mask = torch.zeros(1, 2, case.num_q, case.num_k, dtype=torch.bool)
    mask[..., 0] = True
    mask[:, :, 1::2, 1] = True
    q, k, v = (x.clone() for x in case.qkv())
    grads = gradients_for(case)
    clean = run(case, device, (q, k, v), pack(mask), grads)
    tokens = case.table("q" if which == "q" else "k")[1]
    token = tokens[tokens >= 0][0]
    {"q": q, "k": k, "v": v}[which][:, 0, token] = math.nan
    dirty = run(case, device, (q, k, v), pack(mask), grads)
    rows = torch.zeros(2, case.tokens("q"), dtype=torch.bool)
    if which == "q":
        rows[0, token] = True
    else:
        odd = case.table("q")[1::2].flatten()
        rows[0, odd[odd >= 0]] = True
    for a, b in zip(clean[:1], dirty[:1], strict=True):
        assert bool(torch.isnan(b[0][rows]).all())
        assert torch.equal(a[0][~rows], b[0][~rows])
    assert torch.equal(clean[2][0][~rows], dirty[2][0][~rows])  # dq
    for a, b in zip(clean[3:], dirty[3:], strict=True):
        assert torch.equal(a[:, 1], b[:, 1])  # the other head


def test_scores_of_minus_infinity_only(device):
    """A tile that gives a row only -inf weighs nothing there; the other rows and tiles are as ever."""
    case = SMALL.but(heads=1, heads_kv=1, head_dim=16, grid_k=(2, 2, 8), dtype=torch.float16)
    q, k, v = (x.clone() for x in case.qkv())
    q[..., 0] = q[..., 0].abs() + 0.1
    first = case.table("k")[0]
    k[:, :, first] = 0
    k[:, :, first, 0] = -math.inf
    both = pack(torch.ones(1, 1, case.num_q, case.num_k, dtype=torch.bool))
    without = torch.ones(1, 1, case.num_q, case.num_k, dtype=torch.bool)
    without[..., 0] = False
    got, want = run(case, device, (q, k, v), both), run(case, device, (q, k, v), pack(without))
    assert_identical(got, want)
    only = pack(~without)
    out, lse = run(case, device, (q, k, v), only)
    assert not out.any()
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("grid", [(3, 3, 5), (2, 4, 4)], ids=["partial", "even"])
def test_padding_in_tile_order_never_shows(grid, device):
    case = SMALL.but(grid_q=grid, grid_k=grid, layout="tile", dtype=torch.float16)
    grads = gradients_for(case)
    q, k, v = case.qkv()
    pad_q, pad_k = ((case.table(side) < 0).flatten() for side in "qk")
    clean = run(case, device, (q, k, v), case.selection(), grads)
    for x in (q, k, v, *grads):
        x[:, :, pad_q if x.shape[1] == case.heads else pad_k] = math.nan
    dirty = run(case, device, (q, k, v), case.selection(), grads)
    assert_identical(clean, dirty)
    out, lse, dq, dk, dv = dirty
    for x, pad in ((out, pad_q), (dq, pad_q), (dk, pad_k), (dv, pad_k)):
        assert not x[:, :, pad].any()
    assert bool((lse[:, :, pad_q] == -math.inf).all())


def test_every_tail_entry_is_poison_and_results_repeat_bit_for_bit(device):
    case = SMALL.but(dtype=torch.bfloat16)
    lists = case.selection()
    assert bool((lists[1] == INT32_MAX).any())
    results = [run(case, device, case.qkv(), lists, gradients_for(case)) for _ in range(2)]
    assert_identical(*results)


@pytest.mark.parametrize("path", [None, "pointer"], ids=["box", "pointer"])
def test_scores_far_below_zero_in_partial_tiles(path, device):
    """exp(0 - lse) of a position without a key overflows, and must not meet its zeros."""
    case = SMALL.but(grid_q=(2, 3, 5), grid_k=(2, 3, 5), dtype=torch.float16, heads=1)
    q, k, v = case.qkv(std=0.1)
    qkv, lists, grads = (q + 4, k - 8, v * 10), case.selection(0.6), gradients_for(case)
    ours = run(case, device, qkv, lists, grads, path=path)
    truth = (
        *reference.attend(*qkv, *lists, *case.tail),
        *reference.attend_backward(*grads, *qkv, *lists, *case.tail),
    )
    assert float(truth[1].max()) < -100
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, truth, strict=True):
        # dq is a small difference of terms of size |k|, whose dS is rounded to fp16.
        slack = 0.05 if name == "dq" else 1e-2
        torch.testing.assert_close(a.double(), b, rtol=slack, atol=slack, msg=lambda m, name=name: f"{name}: {m}")


def test_large_activations_keep_exact_gradients(device):
    """Scores of some hundreds: a scale applied to k in bf16, or scores rounded to bf16, would change the softmax."""
    case = SMALL.but(dtype=torch.bfloat16, heads=1)
    qkv, lists, grads = case.qkv(std=12.0), case.selection(0.6), gradients_for(case)
    ours = run(case, device, qkv, lists, grads)
    truth = (
        *reference.attend(*qkv, *lists, *case.tail),
        *reference.attend_backward(*grads, *qkv, *lists, *case.tail),
    )
    kept = torch.isfinite(truth[1])
    assert float(truth[1][kept].abs().max()) > 200
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, truth, strict=True):
        a, b = (a[kept], b[kept]) if name == "lse" else (a, b)
        # dS is a small difference of dP and delta, and delta comes from the rounded output.
        bound = 6e-2 if name in ("dq", "dk") else 1e-2
        assert float((a.double() - b).norm() / b.norm()) < bound, name
