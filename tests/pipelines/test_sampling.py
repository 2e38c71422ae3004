"""Schedules, guidance and the loop against the formulas, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bsa_compile.context import current_step
from bsa_compile.pipelines.longcat import sampling


@pytest.fixture
def scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_official_base_sigmas_are_even_from_1_to_0_001(steps):
    expected = [1 + (0.001 - 1) * i / max(steps - 1, 1) for i in range(steps)]
    np.testing.assert_allclose(sampling.base_sigmas(steps), expected, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 4, 16, 50])
def test_official_distilled_sigmas_are_levels_of_the_50_step_grid(steps):
    grid = np.arange(1, 51)[::-1] * 20 / 1000
    chosen = np.floor(np.linspace(0, 50, num=steps, endpoint=False)).astype(int)
    np.testing.assert_allclose(sampling.distilled_sigmas(steps), grid[chosen], atol=1e-12)


def test_official_distilled_run_has_16_steps_from_1():
    sigmas = sampling.distilled_sigmas(16)
    assert len(sigmas) == 16
    assert sigmas[0] == 1
    assert sigmas[1] == pytest.approx(0.94)  # floor(50 / 16) = 3 levels further
    assert sigmas[-1] == pytest.approx(0.08)


def test_official_refinement_starts_at_one_half_and_runs_the_schedule_below(scheduler):
    sampling.set_schedule(scheduler, sampling.base_sigmas(50))
    whole = scheduler.timesteps.tolist()
    sampling.start_at(scheduler)
    timesteps = scheduler.timesteps.tolist()
    assert timesteps[0] == 500
    assert timesteps[1:] == [t for t in whole if t < 500]
    assert len(timesteps) == 26
    np.testing.assert_allclose(scheduler.sigmas.tolist(), [*(t / 1000 for t in timesteps), 0], atol=1e-7)


def test_official_continuation_ends_in_ten_even_steps(scheduler):
    sampling.set_schedule(scheduler, sampling.base_sigmas(50))
    above = [t for t in scheduler.timesteps.tolist() if t > 500]
    sampling.enhance_tail(scheduler)
    assert scheduler.timesteps.tolist() == [*above, *np.linspace(500, 0, 10, endpoint=False).tolist()]
    assert scheduler.sigmas[-1] == 0


def test_a_shift_of_the_scheduler_is_applied_once():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampling.set_schedule(scheduler, sampling.base_sigmas(10))
    sigmas = torch.tensor(sampling.base_sigmas(10))
    shifted = (3 * sigmas / (1 + 2 * sigmas) * 1000).tolist()
    sampling.start_at(scheduler)
    np.testing.assert_allclose(scheduler.timesteps.tolist(), [500, *(t for t in shifted if t < 500)], rtol=1e-6)


def test_official_cfg_zero_star_projects_every_sample_by_itself():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, 2, 3, 2, 4, 5, generator=generator).unbind(0)
    guided = sampling.cfg_zero_star(cond, uncond, 4.0)
    for sample in range(2):
        c, u = cond[sample].double().numpy(), uncond[sample].double().numpy()
        star = (c * u).sum() / (u * u).sum()
        np.testing.assert_allclose(guided[sample].numpy(), u * star + 4 * (c - u * star), rtol=1e-4, atol=1e-5)


def test_cfg_zero_star_without_an_unconditional_flow_is_finite():
    cond = torch.ones(1, 2, 1, 2, 2)
    assert torch.equal(sampling.cfg_zero_star(cond, torch.zeros_like(cond), 4.0), 4 * cond)


def test_the_loop_follows_the_negated_prediction_in_euler_steps(scheduler):
    """x <- x + (s_next - s) * (-f(x, 1000 s)), in float64 with plain loops."""
    noise = torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    sigmas = sampling.base_sigmas(7)
    sampling.set_schedule(scheduler, sigmas)
    out = sampling.denoise(scheduler, noise, lambda x, t: torch.sin(x) * (t / 1000) + 0.1)
    x = noise.double()
    for now, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x + (after - now) * -(torch.sin(x) * now + 0.1)
    torch.testing.assert_close(out.double(), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_the_loop_goes_on_from_any_step_to_the_same_bits(scheduler, start):
    noise = torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = {0: noise}

    def run(latents, at, keep):
        sampling.set_schedule(scheduler, sampling.base_sigmas(4))
        return sampling.denoise(scheduler, latents, lambda x, t: torch.cos(x) + t / 1000, start=at, after_step=keep)

    whole = run(noise, 0, seen.__setitem__)
    assert torch.equal(run(seen[start], start, lambda done, latents: None), whole)


def test_every_step_is_told_to_the_policies(scheduler):
    seen = []
    sampling.set_schedule(scheduler, sampling.base_sigmas(3))
    sampling.denoise(scheduler, torch.zeros(1, 1, 1, 1, 1), lambda x, t: seen.append(current_step()) or x)
    assert [(s.index, s.total) for s in seen] == [(0, 3), (1, 3), (2, 3)]
    assert current_step() is None
