"""Models that are not ours: the official LongCat interface, diffusers' Wan, and what must stay dense."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bsa_compile
from bsa_compile import reference
from bsa_compile.errors import UnsupportedError
from bsa_compile.policy import BSAPolicy, Rule

from .official_stand_in import LongCatVideoTransformer3DModel as Official
from .official_stand_in import attend_with
from .support import CAPTION, CountCompiles, make_inputs, reference_attention, relative_error

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))
REGIONAL = pytest.mark.parametrize("regional", [None, False], ids=["default", "whole"])


def official(policy, seed=0, **config):
    """The stand-in, and a copy whose attention is the reference's under `policy` (None: dense)."""
    torch.manual_seed(seed)
    model = Official(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    expected = copy.deepcopy(model)

    def attend(q, k, v, shape):
        area = shape[1] * shape[2]
        grid_q, grid_k = ((x.shape[2] // area, *shape[1:]) for x in (q, k))
        if policy is None or grid_q[0] == 0:
            return F.scaled_dot_product_attention(q, k, v)
        return reference_attention(policy)(q, k, v, grid_q=grid_q, grid_k=grid_k, role="")

    attend_with(expected, attend)
    rope = type(expected.blocks[0].attn.rope_3d)
    for module in expected.modules():
        if isinstance(module, rope):
            for t in range(1, 12):
                module.register_grid_size((t, 6, 10))
    return model, expected


@REGIONAL
def test_the_official_module_runs_block_sparse_as_it_stands(regional):
    model, expected = official(POLICY)
    latents, timestep, text = make_inputs((4, 6, 10), batch=2)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    fast = bsa_compile.optimize(model, POLICY, backend="eager", regional=regional)
    with torch.no_grad():
        out = fast(latents, timestep, text, encoder_attention_mask=mask)
        assert relative_error(out, expected(latents, timestep, text, mask)) < 1e-5
    assert [s.module for s in fast.report.rewritten] == ["blocks.0.attn", "blocks.1.attn"]
    assert {s.reason for s in fast.report.dense} == {"cross_attention"}
    with pytest.raises(RuntimeError, match=r"flash-attn|numpy"):
        model(latents, timestep, text)  # the model passed in stays as it was


@pytest.mark.parametrize("cond", [1, 4])
def test_the_official_modules_cond_latents_and_cache(cond):
    model, expected = official(POLICY)
    latents, timestep, text = make_inputs((6, 6, 10))
    fast = bsa_compile.optimize(model, POLICY, backend="eager")
    with torch.no_grad():
        out = fast(latents, timestep, text, num_cond_latents=cond)
        assert relative_error(out, expected(latents, timestep, text, num_cond_latents=cond)) < 1e-5
        _, cache = fast(latents[:, :, :cond], timestep, text, return_kv=True)
        cached = fast(latents[:, :, cond:], timestep, text, num_cond_latents=cond, kv_cache_dict=cache)
        _, want_cache = expected(latents[:, :, :cond], timestep, text, return_kv=True)
        want = expected(latents[:, :, cond:], timestep, text, num_cond_latents=cond, kv_cache_dict=want_cache)
    assert relative_error(cached, want) < 1e-5
    assert {s.role for s in fast.report.rewritten} == {"cond", "noise", "cached"}


@REGIONAL
def test_rules_by_path_meet_the_official_modules_cached_calls(regional):
    """Its block calls `attn.forward_with_kv_cache` past `attn.__call__`, where a trace takes the module's path from."""
    policy = BSAPolicy(**{**POLICY.to_dict(), "rules": [Rule(module="blocks.*.attn", sparsity=0.8)]})
    model, expected = official(BSAPolicy(**{**POLICY.to_dict(), "sparsity": 0.8}))
    latents, timestep, text = make_inputs((6, 6, 10))
    before = [(type(b.attn), dict(b.attn.__dict__)) for b in model.blocks]
    fast = bsa_compile.optimize(model, policy, backend="eager", regional=regional)
    with torch.no_grad():
        _, cache = fast(latents[:, :, :2], timestep, text, return_kv=True)
        cached = fast(latents[:, :, 2:], timestep, text, num_cond_latents=2, kv_cache_dict=cache)
        _, want_cache = expected(latents[:, :, :2], timestep, text, return_kv=True)
        want = expected(latents[:, :, 2:], timestep, text, num_cond_latents=2, kv_cache_dict=want_cache)
    sites = {(s.module, s.role, s.sparsity, s.detail) for s in fast.report.sites}
    assert sites == {(f"blocks.{i}.attn", role, 0.8, "rule 0") for i in range(2) for role in ("cond", "cached")}
    assert relative_error(cached, want) < 1e-5
    assert [(type(b.attn), b.attn.__dict__) for b in model.blocks] == before


@REGIONAL
def test_the_official_module_with_cond_latents_alone(regional):
    model, expected = official(POLICY)
    latents, timestep, text = make_inputs((2, 6, 10))
    fast = bsa_compile.optimize(model, POLICY, backend="eager", regional=regional)
    with torch.no_grad():
        out = fast(latents, timestep, text, num_cond_latents=2)
        assert relative_error(out, expected(latents, timestep, text, num_cond_latents=2)) < 1e-5
    assert [(s.module, s.role) for s in fast.report.rewritten] == [("blocks.0.attn", "cond"), ("blocks.1.attn", "cond")]


@REGIONAL
def test_the_official_module_is_switched_off_and_on(regional):
    model, expected = official(POLICY)
    _, dense = official(None)
    inputs = make_inputs((4, 6, 10))
    fast = bsa_compile.optimize(model, POLICY, backend="eager", regional=regional)
    with torch.no_grad():
        sparse = fast(*inputs)
        assert relative_error(sparse, expected(*inputs)) < 1e-5
        fast.disable_bsa()
        off = fast(*inputs)
        assert relative_error(off, dense(*inputs)) < 1e-5
        with CountCompiles() as compiles:
            fast.enable_bsa()
            assert torch.equal(fast(*inputs), sparse)
            fast.disable_bsa()
            assert torch.equal(fast(*inputs), off)
        assert compiles.count == 0
    assert not any(block.attn.enable_bsa for block in model.blocks)  # nobody switched the model passed in


PARAMS = {"sparsity": 0.6, "chunk_3d_shape_q": [2, 3, 4], "chunk_3d_shape_k": [2, 2, 4]}  # those of POLICY


@pytest.mark.parametrize(
    ("config", "call", "policy", "sparse"),
    [
        ({"enable_bsa": True}, None, None, True),
        ({"enable_bsa": True}, "disable_bsa", None, False),
        ({"enable_bsa": True}, "disable_bsa", POLICY, False),
        ({"enable_bsa": False}, None, None, False),
        ({"enable_bsa": False}, None, POLICY, True),
        ({"enable_bsa": False}, "enable_bsa", None, True),
        ({}, None, None, True),
        ({}, "enable_bsa", None, True),
    ],
    ids=[
        "true",
        "true, disabled",
        "true, disabled, policy",
        "false",
        "false, policy",
        "false, enabled",
        "silent",
        "silent, enabled",
    ],
)
def test_what_the_official_model_asks_for_counts(config, call, policy, sparse):
    """Its switch is a flag on every block's attention, to compare with its configuration."""
    model, expected = official(POLICY, **config, bsa_params=PARAMS)
    if call:
        getattr(model, call)()
    inputs = make_inputs((4, 6, 10))
    fast = bsa_compile.optimize(model, policy, backend="eager")
    with torch.no_grad():
        fast(*inputs)
        assert len(fast.report.rewritten) == (2 if sparse else 0)
        fast.enable_bsa()
        assert relative_error(fast(*inputs), expected(*inputs)) < 1e-5
    assert len(fast.report.rewritten) == 2


def test_blocks_of_the_official_model_switched_apart_are_told(caplog):
    model, _ = official(POLICY, enable_bsa=True)
    model.blocks[0].attn.enable_bsa = False
    with caplog.at_level(logging.INFO, logger="bsa_compile"):
        bsa_compile.optimize(model, POLICY, backend="eager")
    assert "enable_bsa differs among the model's blocks" in caplog.text


@REGIONAL
def test_bad_calls_of_the_official_module_get_its_own_errors(regional):
    model, _ = official(POLICY)
    latents, timestep, text = make_inputs((4, 6, 10))
    fast = bsa_compile.optimize(model, POLICY, backend="eager", regional=regional)
    with torch.no_grad():
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_states'"):
            fast(timestep=timestep, encoder_hidden_states=text)
        with pytest.raises(Exception, match=r"zip\(\) argument 2 is longer") as info:
            fast(latents[:, :, 0], timestep, text)
    assert "adapters.py" not in {entry.path.name for entry in info.traceback}


def test_other_variants_of_the_official_module_are_refused(monkeypatch):
    """The avatar model's attention has the same name, and other kinds of calls."""
    model, _ = official(POLICY)
    avatar = "longcat_video.modules.avatar.attention"
    monkeypatch.setattr(type(model.blocks[0].attn), "__module__", avatar)
    with pytest.raises(UnsupportedError, match=rf"{avatar}\.Attention.*bsa_compile\.attention"):
        bsa_compile.optimize(model, POLICY)


def test_the_official_context_parallelism_is_refused():
    model, _ = official(POLICY)
    model.cp_split_hw = [1, 2]
    with pytest.raises(UnsupportedError, match="cp_split_hw"):
        bsa_compile.optimize(model, POLICY)


def tiny_wan():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=CAPTION,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ).eval()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_wan_of_diffusers_is_found_by_its_patch_embedding(backend, monkeypatch):
    model = tiny_wan()
    latents, timestep, text = make_inputs((4, 6, 10))
    call = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": text[:, 0], "return_dict": False}
    fast = bsa_compile.optimize(model, POLICY, backend=backend)
    with torch.no_grad():
        out, dense = fast(**call)[0], model(**call)[0]
    report = fast.report
    assert [s.module for s in report.rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert [(s.module, s.reason) for s in report.dense] == [
        ("blocks.0.attn2", "cross_attention"),
        ("blocks.1.attn2", "cross_attention"),
    ]
    assert {(s.grid_q, s.grid_source) for s in report.rewritten} == {((4, 6, 10), "patch_embedding")}

    def sdpa(query, key, value, **kwargs):
        if query.shape[2] != key.shape[2]:
            return true_sdpa(query, key, value, **kwargs)
        grids = {"grid_q": (4, 6, 10), "grid_k": (4, 6, 10), "tile_q": (2, 3, 4), "tile_k": (2, 2, 4)}
        return reference.block_sparse_attention(query, key, value, **grids, sparsity=0.6)[0].to(query.dtype)

    true_sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with torch.no_grad():
        want = model(**call)[0]
    assert relative_error(out, want) < 1e-5
    assert relative_error(out, dense) > 1e-4


def test_text_as_long_as_the_video_does_not_fool_the_pass():
    model = tiny_wan()
    latents, timestep, _ = make_inputs((2, 4, 8))
    text = torch.randn(1, 64, CAPTION)
    fast = bsa_compile.optimize(model, POLICY, backend="eager")
    with torch.no_grad():
        fast(hidden_states=latents, timestep=timestep, encoder_hidden_states=text)
    assert [s.module for s in fast.report.rewritten] == ["blocks.0.attn1", "blocks.1.attn1"]


class JointTextVideo(nn.Module):
    """Text and video tokens in one sequence, as in MMDiT models."""

    def __init__(self):
        super().__init__()
        self.embed, self.text = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(CAPTION, 32)
        self.qkv = nn.Linear(32, 96)

    def forward(self, latents, text):
        x = torch.cat([self.text(text), self.embed(latents).flatten(2).transpose(1, 2)], dim=1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


def test_a_sequence_of_text_and_video_stays_dense_with_that_reason():
    model = JointTextVideo()
    latents, _, text = make_inputs((4, 6, 10))
    fast = bsa_compile.optimize(model, POLICY, backend="eager")
    with torch.no_grad():
        assert relative_error(fast(latents, text[:, 0]), model(latents, text[:, 0])) < 1e-6
    assert [s.reason for s in fast.report.sites] == ["mixed_sequence"]
