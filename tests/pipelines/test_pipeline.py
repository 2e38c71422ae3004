"""Whole generations with tiny instances of the real classes."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bsa_compile import BSAPolicy
from bsa_compile.context import current_step
from bsa_compile.errors import CheckpointError, UsageError
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.pipelines.longcat import LongCatPipeline, LongCatPipelineConfig, StageRule, sampling

from .conftest import EAGER

SMALL = {"prompt": "a red ball", "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3}
LARGE = {**SMALL, "width": 96, "base_size": (16, 48), "refine": True, "refine_steps": 4}


@pytest.fixture
def watch(pipe, monkeypatch):
    """Every call of the DiT, and every latent that is decoded."""
    seen = SimpleNamespace(calls=[], decoded=[])
    forward, decode = pipe.transformer.forward, pipe._codec.decode

    def call(latents, timestep, text, mask=None, **options):
        seen.calls.append(
            SimpleNamespace(
                latents=latents,
                timestep=timestep,
                text=text,
                mask=mask,
                loras=pipe.transformer.active_loras,
                policy=pipe.transformer.policy,
                step=current_step(),
                **{"num_cond_latents": 0, "kv_cache_dict": None, "return_kv": False, **options},
            )
        )
        return forward(latents, timestep, text, mask, **options)

    monkeypatch.setattr(pipe.transformer, "forward", call)
    monkeypatch.setattr(pipe._codec, "decode", lambda x: seen.decoded.append(x) or decode(x))
    return seen


def reference_dit(folder, *loras):
    dit = LongCatVideoTransformer3DModel.from_pretrained(folder / "dit")
    for name in loras:
        dit.load_lora(folder / "lora" / f"{name}.safetensors", name)
    dit.enable_loras(loras)
    return dit


def embedded(folder, text):
    """UMT5's embeddings and the mask, straight from the libraries."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokens = AutoTokenizer.from_pretrained(folder / "tokenizer")(
        [text], padding="max_length", max_length=512, return_tensors="pt"
    )
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        return encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[:, None], tokens.attention_mask


@torch.no_grad()
def euler(flow, x, sigmas):
    """The sampler in float64: x <- x - (s_next - s) * flow(x, s)."""
    x = x.double()
    for now, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x - (after - now) * flow(x.float(), torch.tensor([1000 * now])).double()
    return x


def test_text_to_video_is_cfg_zero_star_over_even_sigmas(pipe, watch, folder):
    out = pipe(**SMALL, negative_prompt="blurry", guidance_scale=3.0, seed=5)
    assert out.frames.shape == (9, 32, 48, 3)
    assert out.frames.dtype == np.uint8
    assert out.fps == 15
    dit = reference_dit(folder)
    prompt, negative = embedded(folder, "a red ball"), embedded(folder, "blurry")

    def flow(x, t):
        c, u = (dit(x, t, *text).double() for text in (prompt, negative))
        star = (c * u).sum() / (u * u).sum()
        return u * star + 3.0 * (c - u * star)

    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(5))
    expected = euler(flow, noise, [1, 0.5005, 0.001])
    torch.testing.assert_close(watch.decoded[0].double(), expected, atol=2e-3, rtol=2e-3)
    assert [(c.step.index, c.step.total) for c in watch.calls] == [(0, 3), (1, 3), (2, 3)]


def test_a_distilled_run_has_its_lora_and_no_guidance(pipe, watch, folder):
    pipe(**{**SMALL, "num_inference_steps": 4}, distill=True)
    assert {call.loras for call in watch.calls} == {("cfg_step_lora",)}
    assert {len(call.text) for call in watch.calls} == {1}
    assert pipe.transformer.active_loras == ()
    dit, text = reference_dit(folder, "cfg_step_lora"), embedded(folder, "a red ball")
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = euler(lambda x, t: dit(x, t, *text), noise, sampling.distilled_sigmas(4))
    torch.testing.assert_close(watch.decoded[0].double(), expected, atol=2e-3, rtol=2e-3)


def test_official_step_counts(pipe):
    assert pipe.prepare("a").request.num_inference_steps == 50
    distilled = pipe.prepare("a", distill=True).request
    assert (distilled.num_inference_steps, distilled.guidance_scale) == (16, 1.0)
    assert pipe.prepare("a").request.guidance_scale == 4.0


