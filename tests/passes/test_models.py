"""Whole models: diffusers' Wan and our LongCat DiT, in Dynamo and export graphs."""

from __future__ import annotations

import io

import pytest
import torch
from torch.export import Dim, export

from bsa_compile import attention
from bsa_compile.passes import rewrite

from .support import ALL, Recorder, capture, count


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


# -- Wan --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wan():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    ).eval()


def wan_inputs(t=3, h=4, w=6, text=72):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, t, 2 * h, 2 * w, generator=generator)
    return latents, torch.tensor([5]), torch.randn(1, text, 8, generator=generator)


WAN_SITES = [
    ("blocks.0.attn1", "self", "rewritten"),
    ("blocks.0.attn2", "cross", "cross_attention"),
    ("blocks.1.attn1", "self", "rewritten"),
    ("blocks.1.attn2", "cross", "cross_attention"),
]


def test_wan_in_a_dynamo_graph(wan):
    """Its attention is called by keywords alone, its text is as long as its video."""
    recorder, inputs = Recorder(), wan_inputs()
    with torch.no_grad():
        close(recorder.run(wan, *inputs, return_dict=False)[0], wan(*inputs, return_dict=False)[0])
    report = recorder.reports[0]
    assert [(s.module, s.role, s.reason) for s in report.sites] == WAN_SITES
    assert {s.grid_q for s in report.rewritten} == {(3, 4, 6)}


def test_wan_in_an_export_graph(wan):
    inputs = wan_inputs()
    sizes = {2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}
    shapes = {"hidden_states": sizes, "timestep": None, "encoder_hidden_states": {1: Dim.AUTO}, "return_dict": None}
    with torch.no_grad():
        program = export(wan, inputs, {"return_dict": False}, dynamic_shapes=shapes, strict=False)
        after, report = rewrite(program, ALL)
        assert [(s.module, s.role, s.reason) for s in report.sites] == WAN_SITES
        other = wan_inputs(2, 6, 4, 7)
        close(after.module()(*other, return_dict=False)[0], wan(*other, return_dict=False)[0])


def test_wan_under_gradient_checkpointing(wan):
    wan.enable_gradient_checkpointing()
    try:
        after, report = rewrite(capture(wan.train(), *wan_inputs(), return_dict=False), ALL)
    finally:
        wan.eval().disable_gradient_checkpointing()
    assert [(s.module, s.role, s.reason) for s in report.sites] == WAN_SITES
    assert count(after, "bsa::attend") == 2


def test_one_wan_block_needs_a_grid(wan):
    """As diffusers' `compile_repeated_blocks` does it; the grid comes from the caller."""
    block = wan.blocks[0]
    x, text, modulation = torch.randn(1, 72, 32), torch.randn(1, 72, 32), torch.randn(1, 6, 32)
    rotary = tuple(torch.randn(1, 72, 1, 16) for _ in range(2))
    graph = capture(block, x, text, modulation, rotary)
    assert [s.reason for s in rewrite(graph, ALL)[1].sites] == ["unknown_grid", "cross_attention"]
    _, report = rewrite(graph, ALL, (3, 4, 6), module_prefix="blocks.0")
    assert [(s.module, s.role, s.reason) for s in report.sites] == WAN_SITES[:2]


# -- LongCat ----------------------------------------------------------------------------------------------------------


def make_longcat(depth):
    from bsa_compile.models.longcat import LongCatVideoTransformer3DModel

    torch.manual_seed(0)
    model = LongCatVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        hidden_size=32,
        depth=depth,
        num_heads=2,
        caption_channels=8,
        adaln_tembed_dim=16,
        frequency_embedding_size=16,
        text_tokens_zero_pad=True,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def longcat():
    return make_longcat(2)


def longcat_inputs(t=3, h=4, w=6, text=72):
    latents, timestep, _ = wan_inputs(t, h, w)
    return latents, timestep.float(), torch.randn(1, 1, text, 8, generator=torch.Generator().manual_seed(1))


def self_sites(report):
    return [(s.module, s.role, s.reason, s.grid_q, s.grid_k) for s in report.sites if s.role != "cross"]


