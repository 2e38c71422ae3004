"""What the LongCat tests share: golden data, small models, inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsa_compile.models.longcat import LongCatConfig, LongCatVideoTransformer3DModel

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in fp64; NaN anywhere gives NaN, which is below no bound."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def golden_model() -> LongCatVideoTransformer3DModel:
    return LongCatVideoTransformer3DModel.from_pretrained(GOLDEN)


def tiny_model(seed: int = 0, **fields: Any) -> LongCatVideoTransformer3DModel:
    """A model with one block of two heads of 16 dims, every weight random (norms and biases too)."""
    small = {
        "in_channels": 4,
        "out_channels": 4,
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "caption_channels": 8,
        "adaln_tembed_dim": 16,
        "frequency_embedding_size": 32,
    }
    model = LongCatVideoTransformer3DModel(LongCatConfig(**{**small, **fields}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if "norm" in name and "weight" in name else noise / max(p[0].numel(), 4) ** 0.5)
    return model.eval()


@dataclass
class Inputs:
    """Arguments of a forward call; `x` first, then the rest by name."""

    hidden_states: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    encoder_attention_mask: Tensor

    def kwargs(self, **changes: Any) -> dict[str, Any]:
        return {**self.__dict__, **changes}


def tiny_inputs(seed: int = 0, batch: int = 2, grid: tuple[int, int, int] = (5, 6, 10), text: int = 7) -> Inputs:
    """Inputs of a `tiny_model`; the second sample's text is padded from its third token on."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, text, dtype=torch.int64)
    mask[1:, 3:] = 0
    return Inputs(
        hidden_states=torch.randn(batch, 4, *grid, generator=g),
        timestep=torch.tensor([400.0, 500.0, 600.0][:batch]),
        encoder_hidden_states=torch.randn(batch, 1, text, 8, generator=g),
        encoder_attention_mask=mask,
    )
