"""The forward of block-sparse attention for Hopper, in Gluon: two query blocks side by side, fed by two rings.

One persistent program per multiprocessor walks over groups of two query blocks of 64 rows. A consumer of four warps
attends for each block; one warp loads keys and one loads values, 128 of them at a time, into rings of slots in shared
memory: two blocks of 64, or one of 128 where query and key tiles are large enough (not `PAIRED`). Blocks that both
consumers want are loaded once (`share.share_lists`), with those of each alone in between, see `hopper_ring`.

Barriers. A slot has one `empty` barrier of two arrivals: both consumers', or, where the fill is for one consumer, the
loader arrives for the other. It has three `full` barriers: fills for both, for the first, for the second. A consumer
waits only on barriers whose every completion is meant for it and keeps their phases as bits of an integer, so it cannot
mistake a later fill for the one that it waits for, however far the other consumer is ahead.
"""

from __future__ import annotations

import math

import torch
import triton
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
from bsa_compile.kernels.config import BoxPlan, Triple
from bsa_compile.kernels.hopper_blocks import (
    LOG2_E,
    ROWS,
    block_origin,
    describe,
    hide,
    load_box,
    processors,
    row_tokens,
    unpack,
)
from bsa_compile.kernels.hopper_ring import next_fill
from bsa_compile.kernels.launch import empty_like_tokens
from bsa_compile.kernels.share import share_lists

LN_2 = gl.constexpr(0.6931471805599453)
# Twelve warps start with 168 registers a thread; the consumers take from the loaders.
CONSUMER_REGISTERS = 232
LOADER_REGISTERS = 40
# Slots of the rings of keys and values, 32 KB each. Blocks for one consumer alone need the fourth slot of keys; a tile
# of 128 queries has none and does better with more values in flight (H100: 2.93 instead of 3.01 ms).
SLOTS = {2: (4, 3), 1: (3, 4)}


