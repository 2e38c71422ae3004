"""`LongCatPipeline`: one call from a prompt to a video."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsa_compile.errors import UsageError, must
from bsa_compile.pipelines.longcat import prompts, request, result, sizes
from bsa_compile.pipelines.longcat.config import LongCatPipelineConfig
from bsa_compile.pipelines.longcat.given import check_given, stage_given, tail
from bsa_compile.pipelines.longcat.identity import identity
from bsa_compile.pipelines.longcat.latents import Frames, LatentCodec
from bsa_compile.pipelines.longcat.loading import Components, load_components
from bsa_compile.pipelines.longcat.placement import Placement
from bsa_compile.pipelines.longcat.policies import StagePolicy, as_argument, choose_policy
from bsa_compile.pipelines.longcat.progress import OnProgress, Progress, show_progress
from bsa_compile.pipelines.longcat.request import GenerationRequest, Stage
from bsa_compile.pipelines.longcat.result import GenerationResult, PeakMemory
from bsa_compile.pipelines.longcat.resume import JobFolder
from bsa_compile.pipelines.longcat.stages import StageRunner, attention_calls
from bsa_compile.pipelines.longcat.steps import StepKeeper
from bsa_compile.pipelines.longcat.transformer import PipelineTransformer
from bsa_compile.pipelines.longcat.video import as_frames
from bsa_compile.policy import BSAPolicy
from bsa_compile.report import effective_sparsity

log = logging.getLogger("bsa_compile")


@dataclass(frozen=True)
class Job:
    """A validated call, ready to run.

    Attributes:
        request: what is asked for.
        stages: the runs over denoising steps, in order.
        policies: what each of them runs under.
        argument: the call's policies by stage.
        given: picture or video of the task, at its own size.
        given_fps: frames per second of `given`.
    """

    request: GenerationRequest
    stages: tuple[Stage, ...]
    policies: tuple[StagePolicy, ...]
    argument: Mapping[str, BSAPolicy]
    given: Frames | None
    given_fps: float

    def describe(self) -> list[str]:
        """One line for every kind of stage: its size, and what runs there by whose word."""
        lines: dict[str, str] = {}
        for stage, policy in zip(self.stages, self.policies, strict=True):
            lines.setdefault(stage.kind, f"{stage.kind}: {stage.size}; attention: {policy.describe()}")
        return list(lines.values())


class LongCatPipeline:
    """LongCat-Video: text, picture or video in, video out.

    Attributes:
        transformer: the optimized DiT; `enable_bsa()` and `disable_bsa()` switch at run time.
        config: settings for all videos.

    Example:
        >>> pipe = LongCatPipeline.from_pretrained("LongCat-Video", device="cuda")
        >>> result = pipe(prompt="a red ball rolls over grass", refine=True, seed=42)
        >>> result.save("out.mp4")
    """

    def __init__(
        self, parts: Components, config: LongCatPipelineConfig | None = None, *, device: Any = "cpu", mesh: Any = None
    ) -> None:
        config = LongCatPipelineConfig() if config is None else config
        if not isinstance(config, LongCatPipelineConfig):
            raise UsageError(must("config", "be a LongCatPipelineConfig", type(config).__name__))
        self.config = config
        self.device = torch.device(device)
        self.transformer = PipelineTransformer(parts.dit, config, parts.loras, mesh)
        self._parts = parts
        self._mesh = mesh
        self._codec = LatentCodec(parts.vae)
        self._placement = Placement(self.device, config, self.transformer)
        if config.tiles_vae:
            parts.vae.enable_tiling()
        else:
            parts.vae.disable_tiling()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        config: LongCatPipelineConfig | None = None,
        *,
        device: torch.device | str | None = None,
        torch_dtype: torch.dtype | None = None,
        loras: tuple[str, ...] = (),
        mesh: Any = None,
    ) -> LongCatPipeline:
        """Load LongCat-Video's folder.

        Args:
            folder: with `tokenizer`, `text_encoder`, `vae`, `scheduler`, `dit` and, where they are used, `lora`.
            config: settings for all videos.
            device: where to compute; None: the GPU if there is one.
            torch_dtype: of all weights; None: bfloat16 on a GPU, float32 on a CPU.
            loras: names of LoRA files that must be there.
            mesh: GPUs that share the transformer's work, as in `bsa_compile.optimize`; every rank makes the same calls
                and gets the video, rank 0 keeps checkpoints.

        Raises:
            MissingExtraError: a library of the extra `longcat` is not installed.
            CheckpointError: pieces are missing (all named in one error), corrupt, or do not fit each other.
        """
        if config is not None and not isinstance(config, LongCatPipelineConfig):
            raise UsageError(must("config", "be a LongCatPipelineConfig", type(config).__name__))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if torch_dtype is None:
            torch_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        loading: dict[str, Any] = {}
        if mesh is not None and config is not None and config.shard_weights:
            from bsa_compile.parallel import load_sharded

            loading["load_dit"] = partial(load_sharded, mesh=mesh)
        parts = load_components(Path(folder), dtype=torch_dtype, device=device, loras=loras, **loading)
        return cls(parts, config, device=device, mesh=mesh)

    # -- calls --------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        progress: OnProgress | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Make one video.

        Args:
            prompt: what is to be seen.
            negative_prompt: what is not, for guidance.
            checkpoint: a folder to which latents are written every few steps and finished stages; removed at the end.
            checkpoint_every: steps between two of them; by default the configuration's.
            resume: go on from what is in `checkpoint`, to the same bits as without the interruption.
            progress: told how far the job is; by default a line on stderr where that is a terminal.
            **options: see `prepare`.

        Raises:
            UsageError: an argument is out of range, or two do not fit each other.
            CheckpointError: a LoRA is missing, or `checkpoint` belongs to another job.
        """
        job = self.prepare(prompt, negative_prompt, **options)
        return self.run(job, checkpoint=checkpoint, checkpoint_every=checkpoint_every, resume=resume, progress=progress)

    def prepare(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        task: str = "t2v",
        image: Any = None,
        video: Any = None,
        video_fps: float = request.BASE_FPS,
        policy: BSAPolicy | Mapping[str, BSAPolicy] | None = None,
        **options: Any,
    ) -> Job:
        """Validate a call and choose its policies; nothing runs.

        Args:
            prompt, negative_prompt: as in `__call__`.
            task: `t2v` (text to video), `i2v` (a picture becomes the first frame) or `continuation` (of a video).
            image: of i2v: a PIL image or uint8 `[H, W, 3]`.
            video: of continuation: uint8 `[T, H, W, 3]` or a list of pictures.
            video_fps: its frames per second.
            height, width: of the result in pixels; any that the VAE can take. By default the size that the model was
                trained at, in the shape of what is given.
            num_frames: frames at 15 per second of one segment, the given ones included: 1 + a multiple of 4.
            num_inference_steps: of the base stage; 50, or 16 with `distill`.
            guidance_scale: of CFG-zero*; 4, and none with `distill`. At most 1: no guidance.
            seed: of all noise, whatever the device.
            refine: make the video small and refine it to `height` x `width`.
            refine_steps: length of the schedule of which the refinement runs the part below t = 0.5.
            base_size: (height, width) before the refinement; by default in the ratio that the model was trained at.
            distill: the distilled model (`cfg_step_lora`): few steps, no guidance.
            fps: 15, or with `refine` 30: refine in time as well.
            num_segments: continue the video so often minus one; each one adds num_frames - num_cond_frames frames.
            num_cond_frames: frames that a continuation looks at: 1 + a multiple of 4.
            policy: what runs block-sparse, for all stages or for each (`base`, `refine`); over the configuration.

        Raises:
            UsageError, PolicyError: an argument is out of range, or two do not fit each other.
            CheckpointError: the model's folder lacks a LoRA that this needs.
        """
        given = check_given(task, image, video, video_fps)
        made = request.make_request(
            spatial=self._codec.spatial,
            temporal=self._codec.temporal,
            aspect=None if given is None else given.shape[1] / given.shape[2],
            defaults=self._parts.defaults,
            prompt=prompt,
            negative_prompt=negative_prompt,
            task=task,
            **options,
        )
        for line in request.without_effect(made, {"negative_prompt": negative_prompt, **options}):
            log.warning(line)
        self.transformer.check_loras(made.loras)
        if task == "continuation" and given is not None:
            tail(given, video_fps, request.BASE_FPS, made.num_cond_frames)  # refuses a video that is too short
        argument = as_argument(policy)
        stages = tuple(request.plan(made))
        policies = tuple(self._policy(stage, argument) for stage in stages)
        return Job(made, stages, policies, argument, given, float(video_fps))

    def run(
        self,
        job: Job,
        *,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
        keep_checkpoint: bool = False,
        progress: OnProgress | None = None,
    ) -> GenerationResult:
        """Run a prepared job; see `__call__`.

        With `keep_checkpoint` the finished stages stay in `checkpoint`, for a caller who has yet to save the result.
        """
        every = self.config.checkpoint_every if checkpoint_every is None else checkpoint_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(must("checkpoint_every", "be an integer >= 1", repr(every)))
        if resume and checkpoint is None:
            raise UsageError(must("checkpoint", "be given with resume", None))
        store = None if checkpoint is None else self._job_folder(Path(checkpoint), job, resume)
        if resume and store is not None and not store.found:
            log.warning("nothing to resume in %s: the job starts at the beginning", checkpoint)
        tell = show_progress if progress is None else progress
        try:
            outcome = self._run(job, store, every, tell)
        finally:
            tell(None)
        if store is not None and not keep_checkpoint:
            store.clear()
        return outcome

    # -- what a training is given -------------------------------------------------------------------------------------

    def encode_prompt(self, *texts: str) -> prompts.TextEmbeds:
        """Embed prompts as the transformer reads them, for a training.

        Returns:
            `values` `Float[Tensor, "b 1 l c"]` and `mask` `Int[Tensor, "b l"]` of the b prompts, on the device.

        Raises:
            UsageError: there is none, or one is no text.
        """
        for text in texts or (None,):
            if not isinstance(text, str):
                raise UsageError(must("texts", "be texts, one or more", type(text).__name__))
        return prompts.joined(*self._embedded(*texts))

    def encode_video(self, frames: Any, height: int, width: int, *, seed: int = 0) -> Tensor:
        """Latents of a video as the transformer reads them, for a training.

        Args:
            frames: uint8 `[T, H, W, 3]` or a list of pictures; T is 1 + a multiple of 4.
            height, width: pixels to resize to.
            seed: of the sample that the VAE gives.

        Returns:
            `Float32[Tensor, "1 c 1+(T-1)/4 height/8 width/8"]` on the device.

        Raises:
            UsageError: an argument is out of range.
        """
        found = as_frames(frames, "frames")
        sizes.check_frames("the number of frames", len(found), self._codec.temporal)
        for name, side in (("height", height), ("width", width)):
            sizes.check_side(name, side, self._codec.spatial)
        pixels = self._codec.resized(found, height, width)
        with self._placement.visiting(self._parts.vae):
            return self._codec.encode(pixels, torch.Generator().manual_seed(seed)).to(self.device)

    # -- one job ------------------------------------------------------------------------------------------------------

    def _run(self, job: Job, store: JobFolder | None, every: int, tell: OnProgress) -> GenerationResult:
        began = time.perf_counter()
        asked, total = job.request, len(job.stages)

        def sayer(number: int, name: str) -> Callable[[str], None]:
            return lambda what: tell(Progress(name, number, total, what))

        sayer(1, "text")("encoding the prompt")
        text, negative = self._texts(asked)
        text_seconds = time.perf_counter() - began
        made: dict[tuple[str, int], Frames] = {}
        reports = []
        for index, stage in enumerate(job.stages):
            stage_began, memory = time.perf_counter(), PeakMemory(self.device)
            # Asked anew: enable_bsa() or disable_bsa() may have been called since.
            policy = self._policy(stage, job.argument)
            frames = store.frames(index) if store else None
            kept = frames is not None
            steps = StepKeeper(store, index, every, stage, total, tell)
            if frames is None:
                self.transformer.use(policy.policy, f"{stage.name}: {stage.size}, {policy.by}")
                say = sayer(index + 1, stage.name)
                runner = StageRunner(
                    self.transformer,
                    self._codec,
                    self._parts.scheduler,
                    self._placement,
                    self.config,
                    asked,
                    text,
                    negative,
                    say,
                )
                given = stage_given(self._codec, asked, stage, job.given, job.given_fps, made)
                try:
                    frames = runner.run(stage, given, made.get(("base", stage.segment)), steps)
                except KeyboardInterrupt:
                    steps.save()
                    raise
                if store is not None:
                    store.put_frames(index, frames)
            made[stage.kind, stage.segment] = frames
            seconds = time.perf_counter() - stage_began
            reports.append(self._stage_report(stage, policy, steps, kept, seconds, memory.bytes()))
        last = job.stages[-1].kind
        overlap = [s.num_cond_frames if s.segment else 0 for s in job.stages if s.kind == last]
        video = np.concatenate([made[last, segment][drop:] for segment, drop in enumerate(overlap)])
        report = {
            "request": asked.to_dict(),
            "versions": result.versions(),
            "device": result.device_facts(self.device),
            "dtype": str(self.transformer.dtype).removeprefix("torch."),
            "config": self.config.to_dict(),
            "frames": list(video.shape),
            "fps": asked.fps,
            "text_seconds": text_seconds,
            "seconds": time.perf_counter() - began,
            "stages": reports,
        }
        return GenerationResult(video, asked.fps, report)

    def _texts(self, asked: GenerationRequest) -> tuple[prompts.TextEmbeds, prompts.TextEmbeds | None]:
        if not asked.guided:
            return self._embedded(asked.prompt)[0], None
        text, negative = self._embedded(asked.prompt, asked.negative_prompt)
        return text, negative

    def _embedded(self, *texts: str) -> list[prompts.TextEmbeds]:
        parts, dtype = self._parts, self.transformer.dtype
        longest = min(self.config.max_text_tokens, parts.tokenizer.model_max_length)
        with self._placement.visiting(parts.text_encoder):
            found = [prompts.encode(parts.tokenizer, parts.text_encoder, text, longest, dtype) for text in texts]
            return [text.to(self.device) for text in found]

    def _policy(self, stage: Stage, argument: Mapping[str, BSAPolicy]) -> StagePolicy:
        return choose_policy(
            stage.kind,
            stage.height,
            stage.width,
            stage.num_frames,
            switched=self.transformer.switched,
            argument=argument,
            config=self.config,
            checkpoint=self.transformer.checkpoint,
        )

    def _job_folder(self, folder: Path, job: Job, resume: bool) -> JobFolder:
        who = identity(
            job.request,
            (policy.policy for policy in job.policies),
            job.given,
            job.given_fps,
            parts=self._parts,
            transformer=self.transformer,
            config=self.config,
            device=self.device,
        )
        if self._mesh is None:
            return JobFolder(folder, who, resume=resume)
        from bsa_compile.parallel.launch import first_then_others, is_main

        who["ranks"] = self._mesh.size()
        # The others find what the first one left: an earlier job's files, or none.
        return first_then_others(lambda: JobFolder(folder, who, resume=resume or not is_main(), writes=is_main()))

    def _stage_report(
        self, stage: Stage, policy: StagePolicy, steps: StepKeeper, kept: bool, seconds: float, peak: int
    ) -> dict[str, Any]:
        calls = attention_calls(stage, self._codec, self.transformer.config.patch_size, self.config.kv_cache)
        sites = [] if kept else result.stage_sites(self.transformer.report, calls)
        return {
            **dataclasses.asdict(stage),
            "policy": policy.policy.to_dict(),
            "policy_source": policy.source,
            "overruled": list(policy.overruled),
            "from_checkpoint": kept,
            "resumed_at_step": steps.start[0] if steps.start else None,
            "steps": steps.total,
            "seconds": seconds,
            "step_seconds": steps.seconds,
            "effective_sparsity": effective_sparsity(sites),
            "block_sparse_sites": sum(site.rewritten for site in sites),
            "dense_sites": sum(not site.rewritten for site in sites),
            "sites": [site.to_dict() for site in sites],
            "peak_memory_bytes": peak,
        }
