"""A LongCat DiT with random weights, made where it is measured, and what one of its steps is given."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.models.longcat.layers import RMSNorm

TEXT_TOKENS = 512
"""Text tokens of a step: LongCat's maximum."""

WEIGHTS = "random, standard deviation 0.02; norms 1"
"""What `random_model` fills a model with, in words."""

_DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def random_model(device: torch.device, *, seed: int = 0, **fields: Any) -> LongCatVideoTransformer3DModel:
    """A bf16 model in evaluation mode whose weights never were anywhere else than on `device`.

    No weight is zero, as in the released model. The weights of norms are 1: keys and queries then have the size that
    their norm is there for, and attention is not uniform.

    Args:
        device: where to make it.
        seed: of the weights.
        **fields: of `LongCatConfig`; by default the released model's, 13.6 B parameters.
    """
    with torch.device("meta"):
        model = LongCatVideoTransformer3DModel(**fields).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm | nn.LayerNorm) and name == "weight":
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    return model


def random_inputs(
    model: LongCatVideoTransformer3DModel, grid: tuple[int, int, int], text_tokens: int = TEXT_TOKENS, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of a step of one video whose tokens have this (t, h, w), in the middle of the schedule."""
    config, device = model.config, model.device
    generator = torch.Generator(device).manual_seed(seed)
    sides = [tokens * patch for tokens, patch in zip(grid, config.patch_size, strict=True)]
    shapes = {
        "hidden_states": (1, config.in_channels, *sides),
        "encoder_hidden_states": (1, 1, text_tokens, config.caption_channels),
    }
    made = {
        name: torch.randn(shape, generator=generator, dtype=model.dtype, device=device)
        for name, shape in shapes.items()
    }
    return {**made, "timestep": torch.full((1,), 500.0, device=device)}


def fastest_dense() -> AbstractContextManager[None]:
    """Prefer cuDNN's attention, the fastest dense one in PyTorch on Hopper, and after it FlashAttention-2."""
    return sdpa_kernel(_DENSE, set_priority=True)


def dense_kernel(model: LongCatVideoTransformer3DModel, tokens: int) -> str:
    """Name of the kernel that PyTorch picks for the model's dense self-attention, under the settings in force."""
    config = model.config
    shape = (1, config.num_heads, tokens, config.head_dim)
    q = torch.empty(shape, dtype=model.dtype, device=model.device)
    choice = torch._fused_sdp_choice(q, q, q)
    return SDPBackend(choice).name if choice >= 0 else "none"
