"""What the launchers share: allocation of results and the operands that the kernels read tiles from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bsa_compile.kernels import config
from bsa_compile.kernels.config import Launch, Triple


def empty_like_tokens(x: Tensor) -> Tensor:
    """Uninitialised tensor of the shape of `x` [B, H, S, D] whose memory is a contiguous [B, S, H, D]."""
    batch, heads, tokens, head_dim = x.shape
    return torch.empty(batch, tokens, heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)


def common_alignment(*tensors: Tensor) -> int:
    """Elements in 16 bytes if every row of every tensor starts at a multiple of that from its first element, else 1."""
    elements = 16 // tensors[0].element_size()
    strides = (stride for x in tensors for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    return elements if all(stride % elements == 0 for stride in strides) else 1


def needs_mask(grid: Triple, tile: Triple, block: int) -> bool:
    """Whether blocks of `block` positions of some tile hold positions without a token."""
    return not config.divides(grid, tile) or config.volume(tile) % block != 0


def operands(
    tensors: tuple[Tensor, ...], grid: Triple, tile: Triple, layout: str, block: int, boxes: bool
) -> list[tuple[Any, int]]:
    """Each tensor [B, H, S, D] as a kernel takes it, and how (`ACCESS` in tiles.py): all by descriptor, or none."""
    plans = [config.plan_boxes(x, grid, tile, layout, block) if boxes else "" for x in tensors]
    if any(isinstance(plan, str) for plan in plans):
        return [(x, config.POINTER) for x in tensors]
    result: list[tuple[Any, int]] = []
    for x, plan in zip(tensors, plans, strict=True):
        assert not isinstance(plan, str)
        descriptor = TensorDescriptor(x, list(plan.shape), list(plan.strides), list(plan.block))
        result.append((descriptor, plan.access))
    return result


def launch_options(launch: Launch) -> dict[str, int]:
    """Triton's own launch options."""
    options = {"num_warps": launch.num_warps}
    if launch.max_registers is not None:
        options["maxnreg"] = launch.max_registers
    return options
