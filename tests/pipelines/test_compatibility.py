"""Block-sparse attention with everything that it has to work with, through the real pipeline.

KV cache, LoRAs, the refinement, distilled runs, distillation, gradient checkpointing: each against what the fp64
reference computes in the place of the attention, or against the same thing done another way.
"""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bsa_compile import BSAPolicy
from bsa_compile.distillation import distillation_loss
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.pipelines.longcat import LongCatPipeline, sampling

from ..compile.support import CountCompiles, relative_error, run_reference
from .conftest import EAGER

SMALL = {"prompt": "a red ball", "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3}
LARGE = {**SMALL, "width": 96, "base_size": (16, 48), "refine": True, "refine_steps": 4}
# Tiles that do not divide the grids, and a selection that leaves most of them out.
POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 1, 2), chunk_3d_shape_k=(1, 2, 2))
STAGE_LORAS = ("cfg_step_lora", "refinement_lora")


def write_lora(dit, path, seed):
    """A LoRA on every block, as those of the released model are."""
    generator = torch.Generator().manual_seed(seed)
    dit.add_lora(path.stem, 2, generator=generator)
    with torch.no_grad():
        for p in dit.lora_parameters(path.stem):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    dit.save_lora(path, path.stem)


@pytest.fixture(scope="module")
def uniform(folder, tmp_path_factory):
    """The folder of all tests with LoRAs on every block, and two more."""
    path = tmp_path_factory.mktemp("uniform") / "model"
    shutil.copytree(folder, path)
    dit = LongCatVideoTransformer3DModel.from_pretrained(path / "dit")
    for seed, name in enumerate((*STAGE_LORAS, "style", "motion")):
        write_lora(dit, path / "lora" / f"{name}.safetensors", seed)
    return path


@pytest.fixture(scope="module")
def shared(uniform):
    return LongCatPipeline.from_pretrained(uniform, EAGER, device="cpu")


@pytest.fixture
def pipe(shared, uniform):
    """One pipeline with the user's LoRAs loaded; every test finds it with none of them active."""
    for name in ("style", "motion"):
        if name not in shared.transformer._loras:
            shared.transformer.load_lora(uniform / "lora" / f"{name}.safetensors", name)
    yield shared
    shared.transformer.reset_bsa()
    shared.transformer.disable_all_loras()
    shared.transformer.disable_gradient_checkpointing()


@pytest.fixture
def watch(pipe, monkeypatch):
    """Every call of the DiT with what it compiled, and every latent that is decoded."""
    seen = SimpleNamespace(calls=[], decoded=[])
    forward, decode = pipe.transformer.forward, pipe._codec.decode

    def call(latents, *arguments, **options):
        with CountCompiles() as compiles:
            out = forward(latents, *arguments, **options)
        seen.calls.append(
            SimpleNamespace(
                latents=latents,
                loras=pipe.transformer.active_loras,
                policy=pipe.transformer.policy,
                options=options,
                compiled=compiles.count,
            )
        )
        return out

    monkeypatch.setattr(pipe.transformer, "forward", call)
    monkeypatch.setattr(pipe._codec, "decode", lambda x: seen.decoded.append(x) or decode(x))
    return seen


def reference_flow(folder, pipe, *loras, policy=POLICY):
    """The flow of a fresh DiT with these LoRAs, its self-attention computed by the fp64 reference."""
    dit = LongCatVideoTransformer3DModel.from_pretrained(folder / "dit")
    for name in loras:
        dit.load_lora(folder / "lora" / f"{name}.safetensors", name)
    dit.enable_loras(loras)
    text = pipe.encode_prompt("a red ball")
    return lambda x, t: run_reference(dit, policy, x, t, text.values, text.mask)


@torch.no_grad()
def euler(flow, x, sigmas):
    for now, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x - (after - now) * flow(x, torch.tensor([1000 * now]))
    return x


def first_noise(seed=0):
    return torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


