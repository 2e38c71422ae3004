"""Between frames and latents: the VAE with its normalisation, noise, and the padding of the refinement."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Frames = NDArray[np.uint8]
"""`[T, H, W, 3]`, sRGB."""

REFINE_MULTIPLE = 4
"""Latent frames of the refinement, given and noisy ones each, come in multiples of this: its tiles have 4 frames."""


def generator_for(seed: int, label: str) -> torch.Generator:
    """A generator of its own for every draw, on the CPU: no draw depends on another, nor on the device.

    The first base stage has the seed itself, the others one derived from it.
    """
    if label != "base 0":
        digest = hashlib.sha256(f"{seed}:{label}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


class LatentCodec:
    """A VAE of diffusers (`AutoencoderKLWan`) with its latents normalised as the transformer reads them."""

    def __init__(self, vae: Any) -> None:
        from diffusers.video_processor import VideoProcessor

        self.vae = vae
        self.spatial: int = vae.config.scale_factor_spatial
        self.temporal: int = vae.config.scale_factor_temporal
        self.channels: int = vae.config.z_dim
        self._processor = VideoProcessor(vae_scale_factor=self.spatial)
        shape = (1, self.channels, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, dtype=torch.float32).view(shape)
        self._std = torch.tensor(vae.config.latents_std, dtype=torch.float32).view(shape)

    def shape(self, latent_frames: int, height: int, width: int) -> tuple[int, int, int, int, int]:
        """Shape of the latents of one video whose sides are given in pixels."""
        return (1, self.channels, latent_frames, height // self.spatial, width // self.spatial)

    def resized(self, frames: Frames, height: int, width: int) -> Tensor:
        """Given frames at another size, `Float32[Tensor, "1 3 t h w"]` in [-1, 1]."""
        from PIL import Image

        pixels = self._processor.preprocess_video([Image.fromarray(f) for f in frames], height=height, width=width)
        return pixels.float()

    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Sample normalised latents.

        Args:
            pixels: `Float[Tensor, "1 3 t h w"]` in [-1, 1].
            generator: on the CPU.

        Returns:
            `Float32[Tensor, "1 c 1+(t-1)/4 h/8 w/8"]` on the VAE's device.
        """
        with torch.no_grad():
            found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.sample(generator)
        return (found.float() - self._mean.to(found.device)) / self._std.to(found.device)

    def decode(self, latents: Tensor) -> Frames:
        """Frames of normalised latents `Float[Tensor, "1 c t h w"]`: 1 + (t - 1) * 4 of them."""
        latents = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        with torch.no_grad():
            video = self.vae.decode(latents.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        return to_frames(video)


def to_frames(video: Tensor) -> Frames:
    """`Float[Tensor, "1 3 t h w"]` in [-1, 1] -> uint8 `[t, h, w, 3]`, rounded; one frame at a time in fp32."""
    frames = [((f.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu() for f in video[0].unbind(1)]
    return torch.stack(frames).permute(0, 2, 3, 1).contiguous().numpy()


def upsampled(frames: Frames, num_frames: int, height: int, width: int) -> Tensor:
    """Frames stretched in space, then in time, `Float32[Tensor, "1 3 t h w"]` in [-1, 1].

    Source: bilinear and trilinear with aligned corners, as the public LongCat-Video code feeds its refinement.
    """
    small = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()  # [T, 3, H, W]
    video = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=True)
    video = video.permute(1, 0, 2, 3)[None] / 255.0
    if num_frames != len(frames):
        video = F.interpolate(video, size=(num_frames, height, width), mode="trilinear", align_corners=True)
    return video * 2 - 1


@dataclass(frozen=True)
class Padding:
    """How the frames of a refinement are padded to whole tiles.

    Attributes:
        cond_latents: latent frames that are given, padding included.
        front: copies of the first frame put before it.
        back: copies of the last frame put behind it.
    """

    cond_latents: int
    front: int
    back: int

    @classmethod
    def of(cls, num_frames: int, num_cond_frames: int, temporal: int) -> Padding:
        """Pad the given and the noisy latent frames separately to multiples of four.

        Args:
            num_frames: frames of the refined video, the given ones included.
            num_cond_frames: those that are given.
            temporal: frames per latent frame.
        """

        def whole(latents: int) -> int:
            return math.ceil(latents / REFINE_MULTIPLE) * REFINE_MULTIPLE

        cond = front = 0
        if num_cond_frames:
            cond = whole(1 + math.ceil((num_cond_frames - 1) / temporal))
            front = 1 + (cond - 1) * temporal - num_cond_frames
        noisy = num_frames - num_cond_frames
        back = whole(math.ceil(noisy / temporal)) * temporal - noisy
        return cls(cond, front, back)

    def apply(self, video: Tensor) -> Tensor:
        """`Tensor["1 3 t h w"]` with the copies around it."""
        return torch.cat([repeated(video[:, :, :1], self.front), video, repeated(video[:, :, -1:], self.back)], dim=2)


def repeated(frame: Tensor, times: int) -> Tensor:
    """`Tensor["1 3 1 h w"]` -> `Tensor["1 3 times h w"]`."""
    return frame.expand(-1, -1, times, -1, -1)
