"""Telling how far a job is."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

_BAR = 20  # characters


@dataclass(frozen=True)
class Progress:
    """Where a job stands.

    Attributes:
        stage: its name, for example `base` or `refine 2/3`.
        number, of: the stage's number among all stages, from 1.
        what: what is being done.
        done, total: denoising steps of the stage; total is 0 outside the denoising loop.
        seconds_left: of the stage's denoising, None while unknown.
    """

    stage: str
    number: int
    of: int
    what: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None

    def __str__(self) -> str:
        return self.line()

    def line(self, bar: int = 0) -> str:
        """One line, with a bar of so many characters while denoising."""
        text = f"[{self.number}/{self.of}] {self.stage}: {self.what}"
        if not self.total:
            return f"{text} ..."
        full = bar * self.done // self.total
        drawn = f" |{'#' * full}{'-' * (bar - full)}|" if bar else ""
        left = "" if self.seconds_left is None else f", {clock(self.seconds_left)} left"
        return f"{text}{drawn} {self.done}/{self.total}{left}"


OnProgress = Callable[[Progress | None], None]
"""Called with the state of a job, and with None when it ends, well or not."""


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show_progress(progress: Progress | None) -> None:
    """One line on stderr, with a bar; nothing where stderr is no terminal."""
    if sys.stderr.isatty():
        text = "" if progress is None else progress.line(bar=_BAR)
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
        print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)


class StepClock:
    """Times of steps, and the time left: the first step is left out where others are known, because it compiles."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._last = time.perf_counter()

    def tick(self, left: int) -> tuple[float, float | None]:
        """A step has ended and `left` are to come: seconds that it took, and that the others will take."""
        now = time.perf_counter()
        self._times.append(now - self._last)
        self._last = now
        counted = self._times[1:]
        return self._times[-1], left * sum(counted) / len(counted) if counted else None