# -- KV cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["i2v", "continuation"])
def test_block_sparse_with_a_kv_cache_is_block_sparse_without(pipe, watch, image, video, task, monkeypatch):
    given = {"image": image} if task == "i2v" else {"video": video, "num_cond_frames": 5}
    cached = pipe(**SMALL, task=task, **given, policy=POLICY).report["stages"][0]
    assert watch.calls[0].options["return_kv"]
    assert all(call.options["kv_cache_dict"] for call in watch.calls[1:])
    monkeypatch.setattr(pipe, "config", dataclasses.replace(pipe.config, kv_cache=False))
    whole = pipe(**SMALL, task=task, **given, policy=POLICY).report["stages"][0]
    assert not watch.calls[-1].options["kv_cache_dict"]
    torch.testing.assert_close(*watch.decoded, atol=1e-3, rtol=1e-3)
    for stage, role in ((cached, "cached"), (whole, "noise")):
        assert {site["role"] for site in stage["sites"]} == {"cond", role}
        assert stage["dense_sites"] == 0
    pipe(**SMALL, task=task, **given)
    assert relative_error(watch.decoded[0], watch.decoded[2]) > 0.05  # of the dense model's: the policy has an effect


# -- LoRA -------------------------------------------------------------------------------------------------------------


def test_several_loras_and_the_stages_own_are_active_together(pipe, watch, uniform):
    pipe.transformer.enable_loras(["style", "motion"])
    pipe(**SMALL, distill=True, policy=POLICY)
    loras = ("style", "motion", "cfg_step_lora")
    assert {call.loras for call in watch.calls} == {loras}
    sigmas = sampling.distilled_sigmas(3)
    expected = euler(reference_flow(uniform, pipe, *loras), first_noise(), sigmas)
    torch.testing.assert_close(watch.decoded[0], expected, atol=2e-3, rtol=2e-3)
    without = euler(reference_flow(uniform, pipe, "style", "cfg_step_lora"), first_noise(), sigmas)
    assert relative_error(without, expected) > 0.05


def test_switching_loras_between_stages_compiles_once_for_each_set_and_grid(pipe, watch):
    def run(*mine, **options):
        pipe.transformer.enable_loras(mine)
        return pipe(**{**LARGE, **options}, policy={"refine": POLICY}).frames

    def videos():
        return [
            run(),
            run(distill=True),
            run("style"),
            run("motion", "style", distill=True),
            run("style", distill=True),
        ]

    first = videos()
    compiled: dict[tuple, int] = {}
    for call in watch.calls:
        key = (len(call.loras), call.policy, tuple(call.latents.shape))
        compiled[key] = compiled.get(key, 0) + call.compiled
    assert len(compiled) >= 8  # base of two batch sizes and refinement, each with several numbers of LoRAs
    assert set(compiled.values()) == {1}
    watch.calls.clear()
    again = videos()
    assert sum(call.compiled for call in watch.calls) == 0
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(first[1], first[4])


# -- refinement and distilled runs ------------------------------------------------------------------------------------


def test_the_block_sparse_refinement_is_that_of_the_reference(pipe, watch, uniform):
    base, refine = pipe(**LARGE, distill=True, policy={"refine": POLICY}).report["stages"]
    assert (base["block_sparse_sites"], refine["block_sparse_sites"], refine["dense_sites"]) == (0, 2, 0)
    assert 0.5 < refine["effective_sparsity"] < 0.8
    start = next(call.latents for call in watch.calls if call.loras == ("refinement_lora",))
    flow = reference_flow(uniform, pipe, "refinement_lora")
    expected = euler(flow, start, [0.5, 0.334, 0.001])
    torch.testing.assert_close(watch.decoded[-1], expected, atol=2e-3, rtol=2e-3)
    dense = euler(reference_flow(uniform, pipe, "refinement_lora", policy=None), start, [0.5, 0.334, 0.001])
    assert relative_error(dense, expected) > 0.02


