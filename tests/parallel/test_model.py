"""What holds whichever way ranks exchange: LoRA, selections, compiled code, meshes that are refused."""

from __future__ import annotations

import unittest.mock

import pytest
import torch

from tests.pipelines.support import write_lora

from . import jobs, refused
from .jobs import Case, model_of


def test_lora(pool, tmp_path):
    path = tmp_path / "style.safetensors"
    write_lora(path, model_of_one_process(), seed=3)
    for errors in pool.run(2, jobs.with_lora, Case((4, 5, 6), {"context": 2}), str(path)):
        assert max(errors) < 1e-5


def model_of_one_process():
    with unittest.mock.patch.object(jobs, "device", return_value=torch.device("cpu")):
        return model_of(4)


@pytest.mark.parametrize(
    "case",
    [Case((5, 6, 7), {"context": 3}), Case((5, 7, 6), {"ring": 2}), Case((4, 5, 9), {"ring": 2, "ulysses": 2})],
    ids=str,
)
def test_selections_are_those_of_one_process(pool, case):
    total = 0
    for rows, different, worst in pool.run(case.ranks, jobs.selections, case):
        assert rows > 0
        assert worst < 1e-5, f"{different} of {rows} rows"
        total += different
    print(f"{total} rows differ")


@pytest.mark.parametrize(
    ("case", "compiler", "regional", "graphs"),
    [
        (Case((3, 4, 5), {"context": 2}, cond=1), "aot_eager", True, 1),
        (Case((3, 4, 5), {"context": 2}, cond=1), "aot_eager", False, 1),
        (Case((3, 4, 5), {"ring": 2}), "inductor", True, 1),
        (Case((3, 4, 5), {"context": 2}), "inductor", True, 1),
    ],
    ids=str,
)
def test_compiled_without_a_graph_break(pool, case, compiler, regional, graphs):
    for output, gradient, count in pool.run(case.ranks, jobs.compiled, case, compiler, regional):
        assert output < 1e-5
        assert gradient < 1e-5
        assert count == graphs


def test_meshes_and_models_that_cannot_be_used(pool):
    (said, _) = pool.run(2, refused.messages)
    assert "mesh must be a DeviceMesh, got str" in said["no mesh"]
    assert "'cfg', got ('rows',)" in said["unknown name"]
    assert "at most as many Ulysses ranks as heads (1), got 2" in said["too few heads"]
    assert "mesh_timeout must be a number of seconds > 0" in said["timeout"]
    assert "LongCatVideoTransformer3DModel with mesh=, got Linear" in said["another model"]


@pytest.mark.parametrize("mesh", [{"context": 2}, {"ring": 2}], ids=str)
def test_one_graph_with_checkpointed_blocks_trains(pool, mesh):
    for errors in pool.run(2, jobs.gradients_whole, Case((3, 4, 6), mesh, cond=1)):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("mesh", [{"context": 2}, {"ring": 2}], ids=str)
def test_autocast(pool, mesh):
    for error, dtype in pool.run(2, jobs.under_autocast, Case((3, 4, 6), mesh)):
        assert error < 1e-2  # bf16: its own rounding is 4e-3
        assert dtype == "torch.float32"
