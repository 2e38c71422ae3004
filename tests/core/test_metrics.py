"""PSNR and SSIM against the formulas, window by window."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsa_compile.errors import InputError
from bsa_compile.metrics import psnr, ssim


def slow_psnr(a, b):
    squares = [(int(x) - int(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)]
    error = sum(squares) / len(squares)
    return math.inf if error == 0 else 20 * math.log10(255) - 10 * math.log10(error)


def slow_ssim(a, b):
    """Equations 13 to 16 of the paper, with sums over each window of each channel of each frame."""
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    frames, height, width, channels = a.shape
    for t in range(frames):
        for c in range(channels):
            for i in range(height - 10):
                for j in range(width - 10):
                    x, y = (v[t, i : i + 11, j : j + 11, c].astype(float) for v in (a, b))
                    mx, my = (window * x).sum(), (window * y).sum()
                    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                    cov = (window * (x - mx) * (y - my)).sum()
                    up = (2 * mx * my + c1) * (2 * cov + c2)
                    found.append(up / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return sum(found) / len(found)


@st.composite
def videos(draw):
    """Two videos: unrelated, alike up to noise, flat, or the same."""
    shape = (*(draw(st.integers(low, low + 4)) for low in (1, 11, 11)), draw(st.sampled_from([1, 3])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "near", "flat", "same", "negative"]))
    a = rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "noise":
        return a, rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "near":
        return a, np.clip(a.astype(int) + rng.integers(-9, 10, shape), 0, 255).astype(np.uint8)
    if kind == "flat":
        return np.full(shape, rng.integers(256), np.uint8), np.full(shape, rng.integers(256), np.uint8)
    return a, a.copy() if kind == "same" else 255 - a


@given(videos())
def test_they_are_what_the_formulas_say(pair):
    a, b = pair
    assert psnr(a, b) == pytest.approx(slow_psnr(a, b), rel=1e-12)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)


def test_known_values():
    black, white = np.zeros((2, 16, 16, 3), np.uint8), np.full((2, 16, 16, 3), 255, np.uint8)
    one_off = black + np.uint8(1)
    assert psnr(black, one_off) == pytest.approx(20 * math.log10(255))  # 48.13 dB
    assert psnr(black, white) == pytest.approx(0)
    assert ssim(black, white) == pytest.approx(6.5025 / (255**2 + 6.5025))  # C1 / (255^2 + C1): structure is the same
    half = black.copy()
    half[0] = 1  # one of two frames is off by one: half of the squared error
    assert psnr(half, black) == pytest.approx(20 * math.log10(255) + 10 * math.log10(2))


def test_the_same_video_is_perfect():
    video = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    assert psnr(video, video) == math.inf
    assert ssim(video, video) == pytest.approx(1, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_arrays_and_tensors_of_any_strides_are_alike():
    a, b = np.random.default_rng(0).integers(0, 256, (2, 2, 12, 14, 3), dtype=np.uint8)
    b.setflags(write=False)
    turned = torch.from_numpy(a.copy()).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert psnr(turned, b) == psnr(a, torch.from_numpy(b.copy())) == psnr(a[::-1], b[::-1])
    assert ssim(turned, b) == ssim(a, b) == ssim(torch.from_numpy(a.copy()), b[::-1][::-1])


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("video", "reference", "text"),
    [
        (np.zeros((1, 12, 12, 3)), np.zeros((1, 12, 12, 3)), r"video must be a uint8 .* got torch.float64 \[1, 12"),
        (np.zeros((12, 12, 3), np.uint8), np.zeros((1, 12, 12, 3), np.uint8), r"got torch.uint8 \[12, 12, 3\]"),
        ([[1]], np.zeros((1, 12, 12, 3), np.uint8), "got list"),
        (np.zeros((1, 12, 12, 3), np.uint8), np.zeros((2, 12, 12, 3), np.uint8), r"the reference's shape \[2, 12, 12"),
        (np.zeros((0, 12, 12, 3), np.uint8), np.zeros((0, 12, 12, 3), np.uint8), "hold pixels"),
    ],
)
def test_what_cannot_be_compared_is_refused(metric, video, reference, text):
    with pytest.raises(InputError, match=text):
        metric(video, reference)


def test_frames_smaller_than_a_window_have_no_ssim():
    small = np.zeros((1, 10, 40, 3), np.uint8)
    with pytest.raises(InputError, match=r"at least 11 pixels high and wide, got 10x40"):
        ssim(small, small)
    assert psnr(small, small) == math.inf
