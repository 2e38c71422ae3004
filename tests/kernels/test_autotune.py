"""The search for launch parameters: when it happens, what it finds, where it is kept. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path as File

import pytest
import torch

from bsa_compile.errors import UsageError
from bsa_compile.kernels import autotune
from bsa_compile.kernels.config import Launch, Path

PRESET = Path("box", "because", Launch(64, 64, 4, 2, 168))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is only named; launches with three stages are the faster, those of block_q 128 do not fit."""
    monkeypatch.setenv(autotune.ASK, "1")
    monkeypatch.delenv(autotune.REFUSE, raising=False)
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "_found", {})
    timed: list[Launch] = []

    def milliseconds(run, launch):
        timed.append(launch)
        run(launch)
        return None if launch.block_q == 128 else 5.0 - launch.num_stages

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    return timed


def find(key="a shape", path=PRESET, device=CUDA):
    return autotune.launch_for(key, path, device, lambda launch: None)


@pytest.mark.parametrize(
    ("asked", "refused", "on"),
    [(None, None, False), ("1", None, True), ("1", "0", False), ("0", "1", False), ("", "1", False)],
)
def test_it_is_off_unless_asked_for_and_not_refused(monkeypatch, asked, refused, on):
    for name, value in ((autotune.ASK, asked), (autotune.REFUSE, refused)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert autotune.enabled() is on


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(autotune.ASK, "yes")
    with pytest.raises(UsageError, match="BSA_AUTOTUNE must be 0 or 1, got 'yes'"):
        autotune.enabled()


def test_a_search_keeps_the_fastest_that_runs():
    def measure(launch):
        return (
            None
            if launch.block_q == 128
            else 10.0 - launch.block_q / 1000 - launch.block_k / 64 - launch.num_stages + launch.num_warps
        )

    best, times = autotune.search(PRESET.launch, measure)
    assert best == Launch(64, 128, 4, 3, 168)
    assert times[best] == min(times.values())
    assert all(launch.block_q != 128 for launch in times)
    assert len(times) <= 16
    assert autotune.search(PRESET.launch, lambda launch: None)[0] == PRESET.launch


def test_what_was_found_is_kept_for_this_process_and_the_next(gpu, monkeypatch):
    best = find()
    assert best is not None
    assert best.num_stages == 3
    tried = len(gpu)
    assert find() == best
    monkeypatch.setattr(autotune, "_found", {})  # another process
    assert find() == best
    assert len(gpu) == tried
    file = autotune.cache_file(CUDA)
    assert "H100" in file.name
    assert autotune.sources_digest() in file.name
    assert json.loads(file.read_text())["a shape"]["preset_ms"] == 3.0
    assert find("another shape") == best
    assert set(json.loads(file.read_text())) == {"a shape", "another shape"}
    assert [f.name for f in file.parent.iterdir()] == [file.name]  # no temporary files


def test_other_sources_do_not_see_it(gpu, monkeypatch):
    find()
    tried = len(gpu)
    autotune._cache_file.cache_clear()
    monkeypatch.setattr(autotune, "sources_digest", lambda: "other")
    find()
    assert len(gpu) == 2 * tried
    autotune._cache_file.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a shape": 3}', '{"a shape": {"launch": {"block_q": -1, "block_k": 1}}}']
)
def test_a_broken_file_is_searched_for_anew(gpu, text):
    file = autotune.cache_file(CUDA)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert find() is not None
    assert gpu
    assert "preset_ms" in json.loads(file.read_text())["a shape"]


def test_a_folder_that_cannot_be_written_is_no_error(gpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path / "file"))
    assert find() == find()
    assert "not kept" in caplog.text


def test_nothing_is_searched_for_where_it_cannot_be(gpu, monkeypatch):
    assert find(device=torch.device("cpu")) is None
    assert find(path=Path("gluon", "", Launch(64, 64))) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert find() is None
    monkeypatch.setenv(autotune.REFUSE, "0")
    assert find() is None
    assert gpu == []


def test_a_launch_says_where_it_comes_from(gpu, monkeypatch):
    def explain(path=PRESET):
        return autotune.explain("a shape", path, CUDA)

    assert explain() == "preset until its first call, which searches"
    find()
    assert explain() == f"tuned: {autotune.cache_file(CUDA)}"
    assert explain(Path("gluon", "", Launch(64, 64))) == "preset: this kernel has nothing to tune"
    monkeypatch.setenv(autotune.REFUSE, "0")
    assert explain() == "preset: TRITON_AUTOTUNE_ENABLE=0"
    monkeypatch.delenv(autotune.REFUSE)
    monkeypatch.setenv(autotune.ASK, "0")
    assert explain() == "preset: BSA_AUTOTUNE=1 would search"


def test_the_class_of_a_shape_counts_sizes_by_powers_of_two():
    def key(heads=8, grid=(24, 44, 80), kept=82, dtype=torch.bfloat16, kernel="forward"):
        x = torch.empty(1, heads, 8, 128, dtype=dtype, device="meta")
        tile = (4, 4, 4)
        return autotune.shape_class(kernel, PRESET, x, x, grid, tile, grid, tile, "raster", kept)

    assert key() == key(grid=(24, 48, 80)) == key(kept=100)
    others = (key(heads=16), key(grid=(24, 45, 80)), key(kept=200), key(dtype=torch.float16), key(kernel="backward_q"))
    assert len({key(), *others}) == 6


def test_the_cache_folder_is_the_users(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.delenv(autotune.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert autotune.cache_file(CUDA).is_relative_to(File("/somewhere/bsa_compile/autotune"))
