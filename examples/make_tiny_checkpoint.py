"""Make the tiny LongCat checkpoint that the project ships (`bsa_compile/data/tiny_longcat`).

The weights are random, seeded, and in the official layout. They are scaled so that activations stay finite and every
part of a block contributes. Queries and keys share a part of their projection, so that attention prefers tokens that
are alike and near, as a trained model's does: a block mask of pure noise would show nothing.

Run: python examples/make_tiny_checkpoint.py [FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import bsa_compile
from bsa_compile.models.longcat import LongCatConfig, LongCatVideoTransformer3DModel

CONFIG = LongCatConfig(
    hidden_size=128,
    depth=2,
    num_heads=2,
    caption_channels=48,
    adaln_tembed_dim=32,
    text_tokens_zero_pad=True,
    enable_bsa=True,
    bsa_params={"sparsity": 0.9375, "chunk_3d_shape_q": [4, 4, 4], "chunk_3d_shape_k": [4, 4, 4]},
)
SEED = 20251
GATE = 0.5
"""Mean of the adaLN gates: a released model's are not zero, a freshly initialised one's are."""
ALIKE = 0.7
"""Share of the query projection in the key projection."""
CONTENT_BIAS = 1.8
"""Size of the bias that queries and keys share; through RoPE it makes tokens prefer near ones."""
QK_GAIN = 2.0
"""Weight of the q/k norms."""
FLOW_STD = 0.5
"""Scale of the predicted flow."""


def initialise(model: LongCatVideoTransformer3DModel, seed: int) -> None:
    """Fill the parameters in place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name.split(".")[-2]:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif parameter.dim() == 1:
                parameter.copy_(normal(parameter.shape, 0.02))
            else:
                parameter.copy_(normal(parameter.shape, parameter[0].numel() ** -0.5))
        dim = model.config.hidden_size
        for block in model.blocks:
            shift_scale_gate = block.adaLN_modulation[1]
            shift_scale_gate.weight.mul_(0.3)
            for gate in (2, 5):
                shift_scale_gate.bias[gate * dim : (gate + 1) * dim] += GATE
            weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
            weight[dim : 2 * dim] = ALIKE * weight[:dim] + (1 - ALIKE**2) ** 0.5 * weight[dim : 2 * dim]
            bias[:dim] = normal((dim,), CONTENT_BIAS)
            bias[dim : 2 * dim] = bias[:dim]
            for norm in (block.attn.q_norm, block.attn.k_norm):
                norm.weight.fill_(QK_GAIN)
        model.final_layer.linear.weight.mul_(FLOW_STD)


def make(folder: Path, seed: int = SEED) -> None:
    """Write the checkpoint; the same seed gives the same weights."""
    model = LongCatVideoTransformer3DModel(CONFIG)
    initialise(model, seed)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(bsa_compile.__file__).parent / "data" / "tiny_longcat"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args().folder
    make(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
