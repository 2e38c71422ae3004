"""The kernels of `attend_backward`: delta, dq, and dk with dv."""

from __future__ import annotations

import triton
import triton.language as tl

from bsa_compile.kernels.tiles import (
    LOG2_E,
    POINTER,
    dot,
    head_pointer,
    load_block,
    load_rows,
    parts,
    store_block,
    tile_tokens,
)


@triton.jit
def delta_kernel(
    grad_ptr,
    out_ptr,
    grad_lse_ptr,
    delta_ptr,
    grad_strides,
    out_strides,
    grad_lse_strides,
    heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK)
    pid = tl.program_id(0)
    batch = pid // blocks // heads
    head = pid // blocks % heads
    first = (pid % blocks).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK).to(tl.int64)
    token = first + row
    keep = token < tokens
    grad_ptr = head_pointer(grad_ptr, grad_strides, batch, head, ALIGN)
    out_ptr = head_pointer(out_ptr, out_strides, batch, head, ALIGN)
    grad = load_rows(grad_ptr, grad_strides[2], first, row, keep, True, HEAD_DIM, BLOCK_D, ALIGN)
    out = load_rows(out_ptr, out_strides[2], first, row, keep, True, HEAD_DIM, BLOCK_D, ALIGN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK]
    if HAS_GRAD_LSE:
        grad_lse_ptr = head_pointer(grad_lse_ptr, grad_lse_strides, batch, head, 1)
        delta -= tl.load(grad_lse_ptr + token * grad_lse_strides[2], mask=keep, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (batch * heads + head).to(tl.int64) * tokens + token, delta, mask=keep)


@triton.jit
def _load_statistics(lse_ptr, delta_ptr, token, valid, MASKED: tl.constexpr):
    """(lse in base 2, delta) of some rows; for a row without keys or token lse is +inf, which makes P zero."""
    if MASKED:
        lse = tl.load(lse_ptr + token, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + token, mask=valid, other=0.0)
    else:
        lse = tl.load(lse_ptr + token)
        delta = tl.load(delta_ptr + token)
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E, delta


