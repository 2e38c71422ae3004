"""Ends a job in which a rank is lost, and says which.

A rank that died or hangs leaves the others waiting in a collective, where no exception reaches them. So every rank has
a thread that shows where the rank stands, and looks where the others stand when its own has not moved on for long.

On a GPU a collective is enqueued at once, and it is the GPU that waits in it, maybe long after the call returned. There
a rank leaves a mark in the stream wherever it gets on, and has got on when the GPU has reached it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward

from .board import Board, named

BEATS = 10  # looks per timeout
EXIT_STATUS = 75
GRACE = 3.0  # seconds in which the others say what they see, before this rank's end breaks their connections


def _end(message: str) -> None:
    """The main thread waits in a collective and cannot be reached: only the process can be ended."""
    print(f"bsa_compile: {message}", file=sys.stderr, flush=True)
    atexit.register(os._exit, EXIT_STATUS)  # should another's end break the main thread's wait before this one's
    time.sleep(GRACE)
    os._exit(EXIT_STATUS)


Mark = Callable[[], bool]
"""Tells whether a device has got to a place in the work that it was given."""


def cuda_marks(device: torch.device) -> Callable[[], Mark | None]:
    """What makes a mark in the current stream of a GPU; None while the stream is recorded and not run."""

    def mark() -> Mark | None:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return None
            event = torch.cuda.Event()
            event.record()

        def reached() -> bool:
            with torch.cuda.device(device):  # a new thread is at GPU 0, and would make a context there
                return event.query()

        return reached

    return mark


class Watch:
    """Shows how far this rank is, and ends it when another one is lost.

    Args:
        board: where ranks show how far they are; its timeout is how long one may stand still inside a call.
        mark: makes a mark where the device's work has been given to it so far; None: it is done when it returns.
        end: what to do with the message; by default print it and end the process.
    """

    def __init__(
        self, board: Board, mark: Callable[[], Mark | None] | None = None, end: Callable[[str], Any] = _end
    ) -> None:
        self._board, self._mark, self._end = board, mark, end
        self._ahead: deque[tuple[Mark, str]] = deque()  # what the device has not reached yet, and in what it lies
        self._moves, self._inside, self._backward = 0, False, False
        self._moved = time.monotonic()
        # A rank that never shows anything counts as seen now: it may be lost before its first beat.
        self._seen = {rank: ("", self._moved) for rank in board.ranks if rank != board.rank}
        self._beats = 0
        self._spoke = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bsa_compile watch", daemon=True)
        self._thread.start()

    def move(self) -> None:
        """This rank has got on: every rank does so in the same places."""
        self._moves += 1
        self._moved = time.monotonic()
        make = self._mark  # the thread may take it away
        mark = None if make is None else make()
        if mark is not None:
            self._ahead.append((mark, self._stage))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While this rank may wait for others."""
        self._inside = True
        self.move()
        try:
            yield
        finally:
            self.move()
            self._inside = False

    def backward(self) -> None:
        """A backward pass has come to what the model returned; until its end this rank may wait for others."""
        self._backward = True
        self.move()
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self.move()
        self._backward = False

    def close(self) -> None:
        """End the thread."""
        self._stop.set()

    def lost(self) -> list[int]:
        """Ranks that gave no sign of life for a few beats, after waiting for one; none where all is said already."""
        time.sleep(6 * self._pause)  # its last beat may be seen late
        if self._spoke:
            return []
        now = time.monotonic()
        return [r for r, (_, since) in self._seen.items() if now - since > 3 * self._pause]

    @property
    def _stage(self) -> str:
        """In what this rank may wait for others, as far as its own thread has come."""
        return "a call of the model" if self._inside else "a backward pass"

    @property
    def _reached(self) -> int:
        """Moves up to which the device has come."""
        return self._moves - len(self._ahead)

    @property
    def _waits(self) -> bool:
        return self._inside or self._backward or bool(self._ahead)

    @property
    def _pause(self) -> float:
        return min(1.0, self._board.timeout / BEATS)

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            try:
                self._look()
            except Exception as exc:  # the store goes with the process that holds it
                end = time.monotonic() + GRACE  # which may be done, and this rank's GPU nearly
                while self._ahead and not (self._inside or self._backward) and time.monotonic() < end:
                    self._follow()
                    time.sleep(0.01)
                if self._waits and not self._stop.is_set():
                    self._end(f"the job's store cannot be reached any more, so the rank that holds it is lost: {exc}")
                self._leave_device()
                return

    def _look(self) -> None:
        self._follow()
        self._beats += 1
        self._board.show("beat", f"{self._beats} {self._moves} {self._reached} {_place(self._backward)}")
        now = time.monotonic()
        for rank, (seen, _) in self._seen.items():
            text = self._board.look("beat", rank)
            if text is not None and text != seen:
                self._seen[rank] = (text, now)
        timeout = self._board.timeout
        # A pass that an error ended has not told its end, so that is looked at, not believed.
        if self._backward and not _runs_backward():
            self._backward = False
        if self._waits and now - self._moved > timeout:
            self._spoke = True
            self._end(self._verdict(now))
            self._stop.set()

    def _follow(self) -> None:
        """See how far the device has got."""
        try:
            while self._ahead and self._ahead[0][0]():
                self._ahead.popleft()
                self._moved = time.monotonic()
        except RuntimeError:  # of a kernel: the main thread meets it where it waits for the device, and says it
            self._leave_device()

    def _leave_device(self) -> None:
        """Look no more at how far the device is."""
        self._mark = None
        self._ahead.clear()

    def _verdict(self, now: float) -> str:
        timeout = self._board.timeout
        stage = self._ahead[0][1] if self._ahead else self._stage
        waited = f"rank {self._board.rank} waited {now - self._moved:.0f} s in {stage}"
        silent = [r for r, (_, since) in self._seen.items() if now - since > min(timeout, 5 * self._pause)]
        if silent:
            return f"{waited}: {named(silent)} gave no sign of life and must have died or been stopped"
        shown = {r: text.split(maxsplit=3)[1:] for r, (text, _) in self._seen.items()}
        places = "; ".join(f"rank {r} is at {place}" for r, (_, _, place) in shown.items())
        # Those that are farthest behind: the others wait for them, though not in the same place, as a GPU is given work
        # ahead.
        far = {r: (int(moves), int(reached)) for r, (moves, reached, _) in shown.items()}
        here = (self._moves, self._reached)
        least = min(far.values(), default=here)
        behind = [r for r in far if far[r] == least < here]
        if behind:
            return f"{waited}: {named(behind)} hangs, or makes other calls: it did not get as far as this one; {places}"
        return f"{waited}: no rank gets on, all of them are alive; {places}"


def _place(backward: bool) -> str:
    """Where the main thread is, for people; in a backward pass, a thread of torch's engine if one runs Python."""
    frames = sys._current_frames()
    # A thread that others started is a dummy, and that only once it has asked who it is.
    own = {t.ident for t in threading.enumerate() if not isinstance(t, threading._DummyThread)}
    of_engine = [frame for ident, frame in frames.items() if ident not in own] if backward else []
    frame = of_engine[0] if of_engine else frames.get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _runs_backward() -> bool:
    """Whether a thread of this process waits for torch's engine."""
    for frame in sys._current_frames().values():
        here: Any = frame
        while here is not None:
            if here.f_code is _engine_run_backward.__code__:
                return True
            here = here.f_back
    return False
