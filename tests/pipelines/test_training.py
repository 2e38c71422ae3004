"""The script that trains the small model: all its phases, stopped and resumed, up to a folder that makes videos."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bsa_compile.pipelines.longcat import LongCatPipeline, LongCatPipelineConfig

pytest.importorskip("diffusers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load("train_tiny")


@pytest.fixture
def few(script, monkeypatch):
    """The phases of `--smoke`, two steps each, of 9 frames."""
    monkeypatch.setattr(script.parts, "FRAMES", 9)
    monkeypatch.setattr(script, "STATISTICS_CLIPS", 2)
    monkeypatch.setattr(script, "VALIDATION_CLIPS", 2)
    monkeypatch.setattr(script, "WINDOW", 5)
    return tuple(dataclasses.replace(phase, steps=2) for phase in script.SMOKE)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_stops_goes_on_and_exports_a_model(script, few, tmp_path, device):
    calls = 0
    complete = False
    while not complete:
        calls += 1
        trainer = script.Trainer(tmp_path, torch.device(device), few, "eager")
        complete = trainer.run(minutes=0.0)  # a step, then stop
    assert calls == 2 * len(few)  # no phase is begun in what is left of another's time
    assert [entry["phase"] for entry in trainer.losses] == [phase.name for phase in few]
    assert trainer.losses == json.loads((tmp_path / "losses.json").read_text())
    assert all(math.isfinite(value) for entry in trainer.losses for key, value in entry.items() if key != "phase")
    assert {"validation_dense", "validation_block_sparse"} <= set(trainer.losses[-1])
    pytest.importorskip("matplotlib")
    picture = load("plot_losses")
    drawn = picture.figure(picture.read_phases(tmp_path / "losses.json"))
    assert [axes.get_title() for axes in drawn.axes] == [phase.name for phase in few[1:]]
    assert len(drawn.axes[-1].lines) == 3  # of single batches, and of both kinds of attention on unseen clips
    # Not begun anew: the optimizer has counted the steps of all calls.
    steps = {int(state["step"]) for state in trainer.optimizers["others"].state.values()}
    assert steps == {sum(phase.steps for phase in few if phase.policy is not None)}
    assert all(torch.isfinite(p).all() for p in trainer.average.parameters())

    config = LongCatPipelineConfig(compile_backend="eager")
    pipe = LongCatPipeline.from_pretrained(trainer.export(), config, device=device)
    made = pipe("a red ball rolls to the left over grass", height=48, width=56, num_frames=9, num_inference_steps=2)
    assert made.frames.shape == (9, 48, 56, 3)
    assert made.report["stages"][0]["block_sparse_sites"]


@pytest.mark.gpu
def test_recorded_losses_have_the_gradients_of_eager_ones(script, few, tmp_path):
    trainer = script.Trainer(tmp_path, torch.device("cuda"), few, "eager")
    layer = torch.nn.Linear(8, 8, device="cuda")
    parameters = list(layer.parameters())

    def compute(x):
        return {"loss": layer(x).square().mean(), "other": x.sum()}

    recorded = [trainer.recorded(compute, [layer], (torch.randn(4, 8, device="cuda"),)) for _ in range(2)]
    for step in range(6):
        x = torch.randn(4, 8, device="cuda")
        losses = recorded[step % 2](x)
        want = compute(x)
        torch.testing.assert_close(losses["other"], want["other"])
        torch.testing.assert_close(losses["loss"], want["loss"])
        got = torch.autograd.grad(losses["loss"], parameters)
        torch.testing.assert_close(got, torch.autograd.grad(want["loss"], parameters))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, got, strict=True):
                parameter -= 0.1 * gradient


@pytest.mark.gpu
def test_a_recorded_step_is_muons(script):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, device="cuda")

    starts = [draw(32, 48), draw(64, 16)]
    runs = {name: [torch.nn.Parameter(value.clone()) for value in starts] for name in ("eager", "recorded")}
    options = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = {name: torch.optim.Muon(parameters, **options) for name, parameters in runs.items()}
    recorded = None
    for step in range(6):
        rate = 0.01 / (1 + step)
        gradients = [draw(*value.shape) for value in starts]
        for name, parameters in runs.items():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizers[name].param_groups[0]["lr"] = rate
            if name == "recorded" and recorded is not None:
                recorded(rate)
            else:
                optimizers[name].step()
        if recorded is None:
            recorded = script.RecordedStep(optimizers["recorded"])
        torch.testing.assert_close(runs["recorded"], runs["eager"], rtol=1e-5, atol=1e-5)
        moved = [(now - start).abs().max() for now, start in zip(runs["eager"], starts, strict=True)]
        assert min(moved) > 1e-3  # what is compared is more than where they started
