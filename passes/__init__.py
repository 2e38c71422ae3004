"""The graph passes: what turns a captured model's self-attention into block-sparse ops."""

from __future__ import annotations

from .. import ops as ops  # registers torch.ops.bsa, which rewritten graphs call
from .rewrite import BlockSparseAttention, rewrite

__all__ = ["BlockSparseAttention", "rewrite"]
