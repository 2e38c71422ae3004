"""Small models, and what block-sparse attention inside them must compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bsa_compile import reference
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy

CAPTION = 24


def make_longcat(depth: int = 2, seed: int = 0) -> LongCatVideoTransformer3DModel:
    """A LongCat DiT small enough to compile in seconds, with weights that make every part count."""
    torch.manual_seed(seed)
    model = LongCatVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        hidden_size=32,
        depth=depth,
        num_heads=2,
        caption_channels=CAPTION,
        adaln_tembed_dim=16,
        frequency_embedding_size=32,
        text_tokens_zero_pad=True,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1))
    return model.eval()


def make_inputs(
    grid: tuple[int, int, int] = (4, 6, 10), batch: int = 1, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents whose patches form `grid`, timesteps, text."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    latents = torch.randn(batch, 4, t, 2 * h, 2 * w, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    text = torch.randn(batch, 1, 7, CAPTION, generator=generator)
    return latents, timestep, text


def reference_attention(policy: BSAPolicy, calls: list | None = None) -> Callable[..., Tensor]:
    """An `attention_fn` that computes the policy's block-sparse attention by the fp64 reference."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, grid_q, grid_k, role) -> Tensor:
        if calls is not None:
            calls.append((role, tuple(grid_q), tuple(grid_k)))
        out, _ = reference.block_sparse_attention(
            q.cpu(),  # the reference computes on the CPU, wherever the model is
            k.cpu(),
            v.cpu(),
            grid_q=grid_q,
            grid_k=grid_k,
            tile_q=policy.chunk_3d_shape_q,
            tile_k=policy.chunk_3d_shape_k,
            sparsity=policy.sparsity,
            cdf_threshold=policy.cdf_threshold,
        )
        return out.to(q.device, q.dtype)

    return attend


def run_reference(model: LongCatVideoTransformer3DModel, policies, *args, **kwargs):
    """Run the model with the reference in place of its attention; `policies` is one, or one per block (None: dense)."""
    per_block = policies if isinstance(policies, list) else [policies] * len(model.blocks)
    before = [b.attn.attention_fn for b in model.blocks]
    try:
        for block, policy in zip(model.blocks, per_block, strict=True):
            if policy is not None:
                block.attn.attention_fn = reference_attention(policy)
        return model(*args, **kwargs)
    finally:
        for block, fn in zip(model.blocks, before, strict=True):
            block.attn.attention_fn = fn


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class CountCompiles:
    """How many graphs Dynamo captured inside the block."""

    def __enter__(self) -> CountCompiles:
        self._before = self._total()
        return self

    def __exit__(self, *_: object) -> None:
        self.count = self._total() - self._before

    @staticmethod
    def _total() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]
