"""`torchrun -m bsa_compile generate`: the video that one process makes, and a killed job goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bsa_compile.pipelines.longcat.video import read_video

from .pool import DEVICE

for library in ("diffusers", "transformers", "av"):
    pytest.importorskip(library)

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs 2 GPUs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.pipelines.support import write_model

    return write_model(tmp_path_factory.mktemp("longcat") / "model")


def start(folder, output, ranks, *arguments):
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "bsa_compile", "generate", "--model", str(folder), "--prompt", "a red ball"]
    command += ["--height", "48", "--width", "80", "--num-frames", "9", "--num-inference-steps", str(STEPS)]
    command += ["--device", DEVICE, "--dtype", "float32", "--backend", "eager", "--output", str(output)]
    command += [*map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out.mp4"
    finish(start(folder, output, 1))
    return read_video(output)[0]


def assert_same(frames, expected):
    """Here and there a byte is rounded the other way, which the codec spreads over its block."""
    assert frames.shape == expected.shape
    assert expected.std() > 10  # another video would be thousands of times as far away
    assert np.abs(frames.astype(int) - expected.astype(int)).mean() < 0.01


def test_two_ranks_make_the_video_of_one(folder, alone, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"shard_weights": True}))
    said = finish(start(folder, tmp_path / "out.mp4", 2, "--config", config))
    assert said.count("wrote") == 1
    frames = read_video(tmp_path / "out.mp4")[0]
    assert_same(frames, alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "out.json", "out.mp4"]


def test_a_killed_job_goes_on(folder, alone, tmp_path):
    output = tmp_path / "out.mp4"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"checkpoint_every": 2}))
    job = start(folder, output, 2, "--config", config)
    kept = tmp_path / "out.mp4.checkpoint" / "latents.safetensors"
    deadline = time.monotonic() + 90
    while not kept.exists() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    assert kept.exists()
    assert not output.exists()
    finish(start(folder, output, 2, "--config", config, "--resume"))
    (stage,) = json.loads(output.with_suffix(".json").read_text())["stages"]
    assert 0 < stage["resumed_at_step"] < STEPS
    frames = read_video(output)[0]
    assert_same(frames, alone)
    assert not kept.parent.exists()
