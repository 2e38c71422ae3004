"""The LongCat-Video pipeline: prompt, image or video in, frames out, with block-sparse refinement.

diffusers, transformers and PyAV (the extra `longcat`) are imported where they are used.
"""

from __future__ import annotations

from bsa_compile.pipelines.longcat.config import LongCatPipelineConfig, StageRule
from bsa_compile.pipelines.longcat.pipeline import LongCatPipeline
from bsa_compile.pipelines.longcat.result import GenerationResult

__all__ = ["GenerationResult", "LongCatPipeline", "LongCatPipelineConfig", "StageRule"]
