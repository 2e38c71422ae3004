"""Gradients of the block-sparse attention, with the selection held fixed.

With S = q k^T, P = exp(scale * S - lse), dP = dout v^T and delta = rowsum(dout * out) - dlse:
dS = P * (dP - delta), dq = scale * dS k, dk = scale * dS^T q, dv = P^T dout.
dq walks the list of each query tile and dk, dv walk the transposed list of each key tile, so nothing is accumulated by
atomics and the result is bit-equal from call to call. The scale is applied to fp32 sums only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bsa_compile.kernels import autotune, config
from bsa_compile.kernels.backward_kernels import backward_k_kernel, backward_q_kernel, delta_kernel
from bsa_compile.kernels.config import Launch, Triple
from bsa_compile.kernels.launch import common_alignment, empty_like_tokens, launch_options, needs_mask, operands
from bsa_compile.kernels.transpose import transpose_selection


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    layout: str = "raster",
    *,
    launch_q: Launch | None = None,
    launch_k: Launch | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_forward` with respect to q, k and v.

    Args:
        grad_out: [B, H, Sq, D], any strides.
        grad_lse: [B, H, Sq], any strides, or None for zero.
        q: This and what follows are the inputs and results of `attend_forward`.
        launch_q: Block sizes of the dq kernel to use instead of the preset; launch_k those of the dk, dv kernel.
        path: "box" refuses the Hopper kernels, "pointer" the box path too (for benchmarks and tests).

    Returns:
        dq, dk and dv in the dtypes and shapes of q, k and v, laid out in memory as [B, S, H, D]. Key tiles that no
        query tile selected and query rows without keys get exact zeros.
    """
    batch, heads, tokens_q, head_dim = q.shape
    heads_kv = k.shape[1]
    if grad_out.stride(-1) != 1 and head_dim > 1:
        grad_out = grad_out.contiguous()
    hopper = config.backward_path(
        q, k, v, grad_out, grid_q, tile_q, grid_k, tile_k, scale, layout,
        launches=launch_q is not None or launch_k is not None, path=path,
    )  # fmt: skip
    if not isinstance(hopper, str):
        from bsa_compile.kernels.hopper_backward import attend_backward_hopper  # Gluon is not in every Triton

        return attend_backward_hopper(
            grad_out, grad_lse, q, k, v, out, lse, kv_num_blocks, kv_indices,
            grid_q, tile_q, grid_k, tile_k, scale, hopper.plans,
        )  # fmt: skip
    if launch_q is None and launch_k is None and autotune.enabled():
        grids = (grid_q, tile_q, grid_k, tile_k)
        rest = (grad_out, grad_lse, q, k, v, out, lse, kv_num_blocks, kv_indices, *grids, scale, layout)
        chosen = config.backward_q_path(q, k, v, grid_k, tile_q, tile_k, layout, path=path)
        key = autotune.shape_class("backward_q", chosen, q, k, *grids, layout, kv_indices.shape[-1])
        launch_q = autotune.launch_for(
            key, chosen, q.device, lambda one: attend_backward(*rest, launch_q=one, path=path)
        )
        chosen = config.backward_k_path(q, grad_out, grid_q, tile_q, tile_k, layout, path=path)
        key = autotune.shape_class("backward_k", chosen, q, k, *grids, layout, kv_indices.shape[-1])
        launch_k = autotune.launch_for(
            key, chosen, q.device, lambda one: attend_backward(*rest, launch_q=launch_q, launch_k=one, path=path)
        )
    tiles_q, tiles_k = config.num_tiles(grid_q, tile_q), config.num_tiles(grid_k, tile_k)
    dq, dk, dv = empty_like_tokens(q), empty_like_tokens(k), empty_like_tokens(v)
    delta = torch.empty(batch, heads, tokens_q, dtype=torch.float32, device=q.device)
    kv_num_blocks, kv_indices = kv_num_blocks.contiguous(), kv_indices.contiguous()
    q_offsets, q_indices = transpose_selection(kv_num_blocks, kv_indices, tiles_k)
    lse = lse.contiguous()
    block_d = max(16, config.next_power_of_two(head_dim))

    align = common_alignment(q, k, v, grad_out, out, dq, dk, dv)
    rows = 64
    programs = batch * heads * triton.cdiv(tokens_q, rows)
    if programs:
        delta_kernel[(programs,)](
            grad_out, out, grad_lse, delta, grad_out.stride()[:3], out.stride()[:3],
            (0, 0, 0) if grad_lse is None else grad_lse.stride(), heads, tokens_q,
            HEAD_DIM=head_dim, BLOCK_D=block_d, ALIGN=align, BLOCK=rows, HAS_GRAD_LSE=grad_lse is not None,
        )  # fmt: skip

    shared: dict[str, Any] = {
        "TILE_Q": tuple(tile_q),
        "TILE_K": tuple(tile_k),
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "ALIGN": align,
        "TILED": layout == "tile",
    }
    chosen = config.backward_q_path(q, k, v, grid_k, tile_q, tile_k, layout, launch=launch_q, path=path)
    launch_q, boxes = chosen.launch, chosen.name == "box"
    programs = batch * heads * tiles_q * triton.cdiv(config.volume(tile_q), launch_q.block_q)
    if programs:
        (q_src, access_q), (grad_src, access_grad), (dq_dst, access_dq) = operands(
            (q, grad_out, dq), grid_q, tile_q, layout, launch_q.block_q, boxes
        )
        (k_src, access_k), (v_src, access_v) = operands((k, v), grid_k, tile_k, layout, launch_q.block_k, boxes)
        backward_q_kernel[(programs,)](
            q_src, k_src, v_src, grad_src, dq_dst, lse, delta, kv_num_blocks, kv_indices, float(scale),
            q.stride()[:3], k.stride()[:3], v.stride()[:3], grad_out.stride()[:3], dq.stride()[:3],
            heads, heads // heads_kv, tiles_q, tokens_q, kv_indices.shape[-1], tuple(grid_q), tuple(grid_k),
            BLOCK_Q=launch_q.block_q,
            BLOCK_K=launch_q.block_k,
            MASK_Q=needs_mask(grid_q, tile_q, launch_q.block_q),
            MASK_K=needs_mask(grid_k, tile_k, launch_q.block_k),
            ACCESS_Q=access_q,
            ACCESS_GRAD=access_grad,
            ACCESS_DQ=access_dq,
            ACCESS_K=access_k,
            ACCESS_V=access_v,
            STAGES=launch_q.num_stages,
            **shared,
            **launch_options(launch_q),
        )  # fmt: skip
    chosen = config.backward_k_path(q, grad_out, grid_q, tile_q, tile_k, layout, launch=launch_k, path=path)
    launch_k, boxes = chosen.launch, chosen.name == "box"
    programs = batch * heads_kv * tiles_k * triton.cdiv(config.volume(tile_k), launch_k.block_k)
    if programs:
        (q_src, access_q), (grad_src, access_grad) = operands(
            (q, grad_out), grid_q, tile_q, layout, launch_k.block_q, boxes
        )
        # k and v are read once, by pointers: they then stay in shared memory, where registers are what is scarce.
        (dk_dst, access_dk), (dv_dst, access_dv) = operands((dk, dv), grid_k, tile_k, layout, launch_k.block_k, boxes)
        backward_k_kernel[(programs,)](
            q_src, k, v, grad_src, dk_dst, dv_dst, lse, delta, q_offsets, q_indices, float(scale),
            q.stride()[:3], k.stride()[:3], v.stride()[:3], grad_out.stride()[:3], dk.stride()[:3], dv.stride()[:3],
            heads, heads // heads_kv, tiles_k, tokens_q, q_indices.shape[-1], tuple(grid_q), tuple(grid_k),
            BLOCK_Q=launch_k.block_q,
            BLOCK_K=launch_k.block_k,
            MASK_Q=needs_mask(grid_q, tile_q, launch_k.block_q),
            MASK_K=needs_mask(grid_k, tile_k, launch_k.block_k),
            ACCESS_Q=access_q,
            ACCESS_GRAD=access_grad,
            ACCESS_DK=access_dk,
            ACCESS_DV=access_dv,
            STAGES=launch_k.num_stages,
            **shared,
            **launch_options(launch_k),
        )  # fmt: skip
    return dq, dk, dv
