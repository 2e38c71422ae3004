"""Clips for training, drawn on the device that trains."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bsa_compile.pipelines.small.captions import draw_caption
from bsa_compile.pipelines.small.clips import draw_clip

LATENT = 4
"""Frames, rows and columns of pixels per latent."""


class ClipBatch(NamedTuple):
    """Some clips.

    Attributes:
        video: `Float32[Tensor, "b 3 t h w"]` in [-1, 1].
        cover: share of every latent that the shape covers at most, `Float16[Tensor, "b 1+(t-1)/4 h/4 w/4"]`.
        captions: their texts.
    """

    video: Tensor
    cover: Tensor
    captions: list[str]


class ClipDataset:
    """Endlessly many clips; clip i is always the same one.

    Args:
        name: of the data set: others have other clips.
        num_frames, height, width: of the clips.
        window: take so many of a clip's frames, somewhere; None: all.
        device: where to draw; a GPU is not waited for.
    """

    def __init__(
        self,
        name: str,
        num_frames: int,
        height: int,
        width: int,
        window: int | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._name, self._size, self._window = name, (num_frames, height, width), window
        self._device = torch.device(device)

    def batch(self, first: int, count: int) -> ClipBatch:
        """Clips `first` to `first + count - 1`."""
        video, cover, captions = zip(*(self._draw(first + i) for i in range(count)), strict=True)
        return ClipBatch(torch.stack(video), torch.stack(cover), list(captions))

    def _draw(self, index: int) -> tuple[Tensor, Tensor, str]:
        rng = random.Random(f"{self._name} {index}")
        caption = draw_caption(rng)
        frames = slice(None)
        if self._window is not None:
            start = rng.randrange(self._size[0] - self._window + 1)
            frames = slice(start, start + self._window)
        video, mask = draw_clip(caption, *self._size, rng, frames=frames, device=self._device)
        # The first latent holds the first frame alone.
        mask = torch.cat([mask[:1].expand(LATENT - 1, -1, -1), mask])
        cover = F.max_pool3d(mask[None], LATENT)[0]
        return video, cover.half(), caption.text
