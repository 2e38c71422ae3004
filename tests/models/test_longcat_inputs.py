"""Inputs and configs that must be refused, and with which words."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from longcat_cases import tiny_inputs, tiny_model

from bsa_compile.errors import InputError, UsageError
from bsa_compile.models.longcat import LongCatConfig, LongCatVideoTransformer3DModel


def cache_of(tokens=30, batch=2, heads=2, dim=16, index=0):
    return {index: (torch.zeros(batch, heads, tokens, dim), torch.zeros(batch, heads, tokens, dim))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 6, 10)}, r"hidden_states must have shape \[B, 4, T, H, W\]"),
        ({"hidden_states": torch.zeros(2, 5, 5, 6, 10)}, r"hidden_states must have shape .*got \(2, 5, 5, 6, 10\)"),
        ({"hidden_states": torch.zeros(2, 4, 0, 6, 10)}, "hidden_states must have shape .*>= 1"),
        ({"hidden_states": torch.zeros(2, 4, 5, 6, 10).long()}, "hidden_states must be a float tensor"),
        ({"timestep": torch.tensor(1.0)}, r"timestep must have shape \[B\] or \[B, T\]"),
        ({"timestep": torch.zeros(1)}, "timestep must have shape"),
        ({"timestep": torch.zeros(2, 4)}, r"timestep .*got \(2, 4\) for hidden_states \(2, 4, 5, 6, 10\)"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 8)}, r"encoder_hidden_states must have shape \[B, 1, L, 8\]"),
        ({"encoder_hidden_states": torch.zeros(2, 1, 7, 9)}, "encoder_hidden_states must have shape"),
        ({"encoder_hidden_states": torch.zeros(3, 1, 7, 8)}, "encoder_hidden_states must have shape"),
        ({"encoder_hidden_states": torch.zeros(2, 2, 7, 8)}, "encoder_hidden_states must have shape"),
        ({"encoder_attention_mask": torch.ones(2, 6)}, r"encoder_attention_mask must have shape \[B, L\]"),
        ({"encoder_attention_mask": torch.ones(2, 1, 7)}, "encoder_attention_mask must have shape"),
        ({"num_cond_latents": -1}, "num_cond_latents must be at least 0, got -1"),
        ({"num_cond_latents": 6}, "num_cond_latents must be at most the number of latent frames given, got 6 of 5"),
        ({"num_cond_latents": 1.0}, "num_cond_latents must be an integer"),
        ({"num_cond_latents": True}, "num_cond_latents must be an integer"),
        ({"kv_cache_dict": cache_of()}, r"num_cond_latents must be the number of cached .*Pass num_cond_latents\."),
        ({"kv_cache_dict": cache_of(45), "num_cond_latents": 2}, r"kv_cache_dict\[0\]\.k must hold .*45 tokens for 2"),
        ({"kv_cache_dict": cache_of(batch=3), "num_cond_latents": 2}, "batch 1 or that of hidden_states, got 3"),
        ({"kv_cache_dict": cache_of(heads=4), "num_cond_latents": 2}, r"\.k must have shape \[1 or B, 2, S, 16\]"),
        ({"kv_cache_dict": cache_of(dim=8), "num_cond_latents": 2}, r"\.k must have shape \[1 or B, 2, S, 16\]"),
        ({"kv_cache_dict": cache_of(index=1), "num_cond_latents": 2}, r"each of the blocks 0\.\.0, got keys \[1\]"),
        ({"kv_cache_dict": {**cache_of(), **cache_of(index=7)}, "num_cond_latents": 2}, r"got keys \[0, 7\]"),
        ({"kv_cache_dict": {0: (cache_of()[0][0],)}, "num_cond_latents": 2}, r"must be a pair \(k, v\), got 1 items"),
        (
            {"kv_cache_dict": {0: (cache_of()[0][0], cache_of(15)[0][1])}, "num_cond_latents": 2},
            r"kv_cache_dict\[0\]\.v must hold",
        ),
        (
            {"kv_cache_dict": cache_of(), "num_cond_latents": 2, "return_kv": True},
            "return_kv must be False when kv_cache_dict is given",
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_bad_input_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tiny_model()(**tiny_inputs().kwargs(**changes))


def test_empty_cache_is_no_cache():
    model, inputs = tiny_model(), tiny_inputs()
    assert torch.equal(model(**inputs.kwargs(kv_cache_dict={})), model(**inputs.kwargs()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"num_heads": True}, "num_heads must be a positive integer"),
        ({"hidden_size": 4096.0}, "hidden_size must be a positive integer"),
        ({"num_heads": 3}, "hidden_size must be num_heads times a multiple of 8"),
        ({"hidden_size": 4 * 32}, "hidden_size must be num_heads times a multiple of 8"),
        ({"patch_size": (2, 2, 2)}, "patch_size must start with 1"),
        ({"patch_size": (1, 2)}, "patch_size must be 3 positive integers"),
        ({"cp_split_hw": [1, 0]}, "cp_split_hw must be 2 positive integers"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a positive number"),
        ({"enable_bsa": "yes"}, "enable_bsa must be true or false"),
        ({"bsa_params": [1]}, "bsa_params must be an object or null"),
    ],
)
def test_bad_config_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        LongCatConfig(**fields)


def test_model_takes_a_config_or_fields_not_both():
    config = tiny_model().config
    with torch.device("meta"):
        by_fields = LongCatVideoTransformer3DModel(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        )
        assert by_fields.config == config
        with pytest.raises(UsageError, match="config must come alone or as fields"):
            LongCatVideoTransformer3DModel(config, depth=2)
