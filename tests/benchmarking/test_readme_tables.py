"""README's tables of results are made from files."""

from __future__ import annotations

import json

import pytest
import torch

from bsa_compile.benchmarking.compare import Case, Run, compare
from bsa_compile.benchmarking.problem import Setting
from tests.benchmarking.support import script as script_of

PAGE = "before\n<!-- results: peers.json | one -->\nold\n<!-- end of results -->\nafter\n"


@pytest.fixture(scope="module")
def script():
    return script_of("readme_tables")


def test_the_readme_is_what_its_results_give(script):
    assert script.main(["--check"]) == 0


def test_a_table_of_a_comparison(script, tmp_path, monkeypatch, capsys):
    setting = Setting((4, 4, 8), (4, 4, 4), 1, 16, torch.float32, 0.5)
    data = compare([Case("one", setting, measures=("forward",))], Run(torch.device("cpu"), 1, 1))
    about = {"versions": {"torch": "2", "triton": None}, "device": {"name": "a CPU"}, "date": "today", "legend": "L."}
    (tmp_path / "peers.json").write_text(json.dumps({**data, **about}))
    new = script.rewritten(PAGE, tmp_path)
    assert new.startswith("before\n<!-- results: peers.json | one -->\n**tile 4x4x4, gate lists, w-neighbours share ")
    assert "\n| bsa_compile | " in new
    assert "L. a CPU, today; torch 2 ([figures](benchmarks/results/peers.json)).\n<!-- end of results -->\nafter" in new
    assert script.rewritten(new, tmp_path) == new

    monkeypatch.setattr(script, "rewritten", lambda text: new)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert script.main(["--check", "--file", str(page)]) == 1
    assert "page.md is not what its results give" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert script.main(["--file", str(page)]) == 0
    assert page.read_text() == new


@pytest.mark.parametrize("kind", ["dit_step", "quality", "parallel"])
def test_a_table_of_a_whole_model(script, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(script.model_tables, kind, lambda data: f"| {data['kind']} |\n\nWords.")
    about = {"versions": {"torch": "2", "triton": None}, "device": {"name": "a GPU"}, "date": "today"}
    (tmp_path / "found.json").write_text(json.dumps({"kind": kind, **about}))
    page = "<!-- results: found.json -->\n<!-- end of results -->\n"
    wanted = f"| {kind} |\n\nWords. a GPU, today; torch 2 ([figures](benchmarks/results/found.json)).\n"
    assert script.rewritten(page, tmp_path) == page.replace(">\n<", f">\n{wanted}<")


def test_a_table_of_many_gpus(script):
    def of(one, shared, communication, hidden, peaks):
        trace = {"communication_ms": communication, "hidden_ms": hidden, "work_ms": 1.0}
        first, second = [{"median_s": s, "peak_gib": p} for s, p in zip((one, shared), peaks, strict=True)]
        return {"one": first, "shared": second, "overlap": trace}

    step = of(3.0, 1.5, 200.0, 150.0, (30.0, 31.0))
    step |= {"sharded_weights": {"median_s": 2.0, "peak_gib": 15.0}, "overlap_sharded": step["overlap"]}
    row = {"grid": [2, 3, 4], "attention": of(0.015, 0.010, 2.0, 0.0, (4.0, 3.0)), "step": step}
    about = {"ranks": 2, "mesh": "ring", "depth": 8, "sparsity": 0.5, "nccl": "2", "text_tokens": 8, "repeats": 3}
    lines = script.model_tables.parallel({**about, "grids": [row]}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert all(cell[0] == "2x3x4, 24 tokens" for cell in cells)
    assert [cell[2:] for cell in cells] == [
        ["15.0 ms", "10.0 ms", "1.50x", "2.0 ms", "0%", ""],
        ["3.00 s", "1.50 s", "2.00x", "200.0 ms", "75%", "30.0 → 31.0 (103%)"],
        ["3.00 s", "2.00 s", "1.50x", "200.0 ms", "75%", "30.0 → 15.0 (50%)"],
    ]
    assert "Mesh dimension `ring`, 8 blocks" in lines[-1]


def test_a_table_of_kernels(script):
    found = script.table(script.RESULTS, "2026-11-23-h100-attend.json", None).splitlines()
    assert found[:2] == ["| what | ms | TFLOP/s | dense cuDNN takes |", "|---|---:|---:|---:|"]
    assert all(line.count("|") == 5 for line in found[2:-2])


def test_what_a_marker_names_must_be_there(script, tmp_path):
    with pytest.raises(SystemExit, match=r"names 'peers.json', which is not in"):
        script.rewritten(PAGE, tmp_path)
    (tmp_path / "peers.json").write_text('{"cases": [{"name": "two"}]}')
    with pytest.raises(SystemExit, match=r"case 'one', which 'peers.json' has not. Its cases: two"):
        script.rewritten(PAGE, tmp_path)
    with pytest.raises(SystemExit, match="no line"):
        script.rewritten("nothing", tmp_path)
