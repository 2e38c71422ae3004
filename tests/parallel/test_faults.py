"""Ranks that differ are told apart, and a rank that is lost ends the job: with one message that names it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bsa_compile.parallel.watch import EXIT_STATUS

from . import faults
from .pool import BACKEND, DEVICE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("what", ["policy", "checkpoint", "configuration", "options"])
def test_what_differs_is_refused_at_the_start(pool, what):
    messages = pool.run(3, faults.start, what, 2)
    assert len(set(messages)) == 1
    assert what in messages[0]
    assert "on rank 2" in messages[0]


@pytest.mark.parametrize("what", ["hidden_states", "num_cond_latents", "policy"])
def test_what_differs_in_a_call_is_refused(pool, what):
    messages = pool.run(3, faults.one_call, what, 1)
    assert len(set(messages)) == 1
    assert what in messages[0]
    assert "on rank 1" in messages[0]


def test_a_rank_that_does_not_call_is_named(pool):
    messages = pool.run(3, faults.absent, 1)
    assert messages[1] == "absent"
    for message in (messages[0], messages[2]):
        assert "make call 1 of the model, got nothing from rank 1 for 1.5 s" in message


def test_all_alike_pass(pool):
    assert pool.run(2, faults.start, "nothing", 1) == ["", ""]


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize(
    ("fault", "where"),
    [*((fault, "call") for fault in ("hang", "kill", "stop")), ("hang", "backward"), ("stop", "backward")],
)
def test_a_rank_lost_ends_the_job(tmp_path, fault, where):
    command = [sys.executable, "-m", "tests.parallel.faults", fault, where, str(tmp_path / "store")]
    began = time.monotonic()
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        _, said = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert time.monotonic() - began < 60
    lines = [line.removeprefix("[rank0]: ") for line in said.splitlines()]  # torch names the rank in tracebacks
    found = [line for line in lines if line.startswith(("bsa_compile:", "bsa_compile.errors."))]
    assert len(found) == 1, said
    (ours,) = found
    assert "rank 1" in ours
    if fault == "kill" and BACKEND == "gloo":  # the other's connection broke
        assert ranks[0].returncode == 1
        assert ranks[1].returncode == -signal.SIGKILL
        assert "ParallelError" in said
    else:
        assert ranks[0].returncode == EXIT_STATUS
        assert (" in _hang" if fault == "hang" else "no sign of life") in ours
        assert ("in a backward pass" if where == "backward" else "in a call of the model") in ours
