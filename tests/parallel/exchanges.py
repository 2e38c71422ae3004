"""Attention of shared tokens without a model: fast enough for many small grids and splits."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

import bsa_compile
from bsa_compile.backend import bsa
from bsa_compile.ops import block_sparse_attention
from bsa_compile.parallel import plan as plans
from bsa_compile.parallel.mesh import resolve, tile_units
from bsa_compile.parallel.plan import Plan
from bsa_compile.parallel.split import FrameSplit

from .jobs import Case, device, mesh_of

WIDTH = 16


def _grad_of(out: Tensor, inputs: list[Tensor], towards: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * towards).sum(), inputs)


@contextlib.contextmanager
def _sparse(tile: tuple[int, int, int], criteria: dict[str, float]) -> Iterator[None]:
    """Lower the anchors as the pass does, without a graph."""

    def ring(q: Tensor, k: Tensor, v: Tensor, *, grid_q: Any, grid_k: Any, role: str, **at: Any) -> Tensor:
        grids = (list(grid_q), list(tile), list(grid_k), list(tile))
        where = (at["axis"], list(at["bounds"]), at["index"], at["group"])
        scale = WIDTH**-0.5
        chosen = (criteria.get("sparsity"), criteria.get("cdf_threshold"))
        lists = torch.ops.bsa.ring_select.default(q.detach(), k.detach(), *grids, *where, *chosen, scale)
        return torch.ops.bsa.ring_attend.default(q, k, v, *lists, *grids, *where, scale)[0]

    def whole(q: Tensor, k: Tensor, v: Tensor, *, grid_q: Any, grid_k: Any, role: str) -> Tensor:
        return block_sparse_attention(q, k, v, grid_q=grid_q, grid_k=grid_k, tile_q=tile, **criteria)

    before = plans.attention, plans.ring_attention
    plans.attention, plans.ring_attention = whole, ring
    try:
        yield
    finally:
        plans.attention, plans.ring_attention = before


def attention(
    case: Case, tile: tuple[int, int, int], criteria: dict[str, float] | None, seed: int, groups: int = 1
) -> dict[str, float]:
    """Largest differences from one process of output and gradients, relative to the largest value.

    Args:
        case: grid, mesh, heads, batch; the first `cond` frames are keys alone.
        tile: of queries and keys.
        criteria: of the selection; None: dense.
        seed: of q, k, v.
        groups: of heads.
    """
    generator = torch.Generator().manual_seed(seed)
    t, h, w = case.grid
    grid_q, grid_k = (t - case.cond, h, w), case.grid
    sizes = [(case.batch, case.heads, g[0] * h * w, WIDTH) for g in (grid_q, grid_k, grid_k, grid_q)]
    q, k, v, towards = (torch.randn(s, generator=generator).to(device()) for s in sizes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if criteria is None:
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        expected = block_sparse_attention(q, k, v, grid_q=grid_q, grid_k=grid_k, tile_q=tile, **criteria)
    wanted = [expected, *_grad_of(expected, inputs, towards)]

    ranks = resolve(mesh_of(case), case.heads)
    split = FrameSplit.of(h, w, ranks.ring.size, ranks.ulysses.size, tile_units([tile]))
    plan = Plan(split, ranks, case.heads, min(groups, case.heads // ranks.ulysses.size))
    with _sparse(tile, criteria) if criteria is not None else contextlib.nullcontext():
        mine = [plan.take(x) for x in inputs]
        shares = plan.share(grid_q), plan.share(grid_k)
        options = {"grid_q": shares[0], "grid_k": shares[1], "role": "noise" if case.cond else "self"}
        out = plan.attend(*mine, **options)
        with torch.no_grad():  # other collectives: those that are waited for late
            assert torch.equal(plan.attend(*mine, **options), out)
        gradients = _grad_of(out, inputs, plan.take(towards))
    flat = out.transpose(1, 2).flatten(2)  # [B, S, H * D], as the model gathers it
    whole = plan.gather(flat, grid_q).unflatten(2, (case.heads, WIDTH)).transpose(1, 2)
    got = [whole]
    for g in gradients:  # each rank has the rows of its own tokens
        dist.all_reduce(g)
        got.append(g)
    # With a single key the gradients of q and k are zero but for rounding, which is measured by the others' size.
    floor = max(float(x.abs().max()) for x in wanted) / 10
    errors = [float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in zip(got, wanted, strict=True)]
    return dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))


def merge_is_exact() -> tuple[bool, bool]:
    """Whether a member whose tiles nobody here selected leaves no trace, in the output and in its own gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = mesh_of(Case((1, 1, 1), {"ring": size})).get_group().group_name
    grid, tile = [2, 2 * size, 4], [2, 2, 2]
    torch.manual_seed(rank)
    q, k, v = (torch.randn(1, 2, 16, WIDTH, device=device()).requires_grad_() for _ in range(3))
    # The key tiles of this member, in the numbering of all: two of a row of tiles.
    mine = torch.tensor([2 * rank, 2 * rank + 1], dtype=torch.int32, device=device()).expand(1, 2, 2, 2).contiguous()
    counts = torch.full((1, 2, 2), 2, dtype=torch.int32, device=device())
    bounds = list(range(0, 2 * size + 1, 2))
    args = (grid, tile, grid, tile, 1, bounds, rank, group, 0.25)
    out, lse = torch.ops.bsa.ring_attend.default(q, k, v, counts, mine, *args)
    alone = (mine - 2 * rank, [2, 2, 4], tile, [2, 2, 4], tile, 0.25)
    expected, lse_alone = torch.ops.bsa.attend.default(q, k, v, counts, *alone)
    same = torch.equal(out, expected) and torch.equal(lse, lse_alone)
    # Now everybody selects the tiles of member 0 alone.
    first = torch.tensor([0, 1], dtype=torch.int32, device=device()).expand(1, 2, 2, 2).contiguous()
    out, _ = torch.ops.bsa.ring_attend.default(q, k, v, counts, first, *args)
    gradients = torch.autograd.grad(out.sum(), [k, v])
    return same, all(bool(g.any()) == (rank == 0) for g in gradients)


