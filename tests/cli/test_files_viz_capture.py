"""Atomic files, pictures, timing and the capture of queries and keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bsa_compile import files, timing, viz
from bsa_compile.capture import capture_attention, select_tiles
from bsa_compile.commands.common import TINY_CHECKPOINT, model_inputs
from bsa_compile.errors import UsageError
from bsa_compile.grid import TokenGrid, num_tiles
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel, dense_attention
from bsa_compile.policy import BSAPolicy
from bsa_compile.selection import BlockSelection

GRID = TokenGrid(5, 9, 10)
ROOT = Path(__file__).resolve().parents[2]


def test_write_is_complete_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "old")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_check_writable(tmp_path):
    assert files.check_writable(tmp_path / "not" / "yet" / "x.png") == tmp_path / "not" / "yet" / "x.png"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        files.check_writable(tmp_path / "file" / "x.png")
    with pytest.raises(UsageError, match="must be a file"):
        files.check_writable(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that permits writing and refuses it")
def test_check_writable_tries_it():
    with pytest.raises(UsageError, match="can be written"):
        files.check_writable("/proc/x.png")


def test_timing():
    calls = []
    result = timing.measure(lambda: calls.append(1), torch.device("cpu"), repeats=3, warmup=2)
    assert len(calls) == 5
    assert len(result.seconds) == 3
    assert min(result.seconds) <= result.median <= max(result.seconds)
    assert result.to_dict()["median_s"] == result.median


@pytest.fixture(scope="module")
def model():
    return LongCatVideoTransformer3DModel.from_pretrained(TINY_CHECKPOINT)


@pytest.fixture(scope="module")
def captured(model):
    inputs = model_inputs(model, GRID, text_tokens=4)
    return capture_attention(model, 1, lambda: model(**inputs))


def test_capture(model, captured):
    assert captured.q.shape == captured.k.shape == (1, 2, GRID.num_tokens, 64)
    assert captured.grid_q == captured.grid_k == GRID.shape
    assert captured.role == "self"
    assert all(block.attn.attention_fn is dense_attention for block in model.blocks)


def test_capture_takes_what_attention_sees(model, captured):
    seen = []

    def record(q, k, v, **kwargs):
        seen.append((q, k))
        return dense_attention(q, k, v, **kwargs)

    model.blocks[1].attn.attention_fn = record
    with torch.no_grad():
        model(**model_inputs(model, GRID, text_tokens=4))
    model.blocks[1].attn.attention_fn = dense_attention
    torch.testing.assert_close(seen[0], (captured.q, captured.k))


@pytest.mark.parametrize("block", [2, -3])
def test_capture_refuses_a_block_that_is_not_there(model, block):
    with pytest.raises(UsageError, match="2 LongCat blocks"):
        capture_attention(model, block, lambda: None)


def test_capture_refuses_a_call_that_attends_nowhere(model):
    with pytest.raises(UsageError, match="a call that did not"):
        capture_attention(model, 0, lambda: None)
    assert model.blocks[0].attn.attention_fn is dense_attention


def test_selection_keeps_every_tile_itself_first(captured):
    """The tiny checkpoint's queries and keys prefer near tokens: the picture would show noise otherwise."""
    site = BSAPolicy(sparsity=0.75).resolve(module="", role="self", grid_q=GRID.shape, grid_k=GRID.shape)
    selection = select_tiles(captured, site)
    selection.validate()
    own = selection.to_dense().diagonal(dim1=-2, dim2=-1)
    assert own.float().mean() > 0.9


def figure(heads: int = 2, nq: int = num_tiles(GRID.shape, (4, 4, 4))):
    mask = torch.rand(1, heads, nq, 18, generator=torch.Generator().manual_seed(0)) < 0.3
    return viz.block_mask_figure(
        BlockSelection.from_dense(mask),
        grid_q=GRID.shape,
        tile_q=(4, 4, 4),
        grid_k=GRID.shape,
        tile_k=(4, 4, 4),
        title="a title",
    ), mask


@pytest.mark.parametrize("heads", [1, 5, 17])
def test_figure_has_one_panel_per_head_that_shows_its_mask(heads):
    drawn, mask = figure(heads)
    panels = [axes for axes in drawn.axes if axes.images]
    assert len(panels) == heads
    for head, axes in enumerate(panels):
        assert torch.equal(torch.from_numpy(axes.images[0].get_array().data) > 0.5, mask[0, head])
        assert f"head {head}" in axes.get_title()
    assert "grid 5x9x10 (450 tokens), tile 4x4x4" in drawn.get_suptitle()
    assert "a title" in drawn.get_suptitle()


def test_figure_refuses_another_grid():
    with pytest.raises(UsageError, match="18 x 18"):
        figure(nq=17)


def test_figure_changes_no_global_state(tmp_path):
    code = f"""
import matplotlib, sys, torch
from bsa_compile import selection, viz
before = dict(dict.items(matplotlib.rcParams))  # reading the backend would choose one
mask = selection.BlockSelection.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool))
where = dict(grid_q=(2, 2, 4), tile_q=(2, 2, 2), grid_k=(2, 2, 4), tile_k=(2, 2, 2))
viz.save_figure(viz.block_mask_figure(mask, **where), {str(tmp_path / "x.png")!r})
assert dict(dict.items(matplotlib.rcParams)) == before and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_tiny_checkpoint_is_what_the_script_makes(tmp_path):
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import make_tiny_checkpoint
    finally:
        sys.path.pop(0)
    make_tiny_checkpoint.make(tmp_path / "again")
    again = LongCatVideoTransformer3DModel.from_pretrained(tmp_path / "again")
    shipped = LongCatVideoTransformer3DModel.from_pretrained(TINY_CHECKPOINT)
    assert again.config == shipped.config
    torch.testing.assert_close(dict(again.state_dict()), dict(shipped.state_dict()))
    assert sum(p.stat().st_size for p in TINY_CHECKPOINT.iterdir()) < 4_000_000
