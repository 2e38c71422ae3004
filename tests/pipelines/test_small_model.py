"""The small model: the one that comes with the package; and with random weights at a small size its defaults, its words
and the commands on it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from bsa_compile.cli import main
from bsa_compile.commands import common
from bsa_compile.commands.compare import default_mode
from bsa_compile.errors import CheckpointError
from bsa_compile.pipelines.longcat import LongCatPipeline, LongCatPipelineConfig
from bsa_compile.pipelines.longcat.defaults import DEFAULTS_NAME, GenerationDefaults
from bsa_compile.pipelines.longcat.prompts import TextEmbeds
from bsa_compile.pipelines.longcat.video import read_video
from bsa_compile.pipelines.small.judge import Verdict, judge

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

DEFAULTS = GenerationDefaults(height=32, width=40, num_frames=13, num_inference_steps=3, guidance_scale=2.0)
CPU = ["--device", "cpu", "--backend", "eager"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """As `examples/train_tiny.py` writes it."""
    from bsa_compile.pipelines.small import parts
    from bsa_compile.pipelines.small.autoencoder import SmallAutoencoder

    torch.manual_seed(0)
    dit = parts.new_dit()
    for block in dit.blocks:  # gates that start at zero would hide the attention
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    torch.nn.init.normal_(dit.final_layer.linear.weight, std=0.02)
    folder = tmp_path_factory.mktemp("small")
    parts.write_folder(folder, dit=dit, text_encoder=parts.new_text_encoder(), vae=SmallAutoencoder())
    (folder / DEFAULTS_NAME).write_text(json.dumps(DEFAULTS.to_dict()))
    return folder


@pytest.fixture
def shipped(small, monkeypatch):
    monkeypatch.setattr(common, "SMALL_MODEL", small)


@pytest.fixture(scope="module")
def pipe(small):
    return LongCatPipeline.from_pretrained(small, LongCatPipelineConfig(compile_backend="eager"), device="cpu")


def test_a_prompt_alone_becomes_a_video(shipped, tmp_path):
    out = tmp_path / "out.mp4"
    assert main(["generate", "--prompt", "a red ball rolls to the left over grass", "--output", str(out), *CPU]) == 0
    assert read_video(out)[0].shape == (13, 32, 40, 3)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["request"]["guidance_scale"] == 2.0
    assert report["stages"][0]["steps"] == 3
    assert report["stages"][0]["block_sparse_sites"]


def test_the_model_in_the_package_makes_what_the_caption_says(tmp_path):
    caption = "a yellow star moves up over wood"
    out = tmp_path / "out.gif"
    assert main(["generate", "--prompt", caption, "--num-inference-steps", "8", "--output", str(out), *CPU]) == 0
    frames, _ = read_video(out)
    assert frames.shape == (49, 192, 224, 3)
    assert judge(frames) == Verdict(colour="yellow", shape="star", motion="up")
    (stage,) = json.loads(out.with_suffix(".json").read_text())["stages"]
    assert stage["block_sparse_sites"] == 8
    assert stage["effective_sparsity"] > 0.9


def test_the_model_in_the_package_is_small_and_lies_where_a_wheel_takes_it_from():
    import bsa_compile

    folder = common.SMALL_MODEL
    assert folder.parent.parent == Path(bsa_compile.__file__).parent
    sizes = {path.parent.name: path.stat().st_size for path in folder.rglob("*.safetensors")}
    assert set(sizes) == {"dit", "text_encoder", "vae"}
    assert 6e6 < sizes["dit"] < 12e6


def test_without_the_model_one_error_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "SMALL_MODEL", tmp_path / "none")
    assert main(["generate", "--prompt", "a red ball", "--output", str(tmp_path / "out.mp4"), *CPU]) == 2
    assert "--model must be given where the package has no small model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_call_says_goes_over_the_defaults(pipe):
    asked = pipe.prepare("a red ball", height=48, width=56, num_inference_steps=5).request
    assert (asked.height, asked.width, asked.num_frames) == (48, 56, 13)
    assert (asked.num_inference_steps, asked.guidance_scale) == (5, 2.0)


def test_what_has_no_effect_is_said_once(shipped, tmp_path, capsys, caplog):
    extra = [
        "--negative-prompt",
        "a blue star",
        "--guidance-scale",
        "1",
        "--refine-steps",
        "9",
        "--num-cond-frames",
        "5",
    ]
    out = tmp_path / "out.gif"
    with caplog.at_level(logging.WARNING, logger="bsa_compile"):
        assert main(["generate", "--prompt", "a red ball", "--output", str(out), *extra, *CPU]) == 0
    said = [r.message for r in caplog.records if "no effect" in r.message]
    assert said == [
        "negative_prompt has no effect without guidance",
        "refine_steps has no effect without refine",
        "num_cond_frames has no effect without a continuation",
    ]


def test_the_steps_of_an_interrupted_run_are_not_discarded_unasked(shipped, tmp_path, capsys):
    out = tmp_path / "out.gif"
    kept = tmp_path / "out.gif.checkpoint" / "latents.safetensors"
    kept.parent.mkdir()
    kept.write_bytes(b"steps")
    assert main(["generate", "--prompt", "a red ball", "--output", str(out), *CPU]) == 2
    assert "Add --resume to go on, or delete it" in capsys.readouterr().err
    assert kept.read_bytes() == b"steps"
    assert not out.exists()


def test_a_picture_keeps_its_shape_at_the_defaults_area(pipe):
    wide = pipe.prepare("a red ball", task="i2v", image=Image.new("RGB", (200, 100))).request
    assert wide.width == pytest.approx(2 * wide.height, rel=0.2)
    assert wide.height * wide.width == pytest.approx(32 * 40, rel=0.2)


def test_words_that_the_model_does_not_know_are_named(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="bsa_compile"):
        pipe.encode_prompt("A red dragon, rolls over grass; quickly!")
    assert [r.message for r in caplog.records] == ["the model does not know 'dragon', 'quickly': ignored"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="bsa_compile"):
        text = pipe.encode_prompt("A RED ball, rolls to the left over grass.")
    assert caplog.records == []
    assert text.values.shape[2] == 24  # tokens that its tokenizer says, not the 512 of LongCat-Video


@pytest.mark.parametrize(
    ("small", "device", "backend", "mode"),
    [
        (True, "cuda", "inductor", "reduce-overhead"),
        (True, "cuda", "eager", None),
        (True, "cpu", "inductor", None),
        (False, "cuda", "inductor", None),
    ],
)
def test_compare_takes_cuda_graphs_where_launches_would_be_all_that_it_measures(small, device, backend, mode):
    assert default_mode(small, torch.device(device), backend) == mode


def test_compare_makes_both_videos_from_the_same_noise(shipped, tmp_path, capsys):
    out = tmp_path / "both"
    assert main(["compare", "--output", str(out), "--seed", "1", "--sparsity", "0.5", *CPU]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        *("block_sparse.gif", "dense.gif", "report.json", "side_by_side.mp4")
    ]
    assert read_video(out / "side_by_side.mp4")[0].shape == (13, 32, 88, 3)
    report = json.loads((out / "report.json").read_text())
    reports = report["reports"]
    assert [reports[side]["request"]["seed"] for side in ("dense", "block_sparse")] == [1, 1]
    assert reports["dense"]["stages"][0]["block_sparse_sites"] == 0
    assert reports["block_sparse"]["stages"][0]["policy"]["sparsity"] == 0.5
    assert report["speedup"] == report["dense"]["median_step_s"] / report["block_sparse"]["median_step_s"]
    assert 0 < report["ssim"] <= 1
    said = capsys.readouterr().out
    assert "13 frames of 32x40" in said
    assert f"PSNR {report['psnr_db']:.2f} dB" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--height", "33", "--width", "40"], "height must be"), (["--sparsity", "1.5"], "sparsity must be a number")],
)
def test_compare_refuses_before_it_loads(shipped, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(LongCatPipeline, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    assert main(["compare", "--output", str(tmp_path / "both"), *arguments, *CPU]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_compare_with_all_tiles_finds_no_difference(shipped, tmp_path, capsys):
    assert main(["compare", "--output", str(tmp_path), "--sparsity", "0", "--json", *CPU]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["psnr_db"] is None or report["psnr_db"] > 50  # None: infinite
    assert report["ssim"] > 0.999


def test_results_are_kept_from_the_next_replay_of_a_cuda_graph(small, monkeypatch):
    config = LongCatPipelineConfig(compile_mode="reduce-overhead")
    transformer = LongCatPipeline.from_pretrained(small, config, device="cpu").transformer
    returned = []

    def forward(latents, *args, return_kv=False, **kwargs):
        returned.append(torch.zeros_like(latents))
        return (None, {0: (returned[-1], returned[-1])}) if return_kv else returned[-1]

    monkeypatch.setattr(transformer, "forward", forward)
    latents, text = torch.randn(1, 16, 2, 4, 4), TextEmbeds(torch.randn(1, 1, 24, 64), torch.ones(1, 24))
    flow, cache = transformer.predict(latents, torch.tensor(500.0), text), transformer.encode(latents, text)
    for memory in returned:
        memory.fill_(1.0)  # as a replay would
    assert all(torch.equal(kept, torch.zeros_like(kept)) for kept in (flow, *cache[0]))


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory", [False, True])
def test_cuda_graphs_give_the_same_video(low_memory):
    given = Image.new("RGB", (56, 48), (200, 30, 40))
    asked = {"height": 48, "width": 56, "num_frames": 13, "num_inference_steps": 3, "guidance_scale": 1.5}
    videos = []
    for mode in (None, "reduce-overhead"):
        config = LongCatPipelineConfig(compile_mode=mode, low_memory=low_memory)
        pipe = LongCatPipeline.from_pretrained(common.SMALL_MODEL, config, device="cuda")
        for _ in range(2):  # recorded, replayed
            made = pipe("a red ball rolls to the left over grass", task="i2v", image=given, seed=0, **asked)
            videos.append(made.frames.astype(int))
    assert all(abs(video - videos[0]).mean() < 2 for video in videos[1:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_frames": 0}, "num_frames must be a positive integer, got 0"),
        ({"num_frames": 13.5}, "num_frames must be a positive integer, got 13.5"),
        ({"width": None}, "height and width must be given both or not at all"),
        ({"guidance_scale": "much"}, "guidance_scale must be a positive number"),
        ({"num_inference_steps": None}, "num_inference_steps must be a positive integer, got null"),
        ({"frames": 13}, "frames"),
    ],
)
def test_malformed_defaults_are_an_error(tmp_path, change, said):
    (tmp_path / DEFAULTS_NAME).write_text(json.dumps({**DEFAULTS.to_dict(), **change}))
    with pytest.raises(CheckpointError, match=said):
        GenerationDefaults.from_folder(tmp_path)


def test_defaults_of_a_folder_that_says_nothing_are_longcat_videos(tmp_path):
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    assert GenerationDefaults().num_frames == 93
    assert GenerationDefaults().size is None
