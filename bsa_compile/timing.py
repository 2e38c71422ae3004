"""Wall-clock time of a call: CUDA events on a GPU, `perf_counter` on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

R = TypeVar("R")


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls, in the order they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """JSON object: median, extremes and every single time, in seconds."""
        return {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "seconds": list(self.seconds),
        }


def timed(function: Callable[[], R], device: torch.device) -> tuple[float, R]:
    """Seconds until the work of one call is done on `device`, and what it returned."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result
    with torch.cuda.device(device):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        result = function()
        end_event.record()
        end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1000, result


def measure(function: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 1) -> Timing:
    """Time `repeats` calls after `warmup` calls that are not counted."""
    for _ in range(warmup):
        timed(function, device)
    return Timing(tuple(timed(function, device)[0] for _ in range(repeats)))
