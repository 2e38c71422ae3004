"""`bsa-compile export` and `bsa-compile rewrite`, and their files in a process of their own."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from onnxruntime import InferenceSession

from bsa_compile.commands import common

from ..export.support import PatchAttention, run_python

GRID = "4,6,8"

RUN_ONNX = """
import sys, onnxruntime, torch
assert "bsa_compile" not in sys.modules
inputs, expected = torch.load(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(got,) = session.run(["noise_pred"], {name: x.numpy() for name, x in inputs.items()})
print(float((torch.from_numpy(got) - expected).norm() / expected.norm()))
"""
RUN_PROGRAM = """
import sys, torch, bsa_compile
inputs, expected = torch.load(sys.argv[2])
got = torch.export.load(sys.argv[1]).module()(*inputs.values())
assert len(bsa_compile.report_of(torch.export.load(sys.argv[1])).rewritten) == 2
print(float((got - expected).norm() / expected.norm()))
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A file with the inputs of one call of the tiny checkpoint, and what it computes block-sparse."""
    import bsa_compile
    from bsa_compile.models.longcat import LongCatVideoTransformer3DModel

    model = LongCatVideoTransformer3DModel.from_pretrained(common.TINY_CHECKPOINT).eval()
    grid = common.check_grid((4, 6, 8))
    made = common.model_inputs(model, grid, text_tokens=16)
    inputs = {name: made[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")}
    fast = bsa_compile.optimize(model, bsa_compile.BSAPolicy(sparsity=0.75), backend="eager")
    with torch.no_grad():
        expected = fast(*inputs.values())
    path = tmp_path_factory.mktemp("case") / "case.pt"
    torch.save((inputs, expected), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("onnx", RUN_ONNX), ("pt2", RUN_PROGRAM)])
def test_the_tiny_checkpoint_leaves_the_process(process, case, tmp_path, kind, code):
    path = tmp_path / f"tiny.{kind}"
    options = ("--grid", GRID, "--text-tokens", 16, "--sparsity", 0.75, "--format", kind, "--output", path, "--json")
    result = process("export", common.TINY_CHECKPOINT, *options, "--dynamic-batch")
    assert result.status == 0, result.err
    assert (result.json["rewritten"], result.json["format"]) == (2, kind)
    assert float(run_python(code, path, case)) < 1e-5


@pytest.mark.slow
def test_an_onnx_file_of_others_is_rewritten(cli, tmp_path):
    torch.manual_seed(0)
    model, x = PatchAttention().eval(), torch.randn(1, 3, 4, 12, 16)
    dense, sparse = tmp_path / "dense.onnx", tmp_path / "sparse.onnx"
    torch.onnx.export(model, (x,), dense, dynamo=True, opset_version=20, verbose=False)
    result = cli("rewrite", dense, "--grid", GRID, "--sparsity", 0, "--output", sparse, "--json")
    assert result.status == 0, result.err
    assert (result.json["rewritten"], result.json["dense"]) == (1, 0)
    outputs = [InferenceSession(path).run(None, {"x": x.numpy()})[0] for path in (dense, sparse)]
    torch.testing.assert_close(*map(torch.from_numpy, outputs), rtol=1e-5, atol=1e-5)
    (report,) = (p.value for p in onnx.load(sparse).metadata_props if p.key == "bsa_compile")
    assert json.loads(report)["rewritten"] == 1
    again = cli("rewrite", sparse, "--grid", GRID, "--output", sparse)
    assert again.status == 0
    assert "0 of 0 attention sites" in again.out


def test_bad_input_is_one_line(cli, tmp_path):
    output = tmp_path / "model.onnx"
    cases = [
        ((tmp_path, "--grid", GRID), "checkpoint must be a folder that holds config.json"),
        ((common.TINY_CHECKPOINT, "--grid", GRID, "--opset", 5), "opset must"),
        ((common.TINY_CHECKPOINT, "--grid", GRID, "--cond", 5), "--cond must lie in 0..4"),
        ((common.TINY_CHECKPOINT, "--grid", "4,6"), "must be three positive integers"),
        ((common.TINY_CHECKPOINT, "--grid", GRID, "--policy", tmp_path / "none.json"), "--policy must be a readable"),
    ]
    for argv, message in cases:
        result = cli("export", *argv, "--output", output)
        assert result.status == 2
        assert message in result.err
        assert "Traceback" not in result.err
    assert cli("export", common.TINY_CHECKPOINT, "--grid", GRID, "--output", tmp_path).status == 2
    missing = cli("rewrite", tmp_path / "none.onnx", "--grid", GRID, "--output", output)
    assert missing.status == 2
    assert "none.onnx" in missing.err
    assert not list(tmp_path.iterdir())
