"""The model against outputs of the official module, fp32, relative error 1e-5."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from longcat_cases import GOLDEN, relative_error
from safetensors.torch import load_file

from bsa_compile.models.longcat import attention

TOLERANCE = 1e-5


def call(model, io, name):
    """The call that the golden README names for `out.{name}` with batch 2."""
    args = (io["hidden_states"], io["timestep"], io["encoder_hidden_states"], io["encoder_attention_mask"])
    if name == "cond":
        return model(args[0], io["timestep.cond"], *args[2:], num_cond_latents=1)
    if name == "lora":
        model.load_lora(GOLDEN / "lora.safetensors", "golden")
        model.enable_loras(["golden"])
    if name == "plain.drop":
        model.config = dataclasses.replace(model.config, text_tokens_zero_pad=False)
    return model(*args)


@pytest.mark.parametrize("name", ["plain", "cond", "lora", "plain.drop"])
@torch.no_grad()
def test_batch_of_two_with_each_sample_on_its_own_text(model, io, name):
    expected = load_file(GOLDEN / "io_per_sample.safetensors")
    assert relative_error(call(model, io, name), expected[f"out.{name}"]) < TOLERANCE


@pytest.mark.parametrize("name", ["plain", "cond", "lora"])
@torch.no_grad()
def test_batch_of_two_as_recorded_in_the_golden_data(model, io, name, monkeypatch):
    """`io.safetensors` was recorded with a cross-attention over the texts of all samples (golden/make_per_sample.py).

    With the same fault put in here, all the rest must match.
    """
    per_sample = attention.CrossAttention.forward

    def over_all_samples(self, x, text, text_valid=None):
        return per_sample(self, x, text.flatten(0, 1).expand(x.shape[0], -1, -1), text_valid)

    assert relative_error(call(model, io, name), io[f"out.{name}"]) > 0.1
    model.disable_all_loras()
    model._loras.clear()
    monkeypatch.setattr(attention.CrossAttention, "forward", over_all_samples)
    assert relative_error(call(model, io, name), io[f"out.{name}"]) < TOLERANCE


@torch.no_grad()
def test_encoding_the_cache(model, io):
    x, y, mask = io["hidden_states"], io["encoder_hidden_states"], io["encoder_attention_mask"]
    out, kv = model(x[:1, :, :1], torch.zeros(1, 1), y[:1], mask[:1], return_kv=True, skip_crs_attn=True)
    assert relative_error(out, io["out.kv_encode"]) < TOLERANCE
    assert sorted(kv) == [0, 1]
    for i, (k, v) in kv.items():
        assert relative_error(k, io[f"kv.{i}.k"]) < TOLERANCE
        assert relative_error(v, io[f"kv.{i}.v"]) < TOLERANCE


@torch.no_grad()
def test_using_the_cache(model, io):
    x, y, mask = io["hidden_states"], io["encoder_hidden_states"], io["encoder_attention_mask"]
    cache = {i: (io[f"kv.{i}.k"], io[f"kv.{i}.v"]) for i in range(2)}
    out = model(x[:1, :, 1:], io["timestep.cond"][:1, 1:], y[:1], mask[:1], num_cond_latents=1, kv_cache_dict=cache)
    assert relative_error(out, io["out.kv_noise"]) < TOLERANCE
