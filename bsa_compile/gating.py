"""Pool, score and select in plain torch: the CPU implementation of the ops `bsa::pool` and `bsa::select`.

Everything is computed in fp32 or better whatever the input dtype. Scores are accumulated in fp64 and rounded to fp32
once: then key tiles that are equal tie wherever a matmul kernel puts them, and neither autocast nor
`torch.set_float32_matmul_precision` can touch them. A NaN score counts as the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .grid import num_tiles, tile_counts, tile_volume, to_tiles, valid_positions
from .policy import keep_count

# Elements of the largest temporaries (of 8 bytes at most, a handful at a time): bounds memory near 64 MiB.
CHUNK_ELEMENTS = 1 << 20

# A sum of N fp64 masses is short of the real number by rounding: ten tiles of mass 0.1 would reach 0.8 with nine.
MASS_SLACK = 1e-10


def pooled_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 tensors (which only gradient checks use)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str = "raster") -> Tensor:
    """Mean over the valid tokens of each tile.

    Args:
        x: `[B, H, S, D]`; S counts the tokens of the grid (`raster`) or all positions of all tiles (`tile`).
        grid: `(T, H, W)`.
        tile: `(tt, th, tw)`.
        layout: `raster` or `tile`.

    Returns:
        `[B, H, N, D]` fp32 (fp64 for fp64).
    """
    batch, heads, _, width = x.shape
    dtype, volume = pooled_dtype(x.dtype), tile_volume(tile)
    inside = valid_positions(grid, tile, x.device)
    sizes = inside.sum(-1, dtype=dtype)[:, None]
    out = torch.empty(batch, heads, num_tiles(grid, tile), width, dtype=dtype, device=x.device)
    layers, rows, columns = tile_counts(grid, tile)
    per_layer = rows * columns  # tiles in one layer of tiles along t; a layer's tokens are contiguous in both layouts
    tokens = volume * per_layer if layout == "tile" else tile[0] * grid[1] * grid[2]
    for b in range(batch):
        for h, n in _chunks(heads, layers, volume * per_layer * width):
            first, last = n.start, min(n.stop, layers)
            here = slice(first * per_layer, last * per_layer)
            some = x[b, h, first * tokens : last * tokens].to(dtype)
            if layout == "tile":
                tiles = some.unflatten(1, (-1, volume))
                tiles = torch.where(inside[here, :, None], tiles, 0)  # padded positions may hold anything
            else:
                frames = min(grid[0], last * tile[0]) - first * tile[0]
                tiles = to_tiles(some, (frames, grid[1], grid[2]), tile)
            torch.div(tiles.sum(-2), sizes[here], out=out[b, h, here])
    return out


def score(q_pooled: Tensor, k_pooled: Tensor) -> Tensor:
    """Pooled q . pooled k.

    Args:
        q_pooled: `[..., Nq, D]`.
        k_pooled: `[..., Nk, D]`.

    Returns:
        `[..., Nq, Nk]` fp32, accumulated in fp64; NaN is replaced by -inf.
    """
    # autocast leaves fp64 alone, and so does the precision setting for fp32 matrix products.
    exact = torch.matmul(q_pooled.double(), k_pooled.double().transpose(-1, -2))
    return exact.float().nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def mass_counts(best_first: Tensor, cdf_threshold: float, scale: float) -> Tensor:
    """How many scores, best first, reach the softmax mass; the one that crosses it is included.

    Args:
        best_first: `[..., Nk]` scores in descending order.
        cdf_threshold: the mass, in (0, 1]; 1 takes all.
        scale: what scores are multiplied by before the softmax.

    Returns:
        `[...]` int64, in [1, Nk].
    """
    num_kv = best_first.shape[-1]
    if cdf_threshold == 1:
        return torch.full(best_first.shape[:-1], num_kv, dtype=torch.int64, device=best_first.device)
    logits = (best_first.double() * scale).nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    top = logits.amax(-1, keepdim=True)
    weights = torch.where(logits == top, 1.0, (logits - top).exp())  # also where the top is infinite
    mass = weights.cumsum(-1)
    short = mass < (cdf_threshold - MASS_SLACK) * mass[..., -1:]
    return (short.sum(-1) + 1).clamp_(max=num_kv)


def keep_best(scores: Tensor, kth: Tensor, counts: Tensor | int) -> Tensor:
    """Mark the `counts` best scores of each row; among equals the lower index.

    Args:
        scores: `[..., Nk]` without NaN.
        kth: `[..., 1]` the last score that is kept.
        counts: `[..., 1]` or one number, how many are kept.

    Returns:
        `[..., Nk]` bool.
    """
    keep = scores >= kth
    if bool((keep.sum(-1, keepdim=True) != counts).any()):  # ties at the boundary
        above = scores > kth
        tied = keep & ~above
        keep = above | (tied & (tied.cumsum(-1) <= counts - above.sum(-1, keepdim=True)))
    return keep


def select(
    q_pooled: Tensor, k_pooled: Tensor, sparsity: float | None, cdf_threshold: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Which key tiles each query tile attends to.

    Args:
        q_pooled: `[B, H, Nq, D]`.
        k_pooled: `[B, Hkv, Nk, D]`, H a multiple of Hkv.
        sparsity: keep the `max(1, floor((1 - sparsity) * Nk))` best scores.
        cdf_threshold: keep the smallest set, best first, that reaches this softmax mass. With both, the larger set.
        scale: what scores are multiplied by before that softmax.

    Returns:
        kv_num_blocks `[B, H, Nq]` and kv_indices `[B, H, Nq, Kmax]`, int32. Kmax is the count for sparsity alone, else
        Nk. Rows are left-packed and ascending; the unused tail is 0.
    """
    batch, heads, num_q, width = q_pooled.shape
    heads_kv, num_kv = k_pooled.shape[1:3]
    count = keep_count(num_kv, sparsity) if sparsity is not None else 1
    capacity = count if cdf_threshold is None else num_kv
    rows = heads // heads_kv * num_q  # query tiles that share a key head
    q_pooled = q_pooled.reshape(batch * heads_kv, rows, width)
    k_pooled = k_pooled.reshape(batch * heads_kv, num_kv, width)
    num_blocks = torch.full((batch * heads_kv, rows), count, dtype=torch.int32, device=q_pooled.device)
    indices = torch.zeros(batch * heads_kv, rows, capacity, dtype=torch.int32, device=q_pooled.device)
    for h, r in _chunks(batch * heads_kv, rows, num_kv):
        scores = score(q_pooled[h, r], k_pooled[h])
        if cdf_threshold is None:
            if count == num_kv:
                keep = torch.ones_like(scores, dtype=torch.bool)
            else:
                keep = keep_best(scores, scores.topk(count, sorted=False).values.amin(-1, keepdim=True), count)
        else:
            best_first = scores.sort(descending=True).values
            counts = mass_counts(best_first, cdf_threshold, scale).clamp_(min=count)[..., None]
            keep = keep_best(scores, best_first.gather(-1, counts - 1), counts)
            num_blocks[h, r] = counts[..., 0].int()
        # `nonzero` lists the kept columns row by row, ascending: the order in which slots are filled.
        used = torch.arange(capacity, device=scores.device) < num_blocks[h, r, None]
        indices[h, r] = indices[h, r].masked_scatter(used, keep.nonzero()[:, -1].int())
    return num_blocks.reshape(batch, heads, num_q), indices.reshape(batch, heads, num_q, capacity)


def _chunks(heads: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut `[heads, rows, columns]` into pieces of at most `CHUNK_ELEMENTS` (at least one row)."""
    row_step = max(1, min(rows, CHUNK_ELEMENTS // columns))
    head_step = max(1, CHUNK_ELEMENTS // (rows * columns))
    for h in range(0, heads, head_step):
        for r in range(0, rows, row_step):
            yield slice(h, h + head_step), slice(r, r + row_step)
