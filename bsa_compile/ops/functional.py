"""Block-sparse attention as one function of q, k and v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grid import TokenGrid
from . import validate
from .anchor import as_list


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid_q: TokenGrid | Sequence[int],
    grid_k: TokenGrid | Sequence[int] | None = None,
    tile_q: Sequence[int] = (4, 4, 4),
    tile_k: Sequence[int] | None = None,
    sparsity: float | None = None,
    cdf_threshold: float | None = None,
    scale: float | None = None,
    layout: str = "raster",
    implementation: str = "native",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LongCat block sparse attention: pool, score, select, attend.

    Works in eager mode, under `torch.compile(fullgraph=True)` and autograd (the selection is held fixed). Autocast
    casts as for dense attention; scores are computed in fp32 all the same.

    Args:
        q: `[B, H, Sq, D]`; D a multiple of 8 in [16, 256].
        k, v: `[B, Hkv, Sk, D]`, H a multiple of Hkv.
        grid_q, grid_k: `(T, H, W)` of queries and keys in tokens; `grid_k` defaults to `grid_q`.
        tile_q, tile_k: query and key tiles in tokens; `tile_k` defaults to `tile_q`.
        sparsity: fraction of key tiles that each query tile skips, in [0, 1].
        cdf_threshold: softmax mass that the kept key tiles must reach, in (0, 1]. With both, the larger set.
        scale: factor of the scores, by default `D ** -0.5`.
        layout: order of the token axes: `raster` or `tile` (padded tile order).
        implementation: which registered implementation attends.
        return_lse: also return the natural-log LSE.

    Returns:
        `[B, H, Sq, D]` in the input dtype, laid out in memory as `[B, Sq, H, D]`; with `return_lse` also `[B, H, Sq]`
        in fp32.

    Raises:
        GridError: a grid or tile is malformed, or a grid does not hold as many tokens as its tensor.
        InputError: shapes, dtypes, devices or parameters do not fit.
        UnsupportedError: no implementation serves this dtype, head_dim, device or name.

    Source: LongCat-Video, "Block Sparse Attention" (github.com/meituan-longcat/LongCat-Video, MIT).
    """
    q_grid, q_tile = as_list(grid_q), as_list(tile_q)
    k_grid = q_grid if grid_k is None else as_list(grid_k)
    k_tile = q_tile if tile_k is None else as_list(tile_k)
    validate.check_criteria(sparsity, cdf_threshold)
    q, k, v = (_unit_last_stride(x) for x in _autocast(q, k, v))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    pool = torch.ops.bsa.pool.default
    # The pooled tensors have no names: they are gone before the output is allocated.
    kv_num_blocks, kv_indices = torch.ops.bsa.select.default(
        pool(q.detach(), q_grid, q_tile, layout),
        pool(k.detach(), k_grid, k_tile, layout),
        sparsity,
        cdf_threshold,
        scale,
    )
    out, lse = torch.ops.bsa.attend.default(
        q, k, v, kv_num_blocks, kv_indices, q_grid, q_tile, k_grid, k_tile, scale, layout, implementation
    )
    return (out, lse) if return_lse else out


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the arguments of dense attention: to its dtype, fp64 excepted."""
    device = tensors[0].device.type
    # `torch.amp.is_autocast_available` would say this, but Dynamo cannot trace it before torch 2.12.
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
