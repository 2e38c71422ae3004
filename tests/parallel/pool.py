"""Processes that run a test's function as the ranks of a job; started once, used by many tests.

On the CPU with gloo; with `BSA_TEST_DEVICE=cuda` on the GPUs of this machine with NCCL, as many ranks as there are.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

DEVICE = os.environ.get("BSA_TEST_DEVICE", "cpu")
BACKEND = "nccl" if DEVICE == "cuda" else "gloo"
SIZE = 4
SECONDS = 90.0


class RankFailed(AssertionError):
    """A rank raised; its traceback is the message."""


class Pool:
    """`SIZE` processes, of which any number can form a job.

    Functions are given by name, so they must be at the top of a module. Each gets its rank's process group ready.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """What `function(*args)` returns on every rank.

        Raises:
            RankFailed: it raised on one of them, or took longer than `seconds` (then the processes are replaced).
        """
        if DEVICE == "cuda":
            import torch

            if torch.cuda.device_count() < ranks:
                pytest.skip(f"needs {ranks} GPUs")
        self._start()
        name = f"{function.__module__}:{function.__qualname__}"
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(ranks):
                self._workers[rank][1].send((name, args, rank, ranks, os.path.join(folder, "store"), seconds))
            deadline = time.monotonic() + seconds
            results, failures = [], []
            for rank in range(ranks):
                process, pipe = self._workers[rank]
                left = max(0.0, deadline - time.monotonic())
                try:
                    # A rank that failed leaves the others waiting for it: what it said matters, not that they wait.
                    answer = pipe.recv() if pipe.poll(3.0 if failures else left) else ("hang", f"rank {rank} hangs")
                except EOFError:
                    answer = ("gone", f"rank {rank} is gone, exit code {process.exitcode}")
                (results if answer[0] == "done" else failures).append(answer[1])
            if failures:
                self.close()
                raise RankFailed("\n".join(failures))
        return results

    def _start(self) -> None:
        if self._workers:
            return
        context = multiprocessing.get_context("spawn")
        for _ in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End the processes; the next `run` starts others."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join(10)
        self._workers = []


def _serve(pipe: Any) -> None:
    """The life of one process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What is compared is fp32; by default cuDNN's convolution, the patch embedding, is TF32.
    torch.backends.cudnn.allow_tf32 = False
    while True:
        try:
            name, args, rank, ranks, store, seconds = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            module, _, path = name.partition(":")
            function = getattr(importlib.import_module(module), path)
            from datetime import timedelta

            gpu = torch.device("cuda", rank) if DEVICE == "cuda" else None
            if gpu is not None:
                torch.cuda.set_device(gpu)
            dist.init_process_group(
                BACKEND,
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=seconds),
                device_id=gpu,
            )
            # A rank that left again before all are connected would break the connections still being made.
            dist.barrier()
            try:
                answer = ("done", function(*args))
            finally:
                dist.destroy_process_group()
                torch._dynamo.reset()
        except BaseException:
            answer = ("failed", f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send(answer)
