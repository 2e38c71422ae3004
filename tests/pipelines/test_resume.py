"""Jobs that are interrupted and go on to the same bits."""

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

from bsa_compile.errors import CheckpointError, UsageError
from bsa_compile.files import write_text
from bsa_compile.pipelines.longcat.progress import Progress, StepClock, clock, show_progress
from bsa_compile.pipelines.longcat.resume import JobFolder

ROOT = Path(__file__).resolve().parents[2]
JOB = {
    "prompt": "a red ball",
    "height": 32,
    "width": 48,
    "base_size": (16, 24),
    "num_frames": 5,
    "num_inference_steps": 3,
    "refine": True,
    "refine_steps": 4,
}
BASE = {name: value for name, value in JOB.items() if name not in ("refine", "base_size")}


class Stop(Exception):
    pass


def stopping(number, error):
    """A progress callback that interrupts the job at the n-th step of all stages."""
    steps = []

    def progress(now):
        if now is not None and now.total and now.done and now.what == "denoising":
            steps.append(now)
            if len(steps) == number:
                raise error

    return progress


@pytest.fixture(scope="module")
def whole(shared_pipe):
    return shared_pipe(**JOB).frames


@pytest.mark.parametrize(
    ("number", "error"), [*((n, KeyboardInterrupt) for n in range(1, 7)), (2, Stop), (3, Stop), (6, Stop)]
)
def test_an_interruption_at_any_step_changes_no_bit(pipe, whole, tmp_path, number, error):
    folder = tmp_path / "job"
    every = 1 if error is Stop else 100  # Ctrl-C keeps the last step by itself
    with pytest.raises(error):
        pipe(**JOB, checkpoint=folder, checkpoint_every=every, progress=stopping(number, error))
    result = pipe(**JOB, checkpoint=folder, resume=True)
    assert np.array_equal(result.frames, whole)
    base, refine = result.report["stages"]
    assert base["resumed_at_step"] == (number if number <= 3 else None)
    assert base["from_checkpoint"] == (number > 3)
    assert refine["resumed_at_step"] == (number - 3 if number > 3 else None)
    assert not folder.exists()


def test_checkpoints_come_every_few_steps(pipe, tmp_path):
    folder = tmp_path / "job"
    with pytest.raises(Stop):
        pipe(**BASE, checkpoint=folder, checkpoint_every=2, progress=stopping(2, Stop))
    assert JobFolder(folder, json.loads((folder / "job.json").read_text()), resume=True).latents(0)[0] == 2


def test_a_job_survives_several_interruptions(pipe, whole, tmp_path):
    folder = tmp_path / "job"
    for number in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            pipe(
                **JOB,
                checkpoint=folder,
                resume=number > 2,
                progress=stopping(number, KeyboardInterrupt),
            )
    assert np.array_equal(pipe(**JOB, checkpoint=folder, resume=True).frames, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "request.seed 0 instead of 3"),
        ({"prompt": "a blue ball"}, "request.prompt 'a red ball' instead of 'a blue ball'"),
        ({"policy": "dense"}, "policies"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused_and_stays(pipe, tmp_path, change, named):
    from bsa_compile import BSAPolicy

    folder = tmp_path / "job"
    with pytest.raises(Stop):
        pipe(**JOB, checkpoint=folder, checkpoint_every=1, progress=stopping(1, Stop))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    if "policy" in change:
        change = {"policy": BSAPolicy.dense()}
    with pytest.raises(CheckpointError, match="be a checkpoint of this job, got another") as caught:
        pipe(**{**JOB, **change}, checkpoint=folder, resume=True)
    assert named in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_other_weights_are_another_job(pipe, tmp_path):
    folder = tmp_path / "job"
    with pytest.raises(Stop):
        pipe(**JOB, checkpoint=folder, checkpoint_every=1, progress=stopping(1, Stop))
    weight = pipe.transformer.model.final_layer.linear.bias
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1
    try:
        with pytest.raises(CheckpointError, match=r"weights\.dit"):
            pipe(**JOB, checkpoint=folder, resume=True)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_users_lora_of_other_weights_is_another_job(pipe, tmp_path):
    def interrupt(scale, **options):
        with torch.no_grad():
            for p in pipe.transformer.lora_parameters("mine"):
                p.fill_(scale)
        pipe(**BASE, checkpoint=tmp_path / "job", checkpoint_every=1, progress=stopping(1, Stop), **options)

    pipe.transformer.add_lora("mine", 1)
    pipe.transformer.enable_loras(["mine"])
    try:
        with pytest.raises(Stop):
            interrupt(0.1)
        with pytest.raises(CheckpointError, match=r"be a checkpoint of this job, got another: loras"):
            interrupt(0.2, resume=True)
        with pytest.raises(Stop):
            interrupt(0.1, resume=True)
    finally:
        pipe.transformer.disable_all_loras()
        pipe.transformer.unload_lora("mine")


def test_without_resume_a_job_starts_anew(pipe, whole, tmp_path):
    folder = tmp_path / "job"
    with pytest.raises(Stop):
        pipe(**{**JOB, "seed": 9}, checkpoint=folder, checkpoint_every=1, progress=stopping(4, Stop))
    assert np.array_equal(pipe(**JOB, checkpoint=folder).frames, whole)


def test_resume_without_a_checkpoint(pipe, whole, tmp_path, caplog):
    with pytest.raises(UsageError, match="checkpoint must be given with resume"):
        pipe(**JOB, resume=True)
    assert np.array_equal(pipe(**JOB, checkpoint=tmp_path / "none", resume=True).frames, whole)
    assert "nothing to resume" in caplog.text


def test_damaged_and_foreign_files_are_refused(tmp_path):
    store = JobFolder(tmp_path, {"a": 1}, resume=True)
    store.put_latents(0, 1, torch.zeros(1))
    data = (tmp_path / "latents.safetensors").read_bytes()
    (tmp_path / "latents.safetensors").write_bytes(data[:20])
    with pytest.raises(CheckpointError, match="readable checkpoint"):
        JobFolder(tmp_path, {"a": 1}, resume=True)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "latents.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint of a generation"):
        JobFolder(tmp_path, {"a": 1}, resume=True)


