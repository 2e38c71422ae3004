"""Attention of a ring of ranks: keys and values move round, each member keeps its queries.

`bsa::ring_select` makes the selection that one process would make: pooled keys are exchanged. `bsa::ring_attend` merges
what each member's keys contribute by their LSE. The next keys are on their way while the present ones are attended to;
in the backward pass so are the sums of their gradients. The ops are opaque, so that a compiler keeps that order.

Source: the merge is that of Ring Attention (arXiv 2310.01889) and of flash decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import merge
from ..errors import UnsupportedError, must
from ..gating import pooled_dtype
from ..grid import Shape3
from ..policy import keep_count
from . import validate
from .definitions import empty_tokens_first, tokens_first
from .ring_share import Ring, everything, finish_gather, owned, start_gather, wait

_RING = "SymInt axis, SymInt[] bounds, SymInt index, str group"
_GRIDS = "SymInt[] grid_q, SymInt[] tile_q, SymInt[] grid_k, SymInt[] tile_k"
_OPTIONS = f'{_GRIDS}, {_RING}, float scale, str implementation="native"'
_LISTS = "Tensor? kv_num_blocks, Tensor? kv_indices"
SCHEMAS = {
    "ring_select": (
        f"(Tensor q, Tensor k, {_GRIDS}, {_RING}, float? sparsity, float? cdf_threshold, float scale)"
        " -> (Tensor kv_num_blocks, Tensor kv_indices)"
    ),
    "ring_attend": f"(Tensor q, Tensor k, Tensor v, {_LISTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    "ring_attend_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LISTS},"
        f" {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
}


def _define(name: str, compute: Any, fake: Any) -> Any:
    op = torch.library.custom_op(
        f"bsa::{name}",
        compute,
        mutates_args=(),
        device_types=("cpu", "cuda"),
        schema=SCHEMAS[name],
        tags=(torch.Tag.needs_exact_strides,),
    )
    op.register_fake(fake)
    return op


def _select(
    q: Tensor,
    k: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    axis: int,
    bounds: Sequence[int],
    index: int,
    group: str,
    sparsity: float | None,
    cdf_threshold: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    ring = Ring.of(axis, bounds, index, group)
    validate.check_ring(q, k, grid_q, grid_k, ring)
    validate.check_criteria(sparsity, cdf_threshold)
    for name, tile in (("tile_q", tile_q), ("tile_k", tile_k)):
        ring.check_tiles(name, tile)
    tiles = [ring.tiles(grid_k, tile_k, m) for m in range(ring.size)]
    pooled = _pool(k, ring.grid(grid_k), tile_k).unflatten(2, tiles[ring.index])
    sizes = [t[axis] for t in tiles]
    pending = start_gather(pooled, 2 + axis, sizes, group)
    pooled_q = _pool(q, ring.grid(grid_q), tile_q)  # while the keys' travel
    pooled_k = torch.cat(finish_gather(pending, 2 + axis, sizes), dim=2 + axis).flatten(2, 4)
    if pooled_q.shape[2] == 0:
        return _empty_selection(q, grid_q, tile_q, grid_k, tile_k, ring, sparsity, cdf_threshold)
    return torch.ops.bsa.select.default(pooled_q, pooled_k, sparsity, cdf_threshold, scale)


def _pool(x: Tensor, grid: Shape3, tile: Sequence[int]) -> Tensor:
    if x.shape[2] == 0:
        return x.new_empty((*x.shape[:2], 0, x.shape[3]), dtype=pooled_dtype(x.dtype))
    return torch.ops.bsa.pool.default(x, list(grid), list(tile), "raster")


def _empty_selection(
    q: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    ring: Ring,
    sparsity: float | None,
    cdf_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """Uninitialised lists of this member's query tiles."""
    num_kv = sum(math.prod(ring.tiles(grid_k, tile_k, m)) for m in range(ring.size))
    by_count = sparsity is not None and cdf_threshold is None
    capacity = keep_count(num_kv, sparsity) if by_count else num_kv  # type: ignore[arg-type]
    rows = (q.shape[0], q.shape[1], math.prod(ring.tiles(grid_q, tile_q, ring.index)))
    return q.new_empty(rows, dtype=torch.int32), q.new_empty((*rows, capacity), dtype=torch.int32)


