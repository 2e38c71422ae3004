"""Distilling a dense teacher into a block-sparse student: the loss of one training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from bsa_compile.api import OptimizedModel
from bsa_compile.errors import InputError, UsageError, must
from bsa_compile.pipelines.longcat.sampling import cfg_zero_star

Model = Callable[..., Tensor]
"""Predicts the flow, called as `LongCatVideoTransformer3DModel.forward` is."""

_TIMESTEPS = 1000.0


def distillation_loss(
    student: Model,
    clean: Tensor,
    text: Tensor,
    text_mask: Tensor | None = None,
    *,
    teacher: Model | None = None,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_cond_latents: int = 0,
    guidance_scale: float = 1.0,
    negative_text: Tensor | None = None,
    negative_mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How far a block-sparse student's flow is from its dense teacher's, at noisy latents.

    The latents are `(1 - sigma) * clean + sigma * noise`. The teacher predicts their flow without gradients; the loss
    is the mean squared error of the student's prediction, in fp32. Gradients pass through block-sparse attention with
    the selection held fixed. What is trained is the caller's choice: the student's parameters, or a LoRA's alone.

    Args:
        student: a model made by `bsa_compile.optimize`, with block-sparse attention switched on; or what wraps one.
        clean: latents of training videos as the model reads them, `Float[Tensor, "b c t h w"]`.
        text: embeddings of their prompts, `Float[Tensor, "b 1 l c_text"]`.
        text_mask: `Tensor["b l"]`, nonzero where a token counts; None: all do.
        teacher: None: the student itself, dense and without the LoRAs that are trained. That teacher stands still while
            a LoRA is trained; where the student's own parameters are trained it moves with them, so give another model
            then. An optimized one is switched to dense meanwhile, any other is called as it is.
        sigma: noise levels in [0, 1], `Float[Tensor, "b"]`; by default drawn evenly. The refinement of LongCat-Video
            works at levels of at most 0.5.
        noise: like `clean`; by default drawn from the normal distribution.
        generator: of the draws, on the device of `clean`; by default torch's own.
        num_cond_latents: so many latent frames at the front are given: they stay clean, at timestep 0, and have no part
            in the loss.
        guidance_scale: of CFG-zero*, above 1: the target is the teacher's guided prediction, so that the student needs
            no guidance.
        negative_text, negative_mask: what guidance leads away from, like `text` and `text_mask`.
        reduction: `mean`, or `none` for the loss of every sample.

    Returns:
        `Float32[Tensor, ""]`, or `Float32[Tensor, "b"]`. Call `backward()` on it, or on a sum of several.

    Raises:
        UsageError: the student would run dense, there is no teacher, or an argument is out of range.
        InputError: a tensor has the wrong shape or dtype, or the teacher predicts another shape.

    Source:
        Flow matching as LongCat-Video was trained: the prediction is `clean - noise`, timesteps are 1000 * sigma.
        Guidance in the target: "On Distillation of Guided Diffusion Models" (arXiv 2210.03142).

    Example:
        >>> student = bsa_compile.optimize(model, BSAPolicy(sparsity=0.9375))
        >>> student.add_lora("sparse", rank=64)
        >>> student.enable_loras(["sparse"])
        >>> optimizer = torch.optim.AdamW(student.lora_parameters("sparse"), lr=1e-4)
        >>> distillation_loss(student, latents, text, mask).backward()
        >>> optimizer.step()
        >>> student.save_lora("sparse.safetensors", "sparse")
    """
    if isinstance(student, OptimizedModel) and not student._bsa_runtime.in_force.enabled:
        todo = "Give optimize an enabled policy, or call enable_bsa()."
        raise UsageError(must("student", "run block-sparse", "one that runs dense", todo))
    if teacher is None and not isinstance(student, OptimizedModel):
        todo = "Only a model made by bsa_compile.optimize can be its own dense teacher."
        raise UsageError(must("teacher", f"be given for a student of {type(student).__name__}", None, todo))
    if reduction not in ("mean", "none"):
        raise UsageError(must("reduction", "be mean or none", repr(reduction)))
    guided = _guided(guidance_scale, negative_text)
    _check_tensors(clean, sigma, noise, num_cond_latents)

    batch, frames = clean.shape[0], clean.shape[2]
    if sigma is None:
        sigma = torch.rand(batch, generator=generator, device=clean.device)
    if noise is None:
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    clean, noise, sigma = (x.to(clean.device, torch.float32) for x in (clean, noise, sigma))
    level = sigma[:, None].repeat(1, frames)  # [B, T]
    level[:, :num_cond_latents] = 0
    mix = level[:, None, :, None, None]
    noisy = (1 - mix) * clean + mix * noise

    def predict(model: Model, text: Tensor, mask: Tensor | None) -> Tensor:
        flow = model(noisy, level * _TIMESTEPS, text, mask, num_cond_latents=num_cond_latents)
        return flow[:, :, num_cond_latents:].float()

    with torch.no_grad(), ExitStack() as stack:
        dense = student if teacher is None else teacher
        if isinstance(dense, OptimizedModel):
            stack.enter_context(dense.bsa_disabled(quiet=True))
        if teacher is None:
            without: Any = getattr(student, "without_trainable_loras", None)
            if without is not None:
                stack.enter_context(without())
        target = predict(dense, text, text_mask)
        if guided:
            assert negative_text is not None
            target = cfg_zero_star(target, predict(dense, negative_text, negative_mask), guidance_scale)
    flow = predict(student, text, text_mask)
    if flow.shape != target.shape:
        raise InputError(must("teacher", f"predict what the student does, {list(flow.shape)}", list(target.shape)))
    loss = (flow - target).square().flatten(1).mean(1)  # [B]
    return loss if reduction == "none" else loss.mean()


def _guided(scale: Any, negative_text: Tensor | None) -> bool:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
        raise UsageError(must("guidance_scale", "be a finite number >= 0", repr(scale)))
    if (scale > 1) != (negative_text is not None):
        want = f"be {'given' if scale > 1 else 'left out'} with guidance_scale {scale:g}"
        got = "none" if negative_text is None else "one"
        raise UsageError(must("negative_text", want, got, "Guidance is what a scale above 1 does."))
    return scale > 1


def _check_tensors(clean: Tensor, sigma: Tensor | None, noise: Tensor | None, num_cond_latents: Any) -> None:
    if not isinstance(clean, Tensor) or clean.dim() != 5 or not clean.is_floating_point():
        got = f"{clean.dtype} {list(clean.shape)}" if isinstance(clean, Tensor) else type(clean).__name__
        raise InputError(must("clean", "be float latents [B, C, T, H, W]", got))
    cond = num_cond_latents
    if isinstance(cond, bool) or not isinstance(cond, int) or not 0 <= cond < clean.shape[2]:
        want = f"be an integer in 0..{clean.shape[2] - 1}, which leaves frames to predict"
        raise UsageError(must("num_cond_latents", want, repr(cond)))
    if noise is not None and noise.shape != clean.shape:
        raise InputError(must("noise", f"have the shape of clean, {list(clean.shape)}", list(noise.shape)))
    if sigma is not None:
        if sigma.shape != clean.shape[:1]:
            raise InputError(must("sigma", f"have shape [{clean.shape[0]}], one level per sample", list(sigma.shape)))
        if not bool(((sigma >= 0) & (sigma <= 1)).all()):
            todo = f"Timesteps are {_TIMESTEPS:g} times as large."
            raise UsageError(must("sigma", "lie in [0, 1]", sigma.tolist(), todo))
