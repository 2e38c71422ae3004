"""Adapters of installed libraries to `bsa::attend`: FlashAttention-4 and the cuDNN frontend, on Hopper.

Both want tiles as contiguous blocks of tokens: an adapter copies q, k and v into tile order and the results back, which
is part of its cost. The libraries are optional (extra `peers`) and imported when they first run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..grid import divides, num_tiles, tile_volume
from ..selection import BlockSelection
from . import tile_order
from .registry import AttendImplementation, declare

EXTRA = "peers"
HOPPER = (9, 0)
HEAD_DIM = 128


@dataclass(frozen=True)
class _Limits:
    """What a library's kernels take."""

    dtypes: tuple[torch.dtype, ...]
    volumes: tuple[int, ...]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid_q: Sequence[int],
        tile_q: Sequence[int],
        grid_k: Sequence[int],
        tile_k: Sequence[int],
        layout: str,
    ) -> bool | str:
        """True, or why not."""
        if q.device.type != "cuda":
            return f"it needs a CUDA GPU, got {q.device.type}"
        capability = torch.cuda.get_device_capability(q.device)
        if capability != HOPPER:
            return f"it is adapted to compute capability 9.0 (Hopper), got {'.'.join(map(str, capability))}"
        if q.dtype not in self.dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"its dtype is {names}, got {str(q.dtype).removeprefix('torch.')}"
        if q.shape[-1] != HEAD_DIM:
            return f"its head_dim is {HEAD_DIM}, got {q.shape[-1]}"
        if q.shape[1] != k.shape[1]:
            return f"it wants as many key heads as query heads, got {k.shape[1]} and {q.shape[1]}"
        volumes = tile_volume(tile_q), tile_volume(tile_k)
        if volumes[0] != volumes[1] or volumes[0] not in self.volumes:
            wanted = " or ".join(map(str, self.volumes))
            return f"its tiles hold {wanted} tokens, those of queries as many as those of keys, got {volumes}"
        if not divides(tile_q, grid_q) or not divides(tile_k, grid_k):
            return "it has no partial tiles, and the tile does not divide the grid"
        return True


# ----------------------------------------------------------------------------------------------- FlashAttention-4
# Source: github.com/Dao-AILab/flash-attention, flash_attn/cute (interface.py, block_sparsity.py). Tensors are
# [B, S, H, D]; the natural-log LSE is [B, H, S]; whole blocks go by `full_block_*`, and there are no masked ones.


def fa4_lists(counts: Tensor, indices: Tensor, volume: int) -> Any:
    """FlashAttention-4's block lists of `[B, H, N]` counts and `[B, H, N, M]` indices."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=counts.new_zeros((*counts.shape, 1)),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(volume, volume),
    )


def fa4_forward(q: Tensor, k: Tensor, v: Tensor, lists: Any, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v `[B, S, H, D]` in tile order to out of the same shape and the natural-log LSE `[B, H, S]`."""
    from flash_attn.cute import flash_attn_func

    out, lse, *_ = flash_attn_func(q, k, v, softmax_scale=scale, block_sparse_tensors=lists, return_lse=True)
    return out, lse