def _select_fake(
    q: Tensor,
    k: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    axis: int,
    bounds: Sequence[int],
    index: int,
    group: str,
    sparsity: float | None,
    cdf_threshold: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    ring = Ring.of(axis, bounds, index, group)
    return _empty_selection(q, grid_q, tile_q, grid_k, tile_k, ring, sparsity, cdf_threshold)


class _Visits:
    """What is the same at every step: whose keys visit, and which of them the queries here selected."""

    def __init__(self, q: Tensor, lists: tuple[Tensor | None, Tensor | None], grids: Any, ring: Ring) -> None:
        self.q, self.lists, self.ring = q, lists, ring
        self.grid_q, self.tile_q, self.grid_k, self.tile_k = (list(g) for g in grids)
        if lists[0] is not None:
            ring.check_tiles("tile_q", self.tile_q)
            ring.check_tiles("tile_k", self.tile_k)

    def owner(self, step: int) -> int:
        """Whose keys are here: at first this member's own, then those of the one before it, and so on."""
        return (self.ring.index - step) % self.ring.size

    def elements(self, member: int, k: Tensor) -> int:
        """Elements of a member's keys and values together."""
        return 2 * k.shape[0] * k.shape[1] * k.shape[3] * self.ring.tokens(self.grid_k, member)

    def shape(self, member: int, k: Tensor) -> tuple[int, ...]:
        return (2, k.shape[0], k.shape[1], self.ring.tokens(self.grid_k, member), k.shape[3])

    def nothing(self, member: int) -> bool:
        """Whether there are no queries here, or no keys of the member."""
        return self.q.shape[2] == 0 or self.ring.tokens(self.grid_k, member) == 0

    def arguments(self, member: int) -> tuple[Any, ...]:
        """Lists, grids and tiles of the attention of the queries here to a member's keys."""
        ring, counts, indices = self.ring, *self.lists
        if counts is None or indices is None:
            num_q = math.prod(ring.tiles(self.grid_q, self.tile_q, ring.index))
            counts, indices = everything(self.q, num_q, math.prod(ring.tiles(self.grid_k, self.tile_k, member)))
        else:
            counts, indices = owned(counts, indices, ring, self.grid_k, self.tile_k, member)
        grid_q, grid_k = list(ring.grid(self.grid_q)), list(ring.grid(self.grid_k, member))
        return counts, indices, grid_q, self.tile_q, grid_k, self.tile_k


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    axis: int,
    bounds: Sequence[int],
    index: int,
    group: str,
    scale: float,
    implementation: str = "native",
) -> tuple[Tensor, Tensor]:
    ring = Ring.of(axis, bounds, index, group)
    validate.check_ring(q, k, grid_q, grid_k, ring)
    visits = _Visits(q, (kv_num_blocks, kv_indices), (grid_q, tile_q, grid_k, tile_k), ring)
    merged: tuple[Tensor, Tensor] | None = None
    visiting = torch.stack((k, v)).flatten()
    for step in range(ring.size):
        owner, last = visits.owner(step), step + 1 == ring.size
        arriving = visiting if last else ring.pass_on(visiting, visits.elements(visits.owner(step + 1), k))
        if not visits.nothing(owner):
            keys, values = visiting.view(visits.shape(owner, k))
            piece = torch.ops.bsa.attend.default(
                q, keys, values, *visits.arguments(owner), scale, "raster", implementation
            )
            merged = piece if merged is None else merge(*merged, *piece)
        visiting = visiting if last else wait(arriving)
    if merged is None:
        return empty_tokens_first(q).zero_(), q.new_full(q.shape[:3], -math.inf, dtype=pooled_dtype(q.dtype))
    return tokens_first(merged[0].to(q.dtype)), merged[1].contiguous()


def _attend_fake(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return empty_tokens_first(q), q.new_empty(q.shape[:3], dtype=pooled_dtype(q.dtype))


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    axis: int,
    bounds: Sequence[int],
    index: int,
    group: str,
    scale: float,
    implementation: str = "native",
) -> tuple[Tensor, Tensor, Tensor]:
    ring = Ring.of(axis, bounds, index, group)
    visits = _Visits(q, (kv_num_blocks, kv_indices), (grid_q, tile_q, grid_k, tile_k), ring)
    dtype = lse.dtype
    dq = torch.zeros_like(q, dtype=dtype)
    visiting = torch.stack((k, v)).flatten()
    sums = torch.zeros_like(visiting, dtype=dtype)  # gradients of the visiting keys and values, so far
    for step in range(ring.size):
        owner, last = visits.owner(step), step + 1 == ring.size
        arriving = visiting if last else ring.pass_on(visiting, visits.elements(visits.owner(step + 1), k))
        grads = None
        if not visits.nothing(owner):
            keys, values = visiting.view(visits.shape(owner, k))
            # With the output and LSE of all keys, these are the gradients that the visiting ones have in the whole.
            grads = torch.ops.bsa.attend_backward.default(
                grad_out, grad_lse, q, keys, values, out, lse, *visits.arguments(owner), scale, "raster", implementation
            )
            dq += grads[0]
        if step > 0:  # they came while the attention above was computed
            sums = wait(sums)
        if grads is not None:
            sums = sums + torch.stack(grads[1:]).flatten()
        sums = ring.pass_on(sums, visits.elements(visits.owner(step + 1), k))
        visiting = visiting if last else wait(arriving)
    # Copies: an op's results must not be views of one tensor.
    dk, dv = (empty_tokens_first(k).copy_(x) for x in wait(sums).view(visits.shape(ring.index, k)))
    return tokens_first(dq.to(q.dtype)), dk, dv


def _attend_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_tokens_first(q), empty_tokens_first(k), empty_tokens_first(v)


select = _define("ring_select", _select, _select_fake)
attend = _define("ring_attend", _attend, _attend_fake)
attend_backward = _define("ring_attend_backward", _attend_backward, _attend_backward_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_num_blocks, kv_indices, *ctx.options = inputs
    lists = () if kv_num_blocks is None else (kv_num_blocks, kv_indices)
    ctx.save_for_backward(q, k, v, *output, *lists)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *lists = ctx.saved_tensors
    # Also where no gradient comes: the other members' keys pass through here.
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = torch.ops.bsa.ring_attend_backward.default(
        grad_out, grad_lse, q, k, v, out, lse, *(lists or (None, None)), *ctx.options
    )
    return *grads, *(None,) * (2 + len(ctx.options))


def _no_double_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    pass


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise UnsupportedError(must("ring attention", "be differentiated once only", "a second derivative"))


attend.register_autograd(_backward, setup_context=_setup)
attend_backward.register_autograd(_no_double_backward, setup_context=_no_double_setup)
