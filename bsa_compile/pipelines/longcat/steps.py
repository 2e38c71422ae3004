"""What happens after every denoising step: progress is told, and now and then the latents are kept."""

from __future__ import annotations

from torch import Tensor

from bsa_compile.pipelines.longcat.progress import OnProgress, Progress, StepClock
from bsa_compile.pipelines.longcat.request import Stage
from bsa_compile.pipelines.longcat.resume import JobFolder


class StepKeeper:
    """Follows the steps of one stage.

    Attributes:
        start: where the stage goes on, None at the beginning.
        total: steps of the stage, 0 before the first one.
        seconds: of every step run.
    """

    def __init__(
        self, store: JobFolder | None, index: int, every: int, stage: Stage, stages: int, tell: OnProgress
    ) -> None:
        self._store, self._index, self._every = store, index, every
        self._stage, self._stages, self._tell = stage, stages, tell
        self.start = store.latents(index) if store else None
        self.total = 0
        self.seconds: list[float] = []
        self._clock = StepClock()
        self._unsaved: tuple[int, Tensor] | None = None

    def begin(self, total: int) -> None:
        """The first step is about to run."""
        self.total = total
        self._clock = StepClock()
        self._say(self.start[0] if self.start else 0, None)

    def after(self, done: int, latents: Tensor) -> None:
        """So many steps are done."""
        seconds, left = self._clock.tick(self.total - done)
        self.seconds.append(seconds)
        self._unsaved = (done, latents)
        if done % self._every == 0 or done == self.total:
            self.save()
        self._say(done, left)

    def save(self) -> None:
        """Keep the last step, if it is not kept yet."""
        if self._store is not None and self._unsaved is not None:
            self._store.put_latents(self._index, *self._unsaved)
            self._unsaved = None

    def _say(self, done: int, left: float | None) -> None:
        self._tell(Progress(self._stage.name, self._index + 1, self._stages, "denoising", done, self.total, left))
