"""Bad input: exit status 2, the reason on stderr, no traceback, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bsa_compile import cli as cli_module
from bsa_compile.commands.common import TINY_CHECKPOINT

SMALL = ("--grid", "4,6,6")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["compare", "--num-inference-steps", "0"], "integer >= 1"),
        (["compare", "--num-inference-steps", "many"], "integer >= 1"),
        (["compare", "--sparsity", "1.5"], "sparsity must be a number in [0, 1], got 1.5"),
        (["compare", "--sparsity", "nan"], "sparsity"),
        (["compare", "--device", "cuda:99"], "--device"),
        (["compare", "--device", "toaster"], "--device"),
        (["compare", "--device", "meta"], "--device"),
        (["compare", "--backend", "nonsense"], "--backend"),
        (["compare", "--backend", "bsa"], "--backend"),
        (["bench", "model", *SMALL, "--backend", "tvm"], "backend 'tvm' must be installed"),
        (["compare", "--mode", "fast"], "--mode"),
        (["compare", "--mode", "reduce-overhead", "--backend", "eager"], "mode and options must be left out"),
        (["bench", "model", *SMALL, "--mode", "reduce-overhead", "--backend", "eager"], "must be left out"),
        (["show", "--grid", "8,30"], "three positive integers"),
        (["show", "--grid", "8,30,-36"], "three positive integers"),
        (["show", "--cdf-threshold", "0"], "cdf_threshold must be a number in (0, 1]"),
        (["show", "--tile", "0,4,4"], "three positive integers"),
        (["show", "--grid", "100,800,800"], "tile pairs"),
        (["show", "--grid", "100000,100000,100000"], "--grid must hold at most"),
        (["show", "--head-dim", "7"], "head_dim must be a multiple of 8 in [16, 256], got 7"),
        (["show", "--head-dim", "264"], "head_dim must be"),
        (["show", "--seed", str(2**64)], "2**63"),
        (["show", "--checkpoint", TINY_CHECKPOINT, "--block", "2"], "--block must lie in 0..1"),
        (["show", "--checkpoint", "nowhere"], "'nowhere'"),
        (["show", "--output", "."], "--output must be a file"),
        (["show", "--output", "mask.jpg"], "--output must end in .png"),
        (["explain", TINY_CHECKPOINT], "--grid"),
        (["explain", TINY_CHECKPOINT, *SMALL, "--cond", "5"], "--cond must lie in 0..4"),
        (["explain", TINY_CHECKPOINT, *SMALL, "--policy", "nowhere.json"], "nowhere.json"),
        (["explain", "nowhere", *SMALL], "'nowhere'"),
        (["explain", TINY_CHECKPOINT, "--grid", "100000,100000,100000"], "--grid must hold at most"),
        (["bench"], "WHAT"),
        (["bench", "attention", "--repeats", "0"], "integer >= 1"),
        (["bench", "attention", "--dtype", "int8"], "int8"),
        (["bench", "attention", "--head-dim", "7"], "head_dim must be"),
        (["bench", "attention", "--grid", "10000000,10000000,10000000"], "--grid must hold at most"),
        (["bench", "model", "--grid", "10000000,10000000,10000000"], "--grid must hold at most"),
        (["bench", "attention", "--json", "nowhere/../"], "--json"),
        (["bench", "model", "--checkpoint", "nowhere"], "'nowhere'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input(cli, run_dir, argv, says):
    result = cli(*argv)
    assert result.status == 2
    assert says in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert list(run_dir.iterdir()) == []


def test_no_traceback_in_a_process(process):
    result = process("explain", "nowhere", *SMALL)
    assert result.status == 2
    assert result.err.startswith("bsa-compile: error: checkpoint must")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "valid JSON"),
        ("[]", "JSON object"),
        ('{"sparsty": 0.9}', "Did you mean 'sparsity'?"),
        ('{"sparsity": 2}', "sparsity must be a number in [0, 1], got 2"),
        ('{"rules": [{"role": 5, "dense": true}]}', "rule role must be one role or a list of roles, got 5"),
        ('{"rules": [{"steps": 5, "dense": true}]}', "rule steps must be a pair"),
        ('{"rules": [{"name": 5, "dense": true}]}', "rule name must be a text, got 5"),
        ('{"rules": [5]}', "rule must be a JSON object, got 5"),
        ('{"sparsity": 1' + "0" * 400 + "}", "sparsity must be a number in [0, 1]"),
        ('{"attend": "nobody"}', "attend must be one of native"),
    ],
    ids=["broken", "list", "misspelt", "range", "role", "steps", "name", "rule", "huge", "attend"],
)
def test_bad_policy_file(cli, run_dir, tmp_path, text, says):
    path = tmp_path / "policy.json"
    path.write_text(text)
    result = cli("explain", TINY_CHECKPOINT, *SMALL, "--policy", path)
    assert result.status == 2
    assert says in result.err


def test_bad_checkpoint_config(cli, tmp_path):
    config = json.loads((TINY_CHECKPOINT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_sizes": 3}))
    result = cli("explain", tmp_path, *SMALL)
    assert result.status == 2
    assert "hidden_size" in result.err


def test_output_below_a_file(cli, run_dir):
    Path("taken").write_text("mine")
    result = cli("compare", "--output", "taken/here")
    assert result.status == 2
    assert "is a file" in result.err
    assert Path("taken").read_text() == "mine"


def test_interrupt(cli, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("bsa_compile.commands.info.run", interrupted)
    result = cli("info")
    assert result.status == cli_module.EXIT_INTERRUPTED
    assert "interrupted" in result.err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")],
    ids=["py", "torch"],
)
def test_out_of_memory(cli, monkeypatch, error):
    def greedy(args):
        raise error

    monkeypatch.setattr("bsa_compile.commands.info.run", greedy)
    result = cli("info")
    assert result.status == 2
    assert "out of memory" in result.err


def test_a_bug_of_ours_is_not_hidden(cli, monkeypatch):
    def broken(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("bsa_compile.commands.info.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("info")


def test_missing_matplotlib(cli, run_dir, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = cli("show", *SMALL)
    assert result.status == 2
    assert "pip install 'bsa-compile[viz]'" in result.err
    assert list(run_dir.iterdir()) == []
