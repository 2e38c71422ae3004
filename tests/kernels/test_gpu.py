"""What only a GPU can show: production shapes, offsets beyond 2**31, CUDA graphs, long rows. Checked on samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bsa_compile.kernels import config
from bsa_compile.kernels.attend_backward import attend_backward
from bsa_compile.kernels.attend_forward import attend_forward
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.pool import pool
from bsa_compile.kernels.score import Scorer
from bsa_compile.kernels.select import select
from bsa_compile.kernels.transpose import transpose_selection
from bsa_compile.ops.functional import block_sparse_attention

pytestmark = pytest.mark.gpu


def token_table(grid: Triple, tile: Triple, device: torch.device) -> Tensor:
    """`[N, V]`: raster token of each position of each tile, -1 for none."""
    counts = config.tile_counts(grid, tile)
    sides = []
    for size, step, n in zip(grid, tile, counts, strict=True):
        at = torch.arange(n * step, device=device)
        sides.append(torch.where(at < size, at, -1).reshape(n, step))
    t, h, w = (
        side.reshape(
            *(n if i == j else 1 for j, n in enumerate(counts)), *(s if i == j else 1 for j, s in enumerate(tile))
        )
        for i, (side, n, s) in enumerate(zip(sides, counts, tile, strict=True))
    )
    token = (t * grid[1] + h) * grid[2] + w
    return torch.where((t < 0) | (h < 0) | (w < 0), -1, token).reshape(math.prod(counts), math.prod(tile))


@dataclass
class Problem:
    """Self-attention over one grid, and the fp64 truth of any tile of it."""

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    lists: Tensor
    grid: Triple
    tile: Triple

    def __post_init__(self) -> None:
        self.scale = self.q.shape[-1] ** -0.5
        self.group = self.q.shape[1] // self.k.shape[1]
        self.table = token_table(self.grid, self.tile, self.q.device)

    @property
    def tail(self) -> tuple:
        return (self.grid, self.tile, self.grid, self.tile, self.scale)

    def tokens(self, tiles: Tensor) -> Tensor:
        found = self.table[tiles.long()].flatten()
        return found[found >= 0]

    def truth(self, head: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(query tokens, key tokens, p, out) of one query tile of batch element 0."""
        rows = self.tokens(torch.tensor([tile], device=self.q.device))
        columns = self.tokens(self.lists[0, head, tile, : int(self.counts[0, head, tile])])
        k, v = (x[0, head // self.group, columns].double() for x in (self.k, self.v))
        p = (self.q[0, head, rows].double() @ k.T * self.scale).softmax(-1)
        return rows, columns, p, p @ v

    def check_forward(self, out: Tensor, lse: Tensor, samples: list[tuple[int, int]]) -> None:
        for head, tile in samples:
            rows, columns, _, expected = self.truth(head, tile)
            k = self.k[0, head // self.group, columns].double()
            expected_lse = (self.q[0, head, rows].double() @ k.T * self.scale).logsumexp(-1)
            assert relative(out[0, head, rows], expected) < 4e-3, (head, tile)
            torch.testing.assert_close(lse[0, head, rows].double(), expected_lse, rtol=0, atol=2e-3)

    def check_dq(self, grad: Tensor, dq: Tensor, samples: list[tuple[int, int]]) -> None:
        for head, tile in samples:
            rows, columns, p, out = self.truth(head, tile)
            k, v = (x[0, head // self.group, columns].double() for x in (self.k, self.v))
            g = grad[0, head, rows].double()
            ds = p * (g @ v.T - (g * out).sum(-1, keepdim=True)) * self.scale
            assert relative(dq[0, head, rows], ds @ k) < 1e-2, (head, tile)

    def check_dk_dv(self, grad: Tensor, dk: Tensor, dv: Tensor, samples: list[tuple[int, int]]) -> None:
        for head_kv, tile in samples:
            own = self.tokens(torch.tensor([tile], device=self.q.device))
            want_k, want_v = (
                torch.zeros(len(own), self.q.shape[-1], dtype=torch.float64, device=own.device) for _ in "kv"
            )
            for head in range(head_kv * self.group, (head_kv + 1) * self.group):
                valid = torch.arange(self.lists.shape[-1], device=own.device) < self.counts[0, head, :, None]
                for query_tile in ((self.lists[0, head] == tile) & valid).any(-1).nonzero().flatten().tolist():
                    rows, columns, p, out = self.truth(head, query_tile)
                    g = grad[0, head, rows].double()
                    here = (columns[:, None] == own[None, :]).double().argmax(0)
                    v = self.v[0, head_kv, own].double()
                    ds = p[:, here] * (g @ v.T - (g * out).sum(-1, keepdim=True)) * self.scale
                    want_k += ds.T @ self.q[0, head, rows].double()
                    want_v += p[:, here].T @ g
            assert relative(dk[0, head_kv, own], want_k) < 1e-2, (head_kv, tile)
            assert relative(dv[0, head_kv, own], want_v) < 1e-2, (head_kv, tile)


def relative(got: Tensor, want: Tensor) -> float:
    assert bool(torch.isfinite(got).all())
    return float((got.double() - want).norm() / want.norm())


def random_problem(
    grid: Triple, heads: int, heads_kv: int, keep: int, device: torch.device, fused: bool, tile: Triple = (4, 4, 4)
) -> Problem:
    """Random bf16 q, k, v, as views of one fused tensor or contiguous [B, H, S, D], and random lists."""
    tokens = math.prod(grid)
    torch.manual_seed(0)
    if fused:
        whole = torch.empty(1, tokens, 3, heads, 128, dtype=torch.bfloat16, device=device).normal_()
        q, k, v = (x.transpose(1, 2) for x in whole.unbind(2))
        k, v = k[:, :heads_kv], v[:, :heads_kv]
    else:
        q = torch.randn(1, heads, tokens, 128, dtype=torch.bfloat16, device=device)
        k, v = (torch.randn(1, heads_kv, tokens, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    tiles = config.num_tiles(grid, tile)
    lists = torch.stack(
        [torch.rand(tiles, tiles, device=device).topk(keep).indices.sort(-1).values.int() for _ in range(heads)]
    )[None]
    counts = torch.full((1, heads, tiles), keep, dtype=torch.int32, device=device)
    return Problem(q, k, v, counts, lists, grid, tile)


def corners(problem: Problem, heads: int) -> list[tuple[int, int]]:
    tiles = problem.table.shape[0]
    return [(0, 0), (0, tiles - 1), (heads - 1, tiles // 2), (heads - 1, tiles - 1), (heads // 2, tiles // 3)]


@pytest.mark.parametrize("path", [None, "box", "pointer"], ids=["preset", "box", "pointer"])
@pytest.mark.parametrize("fused", [False, True], ids=["heads first", "fused qkv"])
@pytest.mark.parametrize(
    "grid", [(24, 44, 80), (24, 45, 80), (24, 30, 52), (23, 44, 80)], ids=lambda grid: "x".join(map(str, grid))
)
def test_production_grids(grid, fused, path, device):
    problem = random_problem(grid, 4, 2, 82, device, fused)
    expected = path or ("gluon" if torch.cuda.get_device_capability(device) == (9, 0) else "box")
    if torch.cuda.get_device_capability(device) >= (9, 0):
        chosen = config.forward_path(problem.q, problem.k, problem.v, *problem.tail, "raster", path=path)
        assert chosen.name == expected, chosen.reason
    args = (problem.q, problem.k, problem.v)
    out, lse = attend_forward(*args, problem.counts, problem.lists, *problem.tail, path=path)
    assert bool(torch.isfinite(out).all())
    problem.check_forward(out, lse, corners(problem, 4))
    grad = torch.randn_like(out)
    dq, dk, dv = attend_backward(grad, None, *args, out, lse, problem.counts, problem.lists, *problem.tail, path=path)
    for x in (dq, dk, dv):
        assert bool(torch.isfinite(x).all())
    problem.check_dq(grad, dq, corners(problem, 4))
    problem.check_dk_dv(grad, dk, dv, corners(problem, 2)[:3])
    again = attend_backward(grad, None, *args, out, lse, problem.counts, problem.lists, *problem.tail, path=path)
    for a, b in zip((dq, dk, dv), again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 4, 8)], ids=str)
def test_full_load_is_bit_equal(tile, device):
    """Neighbours with equal lists keep the tensor cores busiest: where a barrier is missing, some rows then differ."""
    problem = random_problem((24, 44, 80), 8, 8, 82 if tile == (4, 4, 4) else 41, device, False, tile)
    problem.lists[:, :, 1::2] = problem.lists[:, :, 0::2]
    args = (problem.q, problem.k, problem.v, problem.counts, problem.lists, *problem.tail)
    out, lse = attend_forward(*args)
    for _ in range(20):
        again = attend_forward(*args)
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)
    assert float((lse - attend_forward(*args, path="box")[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("alike", [True, False], ids=["equal lists", "random lists"])
@pytest.mark.parametrize("heads_kv", [8, 2])
@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 4, 8)], ids=str)
def test_full_load_of_the_backward_is_bit_equal(tile, heads_kv, alike, device):
    problem = random_problem((24, 44, 80), 8, heads_kv, 82 if tile == (4, 4, 4) else 41, device, False, tile)
    if alike:
        problem.lists[:, :, 1::2] = problem.lists[:, :, 0::2]
    args = (problem.q, problem.k, problem.v, problem.counts, problem.lists, *problem.tail)
    out, lse = attend_forward(*args)
    rest = (*args[:3], out, lse, *args[3:])
    grad = torch.randn_like(out)
    first = attend_backward(grad, lse, *rest)
    for _ in range(20):
        for a, b in zip(attend_backward(grad, lse, *rest), first, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(attend_backward(grad, lse, *rest, path="box"), first, strict=True):
        assert relative(b, a.double()) < 5e-3


HOPPER_BACKWARD = {
    "odd number of tiles": ((4, 12, 12), (4, 4, 4), (4, 12, 20), (4, 4, 4), 2, 3, 3, torch.bfloat16),
    "one tile": ((4, 4, 4), (4, 4, 4), (4, 4, 4), (4, 4, 4), 1, 2, 2, torch.float16),
    "tiles of 128": ((8, 8, 24), (4, 4, 8), (8, 8, 16), (4, 4, 8), 2, 4, 4, torch.bfloat16),
    "64 queries, 128 keys": ((8, 8, 20), (2, 4, 8), (8, 8, 24), (4, 4, 8), 1, 2, 2, torch.bfloat16),
    "128 queries, 64 keys": ((8, 8, 24), (4, 4, 8), (8, 8, 20), (4, 4, 4), 1, 2, 2, torch.float16),
    "partial tiles": ((8, 9, 10), (4, 4, 4), (8, 6, 11), (4, 4, 4), 1, 4, 4, torch.bfloat16),
    "partial tiles of 128": ((8, 9, 20), (4, 4, 8), (8, 9, 20), (4, 4, 8), 1, 4, 4, torch.bfloat16),
    "grouped heads": ((8, 8, 12), (4, 4, 4), (8, 9, 12), (4, 4, 4), 2, 6, 2, torch.bfloat16),
}


@pytest.mark.parametrize("name", HOPPER_BACKWARD)
def test_hopper_backward_beside_the_portable_one(name, device):
    """Lists of random lengths, some empty, some key tiles unwanted."""
    grid_q, tile_q, grid_k, tile_k, batch, heads, heads_kv, dtype = HOPPER_BACKWARD[name]
    torch.manual_seed(0)
    new = {"dtype": dtype, "device": device}
    q = torch.randn(batch, heads, math.prod(grid_q), 128, **new)
    k, v = (torch.randn(batch, math.prod(grid_k), heads_kv, 128, **new).transpose(1, 2) for _ in range(2))
    if batch == 1 and grid_q == grid_k and heads == heads_kv:
        q, k, v = (x.transpose(1, 2) for x in torch.randn(1, q.shape[2], 3, heads, 128, **new).unbind(2))
    tiles_q, tiles_k = config.num_tiles(grid_q, tile_q), config.num_tiles(grid_k, tile_k)
    chosen = torch.rand(batch, heads, tiles_q, tiles_k, device=device)
    chosen = chosen < torch.rand(batch, heads, tiles_q, 1, device=device)
    chosen[:, :, 1:] |= chosen[:, :, :-1] & (torch.rand(chosen[:, :, 1:].shape, device=device) < 0.5)
    if tiles_q > 1:
        chosen[:, :, tiles_q // 3] = False
        chosen[..., tiles_k // 2] = False
    counts = chosen.sum(-1).int()
    lists = (~chosen).to(torch.int8).sort(dim=-1, stable=True).indices.int()
    lists[torch.arange(tiles_k, device=device) >= counts[..., None]] = 2**31 - 1
    tail = (counts, lists, grid_q, tile_q, grid_k, tile_k, 128**-0.5)
    out, lse = attend_forward(q, k, v, *tail)
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    if torch.cuda.get_device_capability(device) == (9, 0):
        path = config.backward_path(q, k, v, grad, *tail[2:], "raster")
        assert not isinstance(path, str), path
    got = attend_backward(grad, grad_lse, q, k, v, out, lse, *tail)
    want = attend_backward(grad, grad_lse, q, k, v, out, lse, *tail, path="pointer")
    for a, b in zip(got, want, strict=True):
        assert bool(torch.isfinite(a).all())
        assert float((a.double() - b.double()).norm()) <= 5e-3 * float(b.double().norm())
        assert torch.equal(a.abs().amax(-1) == 0, b.abs().amax(-1) == 0)


@pytest.mark.parametrize("path", [None, "box", "pointer"], ids=["preset", "box", "pointer"])
@pytest.mark.parametrize("tile", [(4, 4, 8), (4, 8, 8), (3, 5, 2)], ids=str)
def test_other_tiles(tile, path, device):
    problem = random_problem((24, 40, 40), 2, 2, 10, device, True, tile)
    out, lse = attend_forward(problem.q, problem.k, problem.v, problem.counts, problem.lists, *problem.tail, path=path)
    problem.check_forward(out, lse, corners(problem, 2))
    grad = torch.randn_like(out)
    dq, dk, dv = attend_backward(
        grad, None, problem.q, problem.k, problem.v, out, lse, problem.counts, problem.lists, *problem.tail, path=path
    )
    problem.check_dq(grad, dq, corners(problem, 2))
    problem.check_dk_dv(grad, dk, dv, corners(problem, 2)[:3])


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, "box", "pointer"], ids=["preset", "box", "pointer"])
def test_offsets_beyond_32_bits(path, device):
    """A fused-qkv view of more than 2**31 elements; the last tiles lie beyond."""
    problem = random_problem((48, 60, 64), 32, 32, 8, device, True)
    assert problem.q.stride(2) * (problem.q.shape[2] - 1) > 2**31
    pooled = pool(problem.k, problem.grid, problem.tile)
    last = problem.tokens(torch.tensor([pooled.shape[2] - 1], device=device))
    torch.testing.assert_close(
        pooled[0, -1, -1].double(), problem.k[0, -1, last].double().mean(0), rtol=1e-5, atol=1e-6
    )
    args = (problem.q, problem.k, problem.v)
    out, lse = attend_forward(*args, problem.counts, problem.lists, *problem.tail, path=path)
    samples = corners(problem, 32)
    problem.check_forward(out, lse, samples)
    grad = torch.randn(problem.q.shape, dtype=torch.bfloat16, device=device)
    dq, dk, dv = attend_backward(grad, None, *args, out, lse, problem.counts, problem.lists, *problem.tail, path=path)
    problem.check_dq(grad, dq, samples)
    problem.check_dk_dv(grad, dk, dv, samples)


@pytest.mark.parametrize("grid", [(8, 16, 16), (8, 18, 16)], ids=["even", "partial"])
def test_cuda_graph_replays_with_new_data(grid, device):
    tile = (4, 4, 4)
    q, k, v = (torch.randn(1, 2, math.prod(grid), 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    grad = torch.randn_like(q)

    def step():
        counts, lists = select(pool(q, grid, tile), pool(k, grid, tile), 3, 0.3, 0.125)
        out, lse = attend_forward(q, k, v, counts, lists, grid, tile, grid, tile, 0.125)
        return out, lse, *attend_backward(grad, None, q, k, v, out, lse, counts, lists, grid, tile, grid, tile, 0.125)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in (q, k, v, grad):
        x.normal_()
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_no_launch_synchronises(device):
    grid, tile = (8, 16, 16), (4, 4, 4)
    q, k, v = (torch.randn(1, 2, math.prod(grid), 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts, lists = select(pool(q, grid, tile), pool(k, grid, tile), 3, 0.3, 0.125)
        out, lse = attend_forward(q, k, v, counts, lists, grid, tile, grid, tile, 0.125)
        attend_backward(out, lse, q, k, v, out, lse, counts, lists, grid, tile, grid, tile, 0.125)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tiles", [1320, 5280, 9001], ids=str)
@pytest.mark.parametrize(("count", "mass"), [(82, None), (None, 0.9), (40, 0.5)], ids=["count", "mass", "both"])
def test_selection_from_long_rows(tiles, count, mass, device):
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 70, 128, device=device), torch.randn(1, 2, tiles, 128, device=device)
    scale = 128**-0.5
    counts, lists = select(q, k, count, mass, scale)
    again = select(q, k, count, mass, scale)
    filled = torch.arange(lists.shape[-1], device=device) < counts[..., None]
    assert torch.equal(counts, again[0])
    assert torch.equal(lists[filled], again[1][filled])
    assert int(lists[filled].min()) >= 0
    assert int(lists[filled].max()) < tiles
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=device)
    chosen.scatter_(-1, torch.where(filled, lists, lists[..., :1]).long(), True)
    assert torch.equal(chosen.sum(-1), counts)
    worst_in = torch.where(chosen, scores, math.inf).amin(-1)
    best_out = torch.where(chosen, -math.inf, scores).amax(-1)
    assert bool((worst_in >= best_out - 1e-4).all())  # scores are of order 10, in fp32
    if mass is None:
        assert bool((counts == count).all())
    else:
        p = (scores * scale).softmax(-1)
        reached = torch.where(chosen, p, 0).sum(-1)
        last = torch.where(chosen, p, math.inf).amin(-1)
        assert bool((reached >= mass - 1e-6).all())
        assert bool(((reached - last < mass + 1e-6) | (counts <= (count or 1))).all())


@pytest.mark.parametrize("levels", [1, 2, 7], ids="{} values".format)
def test_ties_go_to_the_lower_index_in_long_rows(levels, device):
    """Scores of few values, exact in fp32: count and mass cut through hundreds of equal ones."""
    tiles, scale = 1320, 0.25
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randint(0, levels, (1, 2, 50, tiles), generator=generator, device=device).float()
    for count, mass in ((82, None), (None, 0.5), (600, 0.5)):
        for head in range(2):
            # Key j is the j-th row of scores [rows, tiles] transposed, and query i picks its element i.
            k = torch.nn.functional.pad(scores[:, head : head + 1].transpose(-1, -2), (0, 14)).contiguous()
            q = torch.eye(64, device=device)[None, None, :50]
            counts, lists = select(q, k, count, mass, scale)
            order = scores[0, head].sort(dim=-1, descending=True, stable=True)
            p = (order.values.double() * scale).softmax(-1).cumsum(-1)
            needed = 1 if mass is None else (p < mass - 1e-9).sum(-1) + 1
            expected = torch.as_tensor(needed, device=device).clamp(min=count or 1).expand(50)
            assert torch.equal(counts[0, 0].long(), expected)
            for row in range(50):
                n = int(counts[0, 0, row])
                assert torch.equal(lists[0, 0, row, :n].long(), order.indices[row, :n].sort().values)


@pytest.mark.parametrize("mass", [None, 0.5], ids=["count", "mass"])
def test_extra_memory_of_the_whole_op(mass, device):
    """Beyond its inputs and its output it needs at most a tenth of q, and with a mass the room for all key tiles."""
    grid, heads = (24, 44, 80), 8
    q, k, v = (torch.randn(1, heads, math.prod(grid), 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    rows, tiles = heads * 1320, 1320
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    sparsity = None if mass else 0.9375
    out = block_sparse_attention(q, k, v, grid_q=grid, sparsity=sparsity, cdf_threshold=mass)
    extra = torch.cuda.max_memory_allocated(device) - before - out.nbytes
    lists = 0 if mass is None else 2 * 4 * rows * tiles  # the lists and the load programs made of them
    assert extra <= q.nbytes // 10 + lists


@pytest.mark.parametrize("tiles", [(70, 300), (1320, 1320), (129, 5000)], ids=str)
def test_the_score_kernels_agree(tiles, device):
    """The kernel for Hopper and the portable one, on shared keys, parts of the rows, infinities and NaN."""
    if not config.score_launch(128, device).gluon:
        pytest.skip("the Hopper kernel does not run here")
    tiles_q, tiles_k = tiles
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, tiles_q, 120, device=device), torch.randn(1, 2, tiles_k, 120, device=device)
    q[0, 1, 3, 5], k[0, 1, 7, 9], k[0, 0, tiles_k - 1, 3] = math.inf, math.nan, -math.inf
    layout = config.row_layout(tiles_k)
    found = []
    for launch in (config.HOPPER_SCORE, config.ScoreLaunch(64, 64, 4, 4, 1)):
        scores = torch.full((2, tiles_q - 6, layout.width), math.nan, device=device)
        Scorer(q, k, layout, launch=launch)(scores, 1, 2, 5, tiles_q - 6)
        found.append(scores)
    assert not bool(found[0].isnan().any())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)


def test_transposed_lists_of_a_production_selection(device):
    tiles, keep = 1320, 82
    lists = torch.rand(1, 8, tiles, tiles, device=device).topk(keep).indices.sort(-1).values.int()
    counts = torch.randint(0, keep + 1, (1, 8, tiles), dtype=torch.int32, device=device)
    mask = torch.zeros(1, 8, tiles, tiles + 1, dtype=torch.bool, device=device)
    filled = torch.arange(keep, device=device) < counts[..., None]
    mask.scatter_(-1, torch.where(filled, lists, tiles).long(), True)
    mask = mask[..., :tiles].transpose(-1, -2)
    offsets, indices = transpose_selection(counts, lists, tiles)
    assert torch.equal(offsets[..., 1:].long(), mask.sum(-1).cumsum(-1))
    for head in range(8):
        expected = mask[0, head].nonzero()[:, 1].int()
        assert torch.equal(indices[0, head, : len(expected)], expected)
