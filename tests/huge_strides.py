"""Tensors whose elements lie more than 2**31 apart, in memory that exists only where it is touched."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

BEYOND = 2**31


def spread(x: Tensor, path: Path, *, over: str) -> Tensor:
    """A copy of `[B, H, S, D]` whose heads or tokens are so far apart that offsets need 64 bits.

    Args:
        x: the values.
        path: where to put a sparse file, of which only the pages that are used take room.
        over: `heads` or `tokens`.
    """
    batch, heads, tokens, width = x.shape
    assert batch == 1
    near = tokens * width if over == "heads" else heads * width
    far = BEYOND // (max(2, heads) - 1) + near if over == "heads" else BEYOND // (tokens - 1) + near
    far = -(-far // 64) * 64  # rows stay aligned
    strides = (0, far, width, 1) if over == "heads" else (0, width, far, 1)
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    out = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype).as_strided(x.shape, strides)
    out.copy_(x)
    assert size > BEYOND
    return out
