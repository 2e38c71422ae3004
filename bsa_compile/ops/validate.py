"""What the ops refuse, in one place: real, fake and symbolic arguments are checked alike, without reading any data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GridError, InputError, UnsupportedError, must
from ..grid import as_shape3, num_tiles, num_tokens, tile_volume
from ..policy import ROLES
from .ring_share import Ring

LAYOUTS = ("raster", "tile")
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A role only the pass understands: any plain attention that runs inside `latent_grid`, cross-attention included.
AUTO_ROLE = "auto"


def check_grid(name: str, grid: Any) -> None:
    """Three positive integers, possibly symbolic."""
    as_shape3(name, grid)


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise InputError(must("layout", f"be one of {', '.join(LAYOUTS)}", repr(layout)))


def check_tensor(name: str, x: Tensor, axes: str) -> None:
    """A non-empty tensor with these axes."""
    rank = len(axes.split(", "))
    if x.dim() != rank:
        raise InputError(must(name, f"be [{axes}]", f"{x.dim()} dimensions"))
    for size in x.shape:
        if size == 0:
            raise InputError(must(name, "be non-empty", f"shape {_shape(x)}"))


def check_dtype(name: str, x: Tensor) -> None:
    """A dtype that the ops compute in; fp64 is for the CPU alone."""
    if x.dtype in DTYPES or (x.dtype == torch.float64 and x.device.type in ("cpu", "meta")):
        return
    raise UnsupportedError(
        must(name, "be float32, float16 or bfloat16 (or float64 on the CPU)", f"{x.dtype} on {x.device.type}")
    )


def check_head_dim(head_dim: int) -> None:
    if head_dim % HEAD_DIM_STEP != 0 or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise UnsupportedError(
            must(
                "head_dim",
                f"be a multiple of {HEAD_DIM_STEP} in [{MIN_HEAD_DIM}, {MAX_HEAD_DIM}]",
                str(head_dim),
                "Pad the heads of q, k and v with zeros and pass the original scale.",
            )
        )


def check_tokens(name: str, x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str) -> None:
    """The token axis holds the grid's tokens (`raster`) or all positions of all tiles (`tile`)."""
    expected = num_tokens(grid) if layout == "raster" else num_tiles(grid, tile) * tile_volume(tile)
    if x.shape[2] != expected:
        what = f"grid {'x'.join(map(str, grid))}"
        what += "" if layout == "raster" else f" in padded tiles of {'x'.join(map(str, tile))}"
        raise GridError(
            must(f"the token axis of {name}", f"hold {expected} tokens ({what})", f"{x.shape[2]}", "Check the grid.")
        )


def check_number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    """A finite number in the interval; symbolic numbers are trusted."""
    if value is None or isinstance(value, torch.SymFloat):
        return
    if math.isfinite(value) and low <= value <= high and not (low_open and value == low):
        return
    interval = f"in {'(' if low_open else '['}{low:g}, {high:g}]" if math.isfinite(high) else "finite"
    raise InputError(must(name, f"be a number {interval}", repr(value)))


def check_scale(scale: float | None) -> None:
    check_number("scale", scale, -math.inf, math.inf)


def check_criteria(sparsity: float | None, cdf_threshold: float | None) -> None:
    """At least one criterion, each within its range."""
    if sparsity is None and cdf_threshold is None:
        raise InputError(must("sparsity or cdf_threshold", "be given", "neither", "Pass for example sparsity=0.9375."))
    check_number("sparsity", sparsity, 0, 1)
    check_number("cdf_threshold", cdf_threshold, 0, 1, low_open=True)


def check_heads(q: Tensor, k: Tensor) -> None:
    """Equal batch and head_dim; query heads are a multiple of key heads."""
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(must("q and k", "have the same batch and head_dim", f"{_shape(q)} and {_shape(k)}"))
    if q.shape[1] % k.shape[1] != 0:
        raise InputError(
            must("the heads of q", "be a multiple of the heads of k and v", f"{q.shape[1]} and {k.shape[1]}")
        )


def check_alike(names: str, *tensors: Tensor) -> None:
    """One dtype and one device."""
    if len({x.dtype for x in tensors}) > 1:
        raise InputError(must(names, "have one dtype", ", ".join(str(x.dtype) for x in tensors)))
    check_devices(names, *tensors)


def check_devices(names: str, *tensors: Tensor) -> None:
    if len({x.device for x in tensors}) > 1:
        raise InputError(must(names, "be on one device", ", ".join(str(x.device) for x in tensors)))


def check_pool(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str) -> None:
    """Arguments of `bsa::pool`."""
    check_layout(layout)
    check_grid("grid", grid)
    check_grid("tile", tile)
    check_tensor("x", x, "B, H, S, D")
    check_dtype("x", x)
    check_tokens("x", x, grid, tile, layout)


