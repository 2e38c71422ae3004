"""What a generation gives back, and the figures about it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from os import PathLike
from typing import Any

import torch

import bsa_compile
from bsa_compile.files import write_text
from bsa_compile.pipelines.longcat.latents import Frames
from bsa_compile.pipelines.longcat.video import write_video
from bsa_compile.report import Report, Site


@dataclass(frozen=True)
class GenerationResult:
    """One video.

    Attributes:
        frames: uint8 `[T, H, W, 3]`.
        fps: frames per second.
        report: JSON object: the request, and for every stage its policy and who asked for it, the attention sites,
            seconds, effective sparsity and peak memory.
    """

    frames: Frames
    fps: int
    report: dict[str, Any]

    def save(self, path: str | PathLike[str]) -> None:
        """Write .mp4 (H.264) or .gif; the file is complete or not there.

        Raises:
            UsageError: the format is unknown, or nothing can be written there.
        """
        write_video(path, self.frames, self.fps)

    def save_report(self, path: str | PathLike[str]) -> None:
        """Write the report as JSON."""
        write_text(path, json.dumps(self.report, indent=2) + "\n")


class PeakMemory:
    """Peak memory in bytes since it was made: what tensors took on a GPU, or the process at its largest on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def stage_sites(report: Report, calls: Collection[tuple[Any, ...]]) -> list[Site]:
    """The self-attention sites of one stage, of a report over all that was compiled under its policy.

    Args:
        report: of the optimized model.
        calls: (role, grid of queries, grid of keys) that the stage makes; sites whose grid is not known belong to it.
    """

    def belongs(site: Site) -> bool:
        known = all(isinstance(n, int) for grid in (site.grid_q, site.grid_k) for n in grid or ("?",))
        return not known or (site.role, site.grid_q, site.grid_k) in calls

    return [site for site in report.sites if site.role != "cross" and belongs(site)]


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a result."""
    return {
        "bsa_compile": bsa_compile.__version__,
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """What of the machine decides the bits of a result."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "name": platform.machine(), "threads": torch.get_num_threads()}
