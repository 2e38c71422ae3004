"""Calls to export, and a process that has nothing but the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy

from ..compile.support import make_inputs

ROOT = Path(__file__).resolve().parents[2]
GRID = (4, 6, 10)  # a partial tile in h and in w
POLICIES = {
    "count": BSAPolicy(sparsity=0.7),
    "mass": BSAPolicy(cdf_threshold=0.6),
    "both": BSAPolicy(sparsity=0.8, cdf_threshold=0.5),
}
CALLS = ("plain", "cond", "encode", "cached")


def call(model: LongCatVideoTransformer3DModel, name: str, batch: int = 2) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional and keyword inputs of one way to call the DiT."""
    latents, timestep, text = make_inputs(GRID, batch)
    config = model.config
    latents = latents.repeat(1, config.in_channels // latents.shape[1], 1, 1, 1)
    text = text.repeat(1, 1, 1, -(-config.caption_channels // text.shape[3]))[..., : config.caption_channels]
    if name == "cond":
        return (latents, timestep, text), {"num_cond_latents": 1}
    if name == "encode":
        return (latents, timestep, text), {"return_kv": True, "skip_crs_attn": True}
    if name == "cached":
        with torch.no_grad():
            _, cache = model(latents[:, :, :2], timestep, text, return_kv=True, skip_crs_attn=True)
        return (latents[:, :, 2:], timestep, text), {"num_cond_latents": 2, "kv_cache_dict": cache}
    return (latents, timestep, text), {}


def tensors(result: Any) -> list[Tensor]:
    """Every tensor of a result, in the order in which exports list them."""
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]


def run_python(code: str, *arguments: object, timeout: int = 300) -> str:
    """Run code in a fresh process that finds this checkout, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class PatchAttention(torch.nn.Module):
    """The least that has a patch embedding and self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return tokens + out.transpose(1, 2).flatten(2)
