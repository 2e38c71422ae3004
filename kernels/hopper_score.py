"""Scores of query tiles against key tiles for Hopper, in Gluon; see score.py for the arithmetic.

The plain kernel is bound by shared memory: products of 64 columns read both operands from there at 128 bytes a cycle,
and the scores pass through it on their way out. Here the queries stay in registers, the keys come by the tensor memory
accelerator while the block before is multiplied, and each thread writes the scores that it holds, 4 columns at a time.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# The name of the copy changed after triton 3.7.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

BLOCK_Q, BLOCK_K, HEAD_DIM = gl.constexpr(128), gl.constexpr(64), gl.constexpr(128)
MAX_REGISTERS = 128  # so that two programs share a multiprocessor


@gluon.jit
def _fill(k_box, ring, full, slot, row, part_rows, wanted):
    """Bring the high and low parts of a block of keys into a slot, if it is `wanted`."""
    bar = full.index(slot)
    mbarrier.expect(bar, 2 * k_box.block_type.nbytes, pred=wanted)
    _copy(k_box, [row, 0], bar, ring.index(2 * slot), pred=wanted)
    _copy(k_box, [part_rows + row, 0], bar, ring.index(2 * slot + 1), pred=wanted)


@gluon.jit(do_not_specialize=["first_list", "first_row", "blocks_at_once"])
def _score_hopper(
    k_box,
    parts,
    factors,
    scores,
    first_list,
    first_row,
    rows,
    group,
    tiles_q,
    first_k,
    part_rows,
    width,
    blocks_at_once,
    SLOTS: gl.constexpr,  # of the ring of key blocks, 32 KB each
):
    """As `_score`; within each 16 keys of `parts`, the columns that a thread gets stand as `quad_position` says."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_K, 16])
    Q: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    # The registers of S with the two pairs of columns that a thread has of each 16 as its 4 neighbouring columns.
    QUADS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[BLOCK_Q, BLOCK_K],
    )
    blocks_k = width // BLOCK_K
    programs_k = (blocks_k + blocks_at_once - 1) // blocks_at_once
    programs_q = (rows + BLOCK_Q - 1) // BLOCK_Q
    pid = gl.program_id(0)
    first = pid % programs_k * blocks_at_once
    end = gl.minimum(first + blocks_at_once, blocks_k)
    block_q = pid // programs_k % programs_q
    local = pid // programs_k // programs_q
    pair = first_list + local
    k_list = first_k + (pair // group) * width

    ring = gl.allocate_shared_memory(gl.float16, [2 * SLOTS, BLOCK_K, HEAD_DIM], k_box.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SLOTS):
        mbarrier.init(full.index(s), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for s in gl.static_range(SLOTS):
        _fill(k_box, ring, full, s, k_list + (first + s) * BLOCK_K, part_rows, first + s < end)

    # Rows beyond the last are those of other heads, or of keys: they are read, and never written.
    first_q = pair.to(gl.int64) * tiles_q + first_row + block_q * BLOCK_Q
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, Q))
    offset = (gl.arange(0, BLOCK_Q, gl.SliceLayout(1, Q)) * HEAD_DIM)[:, None] + column[None, :]
    q_hi = gl.load(parts + first_q * HEAD_DIM + offset)
    q_lo = gl.load(parts + (first_q + part_rows) * HEAD_DIM + offset)
    q_factor = gl.load(factors + first_q + gl.arange(0, BLOCK_Q, gl.SliceLayout(1, S)))
    k_factors = factors + k_list + gl.arange(0, BLOCK_K, gl.SliceLayout(0, S))
    last = rows - block_q * BLOCK_Q
    scores += (local.to(gl.int64) * rows + block_q * BLOCK_Q) * width
    zero = gl.zeros([BLOCK_Q, BLOCK_K], gl.float32, S)
    for block in range(first, end):
        slot = (block - first) % SLOTS
        k_factor = gl.load(k_factors + block * BLOCK_K)
        mbarrier.wait(full.index(slot), (block - first) // SLOTS & 1)
        k_hi = ring.index(2 * slot).permute((1, 0))
        k_lo = ring.index(2 * slot + 1).permute((1, 0))
        acc = warpgroup_mma(q_lo, k_hi, zero, use_acc=False, is_async=True)
        acc = warpgroup_mma(q_hi, k_lo, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        # An infinity makes an infinity or NaN of any sign here; the product of the high parts alone is right then.
        acc = gl.where(gl.abs(acc) < float("inf"), acc, 0.0)
        acc = warpgroup_mma(q_hi, k_hi, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        gl.thread_barrier()  # every warp has read the slot
        _fill(k_box, ring, full, slot, k_list + (block + SLOTS) * BLOCK_K, part_rows, block + SLOTS < end)
        acc = acc * (q_factor[:, None] * k_factor[None, :])
        acc = gl.where(acc == acc, acc, float("-inf"))
        acc = acc.reshape([BLOCK_Q, BLOCK_K // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([BLOCK_Q, BLOCK_K])
        row = gl.arange(0, BLOCK_Q, gl.SliceLayout(1, QUADS))
        position = block * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, QUADS))
        target = (row * width)[:, None] + position[None, :]
        gl.store(scores + target, gl.convert_layout(acc, QUADS), mask=(row < last)[:, None])


def key_box(parts: Tensor) -> TensorDescriptor:
    """How the kernel reads the keys among `parts` [2, rows, 128] fp16."""
    flat = parts.view(-1, HEAD_DIM.value)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [BLOCK_K.value, HEAD_DIM.value], layout)
