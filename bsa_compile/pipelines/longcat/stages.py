"""The two kinds of stages: from noise to a video, and from a small video to a large one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bsa_compile.pipelines.longcat import latents as lat
from bsa_compile.pipelines.longcat import sampling, sizes
from bsa_compile.pipelines.longcat.config import LongCatPipelineConfig
from bsa_compile.pipelines.longcat.latents import Frames, LatentCodec
from bsa_compile.pipelines.longcat.placement import Placement
from bsa_compile.pipelines.longcat.prompts import TextEmbeds, joined
from bsa_compile.pipelines.longcat.request import GenerationRequest, Stage
from bsa_compile.pipelines.longcat.transformer import PipelineTransformer


class Steps(Protocol):
    """Who follows a stage's steps.

    Attributes:
        start: steps done and noisy latents to go on from; None: the stage begins.
    """

    start: tuple[int, Tensor] | None

    def begin(self, total: int) -> None:
        """The first of the stage's `total` steps is about to run."""

    def after(self, done: int, latents: Tensor) -> None:
        """So many steps are done, and these are the noisy latents."""


@dataclass(frozen=True)
class StageRunner:
    """What the stages of one job share.

    Attributes:
        text: embeddings of the prompt.
        negative: of the negative prompt, None without guidance.
        say: told what is being done.
    """

    transformer: PipelineTransformer
    codec: LatentCodec
    scheduler: Any
    placement: Placement
    config: LongCatPipelineConfig
    request: GenerationRequest
    text: TextEmbeds
    negative: TextEmbeds | None
    say: Callable[[str], None]

    def run(self, stage: Stage, given: Tensor | None, small: Frames | None, steps: Steps) -> Frames:
        """Run one stage.

        Args:
            stage: which.
            given: its given frames `Float32[Tensor, "1 3 t_c h w"]` in [-1, 1], None if none are.
            small: the base stage's frames, for a refinement.
            steps: says where to go on, and is told of every step.

        Returns:
            The segment's frames, the given ones included.
        """
        if stage.kind == "base":
            self._base_schedule(stage)
            cond, noisy, cut = self._base_inputs(stage, given)
        else:
            sampling.set_schedule(self.scheduler, sampling.base_sigmas(self.request.refine_steps))
            sampling.start_at(self.scheduler)
            cond, noisy, cut = self._refine_inputs(stage, given, small if steps.start is None else None)
        done = 0
        if steps.start is not None:
            done, kept = steps.start
            noisy = kept.to(self.placement.device)
        assert noisy is not None
        with self.transformer.loras(stage.lora):
            self.placement.denoising()
            predict = self._predictor(stage, cond)
            steps.begin(len(self.scheduler.timesteps))
            noisy = sampling.denoise(self.scheduler, noisy, predict, start=done, after_step=steps.after)
        self.say("decoding")
        with self.placement.visiting(self.codec.vae):
            frames = self.codec.decode(noisy if cond is None else torch.cat([cond, noisy], dim=2))
        return frames[cut : cut + stage.num_frames]

    # -- what a stage starts from -------------------------------------------------------------------------------------

    def _base_schedule(self, stage: Stage) -> None:
        distill, steps = self.request.distill, self.request.num_inference_steps
        sigmas = sampling.distilled_sigmas(steps) if distill else sampling.base_sigmas(steps)
        sampling.set_schedule(self.scheduler, sigmas)
        continues = stage.num_cond_frames > 1
        if continues and self.config.enhance_hf and not distill:
            sampling.enhance_tail(self.scheduler)

    def _base_inputs(self, stage: Stage, given: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
        """Given latents, noise, and how many decoded frames to drop in front."""
        frames = sizes.latent_frames(stage.num_frames, self.codec.temporal)
        cond = None
        if given is not None:
            self.say("encoding what is given")
            cond = self._encoded(given, f"{stage.kind} {stage.segment} cond")
            frames -= cond.shape[2]
        shape = self.codec.shape(frames, stage.height, stage.width)
        noise = torch.randn(shape, generator=lat.generator_for(self.request.seed, f"base {stage.segment}"))
        return cond, noise.to(self.placement.device), 0

    def _refine_inputs(
        self, stage: Stage, given: Tensor | None, small: Frames | None
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Likewise, the noise mixed with the stretched video; without one, the noisy latents are known already."""
        label = f"refine {stage.segment}"
        padding = lat.Padding.of(stage.num_frames, stage.num_cond_frames, self.codec.temporal)
        noisy = cond = None
        if small is not None:
            self.say("encoding the base video")
            video = padding.apply(lat.upsampled(small, stage.num_frames, stage.height, stage.width))
            latents = self._encoded(video, f"{label} video")
            noise = torch.randn(latents.shape, generator=lat.generator_for(self.request.seed, label)).to(latents)
            latents = (1 - sampling.REFINE_START) * latents + sampling.REFINE_START * noise
            noisy = latents[:, :, padding.cond_latents :]
        if given is not None:
            self.say("encoding what is given")
            front = lat.repeated(given[:, :, :1], padding.front)
            cond = self._encoded(torch.cat([front, given], dim=2), f"{label} cond")
        return cond, noisy, padding.front

    def _encoded(self, pixels: Tensor, label: str) -> Tensor:
        with self.placement.visiting(self.codec.vae):
            return self.codec.encode(pixels, lat.generator_for(self.request.seed, label)).to(self.placement.device)

    # -- predictions --------------------------------------------------------------------------------------------------

    def _predictor(self, stage: Stage, cond: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The model's prediction for noisy latents, guided where the stage is."""
        transformer, text, negative = self.transformer, self.text, self.negative
        base = stage.kind == "base"
        cache = None
        if cond is not None and base and self.config.kv_cache:
            self.say("filling the KV cache")
            cache = transformer.encode(cond, text)
        if negative is None or not base:
            return lambda latents, t: transformer.predict(latents, t, text, cond=cond, cache=cache)
        both = joined(negative, text)

        def guided(latents: Tensor, t: Tensor) -> Tensor:
            if self.config.low_memory:
                uncond = transformer.predict(latents, t, negative, cond=cond, cache=cache)
                with_text = transformer.predict(latents, t, text, cond=cond, cache=cache)
            else:
                uncond, with_text = transformer.predict(latents, t, both, cond=cond, cache=cache).chunk(2)
            return sampling.cfg_zero_star(with_text, uncond, self.request.guidance_scale)

        return guided


AttentionCall = tuple[str, tuple[int, int, int], tuple[int, int, int]]
"""Role, grid of the queries, grid of the keys."""


def attention_calls(stage: Stage, codec: LatentCodec, patch: tuple[int, int, int], cached: bool) -> set[AttentionCall]:
    """The self-attention that the steps of a stage call: what of a report belongs to it.

    Args:
        stage: which.
        codec: knows the VAE's factors.
        patch: latent frames, rows and columns of a token.
        cached: whether base stages keep given frames in a KV cache.
    """
    rows, columns = (
        -(-side // (codec.spatial * size)) for side, size in zip((stage.height, stage.width), patch[1:], strict=True)
    )
    if stage.kind == "refine":
        padding = lat.Padding.of(stage.num_frames, stage.num_cond_frames, codec.temporal)
        cond = padding.cond_latents
        total = sizes.latent_frames(padding.front + stage.num_frames + padding.back, codec.temporal)
    else:
        cond = sizes.latent_frames(stage.num_cond_frames, codec.temporal) if stage.num_cond_frames else 0
        total = sizes.latent_frames(stage.num_frames, codec.temporal)
    whole = (total, rows, columns)
    if not cond:
        return {("self", whole, whole)}
    given = (cond, rows, columns)
    role = "cached" if cached and stage.kind == "base" else "noise"
    return {("cond", given, given), (role, (total - cond, rows, columns), whole)}
