"""What an attention call must be like for block-sparse attention to compute the same thing on fewer keys."""

from __future__ import annotations

from typing import Any

import torch

from .match import Match
from .modulepath import value
from .sizes import Sizes, shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8

Issue = tuple[str, str]
"""A key of `report.REASONS` and its detail."""


def obstacle(match: Match, output: Any, sizes: Sizes) -> Issue | None:
    """Why a call cannot be rewritten whatever its tokens are, or None.

    Args:
        match: the call.
        output: its example value; its dtype is what the attention computes in, also under autocast.
        sizes: what is known of sizes.
    """
    if match.issue is not None:
        return match.issue
    tensors = [value(x) for x in (match.q, match.k, match.v)]
    output = output[0] if isinstance(output, (list, tuple)) else output
    if not all(isinstance(x, torch.Tensor) for x in (*tensors, output)):
        return "shape", "the graph holds no shapes: trace it with torch.compile or torch.export"
    if any(x.dim() != 4 for x in tensors):
        return "shape", ", ".join(f"{x.dim()}-D" for x in tensors)
    q, k, v = (_bhsd(shape(x), match.layout) for x in tensors)
    if not (sizes.all_same(k, v) and sizes.same(q[0], k[0]) and sizes.same(q[3], k[3])):
        return "shape", f"q {_text(q)}, k {_text(k)}, v {_text(v)} as [B, H, S, D]"
    if not sizes.same(q[1], k[1]) and not ((match.gqa or k[1] == 1) and sizes.quotient(q[1], k[1]) is not None):
        return "shape", f"{q[1]} query heads, {k[1]} key heads"
    if len({x.device for x in tensors}) > 1:
        return "shape", "q, k and v are on different devices"
    if not _computes_in(output):
        return "dtype", str(output.dtype).removeprefix("torch.")
    dim = q[3]
    if not isinstance(dim, int) or dim % HEAD_DIM_STEP or not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        return "head_dim", str(dim)
    return None


def _computes_in(output: torch.Tensor) -> bool:
    return output.dtype in DTYPES or (output.dtype == torch.float64 and output.device.type == "cpu")


def _bhsd(sizes: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    return tuple(sizes[layout.index(axis)] for axis in "BHSD")


def _text(sizes: tuple[Any, ...]) -> str:
    return "x".join(map(str, sizes))