def test_a_seed_repeats_and_another_differs(pipe):
    one, again, other = (pipe(**SMALL, seed=seed).frames for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_image_to_video_keeps_the_given_latent_and_runs_it_at_timestep_0(folder, image, pipe, watch, monkeypatch):
    monkeypatch.setattr(pipe, "config", dataclasses.replace(pipe.config, kv_cache=False))
    pipe(**SMALL, task="i2v", image=image)
    decoded = watch.decoded[0]
    for call in watch.calls:
        assert call.num_cond_latents == 1
        assert call.latents.shape[2] == 3
        assert torch.equal(call.timestep[:, 0], torch.zeros(2))
        assert (call.timestep[:, 1:] > 0).all()
        assert torch.equal(call.latents[0, :, :1], decoded[0, :, :1])
    pixels = pipe._codec.resized(image[None], 32, 48)
    with torch.no_grad():
        given = pipe._parts.vae.encode(pixels).latent_dist
    config = pipe._parts.vae.config
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    off = (decoded[:, :, :1] * std + mean - given.mean) / given.std
    assert off.abs().max() < 6  # a sample of what the VAE says of the picture


@pytest.mark.parametrize("task", ["i2v", "continuation"])
def test_cached_equals_uncached(folder, image, video, pipe, watch, task, monkeypatch):
    given = {"image": image} if task == "i2v" else {"video": video, "num_cond_frames": 5}
    pipe(**SMALL, task=task, **given)
    assert watch.calls[0].return_kv
    assert all(call.latents.shape[2] == 3 - call.num_cond_latents for call in watch.calls[1:])
    monkeypatch.setattr(pipe, "config", dataclasses.replace(pipe.config, kv_cache=False))
    pipe(**SMALL, task=task, **given)
    assert not watch.calls[-1].kv_cache_dict
    torch.testing.assert_close(*watch.decoded, atol=1e-3, rtol=1e-3)


def test_low_memory_gives_the_same_video_and_moves_what_is_not_needed(folder, video, pipe, watch):
    given = {"task": "continuation", "video": video, "num_cond_frames": 5}
    pipe(**SMALL, **given)
    lean = LongCatPipeline.from_pretrained(
        folder, LongCatPipelineConfig(compile_backend="eager", low_memory=True, vae_tiling=False), device="cpu"
    )
    moves = []
    names = {id(lean._parts.vae): "vae", id(lean._parts.text_encoder): "text", id(lean.transformer): "dit"}
    move = lean._placement._move
    lean._placement._move = lambda module, device: moves.append(names[id(module)]) or move(module, device)
    seen = []
    decode = lean._codec.decode
    lean._codec.decode = lambda x: seen.append(x) or decode(x)
    lean(**SMALL, **given)
    torch.testing.assert_close(watch.decoded[0], seen[0], atol=1e-3, rtol=1e-3)
    # Each visitor: the transformer leaves, the visitor comes and goes; then the transformer comes back to denoise.
    assert moves == ["dit", "text", "text", "dit", "vae", "vae", "dit", "dit", "vae", "vae"]


def test_offload_moves_text_encoder_and_vae_only(pipe, monkeypatch):
    moved = []
    monkeypatch.setattr(pipe._placement, "_move", lambda module, device: moved.append(module))
    pipe(**SMALL)
    kinds = [type(module).__name__ for module in moved]
    assert kinds == ["UMT5EncoderModel"] * 2 + ["PipelineTransformer"] + ["AutoencoderKLWan"] * 2


def test_a_tiled_vae_is_asked_for_by_low_memory(folder):
    for config, tiled in (({"low_memory": True}, True), ({}, False), ({"vae_tiling": True}, True)):
        lean = LongCatPipeline.from_pretrained(folder, LongCatPipelineConfig(**config), device="cpu")
        assert lean._parts.vae.use_tiling is tiled


def test_the_refinement_starts_from_the_stretched_video_at_one_half(pipe, watch):
    out = pipe(**LARGE)
    assert out.frames.shape == (9, 32, 96, 3)
    base, refine = out.report["stages"]
    assert (base["height"], base["width"]) == (16, 48)
    calls = [call for call in watch.calls if call.loras == ("refinement_lora",)]
    assert len(calls) == refine["steps"] == 3  # 0.5, and those of (1, .667, .334, .001) below
    np.testing.assert_allclose([float(c.timestep[0]) for c in calls], [500, 334, 1], atol=0.5)
    assert calls[0].latents.shape == (1, 16, 4, 4, 12)  # 3 latent frames, padded to 4
    assert {len(call.text) for call in calls} == {1}
    assert all(not c.policy.enabled for c in watch.calls[:3])
    assert all(c.policy.enabled for c in calls)


def test_the_refinement_of_a_picture_pads_given_and_noisy_frames_apart(pipe, watch, image):
    out = pipe(**LARGE, task="i2v", image=image)
    assert out.frames.shape == (9, 32, 96, 3)
    call = watch.calls[-1]
    assert call.num_cond_latents == 4
    assert call.latents.shape[2] == 8
    assert (call.timestep[0] == 0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("video_fps", [30, 15])
def test_refinement_in_time_makes_30_fps(pipe, watch, video, video_fps):
    out = pipe(**LARGE, task="continuation", video=video, video_fps=video_fps, num_cond_frames=5, fps=30)
    assert out.frames.shape == (18, 32, 96, 3)
    assert out.fps == 30
    assert watch.calls[-1].num_cond_latents == 4  # 10 frames are 4 latent ones


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distill": True},
        {"policy": BSAPolicy(chunk_3d_shape_q=(4, 4, 4), chunk_3d_shape_k=(4, 4, 8))},
        {"refine": True, "refine_steps": 2},
        {"refine": True, "refine_steps": 2, "base_size": (16, 16)},
        {"refine": True, "refine_steps": 2, "fps": 30},
        {"task": "i2v"},
    ],
    ids=lambda v: "-".join(v) or "plain",
)
@pytest.mark.parametrize("size", [(24, 40), (40, 24)], ids=str)
def test_the_result_has_the_size_that_was_asked_for(pipe, image, size, options):
    """Neither is a multiple of the patches' 16 pixels, nor of a tile's."""
    options = {**options, **({"image": image} if "task" in options else {})}
    asked = {**SMALL, "num_frames": 5, "num_inference_steps": 1, "height": size[0], "width": size[1]}
    out = pipe(**asked, **options)
    assert out.frames.shape == (10 if "fps" in options else 5, *size, 3)


