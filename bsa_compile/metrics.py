"""How far a video is from another one: PSNR and SSIM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .errors import InputError, must

PEAK = 255.0
"""The largest value that a pixel can have."""

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2

Video = NDArray[np.uint8] | Tensor
"""`UInt8["t h w c"]`."""


def psnr(video: Video, reference: Video) -> float:
    """Peak signal-to-noise ratio of a video in dB: infinite where both are the same.

    The squared error is averaged over all pixels of all frames before the logarithm, so that single frames without
    any difference do not make it infinite.

    Args:
        video: `UInt8["t h w c"]`, an array or a tensor on any device.
        reference: likewise, of the same shape.

    Raises:
        InputError: a video is no uint8 of four dimensions, is empty, or the shapes differ.
    """
    a, b = _pair(video, reference)
    total = 0.0
    for x, y in zip(a, b, strict=True):  # a frame at a time: fp64 of whole videos would take gigabytes
        total += float((x.double() - y.double()).square().sum())
    error = total / a.numel()
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def ssim(video: Video, reference: Video) -> float:
    """Structural similarity of a video, the mean over all frames and channels: 1 where both are the same.

    Windows are Gaussian, 11x11 with a standard deviation of 1.5 pixels, and lie wholly inside the frame; channels are
    compared each by itself, frames at the size they have.

    Args:
        video: `UInt8["t h w c"]`, h and w at least 11; an array or a tensor on any device.
        reference: likewise, of the same shape.

    Raises:
        InputError: a video is no uint8 of four dimensions, is empty or smaller than a window, or the shapes differ.

    Source:
        Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment: From Error Visibility to Structural
        Similarity", IEEE Transactions on Image Processing 13(4), with its K1 = 0.01, K2 = 0.03, L = 255.
    """
    a, b = _pair(video, reference)
    if min(a.shape[1:3]) < _WINDOW:
        raise InputError(must("frames", f"be at least {_WINDOW} pixels high and wide", f"{a.shape[1]}x{a.shape[2]}"))
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    total = sum(float(_ssim_map(_planes(x), _planes(y), weights).mean()) for x, y in zip(a, b, strict=True))
    return total / len(a)


def _ssim_map(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """SSIM at every window of one frame, `[C, 1, H, W]` -> `[C, 1, H - 10, W - 10]`."""

    def blurred(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return luminance * (2 * covariance + _C2) / (var_x + var_y + _C2)


def _planes(frame: Tensor) -> Tensor:
    """`[H, W, C]` -> `[C, 1, H, W]` in fp64: variances are differences of squares of up to 255."""
    return frame.permute(2, 0, 1).unsqueeze(1).double()


def _pair(video: Any, reference: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors on one device, checked."""
    a, b = (_checked(name, value) for name, value in (("video", video), ("reference", reference)))
    if a.shape != b.shape:
        raise InputError(must("video", f"have the reference's shape {list(b.shape)}", list(a.shape)))
    return a, b.to(a.device)


def _checked(name: str, value: Any) -> Tensor:
    tensor = torch.from_numpy(np.require(value, requirements=["C", "W"])) if isinstance(value, np.ndarray) else value
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.ndim != 4:
        shape = list(getattr(tensor, "shape", ()))
        got = f"{getattr(tensor, 'dtype', type(value).__name__)} {shape}"
        raise InputError(must(name, "be a uint8 array or tensor [t, h, w, c]", got))
    if tensor.numel() == 0:
        raise InputError(must(name, "hold pixels", str(list(tensor.shape))))
    return tensor