@gluon.jit
def _fill(
    box, batch, head, heads, frames, first, second, ring, full, empty, position,
    kind: gl.constexpr, SLOTS: gl.constexpr, ACCESS: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Fill the slot of a ring position with a step's keys. `kind`: 0 for both consumers, 1 or 2 for one of them."""
    slot = position % SLOTS
    mbarrier.wait(empty.index(slot), ((position // SLOTS) & 1) ^ 1)
    if kind != 0:
        mbarrier.arrive(empty.index(slot), count=1)
    bar = full.index(kind * SLOTS + slot)
    t, h, w = unpack(first)
    if PAIRED:
        mbarrier.expect(bar, 2 * box.block_type.nbytes)
        load_box(box, batch, head, heads, frames, t, h, w, bar, ring.index(2 * slot), ACCESS)
        t, h, w = unpack(second)
        load_box(box, batch, head, heads, frames, t, h, w, bar, ring.index(2 * slot + 1), ACCESS)
    else:
        mbarrier.expect(bar, box.block_type.nbytes)
        load_box(box, batch, head, heads, frames, t, h, w, bar, ring.index(slot), ACCESS)


@gluon.jit
def _loader(
    box, q_box, ring, full, empty, programs, plans,
    heads, group_size, frames, frames_q, tiles_q, grid_h, grid_w, groups, groups_per_head, length,
    QUERIES: gl.constexpr, SLOTS: gl.constexpr, ACCESS: gl.constexpr, ACCESS_Q: gl.constexpr,
    TILE_T: gl.constexpr, TILE_H: gl.constexpr, TILE_W: gl.constexpr, TILES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Fill one ring for all groups of this program; with QUERIES the two query blocks come first."""
    position = 0
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        pair = index // groups_per_head
        batch = pair // heads
        head = pair % heads
        head_kv = head // group_size
        heads_kv = heads // group_size
        plan = plans + index * 4
        common = gl.load(plan)
        alone_0 = gl.load(plan + 1)
        alone_1 = gl.load(plan + 2)
        blocks = programs + gl.cast(index, gl.int64) * (TILES * length)
        first = gl.load(blocks)
        second = gl.load(blocks + 1)
        if QUERIES:
            slot = position % SLOTS
            mbarrier.wait(empty.index(slot), ((position // SLOTS) & 1) ^ 1)
            bar = full.index(slot)
            if PAIRED:
                mbarrier.expect(bar, 2 * q_box.block_type.nbytes)
                for part in gl.static_range(2):
                    t, h, w = block_origin(
                        index % groups_per_head, part, tiles_q, grid_h, grid_w, TILE_T, TILE_H, TILE_W, TILES
                    )
                    load_box(q_box, batch, head, heads, frames_q, t, h, w, bar, ring.index(2 * slot + part), ACCESS_Q)
            else:
                mbarrier.expect(bar, q_box.block_type.nbytes)
                t, h, w = block_origin(
                    index % groups_per_head, 0, tiles_q, grid_h, grid_w, TILE_T, TILE_H, TILE_W, TILES
                )
                load_box(q_box, batch, head, heads, frames_q, t, h, w, bar, ring.index(slot), ACCESS_Q)
            position += 1
        if TILES == 1:
            WIDTH: gl.constexpr = 2 if PAIRED else 1  # blocks of a step
            for step in range(common):
                next_first = gl.load(blocks + WIDTH * (step + 1))
                next_second = gl.load(blocks + WIDTH * (step + 1) + 1)
                _fill(
                    box, batch, head_kv, heads_kv, frames, first, second,
                    ring, full, empty, position, 0, SLOTS, ACCESS, PAIRED,
                )  # fmt: skip
                position += 1
                first = next_first
                second = next_second
        else:
            rounds = gl.minimum(alone_0, alone_1)
            stride = common // (rounds + 1)
            mine = blocks + 2 * common
            other = mine + length
            for turn in range(rounds + 1):
                # The loads of a round's blocks are under way before they are needed.
                first_0 = gl.load(mine)
                second_0 = gl.load(mine + 1)
                first_1 = gl.load(other)
                second_1 = gl.load(other + 1)
                here = gl.where(turn < rounds, stride, common - rounds * stride)
                for _ in range(here):
                    next_first = gl.load(blocks + 2)
                    next_second = gl.load(blocks + 3)
                    _fill(
                        box, batch, head_kv, heads_kv, frames, first, second,
                        ring, full, empty, position, 0, SLOTS, ACCESS, PAIRED,
                    )  # fmt: skip
                    position += 1
                    first = next_first
                    second = next_second
                    blocks += 2
                if turn < rounds:
                    _fill(
                        box, batch, head_kv, heads_kv, frames, first_0, second_0,
                        ring, full, empty, position, 1, SLOTS, ACCESS, PAIRED,
                    )  # fmt: skip
                    _fill(
                        box, batch, head_kv, heads_kv, frames, first_1, second_1,
                        ring, full, empty, position + 1, 2, SLOTS, ACCESS, PAIRED,
                    )  # fmt: skip
                    position += 2
                    mine += 2
                    other += 2
            for _ in range(rounds, alone_0):
                _fill(
                    box, batch, head_kv, heads_kv, frames, gl.load(mine), gl.load(mine + 1),
                    ring, full, empty, position, 1, SLOTS, ACCESS, PAIRED,
                )  # fmt: skip
                position += 1
                mine += 2
            for _ in range(rounds, alone_1):
                _fill(
                    box, batch, head_kv, heads_kv, frames, gl.load(other), gl.load(other + 1),
                    ring, full, empty, position, 2, SLOTS, ACCESS, PAIRED,
                )  # fmt: skip
                position += 1
                other += 2


@gluon.jit
def _bar(position, alone, phases, part: gl.constexpr, SLOTS: gl.constexpr):
    """(slot, number of the barrier that tells of its fill, phase to wait for, phases after)."""
    slot = position % SLOTS
    bar = gl.where(alone, (part + 1) * SLOTS, 0) + slot
    return slot, bar, (phases >> bar) & 1, phases ^ (1 << bar)


# What follows takes a step's scores or weights as a left and a right half; where a step is one block, `left` is all of
# it and `right` another name for it.


@gluon.jit
def _scores(q, ring, full, slot, bar, phase, S: gl.constexpr, PAIRED: gl.constexpr):
    """Start the products of queries and keys."""
    mbarrier.wait(full.index(bar), phase)
    if PAIRED:
        zero = gl.zeros([ROWS, ROWS], gl.float32, S)
        left = warpgroup_mma(q, ring.index(2 * slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        right = warpgroup_mma(q, ring.index(2 * slot + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    else:
        zero = gl.zeros([ROWS, 2 * ROWS], gl.float32, S)
        left = warpgroup_mma(q, ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        right = left
    return left, right


@gluon.jit
def _values(p_left, p_right, acc, ring, slot, PAIRED: gl.constexpr):
    """Start the products of weights and values."""
    if PAIRED:
        acc = warpgroup_mma(p_left, ring.index(2 * slot), acc, is_async=True)
        acc = warpgroup_mma(p_right, ring.index(2 * slot + 1), acc, is_async=True)
    else:
        acc = warpgroup_mma(p_left, ring.index(slot), acc, is_async=True)
    return acc


@gluon.jit
def _await_scores(left, right, steps_after: gl.constexpr, PAIRED: gl.constexpr):
    """Wait for the products of `_scores`, but not for those of the `_values` that were started after them."""
    if PAIRED:
        left, right = warpgroup_mma_wait(2 * steps_after, [left, right])
    else:
        left = warpgroup_mma_wait(steps_after, [left])
        right = left
    return left, right


@gluon.jit
def _await_values(product, total, p_left, p_right, PAIRED: gl.constexpr):
    """Wait for the products of `_values`. The other operands hold the compiler back, see `_consumer`."""
    if PAIRED:
        acc, total, p_left, p_right = warpgroup_mma_wait(0, [product, total, p_left, p_right])
    else:
        acc, total, p_left = warpgroup_mma_wait(0, [product, total, p_left])
        p_right = p_left
    return acc, total, p_left, p_right


@gluon.jit
def _softmax(left, right, best, scale_log2, drop, PAIRED: gl.constexpr):
    """(weights, their row sums, the new best, the factor for what was summed before); logits in base 2.

    `drop` is +inf where the right block only fills up the step (a block that the row has anyway, so that the best one
    stays right), else 0.
    """
    highest = gl.max(gl.maximum(left, right) if PAIRED else left, 1)
    highest = gl.maximum(best, highest * scale_log2)
    shift = gl.where(highest == float("-inf"), 0.0, highest)  # -inf minus -inf is NaN
    left = gl.exp2(left * scale_log2 - shift[:, None])
    if PAIRED:
        right = gl.exp2(right * scale_log2 - (shift + drop)[:, None])
        sums = gl.sum(left + right, 1)
    else:
        right = left
        sums = gl.sum(left, 1)
    return left, right, sums, highest, gl.exp2(best - shift)


@gluon.jit
def _consumer(
    k_ring, v_ring, k_full, k_empty, v_full, v_empty, programs, plans, out, lse, scale_log2,
    heads, tiles_q, frames_q, grid_h_q, grid_w_q, frames_k, grid_h_k, grid_w_k,
    stride_b, stride_h, stride_s, tokens_q, groups, groups_per_head, length,
    part: gl.constexpr, HEAD_DIM: gl.constexpr, SLOTS_K: gl.constexpr, SLOTS_V: gl.constexpr,
    TILE_T: gl.constexpr, TILE_H: gl.constexpr, TILE_W: gl.constexpr, TILES: gl.constexpr,
    BOX_Q_H: gl.constexpr, BOX_Q_W: gl.constexpr, BOX_K_H: gl.constexpr, BOX_K_W: gl.constexpr,
    MASK_K: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Attend for one of the two query blocks of each group."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS if PAIRED else 2 * ROWS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])  # noqa: E741
    Q: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O)
    WIDTH: gl.constexpr = 2 if PAIRED else 1  # blocks of a step
    dtype: gl.constexpr = k_ring.dtype
    position_k = 0
    position_v = 0
    phases_k = 0
    phases_v = 0
    for index in range(gl.program_id(0), groups, gl.num_programs(0)):
        plan = plans + index * 4
        common = gl.load(plan)
        if TILES == 2:
            alone = gl.load(plan + 1 + part)
            other = gl.load(plan + 2 - part)
        else:
            alone = 0
            other = 0
        odd = (gl.load(plan + 3) >> part) & 1
        steps = common + alone
        rounds = gl.minimum(alone, other)
        stride = common // (rounds + 1)
        last_alone = gl.where(odd == 1, alone - 1, -1)
        blocks = programs + gl.cast(index, gl.int64) * (TILES * length) + part * (TILES - 1) * length

        slot_q = position_k % SLOTS_K
        mbarrier.wait(k_full.index(slot_q), (phases_k >> slot_q) & 1)
        phases_k ^= 1 << slot_q
        position_k += 1

        best = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        total = gl.zeros([ROWS], gl.float32, ROW)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, O)
        if steps == 0:
            mbarrier.arrive(k_empty.index(slot_q), count=1)
        else:
            if PAIRED:
                q = k_ring.index(2 * slot_q + part).load(Q)
            else:
                q = k_ring.index(slot_q).slice(part * ROWS, ROWS).load(Q)
            fill, own, place, turn, since = next_fill(0, 0, 0, 0, common, rounds, stride, part)
            slot, bar, phase, phases_k = _bar(position_k + fill, own, phases_k, part, SLOTS_K)
            left, right = _scores(q, k_ring, k_full, slot, bar, phase, S, PAIRED)
            left, right = _await_scores(left, right, 0, PAIRED)
            # Only now have the queries surely arrived in registers: a barrier does not wait for loads, and the next
            # fill of their slot does not wait for them either.
            mbarrier.arrive(k_empty.index(slot_q), count=1)
            mbarrier.arrive(k_empty.index(slot), count=1)
            if MASK_K:
                at = blocks + WIDTH * gl.where(own, common, 0)
                left = hide(left, gl.load(at), frames_k, grid_h_k, grid_w_k, S, BOX_K_H, BOX_K_W)
                if PAIRED:
                    right = hide(right, gl.load(at + 1), frames_k, grid_h_k, grid_w_k, S, BOX_K_H, BOX_K_W)
            if TILES == 2:
                drop = gl.where(own & (last_alone == 0), float("inf"), 0.0)
            else:
                drop = gl.where((odd == 1) & (steps == 1), float("inf"), 0.0)
            left, right, total, best, _ = _softmax(left, right, best, scale_log2, drop, PAIRED)
            p_left = gl.convert_layout(left.to(dtype), P)
            p_right = gl.convert_layout(right.to(dtype), P)
            slot_v, bar, phase, phases_v = _bar(position_v + fill, own, phases_v, part, SLOTS_V)
            mbarrier.wait(v_full.index(bar), phase)
            for step in range(1, steps):
                # The scores of this step, then the values of the one before: its product runs under the softmax.
                had = gl.where(step >= common + rounds, step - common, turn)
                fill, own, place, turn, since = next_fill(step, place, turn, since, common, rounds, stride, part)
                slot, bar, phase, phases_k = _bar(position_k + fill, own, phases_k, part, SLOTS_K)
                if MASK_K:
                    at = blocks + WIDTH * gl.where(own, common + had, step - had)
                    block_left = gl.load(at)  # looked at only after the products
                    if PAIRED:
                        block_right = gl.load(at + 1)
                left, right = _scores(q, k_ring, k_full, slot, bar, phase, S, PAIRED)
                product = _values(p_left, p_right, acc, v_ring, slot_v, PAIRED)
                left, right = _await_scores(left, right, 1, PAIRED)
                mbarrier.arrive(k_empty.index(slot), count=1)
                if MASK_K:
                    left = hide(left, block_left, frames_k, grid_h_k, grid_w_k, S, BOX_K_H, BOX_K_W)
                    if PAIRED:
                        right = hide(right, block_right, frames_k, grid_h_k, grid_w_k, S, BOX_K_H, BOX_K_W)
                if TILES == 2:
                    drop = gl.where(own & (had == last_alone), float("inf"), 0.0)
                else:
                    drop = gl.where((odd == 1) & (step + 1 == steps), float("inf"), 0.0)
                left, right, sums, best, decay = _softmax(left, right, best, scale_log2, drop, PAIRED)
                total = total * decay + sums
                # The values of this step must be here before the next one starts. Waiting for them at this point keeps
                # the compiler from moving the wait for the product, which follows, above the softmax; the sums, which
                # hang on every weight, do so where they are an operand of it. The weights of the step before are
                # operands too: the product reads their registers until it is done.
                next_v, bar, phase, phases_v = _bar(position_v + fill, own, phases_v, part, SLOTS_V)
                mbarrier.wait(v_full.index(bar), phase)
                acc, total, p_left, p_right = _await_values(product, total, p_left, p_right, PAIRED)
                mbarrier.arrive(v_empty.index(slot_v), count=1)
                slot_v = next_v
                acc = acc * gl.convert_layout(decay, ROW_O)[:, None]
                p_left = gl.convert_layout(left.to(dtype), P)
                p_right = gl.convert_layout(right.to(dtype), P)
            product = _values(p_left, p_right, acc, v_ring, slot_v, PAIRED)
            acc, total, p_left, p_right = _await_values(product, total, p_left, p_right, PAIRED)
            mbarrier.arrive(v_empty.index(slot_v), count=1)
        position_k += steps + other
        position_v += steps + other

        empty_row = total == 0.0  # no key, or only scores of -inf
        total = gl.where(empty_row, 1.0, total)
        log_sum = gl.where(empty_row, float("-inf"), (best + gl.log2(total)) * LN_2)
        acc = acc / gl.convert_layout(total, ROW_O)[:, None]

        pair = index // groups_per_head
        group = index % groups_per_head
        t, h, w = block_origin(group, part, tiles_q, grid_h_q, grid_w_q, TILE_T, TILE_H, TILE_W, TILES)
        row = gl.arange(0, ROWS, ROW)
        token, valid = row_tokens(row, t, h, w, frames_q, grid_h_q, grid_w_q, BOX_Q_H, BOX_Q_W)
        row_o = gl.arange(0, ROWS, ROW_O)
        token_o, valid_o = row_tokens(row_o, t, h, w, frames_q, grid_h_q, grid_w_q, BOX_Q_H, BOX_Q_W)
        if TILES == 2:
            real = group * 2 + part < tiles_q
            valid = valid & real
            valid_o = valid_o & real
        gl.store(lse + pair.to(gl.int64) * tokens_q + token, log_sum, mask=valid)
        column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, O))
        base = out + (pair // heads).to(gl.int64) * stride_b + (pair % heads).to(gl.int64) * stride_h
        gl.store(base + (token_o * stride_s)[:, None] + column[None, :], acc.to(dtype), mask=valid_o[:, None])


@gluon.jit
def _attend_forward_hopper(
    q_box, k_box, v_box, out, lse, programs, plans, scale,
    heads, group_size, tiles_q, frames_q, grid_h_q, grid_w_q, frames_k, grid_h_k, grid_w_k,
    stride_b, stride_h, stride_s, tokens_q, groups, groups_per_head, length,
    HEAD_DIM: gl.constexpr, SLOTS_K: gl.constexpr, SLOTS_V: gl.constexpr,
    TILE_T: gl.constexpr, TILE_H: gl.constexpr, TILE_W: gl.constexpr, TILES: gl.constexpr,
    BOX_Q_H: gl.constexpr, BOX_Q_W: gl.constexpr, BOX_K_H: gl.constexpr, BOX_K_W: gl.constexpr, MASK_K: gl.constexpr,
    PAIRED: gl.constexpr, ACCESS_Q: gl.constexpr, ACCESS_K: gl.constexpr, ACCESS_V: gl.constexpr,
    REGISTERS: gl.constexpr, REGISTERS_LOADER: gl.constexpr,
):  # fmt: skip
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    if PAIRED:
        k_ring = gl.allocate_shared_memory(k_box.dtype, [2 * SLOTS_K, ROWS, HEAD_DIM], flat)
        v_ring = gl.allocate_shared_memory(k_box.dtype, [2 * SLOTS_V, ROWS, HEAD_DIM], flat)
    else:
        k_ring = gl.allocate_shared_memory(k_box.dtype, [SLOTS_K, 2 * ROWS, HEAD_DIM], flat)
        v_ring = gl.allocate_shared_memory(k_box.dtype, [SLOTS_V, 2 * ROWS, HEAD_DIM], flat)
    k_full = gl.allocate_shared_memory(gl.int64, [3 * SLOTS_K, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [3 * SLOTS_V, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS_K, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS_V, 1], bars)
    for i in gl.static_range(3 * SLOTS_K):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(3 * SLOTS_V):
        mbarrier.init(v_full.index(i), count=1)
    for i in gl.static_range(SLOTS_K):
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(SLOTS_V):
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    scale_log2 = scale * LOG2_E
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    k_ring, v_ring, k_full, k_empty, v_full, v_empty, programs, plans, out, lse, scale_log2,
                    heads, tiles_q, frames_q, grid_h_q, grid_w_q, frames_k, grid_h_k, grid_w_k,
                    stride_b, stride_h, stride_s, tokens_q, groups, groups_per_head, length,
                    0, HEAD_DIM, SLOTS_K, SLOTS_V, TILE_T, TILE_H, TILE_W, TILES,
                    BOX_Q_H, BOX_Q_W, BOX_K_H, BOX_K_W, MASK_K, PAIRED,
                ),
            ),
            (
                _consumer,
                (
                    k_ring, v_ring, k_full, k_empty, v_full, v_empty, programs, plans, out, lse, scale_log2,
                    heads, tiles_q, frames_q, grid_h_q, grid_w_q, frames_k, grid_h_k, grid_w_k,
                    stride_b, stride_h, stride_s, tokens_q, groups, groups_per_head, length,
                    1, HEAD_DIM, SLOTS_K, SLOTS_V, TILE_T, TILE_H, TILE_W, TILES,
                    BOX_Q_H, BOX_Q_W, BOX_K_H, BOX_K_W, MASK_K, PAIRED,
                ),
            ),
            (
                _loader,
                (
                    k_box, q_box, k_ring, k_full, k_empty, programs, plans,
                    heads, group_size, frames_k, frames_q, tiles_q, grid_h_q, grid_w_q,
                    groups, groups_per_head, length,
                    True, SLOTS_K, ACCESS_K, ACCESS_Q, TILE_T, TILE_H, TILE_W, TILES, PAIRED,
                ),
            ),
            (
                _loader,
                (
                    v_box, q_box, v_ring, v_full, v_empty, programs, plans,
                    heads, group_size, frames_k, frames_q, tiles_q, grid_h_q, grid_w_q,
                    groups, groups_per_head, length,
                    False, SLOTS_V, ACCESS_V, ACCESS_Q, TILE_T, TILE_H, TILE_W, TILES, PAIRED,
                ),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, REGISTERS_LOADER, REGISTERS_LOADER],
    )  # fmt: skip


def attend_forward_hopper(
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
    plans: tuple[BoxPlan, ...],
    *,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_forward` in raster order, for the calls that `config.plan_gluon` accepts.

    Args:
        plans: How to read q, k and v: the answer of `config.plan_gluon`.
        programs: How many run at once; one per multiprocessor if None.
    """
    batch, heads, tokens_q, head_dim = q.shape
    out = empty_like_tokens(q)
    lse = torch.empty(batch, heads, tokens_q, dtype=torch.float32, device=q.device)
    tiles = 2 if config.volume(tile_q) == config.GLUON_ROWS else 1  # of a group
    plan_q, plan_k, plan_v = plans
    block_k = math.prod(plan_k.block[:-1])
    paired = block_k == config.GLUON_ROWS
    blocks, steps = share_lists(
        kv_num_blocks.contiguous(), kv_indices.contiguous(), grid_k, tile_k, block_k, tiles, 2 if paired else 1
    )
    groups = steps.shape[0]
    if not groups:
        return out, lse
    slots_k, slots_v = SLOTS[tiles]
    tiles_q = config.num_tiles(grid_q, tile_q)
    _attend_forward_hopper[(min(groups, programs or processors(q.device.index)),)](
        describe(q, plan_q), describe(k, plan_k), describe(v, plan_v), out, lse, blocks, steps, float(scale),
        heads, heads // k.shape[1], tiles_q, *grid_q, *grid_k,
        *out.stride()[:3], tokens_q, groups, triton.cdiv(tiles_q, tiles), blocks.shape[-1],
        HEAD_DIM=head_dim, SLOTS_K=slots_k, SLOTS_V=slots_v,
        TILE_T=tile_q[0], TILE_H=tile_q[1], TILE_W=tile_q[2], TILES=tiles,
        BOX_Q_H=plan_q.block[-3], BOX_Q_W=plan_q.block[-2], BOX_K_H=plan_k.block[-3], BOX_K_W=plan_k.block[-2],
        MASK_K=not config.divides(grid_k, tile_k), PAIRED=paired,
        ACCESS_Q=plan_q.access, ACCESS_K=plan_k.access, ACCESS_V=plan_v.access,
        REGISTERS=CONSUMER_REGISTERS, REGISTERS_LOADER=LOADER_REGISTERS,
        num_warps=4, maxnreg=config.GLUON_LAUNCH.max_registers,
    )  # fmt: skip
    return out, lse