def checked() -> None:
    """`torch.library.opcheck` on the ring's ops, on every rank alike."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = mesh_of(Case((1, 1, 1), {"ring": size})).get_group().group_name
    grid, tile = [2, 2 * size, 3], [2, 2, 2]
    torch.manual_seed(rank)
    q, k, v = (torch.randn(1, 2, 12, WIDTH, device=device()).requires_grad_() for _ in range(3))
    ring = (1, list(range(0, 2 * size + 1, 2)), rank, group)
    grids = (grid, tile, grid, tile)
    select = (q.detach(), k.detach(), *grids, *ring, 0.5, None, 0.25)
    opcheck(torch.ops.bsa.ring_select.default, select)
    lists = torch.ops.bsa.ring_select.default(*select)
    opcheck(torch.ops.bsa.ring_attend.default, (q, k, v, *lists, *grids, *ring, 0.25))
    opcheck(torch.ops.bsa.ring_attend.default, (q, k, v, None, None, *grids, *ring, 0.25))
    shares = [1] * size
    share = torch.randn(3, 1, device=device()).requires_grad_()
    opcheck(torch.ops.bsa.gather_shares.default, (share, 1, shares, rank, group, 2.0))


def order() -> list[str]:
    """Collectives and attention in the traced graph of two groups of heads, in order."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = {"all_to_all_single": "start", "wait_tensor": "wait", "bsa.attention": "attend"}
        for node in graph.graph.nodes:
            seen.extend(word for name, word in names.items() if name in str(node.target))
        return graph.forward

    _two_groups(torch.compile, backend=backend)
    return seen


def compiled_order() -> list[str]:
    """The same in what inductor makes of the graph."""
    policy = bsa_compile.BSAPolicy(chunk_3d_shape_q=(1, 1, 1), chunk_3d_shape_k=(1, 1, 1))
    with torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(_two_groups, torch.compile, backend=bsa, options={"policy": policy})
    called = re.findall(r"torch\.ops\.(\w+\.\w+)\.default\(", codes[0])
    names = {
        "_c10d_functional.all_to_all_single": "start",
        "_c10d_functional.wait_tensor": "wait",
        "bsa.attend": "attend",
    }
    return [names[name] for name in called if name in names]


def _two_groups(compiler: Callable[..., Any], **options: Any) -> None:
    """Run the self-attention of 4 heads on 2 ranks, in two groups."""
    case = Case((2, 2, 3), {"ulysses": 2}, heads=4)
    ranks = resolve(mesh_of(case), case.heads)
    plan = Plan(FrameSplit.of(2, 3, 1, 2), ranks, case.heads, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plan.attend(q, k, v, grid_q=(2, 1, 3), grid_k=(2, 1, 3), role="self")

    with torch.no_grad():
        compiler(attend, fullgraph=True, **options)(*(torch.randn(1, 4, 6, WIDTH, device=device()) for _ in range(3)))
