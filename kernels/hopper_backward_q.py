"""dq on Hopper: a warp-specialised persistent kernel in Gluon. `hopper_ring` tells how two tiles share a ring.

Each consumer warpgroup keeps q and dout of its tile [64, 128] in registers as the left operands of
S = q k^T and dP = dout v^T; the ring brings k and v blocks, and dS = P * (dP - delta) goes from registers into
dq += dS k. The dq product of a block runs while the elementwise part of the next one does.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bsa_compile.kernels import config
from bsa_compile.kernels.config import Triple
from bsa_compile.kernels.hopper_launch import (
    CONSUMER_REGISTERS,
    ENTRY_REGISTERS,
    common_arguments,
    describe,
    programs_on,
)
from bsa_compile.kernels.hopper_ring import (
    CONSUMERS,
    LOG2_E,
    ROWS,
    STATISTICS,
    WIDTH,
    acquire,
    init_ring,
    produce,
    store_tile,
)


@gluon.jit
def _consume(
    a_ring,
    b_ring,
    full,
    empty,
    common_ptr,
    counts_ptr,
    statistics_ptr,
    dq_ptr,
    dq_strides,
    scale,
    groups,
    heads,
    tiles,
    tiles_h,
    tiles_w,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
    WHICH: gl.constexpr,
):
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    scale_log2 = scale * LOG2_E
    start = 0
    uses = 0
    for group in range(gl.program_id(0), groups, gl.num_programs(0)):
        tile = group * CONSUMERS + WHICH
        common = gl.load(common_ptr + group)
        count = gl.load(counts_ptr + tile)
        other = gl.load(counts_ptr + group * CONSUMERS + (1 - WHICH)) - common
        both = gl.minimum(count - common, other)
        statistics = statistics_ptr + tile.to(gl.int64) * STATISTICS + gl.arange(0, ROWS, ROW)
        lse = -gl.load(statistics) * scale_log2
        delta = -gl.load(statistics + ROWS)

        slot = (start + WHICH) % STAGES
        barrier = slot + (1 + WHICH) * STAGES
        mbarrier.wait(full.index(barrier), (uses >> barrier) & 1)
        uses ^= 1 << barrier
        q = a_ring.index(slot).load(LEFT)
        grad = b_ring.index(slot).load(LEFT)
        mbarrier.arrive(empty.index(slot), count=1)
        start += 2

        dq = gl.zeros([ROWS, WIDTH], gl.float32, RESULT)
        zero = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
        if OVERLAP:
            if count > 0:
                slot, uses = acquire(0, start, common, both, uses, full, WHICH, STAGES)
                s = warpgroup_mma(q, a_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                dp = warpgroup_mma(grad, b_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, [s])
                p = gl.exp2(s * scale_log2 - lse[:, None])
                dp, p = warpgroup_mma_wait(0, [dp, p])
                ds = gl.convert_layout((p * (dp - delta[:, None])).to(a_ring.dtype), WEIGHTS)
                for step in range(1, count):
                    before = slot
                    slot, uses = acquire(step, start, common, both, uses, full, WHICH, STAGES)
                    s = warpgroup_mma(q, a_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                    dp = warpgroup_mma(grad, b_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                    pending = warpgroup_mma(ds, a_ring.index(before), dq, is_async=True)
                    s = warpgroup_mma_wait(2, [s])
                    p = gl.exp2(s * scale_log2 - lse[:, None])
                    dp, p = warpgroup_mma_wait(1, [dp, p])
                    next_ds = (p * (dp - delta[:, None])).to(a_ring.dtype)
                    dq, next_ds = warpgroup_mma_wait(0, [pending, next_ds])
                    mbarrier.arrive(empty.index(before), count=1)
                    ds = gl.convert_layout(next_ds, WEIGHTS)
                pending = warpgroup_mma(ds, a_ring.index(slot), dq, is_async=True)
                dq = warpgroup_mma_wait(0, [pending])
                mbarrier.arrive(empty.index(slot), count=1)
        else:
            for step in range(count):
                slot, uses = acquire(step, start, common, both, uses, full, WHICH, STAGES)
                s = warpgroup_mma(q, a_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                dp = warpgroup_mma(grad, b_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, [s])
                p = gl.exp2(s * scale_log2 - lse[:, None])
                dp, p = warpgroup_mma_wait(0, [dp, p])
                ds = gl.convert_layout((p * (dp - delta[:, None])).to(a_ring.dtype), WEIGHTS)
                pending = warpgroup_mma(ds, a_ring.index(slot), dq, is_async=True)
                dq = warpgroup_mma_wait(0, [pending])
                mbarrier.arrive(empty.index(slot), count=1)
        start += count + other
        store_tile(dq_ptr, dq_strides, tile, tiles, tiles_h, tiles_w, heads, dq * scale, TILE)


@gluon.jit
def hopper_backward_q_kernel(
    q_desc,
    grad_desc,
    k_desc,
    v_desc,
    dq_ptr,
    statistics_ptr,
    entries_ptr,
    starts_ptr,
    common_ptr,
    counts_ptr,
    dq_strides,
    scale,
    capacity,
    groups,
    heads,
    frames,
    tiles,
    tiles_h,
    tiles_w,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
    ACCESS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """dq of all tiles.

    Args:
        q_desc: Descriptors of q, dout (grad), k and v: boxes of one tile, [.., th, tw, WIDTH].
        statistics_ptr: [B*H, N, 2, ROWS] fp32: -lse / scale (-inf for a row without keys) and -delta.
        entries_ptr: int32 packed tile origins: the lists of the query tiles, common blocks first.
        starts_ptr: [B*H*N]: where the list of a tile begins, or None for one every `capacity`.
        common_ptr: [B*H*N/2] int32; counts_ptr: [B*H*N] int32.
        ACCESS: Kinds of the descriptors in their order.
    """
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    b_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES, ROWS, WIDTH], LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [3 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    init_ring(full, empty, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    a_ring, b_ring, full, empty, common_ptr, counts_ptr, statistics_ptr, dq_ptr, dq_strides,
                    scale, groups, heads, tiles, tiles_h, tiles_w, TILE, STAGES, OVERLAP, 0,
                ),
            ),
            (
                _consume,
                (
                    a_ring, b_ring, full, empty, common_ptr, counts_ptr, statistics_ptr, dq_ptr, dq_strides,
                    scale, groups, heads, tiles, tiles_h, tiles_w, TILE, STAGES, OVERLAP, 1,
                ),
            ),
            (
                produce,
                (
                    q_desc, grad_desc, k_desc, v_desc, None, a_ring, b_ring, None, full, empty,
                    entries_ptr, starts_ptr, common_ptr, counts_ptr, capacity, groups, heads, frames,
                    tiles, tiles_h, tiles_w, TILE, STAGES, ACCESS,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def backward_q(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    statistics: Tensor,
    entries: Tensor,
    common: Tensor,
    counts: Tensor,
    dq: Tensor,
    grid: Triple,
    tile: Triple,
    scale: float,
    *,
    starts: Tensor | None = None,
    stages: int = 7,
    overlap: bool = True,
) -> None:
    """Fill `dq`. q, k, v, grad_out, dq: [B, H, S, 128] over one grid of whole tiles; the rest is as in the kernel."""
    batch, heads = q.shape[:2]
    described = [describe(x, grid, tile) for x in (q, grad_out, k, v)]
    groups = batch * heads * config.num_tiles(grid, tile) // 2
    hopper_backward_q_kernel[(min(groups, programs_on(q.device)),)](
        *(desc for desc, _ in described), dq, statistics, entries, starts, common, counts, dq.stride()[:3],
        scale, entries.shape[-1], groups, heads, grid[0],
        **common_arguments(tile, grid),
        STAGES=stages,
        OVERLAP=overlap,
        ACCESS=tuple(access for _, access in described),
        REGISTERS=CONSUMER_REGISTERS,
        num_warps=4,
        maxnreg=ENTRY_REGISTERS,
    )  # fmt: skip
