"""Clips for training, drawn by worker processes while the GPU computes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bsa_compile.pipelines.small.captions import draw_caption
from bsa_compile.pipelines.small.clips import draw_clip

LATENT = 4
"""Frames, rows and columns of pixels per latent."""


class ClipBatch(NamedTuple):
    """Some clips.

    Attributes:
        video: `UInt8[Tensor, "b 3 t h w"]`.
        cover: share of every latent that the shape covers at most, `Float16[Tensor, "b 1+(t-1)/4 h/4 w/4"]`.
        captions: their texts.
    """

    video: Tensor
    cover: Tensor
    captions: list[str]


class ClipDataset(Dataset[Any]):
    """Clip i is always the same one.

    Args:
        name: of the data set: others have other clips.
        num_frames, height, width: of the clips.
        window: take so many of a clip's frames, somewhere; None: all.
    """

    def __init__(self, name: str, num_frames: int, height: int, width: int, window: int | None = None) -> None:
        self._name, self._size, self._window = name, (num_frames, height, width), window

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        rng = random.Random(f"{self._name} {index}")
        caption = draw_caption(rng)
        frames = slice(None)
        if self._window is not None:
            start = rng.randrange(self._size[0] - self._window + 1)
            frames = slice(start, start + self._window)
        video, mask = draw_clip(caption, *self._size, rng, frames=frames)
        pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        # The first latent holds the first frame alone.
        mask = torch.cat([mask[:1].expand(LATENT - 1, -1, -1), mask])
        cover = F.max_pool3d(mask[None], LATENT)[0]
        return pixels, cover.half(), caption.text


def clip_batches(dataset: ClipDataset, batch: int, first: int, num_workers: int | None = None) -> Iterator[ClipBatch]:
    """Batches of clips `first`, `first + 1`, ... without end, in pinned memory where there is a GPU.

    By default as many processes draw them as there are processors, less two.
    """
    if num_workers is None:
        num_workers = max(0, (os.cpu_count() or 1) - 2)
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=range(first, 2**62),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_collate,
    )
    return iter(loader)


def _collate(items: list[tuple[Tensor, Tensor, str]]) -> ClipBatch:
    video, cover, captions = zip(*items, strict=True)
    return ClipBatch(torch.stack(video), torch.stack(cover), list(captions))


def as_pixels(video: Tensor) -> Tensor:
    """`UInt8[Tensor, "..."]` -> `Float32[Tensor, "..."]` in [-1, 1]."""
    return video.float() / 127.5 - 1
