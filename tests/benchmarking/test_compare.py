"""Comparisons with peers, which stand in for themselves here."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bsa_compile import reference
from bsa_compile.benchmarking import compare as comparing
from bsa_compile.benchmarking import participants, plots, tables
from bsa_compile.benchmarking.compare import Case, Lost, Run, compare, plan
from bsa_compile.benchmarking.problem import Problem, Setting
from bsa_compile.errors import UsageError
from bsa_compile.selection import BlockSelection
from tests.library_stand_ins import stand_in

CPU = torch.device("cpu")
SETTING = Setting((4, 8, 8), (4, 4, 4), 2, 16, torch.float32, 0.5)
NAMES = ("bsa_compile", "cuDNN frontend BSA", "FlashAttention-4")


def quick(**changes) -> Run:
    return Run(CPU, repeats=1, rounds=1, **changes)


def test_a_plan_varies_one_thing_at_a_time():
    base = Setting((8, 8, 16), (4, 4, 4), 1, 16, torch.float32, 0.75)
    cases = plan(base, ((4, 4, 4), (4, 4, 8)), ("gate", "random"), ("sparsity", "tokens", "kept"))
    assert len({case.name for case in cases}) == len(cases)
    assert [case.dense for case in cases[:4]] == [True, False, False, False]
    kept = [case.setting for case in cases if case.sweep == "kept" and case.setting.tile == (4, 4, 4)]
    assert {setting.kept for setting in kept} == {4}
    assert {setting.grid[0] for setting in kept} == {4, 16, 32}
    assert all(case.setting.whole_tiles for case in cases)
    assert len(plan(base, ((4, 4, 4),), ("random",), ())) == 1


@pytest.mark.parametrize("lists", ["gate", "random"])
@pytest.mark.parametrize("keep", [None, 3])
def test_a_problem_has_the_lists_that_were_asked_for(lists, keep):
    setting = Setting((4, 8, 10), (4, 4, 4), 2, 16, torch.float32, 0.5, lists, keep)
    problem = Problem(setting, CPU)
    BlockSelection(problem.counts, problem.lists, setting.num_tiles).validate()
    assert set(problem.counts.flatten().tolist()) == {setting.kept} == {keep or 3}
    assert 0 <= problem.shared <= 1
    mask = reference.token_mask(problem.counts, problem.lists, *problem.grids, "raster")
    assert problem.pairs(dense=False) == int(mask.sum())
    assert problem.pairs(dense=True) == 2 * 320**2


@pytest.mark.parametrize("dense", [False, True])
def test_the_truth_is_the_references(dense):
    setting = Setting((4, 8, 10), (4, 4, 4), 2, 16, torch.float32, 0.5)  # partial tiles
    problem = Problem(setting, CPU)
    lists = BlockSelection.from_dense(torch.ones(1, 2, 6, 6, dtype=torch.bool))
    given = (lists.kv_num_blocks, lists.kv_indices) if dense else (problem.counts, problem.lists)
    tail = (*given, *problem.grids, setting.scale, "raster")
    out, lse = reference.attend(*problem.qkv, *tail)
    grads = reference.attend_backward(problem.sampled_grad, None, *problem.qkv, *tail)
    assert len(problem.truths(dense)) == 2
    for truth in problem.truths(dense):
        at = (0, truth.head)
        for got, want in zip(
            (truth.out, truth.lse, truth.dq, truth.dk, truth.dv),
            (out[at][truth.rows], lse[at][truth.rows], grads[0][at][truth.rows], grads[1][at], grads[2][at]),
            strict=True,
        ):
            assert torch.allclose(got, want, atol=1e-9)


def test_every_participant_is_checked_timed_and_set_against_ours(monkeypatch):
    calls = stand_in(monkeypatch)
    saved = []
    run = quick(save=lambda data: saved.append(json.loads(json.dumps(data))))
    data = compare([Case("one", SETTING, dense=True)], run)
    (entry,) = data["cases"]
    assert "doing" not in data
    assert len(saved) > 5
    found = entry["participants"]
    variants = {"bsa_compile, deterministic", "FlashAttention-4, lists given", "cuDNN frontend BSA, kv_splits auto"}
    assert set(found) == {*NAMES, *variants, "dense torch"}
    assert set(entry["absent"]) == {"FlexAttention", "dense cuDNN", "dense FlashAttention-2", "dense FlashAttention-4"}
    assert {"forward", "backward"} <= set(calls)
    for name in NAMES:
        assert {"out", "lse", "dq", "dk", "dv"} == set(found[name]["errors"])
        assert max(found[name]["errors"].values()) < 1e-4
        assert {"forward_ms", "backward_ms", "op_forward_ms"} <= set(found[name])
    for name in NAMES[1:]:
        assert found[name]["forward_ratio"] == found[name]["forward_ms"] / found["bsa_compile"]["forward_ms"]
        assert found[name]["op_backward_ratio"] == found[name]["op_backward_ms"] / found["bsa_compile"]["backward_ms"]
    assert "forward_ms" not in found["FlashAttention-4, lists given"]
    dense = found["dense torch"]
    assert dense["op_forward_ratio"] == dense["forward_ms"] / found["bsa_compile"]["op_forward_ms"]
    assert dense["forward_tflops"] == pytest.approx(4 * 16 * 2 * 256**2 / dense["forward_ms"] / 1e9)
    ours = found["bsa_compile"]
    assert ours["backward_tflops"] == pytest.approx(10 * 16 * 256**2 / ours["backward_ms"] / 1e9)  # half of the pairs


def test_wrong_results_are_not_timed_and_errors_do_not_stop_the_rest(monkeypatch):
    stand_in(monkeypatch)
    right = sys.modules["cudnn"].BSA.block_sparse_attention_forward

    def wrong(*args, **options):
        result = right(*args, **options)
        return {**result, "o_tensor": result["o_tensor"] * 1.01}

    def broken(*args, **options):
        raise ValueError("no kernel\nfor this")

    monkeypatch.setattr(sys.modules["cudnn"].BSA, "block_sparse_attention_forward", wrong)
    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", broken)
    (entry,) = compare([Case("one", SETTING)], quick())["cases"]
    found = entry["participants"]
    assert found["cuDNN frontend BSA"]["failed"].startswith("wrong results, relative errors against fp64: out 1.0e-02")
    assert "forward_ms" not in found["cuDNN frontend BSA"]
    assert found["FlashAttention-4"] == {"failed": "ValueError: no kernel for this"}
    assert found["bsa_compile"]["forward_ms"] > 0
    text = "\n".join(tables.remarks(entry))
    assert "cuDNN frontend BSA: failed (wrong results" in text
    assert "FlexAttention: absent (it needs a CUDA GPU, got cpu)" in text


def test_partial_tiles_leave_ours_alone(monkeypatch):
    setting = Setting((4, 8, 10), (4, 4, 4), 1, 16, torch.float32, 0.5)
    (entry,) = compare([Case("partial", setting, measures=("forward",))], quick())["cases"]
    assert set(entry["participants"]) == {"bsa_compile"}
    assert entry["participants"]["bsa_compile"]["forward_ms"] > 0


def test_nothing_is_begun_when_the_time_is_up():
    data = compare([Case("one", SETTING), Case("two", SETTING)], quick(budget=-1.0))
    assert data == {"cases": [], "left_out": ["one", "two"]}


def test_a_lost_gpu_ends_the_run(monkeypatch):
    def lose(device, name):
        raise Lost(f"{name} left the GPU unusable")

    def broken(problem):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(comparing, "_still_there", lose)
    monkeypatch.setitem(participants.SPARSE, "FlexAttention", broken)
    saved = []
    data = compare([Case("one", SETTING), Case("two", SETTING)], quick(save=saved.append))
    assert data["stopped"] == "FlexAttention left the GPU unusable"
    assert [entry["name"] for entry in data["cases"]] == ["one"]
    assert saved[-1]["stopped"]


def test_lists_are_among_those_known():
    with pytest.raises(UsageError, match="gate, random"):
        Setting((4, 8, 8), (4, 4, 4), 2, 16, torch.float32, 0.5, "other")
    with pytest.raises(UsageError, match=r"lie in \[1, 4\]"):
        Setting((4, 8, 8), (4, 4, 4), 2, 16, torch.float32, 0.5, keep=5)


def test_tables_and_plots_are_made_from_the_json(monkeypatch, tmp_path):
    stand_in(monkeypatch)
    cases = plan(SETTING, ((4, 4, 4),), ("gate",), ("sparsity", "tokens"))[:4]
    data = json.loads(json.dumps({"device": {"name": "a CPU"}, **compare(cases, quick())}))
    entry = data["cases"][0]
    share = f"w-neighbours share {100 * entry['shared_fraction']:.0f}% of their blocks"
    assert share in tables.heading(entry)
    header, first, *_ = tables.rows(entry)
    assert len(header) == len(first)
    assert first[0] == "bsa_compile"
    text = tables.markdown(data, entry)
    assert share in text
    assert "dense torch:" in text
    assert set(tables.speedups(data, data["cases"][1])) == {"dense torch"}  # measured in another case of as many tokens
    lines = plots.lines(data["cases"], "forward", lambda case: case["sparsity"], dense=False)
    assert [x for x, _ in lines["bsa_compile, tile 4x4x4"]] == sorted({case["sparsity"] for case in data["cases"]})
    pytest.importorskip("matplotlib")
    plots.save(data, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
