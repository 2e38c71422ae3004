"""The benchmark of a whole step: what it derives, writes and compiles, at a tiny size."""

from __future__ import annotations

import json

import pytest
import torch

import bsa_compile
from bsa_compile import BSAPolicy
from bsa_compile.benchmarking import dit, model_tables
from bsa_compile.pipelines.longcat import sampling
from tests.benchmarking.support import script

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "num_heads": 2, "caption_channels": 16, "adaln_tembed_dim": 16}


@pytest.fixture(scope="module")
def bench():
    return script("dit_step")


def new(repeats=1, steps=26):
    model = {"depth": 3, "parameters": 13_600_000_000, "weights_gib": 25.33, "dtype": "bfloat16", "weights": "random"}
    refine = {"schedule_steps": 50, "shift": 1.0, "steps": steps}
    return {
        "kind": "dit_step",
        "date": "2026-01-31",
        "device": {"name": "a GPU"},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "platform": "Linux"},
        "model": model,
        "text_tokens": 8,
        "repeats": repeats,
        "refine": refine,
        "cells": [],
    }


def cell(grid, sparsity, seconds, **more):
    tokens = grid[0] * grid[1] * grid[2]
    return {"grid": list(grid), "tokens": tokens, "sparsity": sparsity, "median_s": seconds, **more}


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_the_steps_of_the_refinement_are_those_that_the_pipeline_runs(bench, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampling.set_schedule(scheduler, sampling.base_sigmas(50))
    sampling.start_at(scheduler)
    assert bench.refine_steps(shift) == len(scheduler.timesteps)


def test_ratios_and_the_extrapolation(bench):
    data = new(steps=26)
    bench.put(data, cell((48, 44, 80), None, 42.0))
    bench.put(data, cell((24, 44, 80), 0.9375, 4.0))
    assert [c["dense_takes"] for c in data["cells"]] == [None, 1.0]  # no dense cell of that grid yet
    bench.put(data, cell((24, 44, 80), None, 12.0))
    bench.put(data, cell((24, 44, 80), 0.875, 5.0))
    order = [(c["tokens"], c["sparsity"]) for c in data["cells"]]
    assert order == [(84480, None), (84480, 0.875), (84480, 0.9375), (168960, None)]
    assert [c["dense_takes"] for c in data["cells"]] == [1.0, 12 / 5, 3.0, 1.0]
    assert [c["refine_extrapolated_s"] for c in data["cells"]] == [26 * s for s in (12.0, 5.0, 4.0, 42.0)]
    bench.put(data, cell((24, 44, 80), 0.875, 6.0))
    assert [c["dense_takes"] for c in data["cells"]] == [1.0, 2.0, 3.0, 1.0]


def test_cells_share_one_model_and_blocks_share_their_code(bench, tmp_path, capsys):
    model = bsa_compile.optimize(dit.random_model(CPU, depth=6, **TINY), dynamic=False, backend="eager")
    assert next(model.parameters()).dtype == torch.bfloat16
    data, path = new(), tmp_path / "step.json"
    bench.run(data, model, [(4, 8, 8), (8, 8, 8)], [BSAPolicy(sparsity=s) for s in (0.5, 0.75)], path)
    cells = json.loads(path.read_text())["cells"]
    assert cells == data["cells"]
    assert [(c["tokens"], c["sparsity"]) for c in cells] == [(n, s) for n in (256, 512) for s in (None, 0.5, 0.75)]
    assert [c["graphs_compiled"] for c in cells] == [1] * 6
    assert all(c["finite"] and c["median_s"] > 0 and c["peak_gib"] is None for c in cells)
    assert len(model.report.rewritten) == 2 * 6  # block-sparse on both grids
    said = capsys.readouterr().out
    assert "4x8x8, dense: compiling and measuring ..." in said
    assert "8x8x8, sparsity 0.75: " in said


def test_random_weights_leave_nothing_at_zero_and_norms_at_one():
    model = dit.random_model(CPU, depth=2, **TINY)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            assert parameter.float().std() == pytest.approx(0.02, rel=0.5), name
    again = dit.random_model(CPU, depth=2, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_table_says_what_is_extrapolated(bench):
    data = new()
    bench.put(data, cell((24, 44, 80), None, 12.0, peak_gib=30.9, beyond_weights_gib=5.5))
    bench.put(data, cell((24, 44, 80), 0.9375, 4.0, peak_gib=30.9, beyond_weights_gib=5.5))
    lines = model_tables.dit_step(data).splitlines()
    assert lines[0].endswith("| refinement, 26 steps (extrapolated) |")
    assert lines[2] == "| 24x44x80, 84,480 tokens | dense | 12.00 |  | 30.9 | 5.5 | 5 min 12 s |"
    assert lines[3] == "| 24x44x80, 84,480 tokens | sparsity 0.9375 | 4.00 | 3.00x | 30.9 | 5.5 | 1 min 44 s |"
    assert "The refinement's time was not measured" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.04, "4.0 s"), (59.4, "59 s"), (59.6, "1 min"), (312, "5 min 12 s"), (3599.7, "1 h"), (3725, "1 h 2 min")],
)
def test_durations(seconds, text):
    assert model_tables._duration(seconds) == text
