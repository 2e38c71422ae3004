"""Which path a call takes, and why: needs no kernel."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from bsa_compile.kernels import config
from bsa_compile.kernels.config import BOX_FRAMES, BOX_HEADS, BOX_MERGED, Launch, plan_boxes

GRID, TILE = (4, 8, 12), (4, 4, 4)
TOKENS = 4 * 8 * 12
SCALE = 128**-0.5


def heads_first(batch: int = 2, heads: int = 3, tokens: int = TOKENS, head_dim: int = 128, dtype=torch.bfloat16):
    return torch.empty(batch, heads, tokens, head_dim, dtype=dtype)


def tokens_first(batch: int = 2, heads: int = 3):
    return torch.empty(batch, TOKENS, heads, 128, dtype=torch.bfloat16).transpose(1, 2)


def fused(batch: int = 2, heads: int = 3):
    return torch.empty(batch, TOKENS, 3, heads, 128, dtype=torch.bfloat16)[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize(
    ("x", "access", "shape", "block"),
    [
        (heads_first(), BOX_MERGED, (2 * 3 * 4, 8, 12, 128), (4, 4, 4, 128)),
        (tokens_first(), BOX_FRAMES, (3, 2 * 4, 8, 12, 128), (1, 4, 4, 4, 128)),
        (fused(), BOX_FRAMES, (3, 2 * 4, 8, 12, 128), (1, 4, 4, 4, 128)),
        (tokens_first(batch=1), BOX_HEADS, (3, 4, 8, 12, 128), (1, 4, 4, 4, 128)),
        (fused(batch=1), BOX_HEADS, (3, 4, 8, 12, 128), (1, 4, 4, 4, 128)),
        (heads_first(heads=1, tokens=TOKENS + 8)[:, :, :TOKENS], BOX_HEADS, (2, 4, 8, 12, 128), (1, 4, 4, 4, 128)),
        (fused(heads=1), BOX_MERGED, (2 * 4, 8, 12, 128), (4, 4, 4, 128)),
    ],
    ids=[
        "heads first",
        "tokens first",
        "fused qkv",
        "tokens first, one batch",
        "fused qkv, one batch",
        "one head, cut tokens",
        "fused qkv, one head",
    ],
)
def test_plan(x, access, shape, block):
    plan = plan_boxes(x, GRID, TILE, "raster", 64)
    assert not isinstance(plan, str), plan
    assert (plan.access, plan.shape, plan.block) == (access, shape, block)
    assert plan.strides[-4:] == (8 * 12 * x.stride(2), 12 * x.stride(2), x.stride(2), 1)


def test_a_partial_last_frame_is_clipped_only_where_nothing_follows_it():
    grid = (6, 8, 8)
    x = torch.empty(2, 3, 6 * 8 * 8, 128, dtype=torch.bfloat16)
    plan = plan_boxes(x, grid, TILE, "raster", 64)
    assert not isinstance(plan, str)
    assert plan.access == BOX_HEADS
    assert "next batch element" in str(
        plan_boxes(x.transpose(1, 2).contiguous().transpose(1, 2), grid, TILE, "raster", 64)
    )


@pytest.mark.parametrize(
    ("block", "tile", "box"),
    [
        (32, (4, 4, 4), (2, 4, 4, 128)),
        (16, (4, 4, 8), (1, 2, 8, 128)),
        (16, (1, 2, 32), (1, 1, 16, 128)),
        (64, (4, 4, 8), (2, 4, 8, 128)),
    ],
    ids=str,
)
def test_a_box_holds_consecutive_positions_of_the_tile(block, tile, box):
    plan = plan_boxes(heads_first(), GRID, tile, "raster", block)
    assert not isinstance(plan, str)
    assert plan.block == box


@pytest.mark.parametrize(
    ("x", "grid", "tile", "layout", "reason"),
    [
        (heads_first(head_dim=80), GRID, TILE, "raster", "head_dim 80"),
        (heads_first(head_dim=64), GRID, TILE, "raster", "rows of 128 bytes"),
        (heads_first(), GRID, (4, 4, 6), "raster", "side that is not a power of two"),
        (heads_first(), GRID, (2, 2, 4), "raster", "fewer than 64 positions"),
        (heads_first(tokens=2 * 2 * 64), (4, 8, 7), (4, 8, 4), "tile", "keeps the padding"),
        (heads_first(heads=4)[:, :3], GRID, TILE, "raster", "do not merge"),
        (heads_first(batch=1, heads=1).expand(1, 3, -1, -1), GRID, TILE, "raster", "a stride is 0"),
        (torch.empty(1, 2, TOKENS, 131, dtype=torch.bfloat16)[..., 1:129], GRID, TILE, "raster", "aligned"),
        (torch.empty(1, 2, TOKENS, 136, dtype=torch.bfloat16)[..., 1:129], GRID, TILE, "raster", "aligned"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_reason_against_boxes(x, grid, tile, layout, reason):
    assert reason in str(plan_boxes(x, grid, tile, layout, 64))


def test_tile_order_is_a_grid_of_whole_tiles():
    plan = plan_boxes(heads_first(), GRID, TILE, "tile", 64)
    assert not isinstance(plan, str)
    assert plan.shape == (2 * 3 * 6, 1, 64, 128)
    assert plan.block == (1, 1, 64, 128)


def test_path_names_and_reasons():
    q = heads_first()
    path = config.forward_path(q, q, q, GRID, TILE, GRID, TILE, SCALE, "raster")
    assert path.name == "box"
    assert path.launch.block_k == 64
    assert config.forward_path(q, q, q, GRID, TILE, GRID, TILE, SCALE, "raster", path="pointer").reason == "asked for"
    odd = heads_first(head_dim=40)
    path = config.forward_path(q, odd, odd, GRID, TILE, GRID, TILE, SCALE, "raster")
    assert path.name == "pointer"
    assert "head_dim" in path.reason
    single = heads_first(dtype=torch.float32)
    assert "fp32" in config.forward_path(single, single, single, GRID, TILE, GRID, TILE, SCALE, "raster").reason
    chosen = Launch(32, 16, 2, 3)
    assert config.forward_path(q, q, q, GRID, TILE, GRID, TILE, SCALE, "raster", launch=chosen).launch == chosen
    assert config.backward_q_path(q, q, q, GRID, TILE, TILE, "raster").name == "box"
    assert config.backward_k_path(q, q, GRID, TILE, TILE, "raster").name == "box"


WIDE, HALF = (4, 4, 8), (2, 4, 4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ""),
        ({"tile_q": WIDE, "tile_k": WIDE}, ""),
        ({"tile_k": WIDE}, ""),
        ({"k": heads_first(heads=1), "v": heads_first(heads=1)}, ""),
        ({"q": heads_first(dtype=torch.float32), "grad_out": heads_first(dtype=torch.float32)}, "bf16 and fp16"),
        ({"grad_out": heads_first(dtype=torch.float16)}, "grad_out in the dtype of q"),
        ({"grad_out": heads_first()[:, :1].expand(-1, heads_first().shape[1], -1, -1)}, "do not merge"),
        ({"tile_q": HALF}, "query tiles of 64 or 128"),
        ({"tile_k": (4, 8, 8)}, "key tiles of 64 or 128"),
        ({"layout": "tile"}, "raster order"),
        ({"scale": 0.0}, "positive scale"),
        ({"grid_q": (1, 4096, 1)}, "query grid"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_reason_against_the_hopper_backward(options, reason):
    x = heads_first()
    call = {"q": x, "k": x, "v": x, "grad_out": x, "grid_q": GRID, "tile_q": TILE, "grid_k": GRID, "tile_k": TILE}
    plans = config.plan_gluon_backward(**{**call, "scale": SCALE, "layout": "raster", **options})
    if reason:
        assert reason in str(plans)
    else:
        assert len(plans) == 4


def test_the_hopper_backward_is_for_cuda_and_presets():
    x = heads_first()
    args = (x, x, x, x, GRID, TILE, GRID, TILE, SCALE, "raster")
    assert "CUDA" in str(config.backward_path(*args))
    assert "launch parameters" in str(config.backward_path(*args, launches=True))
    assert "'box'" in str(config.backward_path(*args, path="box"))


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"triton": "3.6.0"}, ""),
        ({"pytorch-triton": "3.7.1+git"}, ""),
        ({"triton": "3.9.0"}, "this is 3.9.0"),
        ({"triton": "main"}, "this is main"),
        ({}, "this is unknown"),
    ],
    ids=["3.6", "nightly", "newer", "no number", "none"],
)
def test_hopper_kernels_are_for_the_tritons_that_they_were_checked_with(versions, reason, monkeypatch):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for cached in (config.triton_version, config._why_no_gluon_on):
        cached.cache_clear()
    try:
        found = config._why_no_gluon(torch.device("cuda", 0))
    finally:
        for cached in (config.triton_version, config._why_no_gluon_on):
            cached.cache_clear()
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"scale": -0.1}, "positive scale"),
        ({"scale": 1e-40}, "positive scale"),
        ({"tile_q": (2, 4, 4)}, "query tiles of 64 or 128"),
        ({"tile_k": (16, 16, 8)}, "1024 at most"),
        ({"layout": "tile"}, "raster order"),
    ],
    ids=["taken", "negative scale", "tiny scale", "query tile", "key tile", "tile order"],
)
def test_what_the_hopper_forward_takes(change, reason):
    q = heads_first()
    call = {
        "grid_q": GRID,
        "tile_q": TILE,
        "grid_k": GRID,
        "tile_k": TILE,
        "scale": SCALE,
        "layout": "raster",
        **change,
    }
    plans = config.plan_gluon(q, q, q, *call.values())
    if reason is None:
        assert [plan.block for plan in plans] == [(4, 4, 4, 128)] * 3
    else:
        assert reason in plans


@pytest.mark.parametrize("positions", [1, 8, 16, 30, 64, 96, 128, 160, 256, 1000])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128, 256])
def test_presets_are_usable(positions, head_dim):
    for dtype in (torch.float32, torch.bfloat16):
        for preset in (config.forward_launch, config.backward_q_launch, config.backward_k_launch):
            for boxes in (True, False):
                launch = preset(positions, positions, head_dim, dtype, boxes)
                for block in (launch.block_q, launch.block_k):
                    assert block in (16, 32, 64, 128)
                    assert block < 2 * max(16, positions)


@pytest.mark.parametrize(("positions", "row_bytes", "warps"), [(64, 256, 1), (64, 1024, 4), (8, 32, 1), (1000, 512, 2)])
def test_a_pooling_warp_holds_at_most_16_kb(positions, row_bytes, warps):
    block, chosen = config.pool_launch(positions, row_bytes)
    assert block <= 64
    assert chosen == warps
    assert block * row_bytes <= chosen * 2**14


def test_the_presets_need_no_triton():
    code = "import sys; sys.modules['triton'] = None; from bsa_compile.kernels import config"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