def test_longcat(longcat):
    recorder, inputs = Recorder(), longcat_inputs()
    with torch.no_grad():
        close(recorder.run(longcat, *inputs), longcat(*inputs))
    report = recorder.reports[0]
    assert [(s.module, s.role, s.reason) for s in report.sites] == [
        ("blocks.0.attn", "self", "rewritten"),
        ("blocks.0.cross_attn", "cross", "cross_attention"),
        ("blocks.1.attn", "self", "rewritten"),
        ("blocks.1.cross_attn", "cross", "cross_attention"),
    ]
    assert {s.grid_q for s in report.rewritten} == {(3, 4, 6)}


def test_longcat_with_cond_latents(longcat):
    recorder, inputs = Recorder(), longcat_inputs()
    with torch.no_grad():
        close(recorder.run(longcat, *inputs, num_cond_latents=1), longcat(*inputs, num_cond_latents=1))
    block = [
        ("cond", "rewritten", (1, 4, 6), (1, 4, 6)),
        ("noise", "rewritten", (2, 4, 6), (3, 4, 6)),
    ]
    assert self_sites(recorder.reports[0]) == [(f"blocks.{i}.attn", *site) for i in range(2) for site in block]


@pytest.mark.parametrize("frames", [1, 3])
def test_longcat_encoding_cond_frames(longcat, frames):
    """Nothing that the graph computes tells it from an image or a video: the model's mark does."""
    inputs = longcat_inputs(t=frames)
    options = {"return_kv": True, "skip_crs_attn": True}
    recorder = Recorder()
    with torch.no_grad():
        close(recorder.run(longcat, *inputs, **options)[0], longcat(*inputs, **options)[0])
        program = export(longcat, inputs, options, strict=True)
        loaded = reloaded(program)
    grid = (frames, 4, 6)
    sites = [(f"blocks.{i}.attn", "cond", "rewritten", grid, grid) for i in range(2)]
    assert self_sites(recorder.reports[0]) == sites
    assert self_sites(rewrite(program, ALL)[1]) == sites
    assert self_sites(rewrite(loaded, ALL)[1]) == sites


def test_the_mark_changes_nothing_but_cond_frames_from_self(longcat):
    """Where the trace or an anchor knows the role, the mark has no say."""
    graph = capture(longcat, *longcat_inputs())
    for node in graph.graph.nodes:
        node.meta["custom"] = {"bsa_role": "noise"}
    roles = [s.role for s in rewrite(graph, ALL)[1].sites]
    assert roles == ["self", "cross"] * 2
    for node in graph.graph.nodes:
        node.meta["custom"] = {"bsa_role": "cond"}
    roles = [s.role for s in rewrite(graph, ALL)[1].sites]
    assert roles == ["cond", "cross"] * 2
    anchored = capture(lambda x: attention(x, x, x, grid_q=(2, 2, 2)), torch.randn(1, 2, 8, 16))
    for node in anchored.graph.nodes:
        node.meta["custom"] = {"bsa_role": "cond"}
    assert [s.role for s in rewrite(anchored, ALL)[1].sites] == ["self"]


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.mark.parametrize(("depth", "dynamic"), [(2, None), (1, True)], ids=["static", "dynamic"])
def test_longcat_with_a_cache(longcat, depth, dynamic):
    longcat = longcat if depth == 2 else make_longcat(depth)
    latents, timestep, text = longcat_inputs()
    with torch.no_grad():
        _, cache = longcat(
            latents[:, :, :1], timestep * 0, text, return_kv=True, skip_crs_attn=True, num_cond_latents=0
        )
        arguments = (latents[:, :, 1:], timestep, text)
        options = {"num_cond_latents": 1, "kv_cache_dict": cache}
        recorder = Recorder()
        got = recorder.run(longcat, *arguments, dynamic=dynamic, **options)
        close(got, longcat(*arguments, **options))
    sites = self_sites(recorder.reports[0])
    assert [site[:3] for site in sites] == [(f"blocks.{i}.attn", "cached", "rewritten") for i in range(depth)]
    if dynamic is None:
        assert {site[3:] for site in sites} == {((2, 4, 6), (3, 4, 6))}