def test_a_pipeline_from_a_folder_and_a_configuration(folder):
    """As the README of the pipeline has it; every stage's figures are in the report."""
    config = LongCatPipelineConfig(enable_bsa=True, bsa_params={"sparsity": 0.75}, compile_backend="eager")
    made = LongCatPipeline.from_pretrained(folder, config, device="cpu")
    out = made(prompt="a red ball", height=32, width=48, num_frames=5, num_inference_steps=1)
    assert out.frames.shape == (5, 32, 48, 3)
    (stage,) = out.report["stages"]
    assert stage["policy"]["sparsity"] == 0.75
    assert stage["block_sparse_sites"] == len(stage["sites"]) == 2
    assert stage["seconds"] > sum(stage["step_seconds"]) > 0
    assert stage["peak_memory_bytes"] > 0
    assert stage["effective_sparsity"] is not None


def test_a_long_video_continues_its_segments(pipe, watch):
    out = pipe(**SMALL, num_segments=3, num_cond_frames=5)
    assert out.frames.shape == (9 + 2 * 4, 32, 48, 3)
    one = pipe(**SMALL)
    assert np.array_equal(out.frames[:9], one.frames)
    assert [stage["name"] for stage in out.report["stages"]] == ["base 1/3", "base 2/3", "base 3/3"]
    first, second = watch.decoded[0], watch.decoded[1]
    assert not torch.equal(first[:, :, 2:], second[:, :, 2:])


def test_the_users_own_lora_stays_active_beside_the_stages(pipe, watch, folder):
    pipe.transformer.load_lora(folder / "lora" / "refinement_lora.safetensors", "mine")
    pipe.transformer.enable_loras(["mine"])
    try:
        pipe(**SMALL, distill=True)
        assert {call.loras for call in watch.calls} == {("mine", "cfg_step_lora")}
        assert pipe.transformer.active_loras == ("mine",)
    finally:
        pipe.transformer.disable_all_loras()
        pipe.transformer.unload_lora("mine")


# -- who runs block-sparse --------------------------------------------------------------------------------------------


def test_each_stage_runs_under_its_policy_and_says_so(pipe):
    base, refine = pipe(**LARGE).report["stages"]
    assert (base["block_sparse_sites"], base["dense_sites"]) == (0, 2)
    assert base["effective_sparsity"] is None
    assert (refine["block_sparse_sites"], refine["dense_sites"]) == (2, 0)
    assert refine["effective_sparsity"] == 0.5  # 1 of 2 tiles: at least one is kept
    assert refine["policy_source"] == "the mixed strategy"
    assert {site["role"] for site in refine["sites"]} == {"self"}