def check_select(
    q_pooled: Tensor, k_pooled: Tensor, sparsity: float | None, cdf_threshold: float | None, scale: float
) -> None:
    """Arguments of `bsa::select`."""
    check_criteria(sparsity, cdf_threshold)
    check_scale(scale)
    check_tensor("q_pooled", q_pooled, "B, H, Nq, D")
    check_tensor("k_pooled", k_pooled, "B, Hkv, Nk, D")
    check_alike("q_pooled and k_pooled", q_pooled, k_pooled)
    check_heads(q_pooled, k_pooled)
    if q_pooled.dtype not in (torch.float32, torch.float64):
        raise InputError(must("q_pooled and k_pooled", "be float32, as pool returns them", str(q_pooled.dtype)))


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v of an attention."""
    check_tensor("q", q, "B, H, Sq, D")
    check_tensor("k", k, "B, Hkv, Sk, D")
    check_tensor("v", v, "B, Hkv, Sk, D")
    check_alike("q, k and v", q, k, v)
    check_dtype("q, k and v", q)
    if k.shape != v.shape:
        raise InputError(must("k and v", "have the same shape", f"{_shape(k)} and {_shape(v)}"))
    check_heads(q, k)
    check_head_dim(q.shape[3])


def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str,
) -> None:
    """Arguments of `bsa::attend`; what the lists hold is not read."""
    check_layout(layout)
    for name, shape in (("grid_q", grid_q), ("tile_q", tile_q), ("grid_k", grid_k), ("tile_k", tile_k)):
        check_grid(name, shape)
    check_scale(scale)
    check_qkv(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise InputError(must(name, "have a unit last stride", str(x.stride(-1)), "Call .contiguous() on it."))
    check_tokens("q", q, grid_q, tile_q, layout)
    check_tokens("k", k, grid_k, tile_k, layout)
    rows = (q.shape[0], q.shape[1], num_tiles(grid_q, tile_q))
    if kv_num_blocks.dtype != torch.int32 or kv_indices.dtype != torch.int32:
        got = f"{kv_num_blocks.dtype}, {kv_indices.dtype}"
        raise InputError(must("kv_num_blocks and kv_indices", "be int32", got))
    if kv_num_blocks.dim() != 3 or any(a != b for a, b in zip(kv_num_blocks.shape, rows, strict=True)):
        raise InputError(must("kv_num_blocks", f"be [B, H, Nq] = {list(rows)}", _shape(kv_num_blocks)))
    if kv_indices.dim() != 4 or any(a != b for a, b in zip(kv_indices.shape[:3], rows, strict=True)):
        raise InputError(must("kv_indices", f"be [B, H, Nq, Kmax] with {list(rows)} first", _shape(kv_indices)))
    if kv_indices.shape[3] == 0:
        raise InputError(must("kv_indices", "have room for at least one key tile", _shape(kv_indices)))
    check_devices("q, kv_num_blocks and kv_indices", q, kv_num_blocks, kv_indices)


def check_gradients(q: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> None:
    """What `bsa::attend_backward` takes beyond the arguments of `bsa::attend`."""
    for name, x, like in (("grad_out", grad_out, q), ("out", out, q), ("grad_lse", grad_lse, lse)):
        if x is not None and (x.dim() != like.dim() or any(a != b for a, b in zip(x.shape, like.shape, strict=True))):
            raise InputError(must(name, f"have the shape {_shape(like)}", _shape(x)))
        if x is not None and x.dtype != like.dtype:
            raise InputError(must(name, f"be {like.dtype}", str(x.dtype)))
    if lse.dim() != 3 or any(a != b for a, b in zip(lse.shape, q.shape[:3], strict=True)):
        raise InputError(must("lse", "be [B, H, Sq]", _shape(lse)))
    check_devices("q, out, lse and their gradients", *(x for x in (q, out, lse, grad_out, grad_lse) if x is not None))


def check_anchor(
    q: Tensor, k: Tensor, v: Tensor, grid_q: Sequence[int], grid_k: Sequence[int], role: str, scale: float | None
) -> None:
    """Arguments of `bsa::attention`."""
    if role == AUTO_ROLE:
        return
    if role not in ROLES:
        raise InputError(must("role", f"be one of {', '.join(ROLES)}", repr(role)))
    check_grid("grid_q", grid_q)
    check_grid("grid_k", grid_k)
    check_scale(scale)
    check_tensor("q", q, "B, H, Sq, D")
    check_tensor("k", k, "B, Hkv, Sk, D")
    check_tensor("v", v, "B, Hkv, Sk, D")
    check_devices("q, k and v", q, k, v)
    check_heads(q, k)
    check_tokens("q", q, grid_q, grid_q, "raster")
    check_tokens("k", k, grid_k, grid_k, "raster")


def check_ring(q: Tensor, k: Tensor, grid_q: Sequence[int], grid_k: Sequence[int], ring: Ring) -> None:
    """Arguments that the ops of a ring share; a member's share of the tokens may be empty."""
    check_grid("grid_q", grid_q)
    check_grid("grid_k", grid_k)
    check_heads(q, k)
    if ring.axis not in (1, 2) or ring.size < 1 or not 0 <= ring.index < ring.size:
        want = "be an axis of 1 or 2, bounds of at least one part and the index of one"
        raise InputError(must("axis, bounds and index", want, (ring.axis, ring.bounds, ring.index)))
    for name, x, grid in (("q", q, grid_q), ("k", k, grid_k)):
        if ring.bounds[0] != 0 or ring.bounds[-1] != grid[ring.axis]:
            want = f"run from 0 to the grid's {grid[ring.axis]} tokens along axis {ring.axis}"
            raise GridError(must("bounds", want, list(ring.bounds)))
        if x.shape[2] != ring.tokens(grid):
            want = f"hold the {ring.tokens(grid)} tokens of this member's part of {'x'.join(map(str, grid))}"
            raise GridError(must(f"the token axis of {name}", want, x.shape[2], "Check the grid."))


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
