"""Softmax attention of each query tile over its selected key tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsa_compile.kernels import autotune, config
from bsa_compile.kernels.config import Launch, Triple
from bsa_compile.kernels.launch import common_alignment, empty_like_tokens, launch_options, needs_mask, operands
from bsa_compile.kernels.tiles import (
    LN_2,
    LOG2_E,
    POINTER,
    dot,
    head_pointer,
    load_block,
    parts,
    store_block,
    tile_tokens,
)


@triton.jit
def _attend_forward(
    q_src,
    k_src,
    v_src,
    out_dst,
    lse_ptr,
    counts_ptr,
    lists_ptr,
    scale,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    heads,
    group,
    tiles_q,
    tokens_q,
    capacity,
    grid_q,
    grid_k,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    MASK_Q: tl.constexpr,
    MASK_K: tl.constexpr,
    ACCESS_Q: tl.constexpr,
    ACCESS_K: tl.constexpr,
    ACCESS_V: tl.constexpr,
    ACCESS_OUT: tl.constexpr,
    STAGES: tl.constexpr,
):
    PARTS_Q: tl.constexpr = parts(TILE_Q, BLOCK_Q)
    PARTS_K: tl.constexpr = parts(TILE_K, BLOCK_K)
    pid = tl.program_id(0)
    row = pid // PARTS_Q  # (batch, head, query tile)
    tile_q = row % tiles_q
    head = row // tiles_q % heads
    batch = row // tiles_q // heads
    head_kv = head // group
    heads_kv = heads // group

    start_q = pid % PARTS_Q * BLOCK_Q
    position_q = start_q + tl.arange(0, BLOCK_Q)
    origin_q, offset_q, valid_q = tile_tokens(tile_q, position_q, grid_q, TILE_Q, TILED)
    if ACCESS_Q == POINTER:
        q_src = head_pointer(q_src, q_strides, batch, head, ALIGN)
    if ACCESS_K == POINTER:
        k_src = head_pointer(k_src, k_strides, batch, head_kv, ALIGN)
    if ACCESS_V == POINTER:
        v_src = head_pointer(v_src, v_strides, batch, head_kv, ALIGN)
    if ACCESS_OUT == POINTER:
        out_dst = head_pointer(out_dst, out_strides, batch, head, ALIGN)
    q = load_block(
        q_src, q_strides[2], batch, head, heads, tile_q, start_q, origin_q, offset_q, valid_q,
        grid_q, TILE_Q, TILED, MASK_Q, BLOCK_Q, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_Q,
    )  # fmt: skip

    scale_log2 = scale * LOG2_E
    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # of the scores, scaled, in base 2
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    count = tl.load(counts_ptr + row)
    list_ptr = lists_ptr + row.to(tl.int64) * capacity
    for step in tl.range(0, count * PARTS_K, num_stages=STAGES):
        tile_k = tl.load(list_ptr + step // PARTS_K)
        start_k = step % PARTS_K * BLOCK_K
        origin_k, offset_k, valid_k = tile_tokens(tile_k, start_k + tl.arange(0, BLOCK_K), grid_k, TILE_K, TILED)
        k = load_block(
            k_src, k_strides[2], batch, head_kv, heads_kv, tile_k, start_k, origin_k, offset_k, valid_k,
            grid_k, TILE_K, TILED, MASK_K, BLOCK_K, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_K,
        )  # fmt: skip
        s = dot(q, tl.trans(k))  # [BLOCK_Q, BLOCK_K]
        if MASK_K:
            s = tl.where(valid_k[None, :], s * scale_log2, float("-inf"))
            new_best = tl.maximum(best, tl.max(s, 1))
        else:
            # One multiplication per row instead of one per score.
            new_best = tl.maximum(best, (tl.min(s, 1) if NEGATIVE else tl.max(s, 1)) * scale_log2)
            s = s * scale_log2
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # -inf minus -inf is NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(best - shift)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        v = load_block(
            v_src, v_strides[2], batch, head_kv, heads_kv, tile_k, start_k, origin_k, offset_k, valid_k,
            grid_k, TILE_K, TILED, MASK_K, BLOCK_K, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_V,
        )  # fmt: skip
        acc = dot(p.to(v.dtype), v, acc)
        best = new_best

    empty = total == 0.0  # no key, or only scores of -inf
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (best + tl.log2(total)) * LN_2)
    store_block(
        out_dst, out_strides[2], batch, head, heads, tile_q, start_q, position_q, origin_q, offset_q, valid_q,
        acc / total[:, None], grid_q, TILE_Q, TILED, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_OUT,
    )  # fmt: skip
    keep = valid_q
    if TILED:
        keep = position_q < TILE_Q[0] * TILE_Q[1] * TILE_Q[2]
        lse = tl.where(valid_q, lse, float("-inf"))
    lse_ptr += (batch * heads + head).to(tl.int64) * tokens_q
    tl.store(lse_ptr + origin_q + offset_q, lse, mask=keep)


def attend_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Triple,
    tile_q: Triple,
    grid_k: Triple,
    tile_k: Triple,
    scale: float,
    layout: str = "raster",
    *,
    launch: Launch | None = None,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query tile to the key tiles in its list.

    Args:
        q: [B, H, Sq, D]; k and v are [B, Hkv, Sk, D], H a multiple of Hkv. Any strides with a unit last one.
        kv_num_blocks: [B, H, Nq] int32.
        kv_indices: [B, H, Nq, Kmax] int32, ascending within a row; entries beyond the count are not read.
        scale: Factor of the scores; any finite number.
        layout: Order of the token axes: "raster", or "tile" (padded tile order).
        launch: Block sizes to use instead of the preset (for benchmarks).
        path: "box" refuses the Hopper kernel, "pointer" the box path too (for benchmarks and tests).

    Returns:
        out [B, H, Sq, D] in q's dtype, laid out in memory as [B, Sq, H, D], and the natural-log LSE [B, H, Sq] in fp32.
        A row without keys gives 0 and -inf, and so do the positions of a padded tile order that hold no token.
    """
    batch, heads, tokens_q, head_dim = q.shape
    chosen = config.forward_path(
        q, k, v, grid_q, tile_q, grid_k, tile_k, scale, layout, launch=launch, path=path
    )  # fmt: skip
    if chosen.name == "gluon":
        from bsa_compile.kernels.hopper_forward import attend_forward_hopper  # Gluon is not in every Triton

        return attend_forward_hopper(
            q, k, v, kv_num_blocks, kv_indices, grid_q, tile_q, grid_k, tile_k, scale, chosen.plans
        )  # fmt: skip
    if launch is None and autotune.enabled():
        grids = (grid_q, tile_q, grid_k, tile_k)
        key = autotune.shape_class("forward", chosen, q, k, *grids, layout, kv_indices.shape[-1])
        rest = (q, k, v, kv_num_blocks, kv_indices, *grids, scale, layout)
        tuned = autotune.launch_for(key, chosen, q.device, lambda one: attend_forward(*rest, launch=one, path=path))
        chosen = config.forward_path(q, k, v, *grids, scale, layout, launch=tuned, path=path)
    launch, boxes = chosen.launch, chosen.name == "box"
    out = empty_like_tokens(q)
    lse = torch.empty(batch, heads, tokens_q, dtype=torch.float32, device=q.device)
    tiles_q = config.num_tiles(grid_q, tile_q)
    programs = batch * heads * tiles_q * triton.cdiv(config.volume(tile_q), launch.block_q)
    if programs:
        (k_src, access_k), (v_src, access_v) = operands((k, v), grid_k, tile_k, layout, launch.block_k, boxes)
        (q_src, access_q), (out_dst, access_out) = operands((q, out), grid_q, tile_q, layout, launch.block_q, boxes)
        _attend_forward[(programs,)](
            q_src, k_src, v_src, out_dst, lse, kv_num_blocks.contiguous(), kv_indices.contiguous(), float(scale),
            q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3],
            heads, heads // k.shape[1], tiles_q, tokens_q, kv_indices.shape[-1], tuple(grid_q), tuple(grid_k),
            TILE_Q=tuple(tile_q),
            TILE_K=tuple(tile_k),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, config.next_power_of_two(head_dim)),
            ALIGN=common_alignment(q, k, v, out),
            BLOCK_Q=launch.block_q,
            BLOCK_K=launch.block_k,
            TILED=layout == "tile",
            NEGATIVE=scale < 0,
            MASK_Q=needs_mask(grid_q, tile_q, launch.block_q),
            MASK_K=needs_mask(grid_k, tile_k, launch.block_k),
            ACCESS_Q=access_q,
            ACCESS_K=access_k,
            ACCESS_V=access_v,
            ACCESS_OUT=access_out,
            STAGES=launch.num_stages,
            **launch_options(launch),
        )  # fmt: skip
    return out, lse