@triton.jit
def backward_q_kernel(
    q_src,
    k_src,
    v_src,
    grad_src,
    dq_dst,
    lse_ptr,
    delta_ptr,
    counts_ptr,
    lists_ptr,
    scale,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dq_strides,
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
    MASK_Q: tl.constexpr,
    MASK_K: tl.constexpr,
    ACCESS_Q: tl.constexpr,
    ACCESS_GRAD: tl.constexpr,
    ACCESS_DQ: tl.constexpr,
    ACCESS_K: tl.constexpr,
    ACCESS_V: tl.constexpr,
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
    if ACCESS_GRAD == POINTER:
        grad_src = head_pointer(grad_src, grad_strides, batch, head, ALIGN)
    if ACCESS_DQ == POINTER:
        dq_dst = head_pointer(dq_dst, dq_strides, batch, head, ALIGN)
    if ACCESS_K == POINTER:
        k_src = head_pointer(k_src, k_strides, batch, head_kv, ALIGN)
    if ACCESS_V == POINTER:
        v_src = head_pointer(v_src, v_strides, batch, head_kv, ALIGN)
    q = load_block(
        q_src, q_strides[2], batch, head, heads, tile_q, start_q, origin_q, offset_q, valid_q,
        grid_q, TILE_Q, TILED, MASK_Q, BLOCK_Q, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_Q,
    )  # fmt: skip
    grad = load_block(
        grad_src, grad_strides[2], batch, head, heads, tile_q, start_q, origin_q, offset_q, valid_q,
        grid_q, TILE_Q, TILED, MASK_Q, BLOCK_Q, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_GRAD,
    )  # fmt: skip
    rows_before = (batch * heads + head).to(tl.int64) * tokens_q
    lse, delta = _load_statistics(
        lse_ptr + rows_before + origin_q, delta_ptr + rows_before + origin_q, offset_q, valid_q, MASK_Q
    )  # fmt: skip

    scale_log2 = scale * LOG2_E
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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
        v = load_block(
            v_src, v_strides[2], batch, head_kv, heads_kv, tile_k, start_k, origin_k, offset_k, valid_k,
            grid_k, TILE_K, TILED, MASK_K, BLOCK_K, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_V,
        )  # fmt: skip
        p = tl.exp2(dot(q, tl.trans(k)) * scale_log2 - lse[:, None])  # [BLOCK_Q, BLOCK_K]
        ds = p * (dot(grad, tl.trans(v)) - delta[:, None])
        if MASK_K:
            ds = tl.where(valid_k[None, :], ds, 0.0)
        dq = dot(ds.to(k.dtype), k, dq)

    store_block(
        dq_dst, dq_strides[2], batch, head, heads, tile_q, start_q, position_q, origin_q, offset_q, valid_q,
        dq * scale, grid_q, TILE_Q, TILED, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_DQ,
    )  # fmt: skip


@triton.jit
def backward_k_kernel(
    q_src,
    k_ptr,
    v_ptr,
    grad_src,
    dk_dst,
    dv_dst,
    lse_ptr,
    delta_ptr,
    offsets_ptr,
    lists_ptr,
    scale,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    dk_strides,
    dv_strides,
    heads,
    group,
    tiles_k,
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
    MASK_Q: tl.constexpr,
    MASK_K: tl.constexpr,
    ACCESS_Q: tl.constexpr,
    ACCESS_GRAD: tl.constexpr,
    ACCESS_DK: tl.constexpr,
    ACCESS_DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    PARTS_Q: tl.constexpr = parts(TILE_Q, BLOCK_Q)
    PARTS_K: tl.constexpr = parts(TILE_K, BLOCK_K)
    pid = tl.program_id(0)
    row = pid // PARTS_K  # (batch, key head, key tile)
    heads_kv = heads // group
    tile_k = row % tiles_k
    head_kv = row // tiles_k % heads_kv
    batch = row // tiles_k // heads_kv

    start_k = pid % PARTS_K * BLOCK_K
    position_k = start_k + tl.arange(0, BLOCK_K)
    origin_k, offset_k, valid_k = tile_tokens(tile_k, position_k, grid_k, TILE_K, TILED)
    k_ptr = head_pointer(k_ptr, k_strides, batch, head_kv, ALIGN)
    v_ptr = head_pointer(v_ptr, v_strides, batch, head_kv, ALIGN)
    if ACCESS_DK == POINTER:
        dk_dst = head_pointer(dk_dst, dk_strides, batch, head_kv, ALIGN)
    if ACCESS_DV == POINTER:
        dv_dst = head_pointer(dv_dst, dv_strides, batch, head_kv, ALIGN)
    k = load_rows(
        k_ptr, k_strides[2], origin_k, offset_k, valid_k, MASK_K, HEAD_DIM, BLOCK_D, ALIGN
    )  # [BLOCK_K, BLOCK_D]
    v = load_rows(v_ptr, v_strides[2], origin_k, offset_k, valid_k, MASK_K, HEAD_DIM, BLOCK_D, ALIGN)

    scale_log2 = scale * LOG2_E
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for member in range(0, group):
        head = head_kv * group + member
        list_row = (batch * heads + head).to(tl.int64)
        offset_ptr = offsets_ptr + list_row * (tiles_k + 1) + tile_k
        first = tl.load(offset_ptr)
        count = (tl.load(offset_ptr + 1) - first).to(tl.int32)
        list_ptr = lists_ptr + list_row * capacity + first
        lse_row = lse_ptr + list_row * tokens_q
        delta_row = delta_ptr + list_row * tokens_q
        q_head = q_src
        if ACCESS_Q == POINTER:
            q_head = head_pointer(q_src, q_strides, batch, head, ALIGN)
        grad_head = grad_src
        if ACCESS_GRAD == POINTER:
            grad_head = head_pointer(grad_src, grad_strides, batch, head, ALIGN)
        for step in tl.range(0, count * PARTS_Q, num_stages=STAGES):
            tile_q = tl.load(list_ptr + step // PARTS_Q)
            start_q = step % PARTS_Q * BLOCK_Q
            origin_q, offset_q, valid_q = tile_tokens(tile_q, start_q + tl.arange(0, BLOCK_Q), grid_q, TILE_Q, TILED)
            q = load_block(
                q_head, q_strides[2], batch, head, heads, tile_q, start_q, origin_q, offset_q, valid_q,
                grid_q, TILE_Q, TILED, MASK_Q, BLOCK_Q, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_Q,
            )  # fmt: skip
            grad = load_block(
                grad_head, grad_strides[2], batch, head, heads, tile_q, start_q, origin_q, offset_q, valid_q,
                grid_q, TILE_Q, TILED, MASK_Q, BLOCK_Q, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_GRAD,
            )  # fmt: skip
            lse, delta = _load_statistics(lse_row + origin_q, delta_row + origin_q, offset_q, valid_q, MASK_Q)
            p = tl.exp2(dot(k, tl.trans(q)) * scale_log2 - lse[None, :])  # [BLOCK_K, BLOCK_Q]
            dv = dot(p.to(grad.dtype), grad, dv)
            ds = p * (dot(v, tl.trans(grad)) - delta[None, :])
            dk = dot(ds.to(q.dtype), q, dk)

    store_block(
        dk_dst, dk_strides[2], batch, head_kv, heads_kv, tile_k, start_k, position_k, origin_k, offset_k, valid_k,
        dk * scale, grid_k, TILE_K, TILED, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_DK,
    )  # fmt: skip
    store_block(
        dv_dst, dv_strides[2], batch, head_kv, heads_kv, tile_k, start_k, position_k, origin_k, offset_k, valid_k,
        dv, grid_k, TILE_K, TILED, HEAD_DIM, BLOCK_D, ALIGN, ACCESS_DV,
    )  # fmt: skip
