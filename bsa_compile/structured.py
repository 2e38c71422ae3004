"""q, k, v with the structure of video, and how much neighbouring query tiles have in common.

What a block-sparse kernel can share between query tiles depends on the selections: random q and k give neighbours
unrelated lists, while video gives them nearly the same. Measurements use both and print the shared fraction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import GridError, must
from .grid import TokenGrid, as_shape3, num_tiles, tile_counts
from .selection import BlockSelection

# Set so that tiles of 4x4x4 that are neighbours along w share 70 to 80% of their blocks on the grid 24x44x80 at
# sparsity 0.9375 with head_dim 128; a test holds them to it.
CORRELATION = (8.0, 8.0, 8.0)  # tokens along t, h, w: the width of the Gaussian that smooths the fields
NOISE = 0.5  # part of each token's variance that is its own
AFFINITY = 0.5  # correlation of q's field with k's: tokens attend to what resembles them, as neighbours do


def structured_qkv(
    grid: TokenGrid | Sequence[int],
    heads: int,
    head_dim: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v that are smooth in space and time, with noise of each token's own.

    Every element is a standard normal: a Gaussian field on the grid, low-pass filtered, plus noise. The fields are
    drawn on the CPU, so that two devices differ by the tokens' noise only, which pooling averages away.

    Args:
        grid: `(T, H, W)` in tokens.
        heads: number of heads, each with fields of its own.
        head_dim: D.
        seed: of the generators; the same seed gives the same tensors on the same kind of device.
        dtype: of the results.
        device: where they are made.

    Returns:
        q, k, v: `[1, H, S, D]`, contiguous, tokens in raster order.
    """
    shape = TokenGrid.of(grid).shape
    drawn = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    out = [torch.empty(1, heads, math.prod(shape), head_dim, dtype=dtype, device=device) for _ in range(3)]
    filters = [_filter(size, length, device) for size, length in zip(shape, CORRELATION, strict=True)]
    for head in range(heads):
        key, own, value = (_field(filters, head_dim, drawn, device) for _ in range(3))
        query = AFFINITY * key + math.sqrt(1 - AFFINITY**2) * own
        for x, field in zip(out, (query, key, value), strict=True):
            own_part = torch.randn(field.shape, generator=noise, device=device)
            x[0, head] = math.sqrt(1 - NOISE) * field + math.sqrt(NOISE) * own_part
    q, k, v = out
    return q, k, v


def shared_fraction(
    kv_num_blocks: Tensor, kv_indices: Tensor, grid: TokenGrid | Sequence[int], tile: Sequence[int]
) -> float:
    """The part of their selected blocks that query tiles share with their neighbour along w.

    Args:
        kv_num_blocks: `[B, H, Nq]` int32.
        kv_indices: `[B, H, Nq, Kmax]` int32, whose tails are not read.
        grid: `(T, H, W)` of the queries, in tokens.
        tile: `(tt, th, tw)` of the queries.

    Returns:
        In [0, 1]: blocks in both lists over the mean length of the two lists, summed over all neighbours.

    Raises:
        GridError: the grid has no neighbours along w, or not as many tiles as there are lists.
    """
    shape, tile = TokenGrid.of(grid).shape, as_shape3("tile", tile)
    layers, rows, columns = tile_counts(shape, tile)
    if columns < 2:
        raise GridError(must("grid", "have at least two tiles along w", f"{shape} with tiles of {tile}"))
    if kv_num_blocks.shape[-1] != num_tiles(shape, tile):
        raise GridError(must("grid", f"have {kv_num_blocks.shape[-1]} tiles, as kv_num_blocks", f"{shape}, {tile}"))
    # Tail entries may hold anything; as many columns as the largest index that counts.
    used = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_num_blocks[..., None]
    num_kv = int(torch.where(used, kv_indices, 0).amax()) + 1 if kv_indices.numel() else 1
    both = total = 0
    for counts, indices in zip(kv_num_blocks.flatten(0, 1), kv_indices.flatten(0, 1), strict=True):
        kept = BlockSelection(counts[None, None], indices[None, None], num_kv).to_dense()
        kept = kept.reshape(layers, rows, columns, num_kv)
        both += int((kept[:, :, 1:] & kept[:, :, :-1]).sum())
        lengths = counts.reshape(layers, rows, columns)
        total += int(lengths[:, :, 1:].sum() + lengths[:, :, :-1].sum())
    return 2 * both / max(1, total)


def _filter(size: int, length: float, device: torch.device | str) -> Tensor:
    """`[size, m]`: from white noise on a coarse lattice to a smooth row of unit variance.

    Lattice points are `length` apart, three lengths beyond both ends; values at a distance d correlate by about
    `exp(-(d / (2 * length)) ** 2)`.
    """
    points = torch.arange(-3, math.ceil(size / length) + 4, dtype=torch.float64) * length
    weights = torch.exp(-(((torch.arange(size)[:, None] - points) / length) ** 2) / 2)
    return (weights / weights.norm(dim=1, keepdim=True)).to(device, torch.float32)


def _field(filters: Sequence[Tensor], width: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """`[S, width]`: independent smooth fields on the grid, fp32."""
    field = torch.randn(*(f.shape[1] for f in filters), width, generator=generator).to(device)
    for one in reversed(filters):  # the axis at 2 is summed over and comes back in front: w, then h, then t
        field = torch.tensordot(one, field, dims=([1], [2]))
    return field.reshape(-1, width)
