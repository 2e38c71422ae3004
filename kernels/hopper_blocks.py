"""Blocks of 64 or 128 tokens as the Hopper kernels move them: where they lie, how they come, which of them are real.

A block is a tile of 64 positions or 64 consecutive positions of a larger one. Two of them make a group: two
neighbouring tiles, or the halves of one tile of 128; each has a consumer of its own (`part` 0 or 1).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bsa_compile.kernels import config, share
from bsa_compile.kernels.config import BoxPlan

# The name of the copy changed after triton 3.7.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

ROWS = gl.constexpr(config.GLUON_ROWS)
LOG2_E = gl.constexpr(1.4426950408889634)
_BOX_MERGED = gl.constexpr(config.BOX_MERGED)
_BOX_HEADS = gl.constexpr(config.BOX_HEADS)
_T_SHIFT = gl.constexpr(share.T_SHIFT.value)
_H_SHIFT = gl.constexpr(share.H_SHIFT.value)
_MASK_T = gl.constexpr(share.MAX_GRID[0] - 1)
_MASK_H = gl.constexpr(share.MAX_GRID[1] - 1)
_MASK_W = gl.constexpr(share.MAX_GRID[2] - 1)


@gluon.jit
def unpack(block):
    """(t, h, w) of the first token of a block of a load program."""
    return (block >> _T_SHIFT) & _MASK_T, (block >> _H_SHIFT) & _MASK_H, block & _MASK_W


@gluon.jit
def load_box(box, batch, head, heads, frames, t, h, w, bar, slot, ACCESS: gl.constexpr):
    """Bring the tokens of the box at (t, h, w) into `slot` [tokens, D]."""
    target = slot.reshape(box.block_type.shape)
    if ACCESS == _BOX_MERGED:
        _copy(box, [(batch * heads + head) * frames + t, h, w, 0], bar, target)
    elif ACCESS == _BOX_HEADS:
        _copy(box, [batch * heads + head, t, h, w, 0], bar, target)
    else:
        _copy(box, [head, batch * frames + t, h, w, 0], bar, target)


@gluon.jit
def load_numbers(box, first, bar, slot):
    """Bring fp32 numbers from position `first` of a one-dimensional descriptor on into `slot`."""
    _copy(box, [first], bar, slot)


@gluon.jit
def _tile_origin(tile, grid_h, grid_w, TILE_T: gl.constexpr, TILE_H: gl.constexpr, TILE_W: gl.constexpr):
    """Token coordinates of the first position of a tile."""
    tiles_h = (grid_h + TILE_H - 1) // TILE_H
    tiles_w = (grid_w + TILE_W - 1) // TILE_W
    plane = tile // tiles_w
    return (plane // tiles_h) * TILE_T, (plane % tiles_h) * TILE_H, (tile % tiles_w) * TILE_W


@gluon.jit
def block_origin(
    group,
    part: gl.constexpr,
    tiles,
    grid_h,
    grid_w,
    TILE_T: gl.constexpr,
    TILE_H: gl.constexpr,
    TILE_W: gl.constexpr,
    TILES: gl.constexpr,
):
    """(t, h, w) of the first token of a consumer's block: a tile of its own, or half of the group's tile.

    `tiles` is their number; a second tile beyond it is read as the last one.
    """
    if TILES == 2:
        tile = gl.minimum(group * 2 + part, tiles - 1)
        t, h, w = _tile_origin(tile, grid_h, grid_w, TILE_T, TILE_H, TILE_W)
    else:
        t, h, w = _tile_origin(group, grid_h, grid_w, TILE_T, TILE_H, TILE_W)
        START: gl.constexpr = part * ROWS
        t += START // (TILE_H * TILE_W)
        h += START // TILE_W % TILE_H
        w += START % TILE_W
    return t, h, w


@gluon.jit
def row_tokens(row, t, h, w, frames, grid_h, grid_w, BOX_H: gl.constexpr, BOX_W: gl.constexpr):
    """(token, whether there is one) of the rows of the block at (t, h, w)."""
    t += row // (BOX_H * BOX_W)
    h += row // BOX_W % BOX_H
    w += row % BOX_W
    return (t.to(gl.int64) * grid_h + h) * grid_w + w, (t < frames) & (h < grid_h) & (w < grid_w)


@gluon.jit
def hide(scores, block, frames, grid_h, grid_w, S: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr):
    """-inf where a key block has no token; only blocks that stick out of the grid (sign bit) are looked at."""
    if block < 0:
        scores = _hide_columns(scores, block, frames, grid_h, grid_w, S, BOX_H, BOX_W)
    return scores


@gluon.jit
def _hide_columns(scores, block, frames, grid_h, grid_w, S: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr):
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, S))
    t, h, w = unpack(block)
    valid = (
        (t + column // (BOX_H * BOX_W) < frames)
        & (h + column // BOX_W % BOX_H < grid_h)
        & (w + column % BOX_W < grid_w)
    )
    return gl.where(valid[None, :], scores, float("-inf"))


def describe(x: Tensor, plan: BoxPlan) -> TensorDescriptor:
    """Descriptor of the boxes of a [B, H, S, D] tensor."""
    layout = gl.NVMMASharedLayout(128, 16, len(plan.block))
    return TensorDescriptor(x, list(plan.shape), list(plan.strides), list(plan.block), layout)


@functools.cache
def processors(index: int | None) -> int:
    """Multiprocessors of a CUDA device: a persistent kernel runs one program on each."""
    return torch.cuda.get_device_properties(index).multi_processor_count
