"""`bsa-compile generate`, in process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bsa_compile import BSAPolicy
from bsa_compile.cli import main
from bsa_compile.pipelines.longcat import LongCatPipeline, LongCatPipelineConfig
from bsa_compile.pipelines.longcat.video import read_video, write_video

PROMPT = ["--prompt", "a red ball", "--device", "cpu", "--backend", "eager"]
SIZE = ["--height", "32", "--width", "48", "--num-frames", "5", "--num-inference-steps", "2"]

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, shared_pipe, folder):
    """The command's own loading, unless its settings are those of the pipeline that is loaded already."""
    load = LongCatPipeline.from_pretrained.__func__

    def from_pretrained(cls, path, config, **options):
        if path == folder and config == shared_pipe.config and options["torch_dtype"] is None:
            return shared_pipe
        return load(cls, path, config, **options)

    monkeypatch.setattr(LongCatPipeline, "from_pretrained", classmethod(from_pretrained))


def generate(folder, *arguments):
    return main(["generate", "--model", str(folder), *PROMPT, *SIZE, *map(str, arguments)])


def test_a_prompt_becomes_a_video_with_a_report(folder, tmp_path, capsys):
    out = tmp_path / "made" / "out.mp4"
    assert generate(folder, "--output", out, "--seed", 3, "--guidance-scale", 2) == 0
    frames, fps = read_video(out)
    assert frames.shape == (5, 32, 48, 3)
    assert fps == 15
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["request"]["seed"] == 3
    assert report["request"]["guidance_scale"] == 2
    stage = report["stages"][0]
    assert stage["steps"] == 2
    assert len(stage["step_seconds"]) == 2
    assert stage["peak_memory_bytes"] > 0
    assert stage["policy"]["enabled"] is False
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.json", "out.mp4"]
    said = capsys.readouterr().out
    assert said.startswith("base: 5 frames of 32x48; attention: dense (disabled), by the mixed strategy\n")
    assert "wrote" in said


def test_aliases_and_json(folder, tmp_path, capsys):
    out = tmp_path / "out.gif"
    arguments = ["--model-path", str(folder), "--output-path", str(out), "--json"]
    assert main(["generate", *arguments, *PROMPT, *SIZE]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(out)
    with Image.open(out) as gif:
        assert gif.n_frames == 5


def test_picture_and_video_tasks(folder, tmp_path, image, video):
    Image.fromarray(image).save(tmp_path / "in.png")
    write_video(tmp_path / "in.mp4", video, 15)
    assert generate(folder, "--task", "i2v", "--image", tmp_path / "in.png", "--output", tmp_path / "a.mp4") == 0
    given = ["--video", tmp_path / "in.mp4", "--num-cond-frames", 1]
    assert generate(folder, "--task", "continuation", *given, "--output", tmp_path / "b.mp4") == 0
    for name in ("a", "b"):
        assert len(read_video(tmp_path / f"{name}.mp4")[0]) == 5


def test_refined_and_distilled_under_a_policy_for_one_stage(folder, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"refine": BSAPolicy(sparsity=0.5, chunk_3d_shape_k=(4, 2, 2)).to_dict()}))
    out = tmp_path / "out.mp4"
    options = ["--refine", "--refine-steps", 2, "--distill", "--fps", 30, "--policy", policy]
    assert generate(folder, *options, "--output", out) == 0
    base, refine = json.loads(out.with_suffix(".json").read_text())["stages"]
    assert base["policy_source"] == "the mixed strategy"
    assert refine["policy_source"] == "the policy argument"
    assert refine["policy"]["sparsity"] == 0.5
    assert read_video(out)[1] == 30


@pytest.mark.parametrize("level", [None, "warning"])
def test_each_stage_logs_what_it_runs(folder, tmp_path, capsys, level):
    options = ["--refine", "--refine-steps", 2, "--output", tmp_path / "out.mp4"]
    assert generate(folder, *options, *(["--log-level", level] if level else [])) == 0
    said = capsys.readouterr().err
    if level:
        assert said == ""
        return
    base, refine = said.splitlines()
    assert base.startswith("bsa_compile: INFO: Block Sparse Attention (BSA) is off (base: 5 frames of ")
    assert refine.startswith("bsa_compile: INFO: Enabling Block Sparse Attention (BSA): sparsity=0.9375, ")
    assert refine.endswith("(refine: 5 frames of 32x48, by the mixed strategy)")


def test_ctrl_c_keeps_the_latents_and_resume_goes_on(folder, tmp_path, capsys, monkeypatch):
    from bsa_compile.pipelines.longcat import pipeline

    out, whole = tmp_path / "out.mp4", tmp_path / "whole.mp4"
    assert generate(folder, "--output", whole) == 0

    def interrupt(now):
        if now is not None and now.done == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "show_progress", interrupt)
        assert generate(folder, "--output", out) == 130
    assert not out.exists()
    assert "--resume" in capsys.readouterr().err
    assert generate(folder, "--output", out, "--resume", "--seed", 4) == 2
    assert "request.seed 0 instead of 4" in capsys.readouterr().err
    assert generate(folder, "--output", out, "--resume") == 0
    assert np.array_equal(read_video(out)[0], read_video(whole)[0])
    assert json.loads(out.with_suffix(".json").read_text())["stages"][0]["resumed_at_step"] == 1


def test_a_video_that_cannot_be_written_costs_nothing(folder, tmp_path, capsys, monkeypatch):
    from bsa_compile.pipelines.longcat import result

    def full(*arguments):
        raise OSError(28, "No space left on device", "out.mp4")

    out = tmp_path / "out.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(result, "write_video", full)
        assert generate(folder, "--output", out) == 2
    assert "No space left" in capsys.readouterr().err
    assert generate(folder, "--output", out, "--resume") == 0
    assert json.loads(out.with_suffix(".json").read_text())["stages"][0]["from_checkpoint"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.mp4"]


def test_low_memory_and_a_configuration_file(folder, tmp_path):
    config = LongCatPipelineConfig(compile_backend="eager", max_text_tokens=16)
    (tmp_path / "config.json").write_text(config.to_json())
    out = tmp_path / "out.mp4"
    assert generate(folder, "--low-memory", "--config", tmp_path / "config.json", "--output", out) == 0
    used = json.loads(out.with_suffix(".json").read_text())["config"]
    assert (used["low_memory"], used["max_text_tokens"], used["compile_backend"]) == (True, 16, "eager")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--output", "x.avi"], "must end in .mp4 or .gif"),
        (["--output", "x.mp4", "--height", "33"], "Nearest: 32 or 40"),
        (["--output", "x.mp4", "--task", "i2v"], "--image must be given for --task i2v"),
        (["--output", "x.mp4", "--video", "in.mp4"], "--video must be left out for --task t2v"),
        (["--output", "x.mp4", "--policy", "absent.json"], "--policy must be a readable JSON file"),
        (["--output", "x.mp4", "--config", "absent.json"], "must be a readable JSON file"),
        (["--output", "x.mp4", "--fps", "30"], "pass refine"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LongCatPipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    assert generate(folder, *arguments) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_its_parts_is_refused_in_one_error(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert generate(tmp_path / "empty", "--output", tmp_path / "out.mp4") == 2
    said = capsys.readouterr().err
    for part in ("tokenizer/", "text_encoder/", "vae/", "scheduler/", "dit/"):
        assert part in said
