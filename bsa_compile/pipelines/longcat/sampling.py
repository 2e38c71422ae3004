"""Flow-matching samplers: schedules, guidance, and the loop over denoising steps.

Source of the schedules and of the sign of the prediction: the public LongCat-Video code; of the guidance:
"CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models" (arXiv 2503.18886).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bsa_compile.context import step

DISTILLED_GRID = 50
"""Timesteps that the distilled model knows: 50 even ones."""

REFINE_START = 0.5
"""Noise level at which the refinement starts."""

TAIL_START, TAIL_STEPS = 500.0, 10
"""Timestep below which `enhance_hf` takes even steps, and their number."""


def base_sigmas(steps: int) -> list[float]:
    """Even noise levels from 1 to 0.001."""
    return torch.linspace(1, 0.001, steps).tolist()


def distilled_sigmas(steps: int) -> list[float]:
    """Noise levels of a distilled run: `steps` of the 50 even levels 1, 0.98, ..., 0.02, spread evenly."""
    levels = [(DISTILLED_GRID - i) / DISTILLED_GRID for i in range(DISTILLED_GRID)]
    return [levels[i * DISTILLED_GRID // steps] for i in range(steps)]


def set_schedule(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Give noise levels to the scheduler, which shifts them as its configuration says."""
    scheduler.set_timesteps(len(sigmas), sigmas=list(sigmas), device="cpu")


def start_at(scheduler: Any, level: float = REFINE_START) -> None:
    """Start the schedule at a noise level: that level, then all of the schedule below it."""
    start = level * scheduler.config.num_train_timesteps
    below = [t for t in scheduler.timesteps.tolist() if t < start]
    _put_timesteps(scheduler, [start, *below])


def enhance_tail(scheduler: Any) -> None:
    """Replace what the schedule has from timestep 500 on by ten even steps (500, 450, ..., 50): finer details."""
    above = [t for t in scheduler.timesteps.tolist() if t > TAIL_START]
    tail = [TAIL_START * (TAIL_STEPS - i) / TAIL_STEPS for i in range(TAIL_STEPS)]
    _put_timesteps(scheduler, [*above, *tail])


def _put_timesteps(scheduler: Any, timesteps: Sequence[float]) -> None:
    # Attributes, because set_timesteps would shift levels that are shifted already.
    values = torch.tensor(timesteps, dtype=torch.float32)
    scheduler.timesteps = values
    scheduler.sigmas = torch.cat([values / scheduler.config.num_train_timesteps, torch.zeros(1)])


def cfg_zero_star(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guided prediction `s*u + g*(c - s*u)` with `s = <c, u> / |u|^2` for every sample.

    Args:
        cond, uncond: predictions with and without the prompt, `Float[Tensor, "b ..."]`.
        scale: g.

    Returns:
        Likewise.
    """
    flat_cond, flat_uncond = cond.flatten(1), uncond.flatten(1)
    share = (flat_cond * flat_uncond).sum(1) / (flat_uncond.square().sum(1) + 1e-8)
    base = uncond * share.view(-1, *[1] * (uncond.dim() - 1))
    return base + scale * (cond - base)


def denoise(
    scheduler: Any,
    latents: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    *,
    start: int = 0,
    after_step: Callable[[int, Tensor], None] = lambda done, latents: None,
) -> Tensor:
    """Run the scheduler's steps from `start` on.

    Args:
        scheduler: flow-match Euler with its schedule set.
        latents: noisy latents `Float32[Tensor, "b c t h w"]` at step `start`.
        predict: (latents, timestep 0..1000 as a scalar) -> the model's prediction, of the same shape.
        start: steps done already.
        after_step: told the number of steps done and the latents.

    Returns:
        The denoised latents.
    """
    timesteps = scheduler.timesteps
    scheduler.set_begin_index(start)
    for index in range(start, len(timesteps)):
        with step(index, len(timesteps)):
            prediction = predict(latents, timesteps[index])
        # The model predicts the flow from noise to data, the scheduler follows the one from data to noise.
        latents = scheduler.step(-prediction, timesteps[index], latents, return_dict=False)[0]
        after_step(index + 1, latents)
    return latents