def test_every_stage_that_runs_block_sparse_says_so_in_the_log(pipe, caplog):
    with caplog.at_level(logging.INFO, "bsa_compile"):
        pipe(**LARGE)
        pipe(**SMALL, policy=BSAPolicy(sparsity=0.5))
    base, refine, other = (record.getMessage() for record in caplog.records)
    assert base == "Block Sparse Attention (BSA) is off (base: 9 frames of 16x48, by the mixed strategy)"
    assert refine.startswith("Enabling Block Sparse Attention (BSA): sparsity=0.9375, ")
    assert refine.endswith("(refine: 9 frames of 32x96, by the mixed strategy)")
    assert other.startswith("Enabling Block Sparse Attention (BSA): sparsity=0.5, ")
    assert other.endswith("(base: 9 frames of 32x48, by the policy argument)")


def test_a_policy_for_the_base_stage(pipe, watch):
    policy = BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(1, 2, 3), chunk_3d_shape_k=(1, 2, 3))
    stage = pipe(**SMALL, policy={"base": policy}).report["stages"][0]
    assert stage["block_sparse_sites"] == 2
    assert stage["effective_sparsity"] == pytest.approx(2 / 3)  # 1 of 3 tiles
    assert {call.policy for call in watch.calls} == {policy}


def test_the_run_time_switch_is_over_everything(pipe, watch):
    pipe.transformer.disable_bsa()
    refine = pipe(**LARGE, policy=BSAPolicy()).report["stages"][1]
    assert refine["block_sparse_sites"] == 0
    assert refine["policy_source"] == "disable_bsa()"
    assert refine["overruled"]
    pipe.transformer.enable_bsa()
    assert pipe(**SMALL).report["stages"][0]["block_sparse_sites"] == 2
    pipe.transformer.reset_bsa()
    assert pipe(**SMALL).report["stages"][0]["block_sparse_sites"] == 0


def test_the_switch_works_between_the_steps_of_a_stage(pipe, watch):
    def progress(now):
        if now is not None and now.done == 1:
            pipe.transformer.disable_bsa()

    pipe(**SMALL, policy=BSAPolicy(), progress=progress)
    runtime = pipe.transformer.model._bsa_runtime
    assert runtime.off


def test_dense_first_steps(pipe, watch):
    stage = pipe(**SMALL, policy=BSAPolicy(dense_steps=1)).report["stages"][0]
    reasons = {site["reason"] for site in stage["sites"]}
    assert reasons == {"rewritten", "rule"} or reasons == {"rewritten", "dense_step"}


def test_config_json_of_the_checkpoint_decides_where_nobody_else_does(tmp_path):
    from .support import write_model

    folder = write_model(tmp_path, enable_bsa=True, bsa_params={"sparsity": 0.75})
    loaded = LongCatPipeline.from_pretrained(folder, EAGER, device="cpu")
    assert [p.policy.sparsity for p in loaded.prepare(**LARGE).policies] == [0.75, 0.75]
    config = LongCatPipelineConfig(policies=(StageRule(policy=BSAPolicy.dense(), stage="base"),))
    chosen = LongCatPipeline.from_pretrained(folder, config, device="cpu").prepare(**LARGE)
    assert [p.policy.enabled for p in chosen.policies] == [False, True]
    assert "overrules enable_bsa: true of the checkpoint's config.json" in chosen.describe()[0]


# -- what is refused before anything runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt": " "}, "prompt must say something"),
        ({"prompt": ["a"]}, "prompt must be a text"),
        ({"task": "v2v"}, "task must be one of t2v, i2v, continuation"),
        ({"height": 33}, "Nearest: 32 or 40"),
        ({"width": None}, "given both or not at all"),
        ({"num_frames": 10}, "Nearest: 9 or 13"),
        ({"fps": 30}, "pass refine"),
        ({"fps": 24, "refine": True}, "15 or 30"),
        ({"task": "i2v"}, "image must be given"),
        ({"video": np.zeros((1, 2, 2, 3), np.uint8)}, "video must be left out"),
        ({"guidance_scale": 4.0, "distill": True}, "without guidance"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"seed": -1}, "seed must be"),
        ({"num_segments": 2, "num_cond_frames": 9}, "below num_frames"),
        ({"num_segments": 2, "num_cond_frames": 4}, "Nearest: 1 or 5"),
        ({"base_size": (16, 16)}, "with refine"),
        ({"task": "i2v", "image": np.zeros((4, 4, 3))}, "uint8"),
        ({"task": "continuation", "video": np.zeros((3, 8, 8, 3), np.uint8), "num_cond_frames": 5}, "at least 5"),
    ],
    ids=str,
)
def test_bad_calls_are_refused(pipe, watch, options, text):
    with pytest.raises(UsageError, match=text):
        pipe(**{**SMALL, **options})
    assert not watch.calls


