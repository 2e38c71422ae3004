"""The specification in fp64, as plain as possible: what every fast path is tested against.

Nothing here is meant to be fast, and nothing is shared with the fast paths except the index maps of `grid`.
Shapes: q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]` with H a multiple of Hkv; N tiles of V positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

import torch
from torch import Tensor

from .grid import num_tiles, num_tokens, raster_indices, tile_volume, valid_positions

# A sum of N masses is short of the real number by rounding; ten tiles of mass 0.1 reach 0.3 with three.
_MASS_SLACK = 1e-10


def tile_tokens(grid: Sequence[int], tile: Sequence[int], layout: str = "raster") -> list[Tensor]:
    """For each tile, the indices of its valid tokens on the token axis."""
    if layout == "raster":
        return [row[row >= 0] for row in raster_indices(grid, tile)]
    inside = valid_positions(grid, tile)
    positions = torch.arange(inside.numel()).reshape(inside.shape)
    return [row[ok] for row, ok in zip(positions, inside, strict=True)]


def pool(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str = "raster") -> Tensor:
    """Mean over the valid tokens of each tile: `[B, H, S, D]` to `[B, H, N, D]` fp64."""
    return torch.stack([x.double()[:, :, tokens].mean(2) for tokens in tile_tokens(grid, tile, layout)], 2)


def scores(q_pooled: Tensor, k_pooled: Tensor) -> Tensor:
    """Pooled q . pooled k: `[B, H, Nq, Nk]` fp64."""
    group = q_pooled.shape[1] // k_pooled.shape[1]
    return q_pooled.double() @ k_pooled.double().repeat_interleave(group, 1).transpose(-1, -2)


def select_row(
    row: Sequence[float], sparsity: float | None, cdf_threshold: float | None, scale: float
) -> tuple[list[int], list[int]]:
    """One query tile's selection from its scores.

    Returns:
        The selected key tiles, ascending; and all key tiles, best first (ties: the lower index first; NaN last).
    """
    order = sorted(range(len(row)), key=lambda i: (math.inf if math.isnan(row[i]) else -row[i], i))
    count = 1
    if sparsity is not None:
        count = max(count, math.floor((1 - Decimal(repr(sparsity))) * len(row)))
    if cdf_threshold is not None:
        count = max(count, mass_count([row[i] for i in order], cdf_threshold, scale))
    return sorted(order[:count]), order


def mass_count(best_first: Sequence[float], cdf_threshold: float, scale: float) -> int:
    """How many of the scores, taken in this order, reach the softmax mass; the one that crosses is included."""
    if cdf_threshold == 1:
        return len(best_first)
    logits = [-math.inf if math.isnan(s) else s * scale for s in best_first]
    top = max(logits)
    weights = [1.0 if x == top else math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    for count in range(1, len(weights) + 1):
        if math.fsum(weights[:count]) / total >= cdf_threshold - _MASS_SLACK:
            return count
    return len(weights)


def select(
    q_pooled: Tensor, k_pooled: Tensor, sparsity: float | None, cdf_threshold: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Which key tiles each query tile attends to.

    Returns:
        kv_num_blocks `[B, H, Nq]` and kv_indices `[B, H, Nq, Nk]`, int32; the unused tail holds Nk.
    """
    all_scores = scores(q_pooled, k_pooled)
    num_kv = all_scores.shape[-1]
    counts = torch.zeros(all_scores.shape[:-1], dtype=torch.int32)
    indices = torch.full(all_scores.shape, num_kv, dtype=torch.int32)
    for b, h, n in _rows(counts):
        kept, _ = select_row(all_scores[b, h, n].tolist(), sparsity, cdf_threshold, scale)
        counts[b, h, n] = len(kept)
        indices[b, h, n, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return counts, indices


def token_mask(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    layout: str = "raster",
) -> Tensor:
    """Which key tokens each query token attends to: `[B, H, Sq, Sk]` bool."""
    sizes = [
        num_tokens(grid) if layout == "raster" else num_tiles(grid, tile) * tile_volume(tile)
        for grid, tile in ((grid_q, tile_q), (grid_k, tile_k))
    ]
    q_tokens, k_tokens = tile_tokens(grid_q, tile_q, layout), tile_tokens(grid_k, tile_k, layout)
    mask = torch.zeros(*kv_num_blocks.shape[:2], *sizes, dtype=torch.bool)
    for b, h, n in _rows(kv_num_blocks):
        for j in kv_indices[b, h, n, : int(kv_num_blocks[b, h, n])].tolist():
            mask[b, h, q_tokens[n][:, None], k_tokens[j]] = True
    return mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str = "raster",
) -> tuple[Tensor, Tensor]:
    """Softmax attention under the selection's token mask.

    Returns:
        out `[B, H, Sq, D]` and the natural-log LSE `[B, H, Sq]`, fp64; 0 and -inf where a query attends to nothing.
    """
    mask = token_mask(kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k, layout)
    p, lse = _softmax(q, k, mask, scale)
    return p @ _per_query_head(v, q), lse


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str = "raster",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` with the selection held fixed: dq, dk, dv in fp64."""
    mask = token_mask(kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k, layout)
    p, _ = _softmax(q, k, mask, scale)
    keys, values, grad_out = _per_query_head(k, q), _per_query_head(v, q), grad_out.double()
    out = p @ values
    ds = grad_out @ values.transpose(-1, -2) - (grad_out * out).sum(-1, keepdim=True)
    if grad_lse is not None:
        ds = ds + grad_lse.double()[..., None]
    ds = p * ds * scale
    dq, dk, dv = ds @ keys, ds.transpose(-1, -2) @ q.double(), p.transpose(-1, -2) @ grad_out
    per_kv_head = (k.shape[0], k.shape[1], -1, *k.shape[2:])
    return dq, dk.reshape(per_kv_head).sum(2), dv.reshape(per_kv_head).sum(2)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    tile_q: Sequence[int],
    tile_k: Sequence[int],
    sparsity: float | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    layout: str = "raster",
) -> tuple[Tensor, Tensor]:
    """Pool, score, select and attend, all in fp64; returns out and LSE."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pooled = pool(q, grid_q, tile_q, layout), pool(k, grid_k, tile_k, layout)
    counts, indices = select(*pooled, sparsity, cdf_threshold, scale)
    return attend(q, k, v, counts, indices, grid_q, tile_q, grid_k, tile_k, scale, layout)


def _rows(counts: Tensor) -> list[tuple[int, int, int]]:
    batch, heads, tiles = counts.shape
    return [(b, h, n) for b in range(batch) for h in range(heads) for n in range(tiles)]


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.double().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _softmax(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = q.double() @ _per_query_head(k, q).transpose(-1, -2) * scale
    lse = torch.where(mask, logits, -math.inf).logsumexp(-1)
    return torch.where(mask, (logits - lse[..., None]).exp(), 0.0), lse
