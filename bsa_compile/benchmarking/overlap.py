"""How much of the time that GPUs spend in communication passes while they compute: from a profiler's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]

COMMUNICATION = "nccl"
"""In the name of every kernel of NCCL."""


def traced(call: Callable[[], Any]) -> dict[str, float]:
    """Run a call under the profiler and tell its kernels apart.

    Returns:
        As `shares`. A collective's time holds its wait for the other ranks.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    events = trace.events() or ()
    # A range that somebody named covers kernels and is none.
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return shares((e.name, (e.time_range.start, e.time_range.end)) for e in on_gpu)


def shares(kernels: Iterable[tuple[str, Span]]) -> dict[str, float]:
    """What of the communication is hidden behind other work.

    Args:
        kernels: name, and start and end in microseconds, of everything that ran on the GPU.

    Returns:
        Milliseconds: `communication_ms` in which a collective ran, `hidden_ms` of them in which something else ran
        too, and `work_ms` in which something else ran.
    """
    exchange: list[Span] = []
    work: list[Span] = []
    for name, span in kernels:
        (exchange if COMMUNICATION in name.lower() else work).append(span)
    exchange, work = union(exchange), union(work)
    hidden = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in exchange for b in work)
    return {
        "communication_ms": _length(exchange) / 1000,
        "hidden_ms": hidden / 1000,
        "work_ms": _length(work) / 1000,
    }


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times in spans that do not overlap, in order."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