def test_missing_pieces_are_named_in_one_error(folder, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "tokenizer")
    (copy / "vae" / "config.json").unlink()
    (copy / "text_encoder" / "model.safetensors").unlink()
    (copy / "lora" / "cfg_step_lora.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        LongCatPipeline.from_pretrained(copy, device="cpu", loras=("cfg_step_lora", "refinement_lora"))
    for piece in ("tokenizer/", "vae/config.json", "text_encoder/model.safetensors", "lora/cfg_step_lora"):
        assert piece in str(caught.value)
    assert "refinement_lora" not in str(caught.value)


def test_a_missing_lora_is_named_before_anything_runs(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("lora"))
    loaded = LongCatPipeline.from_pretrained(tmp_path / "model", EAGER, device="cpu")
    with pytest.raises(CheckpointError, match=r"cfg_step_lora.safetensors, lora/refinement_lora.safetensors"):
        loaded(**{**LARGE, "distill": True})


def test_missing_libraries_are_named_with_their_extra(folder, monkeypatch):
    import importlib.util

    from bsa_compile.errors import MissingExtraError

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("av", "ftfy") else find(name, *a)
    )
    with pytest.raises(MissingExtraError, match=r"av, ftfy must be installed.*bsa-compile\[longcat\]"):
        LongCatPipeline.from_pretrained(folder, device="cpu")


def test_parts_that_do_not_fit_are_refused(folder, tmp_path):
    import shutil

    from .support import dit_fields

    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "dit")
    LongCatVideoTransformer3DModel(**dit_fields(caption_channels=24)).save_pretrained(tmp_path / "model" / "dit")
    with pytest.raises(CheckpointError, match="text_encoder has 16, dit 24"):
        LongCatPipeline.from_pretrained(tmp_path / "model", device="cpu")


def test_prompts_are_cleaned_and_long_ones_warned_of(pipe, caplog):
    from bsa_compile.pipelines.longcat import prompts

    assert prompts.clean("  a &amp;amp; b\n\tc “d” ") == 'a & b c "d"'
    parts = pipe._parts
    text = prompts.encode(parts.tokenizer, parts.text_encoder, "red " * 20, 8, torch.float32)
    assert text.values.shape == (1, 1, 8, 16)
    assert "all after the first 8 are ignored" in caplog.text


def test_what_a_training_is_given_is_what_a_generation_reads(pipe, watch, image, video):
    pipe(**SMALL, task="i2v", image=image, seed=3)
    text = pipe.encode_prompt("", "a red ball")
    assert torch.equal(text.values, watch.calls[1].text)
    assert torch.equal(text.mask, watch.calls[1].mask)
    latents = [pipe.encode_video(video[:9], 32, 48, seed=seed) for seed in (3, 3, 4)]
    assert latents[0].shape == (1, 16, 3, 4, 6)
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    off = watch.decoded[0][:, :, :1] - pipe.encode_video(image[None], 32, 48)  # two samples of the same picture
    assert off.abs().mean() < 2


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda pipe, video: pipe.encode_prompt(), "texts must be texts, one or more"),
        (lambda pipe, video: pipe.encode_prompt(["a"]), "texts must be texts, one or more, got list"),
        (lambda pipe, video: pipe.encode_video(video[:8], 32, 48), "number of frames must be 1 .*Nearest: 5 or 9"),
        (lambda pipe, video: pipe.encode_video(video[:9], 33, 48), "height must be a multiple of 8"),
        (lambda pipe, video: pipe.encode_video(video[:9].astype(float), 32, 48), "frames must hold uint8 frames"),
    ],
)
def test_bad_input_of_a_training_is_refused(pipe, video, call, text):
    with pytest.raises(UsageError, match=text):
        call(pipe, video)
