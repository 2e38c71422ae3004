"""What determines the bits of a result, so that a checkpoint is never continued as another job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bsa_compile.errors import CheckpointError, must
from bsa_compile.pipelines.longcat import result
from bsa_compile.pipelines.longcat.config import LongCatPipelineConfig
from bsa_compile.pipelines.longcat.latents import Frames
from bsa_compile.pipelines.longcat.loading import Components, fingerprint
from bsa_compile.pipelines.longcat.request import GenerationRequest
from bsa_compile.pipelines.longcat.transformer import PipelineTransformer
from bsa_compile.policy import BSAPolicy

# Settings that change how a result is computed, and so its bits.
_DECISIVE = (
    "low_memory",
    "kv_cache",
    "enhance_hf",
    "max_text_tokens",
    "compile_backend",
    "compile_mode",
    "compile_options",
    "dynamic",
)


def identity(
    asked: GenerationRequest,
    policies: Iterable[BSAPolicy],
    given: Frames | None,
    given_fps: float,
    *,
    parts: Components,
    transformer: PipelineTransformer,
    config: LongCatPipelineConfig,
    device: torch.device,
) -> dict[str, Any]:
    """JSON object of everything that determines the bits of a job's result.

    Args:
        asked: the request.
        policies: of the stages.
        given: picture or video of the task, and `given_fps` its frames per second.
        parts, transformer: the model.
        config: the pipeline's.
        device: where it runs.

    Raises:
        CheckpointError: a LoRA's file cannot be read.
    """
    settings = config.to_dict()
    digest = hashlib.sha256()
    if given is not None:
        digest.update(f"{given.shape} {given_fps}".encode() + given.tobytes())
    weights = {
        "dit": fingerprint(transformer.state_dict()),
        "vae": fingerprint(parts.vae.state_dict()),
        "text_encoder": fingerprint(parts.text_encoder.state_dict()),
    }
    for name in asked.loras:
        weights[name] = _file_fingerprint(parts.loras[name])
    return {
        "request": asked.to_dict(),
        "given": digest.hexdigest()[:16] if given is not None else None,
        "policies": [policy.to_dict() for policy in policies],
        "config": {**{name: settings[name] for name in _DECISIVE}, "vae_tiling": config.tiles_vae},
        "scheduler": dict(parts.scheduler.config),
        "weights": weights,
        # The user's own, by what is in them: the same name may stand for other weights.
        "loras": [f"{key} {fingerprint(transformer.lora_state_dict(key))}" for key in transformer.active_loras],
        "dtype": str(transformer.dtype),
        "device": result.device_facts(device),
        "versions": result.versions(),
    }


def _file_fingerprint(path: Path) -> str:
    try:
        return fingerprint(load_file(path))
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(must(str(path), "be a readable safetensors file", f"an error: {exc}")) from exc
