"""LongCat-Video's diffusion transformer in plain PyTorch, with the official checkpoint's parameter names.

The model knows nothing of block sparsity: `enable_bsa()` only records a request, which `bsa_compile.optimize` and the
backend read. Every self-attention goes through `blocks.{i}.attn.attention_fn`, the one place an adapter replaces.
"""

from __future__ import annotations

from bsa_compile.models.longcat.attention import Attention, AttentionFn, Grid, TokenSplit, dense_attention
from bsa_compile.models.longcat.config import LongCatConfig
from bsa_compile.models.longcat.transformer import LongCatVideoTransformer3DModel

__all__ = [
    "Attention",
    "AttentionFn",
    "Grid",
    "LongCatConfig",
    "LongCatVideoTransformer3DModel",
    "TokenSplit",
    "dense_attention",
]
