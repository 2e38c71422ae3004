"""What a LongCat model attends with: q and k of one block, and the tiles that a policy selects for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops as ops  # registers torch.ops.bsa
from .errors import UsageError, must
from .grid import Shape3
from .models.longcat.attention import Attention
from .policy import SitePolicy
from .selection import BlockSelection


@dataclass(frozen=True)
class AttentionInputs:
    """Queries and keys of one attention call, as attention sees them: normed and rotated.

    Attributes:
        q: `[B, H, Sq, D]`.
        k: `[B, H, Sk, D]`.
        grid_q, grid_k: token grids.
        role: self, cond, noise or cached.
    """

    q: Tensor
    k: Tensor
    grid_q: Shape3
    grid_k: Shape3
    role: str


class _Captured(Exception):
    """Ends the forward pass: what follows the captured call is of no use."""

    def __init__(self, inputs: AttentionInputs) -> None:
        super().__init__()
        self.inputs = inputs


def capture_attention(model: nn.Module, block: int, call: Callable[[], Any]) -> AttentionInputs:
    """Run a LongCat model up to the self-attention of one block and take its q and k.

    Args:
        model: our LongCat DiT, not optimized; it is left as it was.
        block: index into `model.blocks`; negative ones count from the end.
        call: runs the model once.

    Raises:
        UsageError: the model has no such block of ours, or `call` does not reach it.
    """
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[block], "attn", None) if blocks and -len(blocks) <= block < len(blocks) else None
    if not isinstance(attention, Attention):
        count = len(blocks) if blocks else 0
        raise UsageError(must("block", f"be the index of one of the model's {count} LongCat blocks", block))
    before = attention.attention_fn

    def record(q: Tensor, k: Tensor, v: Tensor, *, grid_q: Shape3, grid_k: Shape3, role: str) -> Tensor:
        raise _Captured(AttentionInputs(q.detach(), k.detach(), grid_q, grid_k, role))

    attention.attention_fn = record
    try:
        with torch.no_grad():
            call()
    except _Captured as captured:
        return captured.inputs
    finally:
        attention.attention_fn = before
    raise UsageError(must("call", f"run block {block} of the model", "a call that did not"))


def select_tiles(inputs: AttentionInputs, site: SitePolicy) -> BlockSelection:
    """The key tiles that each query tile attends to under the policy of a site: pool, score, select."""
    q, k = inputs.q, inputs.k
    q_pooled = torch.ops.bsa.pool(q, inputs.grid_q, site.chunk_3d_shape_q)
    k_pooled = torch.ops.bsa.pool(k, inputs.grid_k, site.chunk_3d_shape_k)
    counts, indices = torch.ops.bsa.select(q_pooled, k_pooled, site.sparsity, site.cdf_threshold, q.shape[-1] ** -0.5)
    return BlockSelection(counts, indices, k_pooled.shape[2])
