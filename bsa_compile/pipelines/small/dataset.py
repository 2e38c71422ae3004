"""Clips for training, drawn on the device that trains."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from bsa_compile.pipelines.small.captions import draw_caption
from bsa_compile.pipelines.small.clips import draw_clip


class ClipBatch(NamedTuple):
    """Some clips.

    Attributes:
        video: `Float32[Tensor, "b 3 t h w"]` in [-1, 1].
        captions: their texts.
    """

    video: Tensor
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
        video, captions = zip(*(self._draw(first + i) for i in range(count)), strict=True)
        return ClipBatch(torch.stack(video), list(captions))

    def _draw(self, index: int) -> tuple[Tensor, str]:
        rng = random.Random(f"{self._name} {index}")
        caption = draw_caption(rng)
        frames = slice(None)
        if self._window is not None:
            start = rng.randrange(self._size[0] - self._window + 1)
            frames = slice(start, start + self._window)
        video, _ = draw_clip(caption, *self._size, rng, frames=frames, device=self._device)
        return video, caption.text
