"""Where an installed library was measured to be faster than our kernels: what `attend="auto"` goes by.

An entry is added when `bsa-compile bench attention --peers` shows the library ahead on the whole op, reordering
included, on both selections, and names the file of that measurement. The table is empty as long as there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import num_tokens, tile_volume


@dataclass(frozen=True)
class Win:
    """A case in which a library was faster.

    Attributes:
        implementation: its registered name.
        backward: whether the backward pass was measured, else the forward pass.
        capability: compute capability of the GPU.
        dtypes: of q, k and v.
        head_dim: D.
        volume: tokens of a tile, of queries and of keys alike.
        min_tokens: the fewest keys of the measurements.
        evidence: file under `benchmarks/results`.
    """

    implementation: str
    backward: bool
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    head_dim: int
    volume: int
    min_tokens: int
    evidence: str


WINS: tuple[Win, ...] = ()


def matching(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_q: Sequence[int],
    tile_q: Sequence[int],
    grid_k: Sequence[int],
    tile_k: Sequence[int],
    layout: str,
    *,
    backward: bool,
) -> Iterator[Win]:
    """Entries of the table that fit a case, in order; symbolic sizes fit none, so nothing is guarded on them."""
    if q.device.type != "cuda" or not WINS:
        return
    sizes = (q.shape[-1], *grid_k, *tile_q, *tile_k)
    if not all(isinstance(size, int) for size in sizes):
        return
    capability = torch.cuda.get_device_capability(q.device)
    for win in WINS:
        same = win.backward == backward and win.capability == capability and q.dtype in win.dtypes
        fits = win.head_dim == q.shape[-1] and win.volume == tile_volume(tile_q) == tile_volume(tile_k)
        if same and fits and num_tokens(grid_k) >= win.min_tokens:
            yield win