def fa4_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    transposed: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fa4_forward`; `transposed` are the lists of query tiles per key tile."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad_out, lse, softmax_scale=scale, dlse=grad_lse, block_sparse_tensors=transposed
    )
    return dq, dk, dv


def fa4_transposed(counts: Tensor, indices: Tensor, num_kv_tiles: int, volume: int) -> Any:
    """Block lists of the query tiles that selected each key tile."""
    turned = BlockSelection(counts, indices, num_kv_tiles).transposed()
    return fa4_lists(turned.kv_num_blocks, torch.where(turned.used, turned.kv_indices, 0), volume)


def _fa4(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, counts, indices, grid_q, tile_q, grid_k, tile_k, scale, layout = args
    q = tile_order.blocks_of(q, grid_q, tile_q, layout, False)
    k, v = (tile_order.blocks_of(x, grid_k, tile_k, layout, False) for x in (k, v))
    lists = fa4_lists(counts.contiguous(), indices.contiguous(), tile_volume(tile_q))
    out, lse = fa4_forward(q, k, v, lists, scale)
    return tile_order.tokens_of(out, grid_q, tile_q, layout, False), tile_order.lse_tokens(lse, grid_q, tile_q, layout)


def _fa4_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, grad_lse, q, k, v, out, lse, counts, indices, grid_q, tile_q, grid_k, tile_k, scale, layout = args
    if torch.are_deterministic_algorithms_enabled():  # theirs adds up with atomics
        return _native_backward(*args)
    grad_out, q, out = (tile_order.blocks_of(x, grid_q, tile_q, layout, False) for x in (grad_out, q, out))
    k, v = (tile_order.blocks_of(x, grid_k, tile_k, layout, False) for x in (k, v))
    lse = tile_order.lse_blocks(lse, grid_q, tile_q, layout)
    grad_lse = None if grad_lse is None else tile_order.lse_blocks(grad_lse, grid_q, tile_q, layout)
    transposed = fa4_transposed(counts, indices, num_tiles(grid_k, tile_k), tile_volume(tile_q))
    grads = fa4_backward(grad_out, grad_lse, q, k, v, out, lse, transposed, scale)
    return _back(grads, grid_q, tile_q, grid_k, tile_k, layout, heads_first=False)


# ------------------------------------------------------------------------------------------------ cuDNN frontend
# Source: github.com/NVIDIA/cudnn-frontend, python/cudnn/block_sparse_attention/api.py. Tensors are [B, H, S, D]; the
# LSE is a natural logarithm. Its backward is functional, bf16 only, and takes no gradient of the LSE.


def cudnn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor | None,
    indices: Tensor,
    volume: int,
    scale: float,
    splits: int | str = 1,
) -> tuple[Tensor, Tensor]:
    """q, k, v `[B, H, S, D]` in tile order to out and LSE.

    Without counts every row takes all its indices. `splits` parts every row's list to keep its keys in L2; "auto" goes
    by the library's own rule, which needs tiles of 64 tokens and no counts.
    """
    import cudnn

    result = cudnn.BSA.block_sparse_attention_forward(
        q,
        k,
        v,
        indices,
        q2k_block_nums=counts,
        sparse_block_size=volume,
        allow_empty_block_nums=counts is not None,
        softmax_scale=scale,
        kv_splits=splits,
    )
    return result["o_tensor"], result["lse_tensor"]


def cudnn_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    counts: Tensor | None,
    indices: Tensor,
    volume: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cudnn_forward`."""
    import cudnn

    result = cudnn.BSA.block_sparse_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        indices,
        q2k_block_nums=counts,
        sparse_block_size=volume,
        softmax_scale=scale,
    )
    return result["dq_tensor"], result["dk_tensor"], result["dv_tensor"]


def _cudnn(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, v, counts, indices, grid_q, tile_q, grid_k, tile_k, scale, layout = args
    q = tile_order.blocks_of(q, grid_q, tile_q, layout, True)
    k, v = (tile_order.blocks_of(x, grid_k, tile_k, layout, True) for x in (k, v))
    out, lse = cudnn_forward(q, k, v, counts.contiguous(), indices.contiguous(), tile_volume(tile_q), scale)
    return tile_order.tokens_of(out, grid_q, tile_q, layout, True), tile_order.lse_tokens(lse, grid_q, tile_q, layout)


def _cudnn_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, grad_lse, q, k, v, out, lse, counts, indices, grid_q, tile_q, grid_k, tile_k, scale, layout = args
    theirs = grad_lse is None and q.dtype == torch.bfloat16 and not torch.are_deterministic_algorithms_enabled()
    if not theirs:
        return _native_backward(*args)
    grad_out, q, out = (tile_order.blocks_of(x, grid_q, tile_q, layout, True) for x in (grad_out, q, out))
    k, v = (tile_order.blocks_of(x, grid_k, tile_k, layout, True) for x in (k, v))
    lse, volume = tile_order.lse_blocks(lse, grid_q, tile_q, layout), tile_volume(tile_q)
    grads = cudnn_backward(grad_out, q, k, v, out, lse, counts.contiguous(), indices.contiguous(), volume, scale)
    return _back(grads, grid_q, tile_q, grid_k, tile_k, layout, heads_first=True)


# ------------------------------------------------------------------------------------------------------------ both


def _native_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, where the library's backward does not do what is asked for."""
    return torch.ops.bsa.attend_backward.default(*args, "native")


def _back(
    grads: tuple[Tensor, Tensor, Tensor],
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    layout: str,
    heads_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = grads
    return (
        tile_order.tokens_of(dq, grid_q, tile_q, layout, heads_first),
        tile_order.tokens_of(dk, grid_k, tile_k, layout, heads_first),
        tile_order.tokens_of(dv, grid_k, tile_k, layout, heads_first),
    )


HALVES = (torch.bfloat16, torch.float16)

declare(AttendImplementation("flash-attn-4", _fa4, _fa4_backward, _Limits(HALVES, (128,)), "flash-attn-4", EXTRA))
declare(
    AttendImplementation("cudnn", _cudnn, _cudnn_backward, _Limits(HALVES, (64, 128)), "nvidia-cudnn-frontend", EXTRA)
)