def test_a_block_sparse_distilled_run_is_that_of_the_reference(pipe, watch, uniform):
    stage = pipe(**SMALL, distill=True, policy=POLICY).report["stages"][0]
    assert (stage["steps"], stage["block_sparse_sites"]) == (3, 2)
    assert {len(call.latents) for call in watch.calls} == {1}  # no second pass for guidance
    flow = reference_flow(uniform, pipe, "cfg_step_lora")
    expected = euler(flow, first_noise(), sampling.distilled_sigmas(3))
    torch.testing.assert_close(watch.decoded[0], expected, atol=2e-3, rtol=2e-3)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(pipe):
    """What a training step is given: latents that the VAE makes of videos, and embedded prompts."""
    frames = np.random.default_rng(5).integers(0, 256, (9, 40, 60, 3), dtype=np.uint8)
    clean = pipe.encode_video(frames, 32, 48)
    assert clean.shape == (1, 16, 3, 4, 6)
    text, negative = pipe.encode_prompt("a red ball"), pipe.encode_prompt("blurry")
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(6))
    return SimpleNamespace(
        args=(clean, text.values, text.mask),
        options={
            "noise": noise,
            "sigma": torch.tensor([0.7]),
            "guidance_scale": 3.0,
            "negative_text": negative.values,
            "negative_mask": negative.mask,
        },
    )


def test_a_lora_distilled_through_the_pipelines_transformer_makes_distilled_videos(uniform, tmp_path, batch):
    """Train block-sparse without guidance against dense with guidance, save, and generate with the file."""
    folder = tmp_path / "model"
    shutil.copytree(uniform, folder)
    student = LongCatPipeline.from_pretrained(folder, EAGER, device="cpu").transformer.model
    student.set_policy(POLICY)
    student.add_lora("sparse", 4, generator=torch.Generator().manual_seed(7))
    student.enable_loras(["sparse"])
    optimizer = torch.optim.Adam(student.lora_parameters("sparse"), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = distillation_loss(student, *batch.args, **batch.options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in student.parameters())  # a pipeline's weights are frozen
    student.save_lora(folder / "lora" / "cfg_step_lora.safetensors", "sparse")

    made = LongCatPipeline.from_pretrained(folder, EAGER, device="cpu")
    frames = made(**SMALL, distill=True, policy=POLICY).frames
    text = made.encode_prompt("a red ball")
    expected = euler(lambda x, t: student(x, t, text.values, text.mask), first_noise(), sampling.distilled_sigmas(3))
    off = frames.astype(int) - made._codec.decode(expected)
    assert np.abs(off).max() <= 1  # a value on the edge may be rounded the other way


def test_gradients_are_the_references_with_and_without_checkpointing(pipe, batch):
    student, dit = pipe.transformer.model, pipe._parts.dit
    student.set_policy(POLICY)
    student.add_lora("sparse", 2, generator=torch.Generator().manual_seed(8))
    student.enable_loras(["style", "sparse"])
    parameters = student.lora_parameters("sparse")

    def gradients(loss):
        loss.backward()
        found = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    clean, *text = batch.args
    negative = (batch.options["negative_text"], batch.options["negative_mask"])
    noisy, timestep = 0.3 * clean + 0.7 * batch.options["noise"], torch.tensor([700.0])
    try:
        dit.enable_loras(["style"])  # what is loaded is there for both, what is active is each one's own
        with torch.no_grad():
            target = sampling.cfg_zero_star(dit(noisy, timestep, *text), dit(noisy, timestep, *negative), 3.0)
        dit.enable_loras(["style", "sparse"])
        want = gradients((run_reference(dit, POLICY, noisy, timestep, *text) - target).square().mean())
    finally:
        dit.disable_all_loras()
    assert sum(g.abs().sum() for g in want) > 0
    for switch in (student.disable_gradient_checkpointing, student.enable_gradient_checkpointing):
        switch()
        got = gradients(distillation_loss(student, *batch.args, **batch.options))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-6)