def test_clearing_leaves_what_others_wrote(tmp_path):
    store = JobFolder(tmp_path, {}, resume=True)
    store.put_latents(0, 1, torch.zeros(1))
    (tmp_path / ".latents.safetensors.abc.tmp").mkdir()  # as a kill leaves it
    write_text(tmp_path / "mine.txt", "mine")
    store.clear()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_progress_tells_the_time_left():
    assert str(Progress("refine 2/3", 5, 6, "denoising", 3, 26, 125.4)) == "[5/6] refine 2/3: denoising 3/26, 2:05 left"
    assert str(Progress("base", 1, 2, "decoding")) == "[1/2] base: decoding ..."
    line = Progress("base", 1, 2, "denoising", 3, 12, 9).line(bar=8)
    assert line == "[1/2] base: denoising |##------| 3/12, 0:09 left"
    assert clock(3723) == "1:02:03"
    steps = StepClock()
    assert steps.tick(3)[1] is None  # the first step compiles
    assert steps.tick(2)[1] is not None


def test_a_terminal_shows_the_bar_in_one_line(monkeypatch, capsys):
    now = Progress("base", 1, 1, "denoising", 6, 12, 9)
    show_progress(now)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    show_progress(now)
    assert capsys.readouterr().err == "\r\x1b[K[1/1] base: denoising |##########----------| 6/12, 0:09 left"
    monkeypatch.setenv("COLUMNS", "12")
    show_progress(now)
    assert capsys.readouterr().err == "\r\x1b[K[1/1] base:"
    show_progress(None)
    assert capsys.readouterr().err == "\r\x1b[K"


def test_progress_covers_every_stage_and_ends(pipe):
    told = []
    pipe(**JOB, progress=told.append)
    assert told[-1] is None
    steps = [(p.number, p.of, p.stage, p.done, p.total) for p in told if p and p.total]
    assert steps == [(1, 2, "base", d, 3) for d in range(4)] + [(2, 2, "refine", d, 3) for d in range(4)]
    left = [p.seconds_left for p in told if p and p.stage == "base" and p.total]
    assert left[:2] == [None, None]
    assert left[-1] == 0


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from bsa_compile.pipelines.longcat import LongCatPipeline, LongCatPipelineConfig
config = LongCatPipelineConfig(compile_backend="eager")
pipe = LongCatPipeline.from_pretrained({model!r}, config, device="cpu")
def progress(now):
    if now is not None and now.total and now.done == 2:
        open({flag!r}, "w").close()
        time.sleep(600)
pipe(**{job!r}, checkpoint={folder!r}, checkpoint_every=1, progress=progress)
"""


def test_a_killed_process_is_continued_to_the_same_bits(pipe, folder, tmp_path):
    threads = torch.get_num_threads()
    job, flag = tmp_path / "job", tmp_path / "flag"
    code = CHILD.format(root=str(ROOT), model=str(folder), flag=str(flag), folder=str(job), job=BASE)
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not flag.exists():
            assert child.poll() is None, child.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    torch.set_num_threads(1)
    try:
        result = pipe(**BASE, checkpoint=job, resume=True)
        assert result.report["stages"][0]["resumed_at_step"] == 2
        assert np.array_equal(result.frames, pipe(**BASE).frames)
    finally:
        torch.set_num_threads(threads)
