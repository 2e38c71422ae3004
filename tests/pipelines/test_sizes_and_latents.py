"""Sizes, paddings, and the way between frames and latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bsa_compile.errors import UsageError
from bsa_compile.pipelines.longcat import latents as lat
from bsa_compile.pipelines.longcat import sizes


@pytest.mark.parametrize(
    ("aspect", "size"), [(480 / 832, (480, 832)), (832 / 480, (832, 480)), (1.0, (640, 640)), (704 / 1280, (480, 832))]
)
def test_base_sizes_have_the_trained_area(aspect, size):
    assert sizes.size_for(aspect, sizes.BASE_AREA, sizes.BASE_MULTIPLE) == pytest.approx(size, abs=32)


def test_official_default_sizes():
    assert sizes.size_for(sizes.DEFAULT_ASPECT, sizes.BASE_AREA, sizes.BASE_MULTIPLE) == (480, 832)
    assert sizes.size_for(sizes.DEFAULT_ASPECT, sizes.REFINE_AREA, sizes.REFINE_MULTIPLE) == (704, 1280)


def test_720x1280_is_refined_from_480x832():
    assert sizes.base_size_for(720, 1280, 8) == (480, 832)


def test_a_large_result_is_refined_from_the_trained_area():
    height, width = sizes.base_size_for(2160, 3840, 8)
    assert height * width == pytest.approx(sizes.BASE_AREA, rel=0.05)


@pytest.mark.parametrize("side", [8, 16, 720, 1080])
def test_any_multiple_of_the_vae_is_taken(side):
    assert sizes.check_side("height", side, 8) == side


@pytest.mark.parametrize(("side", "near"), [(721, "720 or 728"), (3, "8"), (15, "8 or 16")])
def test_other_sides_are_refused_with_the_nearest(side, near):
    with pytest.raises(UsageError, match=f"multiple of 8, got {side}. Nearest: {near}."):
        sizes.check_side("height", side, 8)


@pytest.mark.parametrize(("frames", "near"), [(94, "93 or 97"), (2, "1 or 5"), (96, "93 or 97")])
def test_other_frame_counts_are_refused_with_the_nearest(frames, near):
    with pytest.raises(UsageError, match=f"multiple of 4, got {frames}. Nearest: {near}."):
        sizes.check_frames("num_frames", frames, 4)


@pytest.mark.parametrize(
    ("frames", "cond", "latent_cond", "latent_total"),
    [
        (93, 0, 0, 24),  # 720p refinement at 15 fps
        (93, 1, 4, 28),  # of a picture
        (186, 0, 0, 48),  # at 30 fps
        (93, 13, 4, 24),
        (186, 26, 8, 48),
        (1, 0, 0, 4),
    ],
)
def test_official_paddings_of_the_refinement(frames, cond, latent_cond, latent_total):
    padding = lat.Padding.of(frames, cond, 4)
    padded = padding.front + frames + padding.back
    assert padding.cond_latents == latent_cond
    assert 1 + (padded - 1) // 4 == latent_total


@pytest.mark.parametrize("cond", [0, 1, 2, 5, 13, 26])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("latents", [8, 9, 10, 11, 24])
def test_padded_videos_decode_to_all_their_frames(cond, factor, latents):
    frames = (1 + 4 * (latents - 1)) * factor
    padding = lat.Padding.of(frames, cond, 4)
    encoded = 1 + (padding.front + frames + padding.back - 1) // 4
    decoded = 1 + 4 * (encoded - 1)
    assert padding.cond_latents % 4 == 0
    assert (encoded - padding.cond_latents) % 4 == 0
    assert decoded >= padding.front + frames


def test_padding_repeats_the_outer_frames():
    padding = lat.Padding.of(5, 1, 4)
    video = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 3, 5, 2, 2)
    padded = padding.apply(video)[0, 0, :, 0, 0].tolist()
    assert padded == [0.0] * padding.front + [0, 1, 2, 3, 4] + [4.0] * padding.back


def test_latents_are_normalised_by_the_vaes_statistics(pipe):
    codec, vae = pipe._codec, pipe._parts.vae
    pixels = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(pixels, torch.Generator().manual_seed(3))
    with torch.no_grad():
        raw = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
    shape = (1, 16, 1, 1, 1)
    mean, std = (torch.tensor(v).view(shape) for v in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(latents, (raw - mean) / std)
    assert latents.shape == codec.shape(2, 16, 24)
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample
    expected = ((decoded[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).round()
    assert np.abs(codec.decode(latents).astype(int) - expected.numpy()).max() <= 1


def test_frames_are_stretched_in_space_then_time():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    out = lat.upsampled(frames, 6, 8, 12)
    x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].double() / 255 * 2 - 1
    expected = F.interpolate(x, size=(6, 8, 12), mode="trilinear", align_corners=True)  # both steps are linear
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_draws_do_not_depend_on_each_other():
    draws = {label: torch.randn(4, generator=lat.generator_for(7, label)) for label in ("base 0", "base 1", "refine 0")}
    assert torch.equal(draws["base 0"], torch.randn(4, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(draws["base 1"], draws["refine 0"])
    assert not torch.equal(draws["base 1"], torch.randn(4, generator=lat.generator_for(8, "base 1")))
