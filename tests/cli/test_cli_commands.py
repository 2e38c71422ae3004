"""The commands on small sizes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import bsa_compile
from bsa_compile.commands import common, console, info
from bsa_compile.commands.explain import collapsed, ranges
from bsa_compile.policy import BSAPolicy, keep_count
from bsa_compile.report import Site

TINY = common.TINY_CHECKPOINT
SMALL = ("--grid", "5,9,10")  # no side is a multiple of 4
PNG = b"\x89PNG\r\n\x1a\n"


def assert_png(path: Path) -> None:
    data = path.read_bytes()
    assert data.startswith(PNG)
    assert data.rstrip().endswith(b"IEND\xaeB`\x82")


def test_help_in_a_process(process):
    result = process("--help")
    assert result.status == 0
    assert all(name in result.out for name in ("info", "explain", "bench", "show", "generate", "compare"))
    assert result.err == ""


def test_version(cli):
    assert cli("--version").out == f"bsa-compile {bsa_compile.__version__}\n"


@pytest.mark.parametrize("command", ["info", "explain", "bench", "show", "generate", "compare"])
def test_help_of_a_command(cli, command):
    result = cli(command, "--help")
    assert result.status == 0
    assert result.out.startswith(f"usage: bsa-compile {command}")


# ------------------------------------------------------------------------------------------------------------- info


def test_info(cli):
    result = cli("info")
    assert result.status == 0
    assert f"bsa_compile  {bsa_compile.__version__}" in result.out
    assert "native, auto" in result.out or "auto, " in result.out
    assert "cudnn: not installed (extra peers)" in result.out


def test_info_tells_of_a_gpu_which_kernel_a_shape_gets_and_why(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("BSA_AUTOTUNE", raising=False)
    monkeypatch.setattr(info.torch.cuda, "get_device_name", lambda device=None: "a GPU")
    paths = info.sample_paths(info.torch.device("cpu"), (8, 8, 8), (4, 4, 8))
    assert [path["call"].split(",")[0] for path in paths] == ["forward", "backward_q", "backward_k"]
    assert paths[0]["path"] == "box"
    assert paths[0]["launch"]["block_k"] == 64
    assert paths[0]["launch_from"] == "preset: BSA_AUTOTUNE=1 would search"
    assert paths[0]["auto"].startswith("native (")
    data = {"versions": {}, "devices": [], "libraries": {}, "extras": {"viz": {}}, "attend_implementations": []}
    ops = [{"device": "cuda:0", "implementation": "Triton kernels", "reason": "", "paths": paths}]
    text = info.as_text({**data, "ops": ops})
    assert "block_k 64" in text
    assert 'attend="auto": native' in text


def test_info_json_without_triton(cli, monkeypatch):
    monkeypatch.setattr(common, "installed_version", lambda name: None)
    data = cli("info", "--json").json
    assert data["versions"]["triton"] is None
    assert data["devices"][0]["device"] == "cpu"
    assert data["ops"][0]["device"] == "cpu"
    assert data["extras"]["viz"] == {"matplotlib": None}


# ---------------------------------------------------------------------------------------------------------- explain


@pytest.mark.filterwarnings("error:enable_bsa was asked for")  # of the count of operations, which runs dense
def test_explain(cli):
    result = cli("explain", TINY, "--grid", "8,30,36")
    assert result.status == 0
    assert "2 of 4 attention sites block-sparse" in result.out
    assert "blocks.0-1.attn" in result.out
    assert "blocks.0-1.cross_attn" in result.out
    assert "93.75%" in result.out


def test_explain_json(cli):
    data = cli("explain", TINY, *SMALL, "--sparsity", 0.75, "--json").json
    tiles = 2 * 3 * 3
    kept = keep_count(tiles, 0.75)
    assert data["attention"]["effective_sparsity"] == pytest.approx(1 - kept / tiles)
    assert data["attention"]["flops"] < data["attention"]["dense_flops"]
    assert data["report"]["rewritten"] == 2
    linears = 12 * 2 * 450 * 128**2  # a lower bound: qkv, projections and the feed-forward of one block
    assert data["other_flops"] > linears


def test_explain_says_who_attends_and_why(cli, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(BSAPolicy(attend="auto").to_json())
    result = cli("explain", TINY, *SMALL, "--policy", policy)
    assert "attend by native (auto: the device that runs it decides)" in result.out


def test_explain_reads_the_parent_folder(cli, tmp_path):
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").write_bytes((TINY / "config.json").read_bytes())
    data = cli("explain", tmp_path, *SMALL, "--json").json
    assert data["report"]["rewritten"] == 2


def test_explain_cond_frames(cli):
    sites = cli("explain", TINY, *SMALL, "--cond", 1, "--json").json["report"]["sites"]
    assert {site["role"] for site in sites if site["rewritten"]} == {"cond", "noise"}


def test_explain_a_single_image(cli):
    data = cli("explain", TINY, "--grid", "1,8,8", "--json").json
    assert data["report"]["rewritten"] == 0
    assert data["attention"]["saved"] == 0
    assert "image" in {site["reason"] for site in data["report"]["sites"]}


def test_explain_what_the_data_decides(cli):
    result = cli("explain", TINY, *SMALL, "--cdf-threshold", 0.9)
    assert result.status == 0
    assert "by data" in result.out
    assert "depends on the data" in result.out


def test_explain_a_policy_file_and_its_steps(cli, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(BSAPolicy(sparsity=0.5, dense_steps=2).to_json())
    at = {step: cli("explain", TINY, *SMALL, "--policy", path, "--step", step, "--json").json for step in (0, 2)}
    assert at[0]["report"]["rewritten"] == 0
    assert at[2]["report"]["rewritten"] == 2
    unknown = cli("explain", TINY, *SMALL, "--policy", path)
    assert "note: dense_steps" in unknown.out


def test_ranges():
    assert ranges([5, 0, 1, 2, 9]) == "0-2,5,9"


def test_collapsed_keeps_different_blocks_apart():
    def site(module: str, reason: str = "rewritten") -> Site:
        return Site(module=module, role="self", rewritten=reason == "rewritten", reason=reason)

    sites = [site(f"blocks.{i}.attn") for i in range(3)] + [site("blocks.3.attn", "rule"), site("")]
    assert [name for name, _ in collapsed(sites)] == ["blocks.0-2.attn", "blocks.3.attn", "<root>"]


# ------------------------------------------------------------------------------------------------------------ bench


def test_bench_attention(cli, tmp_path):
    path = tmp_path / "new" / "bench.json"
    result = cli("bench", "attention", *SMALL, "--repeats", 2, "--sparsity", 0.5, "--device", "cpu", "--json", path)
    assert result.status == 0
    assert f"torch {__import__('torch').__version__}" in result.out
    data = json.loads(path.read_text())
    assert data["kept"] == 0.5
    assert f"w-neighbours share {data['shared_fraction']:.0%} of their blocks" in result.out
    assert len(data["times"]["dense"]["seconds"]) == 2
    assert set(data["times"]) == {"dense", "block-sparse", "pool and select", "attend"}


def test_bench_attention_beside_its_peers(cli, tmp_path):
    path, sizes = tmp_path / "peers.json", ("--grid", "4,4,8", "--heads", 1, "--head-dim", 16)
    options = ("--peers", "--device", "cpu", "--repeats", 1, "--rounds", 1, "--lists", "gate", "--tile", "4,4,4")
    result = cli("bench", "attention", *options, *sizes, "--sparsity", 0.5, "--json", path)
    assert result.status == 0
    (entry,) = json.loads(path.read_text())["cases"]
    assert entry["kept_tiles"] == 1
    assert f"w-neighbours share {100 * entry['shared_fraction']:.0f}% of their blocks" in result.out
    assert "FlashAttention-4: absent (flash-attn-4 is not installed: pip install 'bsa-compile[peers]')" in result.out
    assert "tile 4x4x4, gate lists" in result.err
    result = cli("bench", "attention", *options, "--cdf-threshold", 0.5)
    assert result.status == 2
    assert "--peers must go with --sparsity and --tile" in result.err
    assert "must be among gate, random, got 'other'" in cli("bench", "attention", "--peers", "--lists", "other").err


def test_bench_model(cli):
    result = cli("bench", "model", *SMALL, "--repeats", 1, "--device", "cpu", "--backend", "eager", "--json", "-")
    assert result.json["report"]["rewritten"] == 2
    assert result.json["speedup"] > 0
    assert result.json["checkpoint"] == "tiny_longcat"


# ------------------------------------------------------------------------------------------------------------- show


def test_show_random(cli, tmp_path):
    path = tmp_path / "new" / "mask.png"
    result = cli("show", *SMALL, "--heads", 3, "--tile", "4,4,8", "--output", path, "--json")
    assert_png(path)
    assert result.json["tile_q"] == [4, 4, 8]
    assert result.json["kept_per_head"] == [pytest.approx(1 / 12)] * 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_show_checkpoint(cli, run_dir):
    result = cli("show", *SMALL, "--checkpoint", TINY, "--block", 1, "--cdf-threshold", 0.5)
    assert result.status == 0
    assert "of tile pairs kept" in result.out
    assert_png(Path("block_mask.png"))


def test_show_refuses_a_dense_site(cli, run_dir, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(BSAPolicy.dense().to_json())
    result = cli("show", *SMALL, "--policy", path)
    assert result.status == 2
    assert "switched off" in result.err
    assert list(run_dir.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- manners


def test_log_level_before_and_after_the_command(cli):
    line = "Enabling Block Sparse Attention (BSA)"
    assert line in cli("--log-level", "info", "explain", TINY, *SMALL).err
    assert line in cli("explain", TINY, *SMALL, "--log-level", "info").err
    assert line not in cli("explain", TINY, *SMALL).err
    assert not logging.getLogger("bsa_compile").handlers


def test_progress_only_on_a_terminal(capsys, monkeypatch):
    with console.Progress(1) as progress:
        progress("working")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with console.Progress(2) as progress:
        progress("working")
    assert "[1/2] working ..." in capsys.readouterr().err


def test_json_has_no_nan():
    assert json.loads(console.json_text({"a": [float("nan"), 1.0], "b": float("inf")})) == {"a": [None, 1.0], "b": None}
