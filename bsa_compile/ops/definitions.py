"""The opaque ops of the `torch.library` namespace `bsa`: schemas, what they compute on, and what they return.

Each op checks its arguments, then calls plain torch (CPU) or the Triton launchers (CUDA). The launchers are imported on
first use, so that a machine without Triton or a GPU can import and use everything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import cpu, gating
from ..errors import UnsupportedError, must
from ..grid import num_tiles
from ..policy import keep_count
from . import registry, validate

_GRIDS = "SymInt[] grid_q, SymInt[] tile_q, SymInt[] grid_k, SymInt[] tile_k"
_OPTIONS = 'float scale, str layout="raster", str implementation="native"'
SCHEMAS = {
    "pool": '(Tensor x, SymInt[] grid, SymInt[] tile, str layout="raster") -> Tensor',
    "select": (
        "(Tensor q_pooled, Tensor k_pooled, float? sparsity, float? cdf_threshold, float scale)"
        " -> (Tensor kv_num_blocks, Tensor kv_indices)"
    ),
    "attend": (
        f"(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, {_GRIDS}, {_OPTIONS})"
        " -> (Tensor out, Tensor lse)"
    ),
    "attend_backward": (
        "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" Tensor kv_num_blocks, Tensor kv_indices, {_GRIDS}, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
}


def launcher(module: str, function: str) -> Callable[..., Any]:
    """A launcher of `bsa_compile.kernels`.

    Raises:
        UnsupportedError: Triton is not installed.
    """
    try:
        return getattr(importlib.import_module(f"bsa_compile.kernels.{module}"), function)
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "triton":
            raise
        raise UnsupportedError(
            must("triton", "be installed to run on a GPU", "no such module", "Run: pip install triton.")
        ) from exc


def tokens_first(x: Tensor) -> Tensor:
    """The same values with the memory order of a contiguous `[B, S, H, D]`, which the fake functions promise."""
    wanted = _tokens_first_strides(x.shape)
    if all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), wanted, strict=True)):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_tokens_first(x: Tensor) -> Tensor:
    """Uninitialised, like x, in the memory order of a contiguous `[B, S, H, D]`."""
    batch, heads, tokens, width = x.shape
    return x.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def _tokens_first_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    _, heads, tokens, width = shape
    return (tokens * heads * width, width, heads * width, 1)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """On the tensors' GPU, since Triton launches on the current one, and without autocast: what is fp32 stays fp32."""
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _define(name: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `bsa::<name>`; `compute` serves both devices, `fake` traces it."""
    # The kernels read strides themselves: inputs must come as eager has them, not as inductor would like them.
    op = torch.library.custom_op(
        f"bsa::{name}",
        compute,
        mutates_args=(),
        device_types=("cpu", "cuda"),
        schema=SCHEMAS[name],
        tags=(torch.Tag.needs_exact_strides,),
    )
    op.register_fake(fake)
    return op


def _pool(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str = "raster") -> Tensor:
    validate.check_pool(x, grid, tile, layout)
    if x.stride(-1) != 1:
        x = x.contiguous()
    implementation = gating.pool if x.device.type == "cpu" else launcher("pool", "pool")
    with _on(x.device):
        return implementation(x, tuple(grid), tuple(tile), layout)


def _pool_fake(x: Tensor, grid: Sequence[int], tile: Sequence[int], layout: str = "raster") -> Tensor:
    validate.check_pool(x, grid, tile, layout)
    shape = (x.shape[0], x.shape[1], num_tiles(grid, tile), x.shape[3])
    return x.new_empty(shape, dtype=gating.pooled_dtype(x.dtype))


def _select(
    q_pooled: Tensor, k_pooled: Tensor, sparsity: float | None, cdf_threshold: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    validate.check_select(q_pooled, k_pooled, sparsity, cdf_threshold, scale)
    with _on(q_pooled.device):
        if q_pooled.device.type == "cpu":
            return gating.select(q_pooled, k_pooled, sparsity, cdf_threshold, scale)
        count = None if sparsity is None else keep_count(k_pooled.shape[2], sparsity)
        return launcher("select", "select")(q_pooled, k_pooled, count, cdf_threshold, scale)


def _select_fake(
    q_pooled: Tensor, k_pooled: Tensor, sparsity: float | None, cdf_threshold: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    validate.check_select(q_pooled, k_pooled, sparsity, cdf_threshold, scale)
    rows, num_kv = tuple(q_pooled.shape[:3]), k_pooled.shape[2]
    by_count = sparsity is not None and cdf_threshold is None
    capacity = keep_count(num_kv, sparsity) if by_count else num_kv  # type: ignore[arg-type]
    return (
        q_pooled.new_empty(rows, dtype=torch.int32),
        q_pooled.new_empty((*rows, capacity), dtype=torch.int32),
    )


def _attend(
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
    layout: str = "raster",
    implementation: str = "native",
) -> tuple[Tensor, Tensor]:
    grids = (tuple(grid_q), tuple(tile_q), tuple(grid_k), tuple(tile_k))
    validate.check_attend(q, k, v, kv_num_blocks, kv_indices, *grids, scale, layout)
    other = registry.find_attend(implementation, q, k, v, *grids, layout)
    if other is not None:
        forward = other.forward
    else:
        forward = cpu.attend if q.device.type == "cpu" else launcher("attend_forward", "attend_forward")
    with _on(q.device):
        out, lse = forward(q, k, v, kv_num_blocks, kv_indices, *grids, scale, layout)
    return tokens_first(out), lse.contiguous()


def _attend_fake(
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
    layout: str = "raster",
    implementation: str = "native",
) -> tuple[Tensor, Tensor]:
    grids = (grid_q, tile_q, grid_k, tile_k)
    validate.check_attend(q, k, v, kv_num_blocks, kv_indices, *grids, scale, layout)
    registry.find_attend(implementation, q, k, v, *grids, layout)
    return empty_tokens_first(q), q.new_empty(q.shape[:3], dtype=gating.pooled_dtype(q.dtype))


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str = "raster",
    implementation: str = "native",
) -> tuple[Tensor, Tensor, Tensor]:
    grids = (tuple(grid_q), tuple(tile_q), tuple(grid_k), tuple(tile_k))
    validate.check_attend(q, k, v, kv_num_blocks, kv_indices, *grids, scale, layout)
    validate.check_gradients(q, out, lse, grad_out, grad_lse)
    backward = _find_backward(implementation, q, k, v, *grids, layout)
    if backward is None:
        backward = cpu.attend_backward if q.device.type == "cpu" else launcher("attend_backward", "attend_backward")
    if grad_out.stride(-1) != 1:  # the gradient of a sum is an expanded scalar
        grad_out = grad_out.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    with _on(q.device):
        grads = backward(
            grad_out, grad_lse, q, k, v, out, lse.contiguous(), kv_num_blocks, kv_indices, *grids, scale, layout
        )
    dq, dk, dv = (tokens_first(g) for g in grads)
    return dq, dk, dv


def _attend_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    scale: float,
    layout: str = "raster",
    implementation: str = "native",
) -> tuple[Tensor, Tensor, Tensor]:
    grids = (grid_q, tile_q, grid_k, tile_k)
    validate.check_attend(q, k, v, kv_num_blocks, kv_indices, *grids, scale, layout)
    validate.check_gradients(q, out, lse, grad_out, grad_lse)
    _find_backward(implementation, q, k, v, *grids, layout)
    return empty_tokens_first(q), empty_tokens_first(k), empty_tokens_first(v)


def _find_backward(implementation: str, *case: Any) -> Callable[..., Any] | None:
    """The registered backward, None for the built-in one."""
    other = registry.find_attend(implementation, *case, backward=True)
    if other is not None and other.backward is None:
        raise UnsupportedError(
            must(
                "implementation",
                "have a backward for q, k or v to get gradients",
                repr(implementation),
                "Register it with a backward.",
            )
        )
    return None if other is None else other.backward


pool = _define("pool", _pool, _pool_fake)
select = _define("select", _select, _select_fake)
attend = _define("attend", _attend, _attend_fake)
attend_backward = _define("attend_backward", _attend_backward, _attend_backward_fake)
