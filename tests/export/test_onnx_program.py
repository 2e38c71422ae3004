"""`export_onnx`: onnxruntime computes from the file what torch computes."""

from __future__ import annotations

import builtins
import json
import os

import onnx
import onnx.checker
import onnxruntime
import pytest
import torch
from torch import Tensor

import bsa_compile
from bsa_compile.commands.common import TINY_CHECKPOINT
from bsa_compile.errors import ExportError, GridError, MissingExtraError, UsageError
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.policy import BSAPolicy

from ..compile.support import make_longcat, relative_error
from .support import GRID, POLICIES, PatchAttention, call, tensors

POLICY = POLICIES["count"]
NODE = ("ai.bsa", "GatedBlockSparseAttention")


@pytest.fixture(scope="module")
def model():
    return make_longcat(depth=1)


def run(path, inputs: list[Tensor]) -> list[Tensor]:
    """Run a file on the CPU with inputs in their order."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(x) for x in outputs]


def nodes(path) -> list[tuple[str, str]]:
    return [(n.domain, n.op_type) for n in onnx.load(path, load_external_data=False).graph.node]


@pytest.fixture(scope="module")
def tiny():
    """The checkpoint that the project ships."""
    return LongCatVideoTransformer3DModel.from_pretrained(TINY_CHECKPOINT).eval()


def compare(model, policy, name, opset, path) -> None:
    """Export one call, check the file, and compare its outputs with torch's."""
    args, kwargs = call(model, name)
    report = bsa_compile.export_onnx(model, policy, args, path, kwargs, opset=opset)
    onnx.checker.check_model(path, full_check=True)
    attentions = len(model.blocks) * (2 if name == "cond" else 1)
    assert nodes(path).count(NODE) == len(report.rewritten) == attentions
    assert {o.domain: o.version for o in onnx.load(path).opset_import} == {"": opset, "ai.bsa": 1}
    expected = tensors(bsa_compile.export(model, policy, args, kwargs).module()(*args, **kwargs))
    got = run(path, tensors((args, kwargs)))
    assert max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "criterion", "opset"), [("plain", "count", 23), ("cond", "mass", 20), ("cached", "both", 22)]
)
@torch.no_grad()
def test_the_tiny_checkpoint(tiny, tmp_path, name, criterion, opset):
    compare(tiny, POLICIES[criterion], name, opset, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "criterion", "opset"),
    [("plain", "mass", 20), ("cond", "both", 23), ("encode", "count", 21), ("cached", "mass", 23)],
)
@torch.no_grad()
def test_computes_what_torch_computes(model, tmp_path, name, criterion, opset):
    compare(model, POLICIES[criterion], name, opset, tmp_path / "model.onnx")


@pytest.mark.filterwarnings("error::FutureWarning")  # torch's, of how it copies programs
@torch.no_grad()
def test_any_batch_and_the_report_in_the_file(model, tmp_path):
    args, _ = call(model, "plain")
    batch, path = torch.export.Dim("batch"), tmp_path / "model.onnx"
    shapes = ({0: batch}, {0: batch}, {0: batch})
    names = ["latents", "timestep", "text"]
    report = bsa_compile.export_onnx(
        model, POLICY, args, path, dynamic_shapes=shapes, input_names=names, output_names=["flow"]
    )
    program = bsa_compile.export(model, POLICY, args, dynamic_shapes=shapes).module()
    for size in (1, 3):
        inputs = call(model, "plain", size)[0]
        assert relative_error(run(path, list(inputs))[0], program(*inputs)) < 1e-5
    loaded = onnx.load(path)
    assert [i.name for i in loaded.graph.input] == names
    assert [o.name for o in loaded.graph.output] == ["flow"]
    (written,) = (p.value for p in loaded.metadata_props if p.key == "bsa_compile")
    assert json.loads(written) == json.loads(report.to_json())


@pytest.mark.parametrize("opset", [20, 23])
@torch.no_grad()
def test_sparsity_0_equals_the_dense_export(tmp_path, opset):
    torch.manual_seed(0)
    model, x = PatchAttention().eval(), torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    for name, policy in (("all", BSAPolicy(sparsity=0.0)), ("dense", BSAPolicy.dense())):
        bsa_compile.export_onnx(model, policy, (x,), tmp_path / f"{name}.onnx", opset=opset)
    assert nodes(tmp_path / "all.onnx").count(NODE) == 1
    assert nodes(tmp_path / "dense.onnx").count(NODE) == 0
    got, dense = (run(tmp_path / f"{name}.onnx", [x])[0] for name in ("all", "dense"))
    assert relative_error(got, dense) < 1e-5
    assert relative_error(dense, model(x)) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-2), (torch.bfloat16, None)])
@torch.no_grad()
def test_half_precision(tmp_path, dtype, bound):
    torch.manual_seed(0)
    model = PatchAttention().eval().to(dtype)
    x = torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2], dtype=dtype)
    path = tmp_path / "model.onnx"
    report = bsa_compile.export_onnx(model, POLICY, (x,), path)
    assert len(report.rewritten) == 1
    onnx.checker.check_model(path, full_check=True)
    if bound is not None:  # onnxruntime's CPU has no bfloat16 kernels
        assert relative_error(run(path, [x])[0], bsa_compile.export(model, POLICY, (x,)).module()(x)) < bound


@torch.no_grad()
def test_bfloat16_needs_an_opset_whose_operators_take_it(tmp_path):
    model, path = PatchAttention().eval().bfloat16(), tmp_path / "model.onnx"
    x = torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2], dtype=torch.bfloat16)
    with pytest.raises(
        UsageError, match=r"opset must be one with bfloat16 for this model, got 21, whose Conv has none"
    ):
        bsa_compile.export_onnx(model, POLICY, (x,), path, opset=21)
    assert not list(tmp_path.iterdir())
    bsa_compile.export_onnx(model, POLICY, (x,), path, opset=22)
    onnx.checker.check_model(path, full_check=True)


@torch.no_grad()
def test_two_files_take_their_places_together(tmp_path, monkeypatch):
    model, x = PatchAttention().eval(), torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    path, data = tmp_path / "new" / "model.onnx", tmp_path / "new" / "model.onnx.data"
    real_replace = os.replace

    def fails_on_the_model(source, target):
        if str(target) == str(path):
            raise OSError("no space left")
        real_replace(source, target)

    with monkeypatch.context() as large:
        large.setattr("bsa_compile.exporting.onnx_files.EXTERNAL_FROM_BYTES", 1 << 12)
        with monkeypatch.context() as full:
            full.setattr(os, "replace", fails_on_the_model)
            with pytest.raises(ExportError, match="path must be a file that can be written"):
                bsa_compile.export_onnx(model, POLICY, (x,), path)
            assert not list(tmp_path.iterdir())
        bsa_compile.export_onnx(model, POLICY, (x,), path)
        before = path.read_bytes(), data.read_bytes()
        with monkeypatch.context() as full:
            full.setattr(os, "replace", fails_on_the_model)
            with pytest.raises(ExportError):
                bsa_compile.export_onnx(PatchAttention().eval(), POLICY, (x,), path)
        assert (path.read_bytes(), data.read_bytes()) == before
    bsa_compile.export_onnx(model, POLICY, (x,), path)  # small now: one file, and nothing stale beside it
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


@torch.no_grad()
def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("bsa_compile.exporting.onnx_files.EXTERNAL_FROM_BYTES", 1 << 12)
    torch.manual_seed(0)
    model, x = PatchAttention().eval(), torch.randn(1, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    path = tmp_path / "new" / "model.onnx"
    bsa_compile.export_onnx(model, POLICY, (x,), path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (path.parent / "model.onnx.data").stat().st_size >= model.qkv.weight.nbytes
    onnx.checker.check_model(path, full_check=True)
    assert relative_error(run(path, [x])[0], bsa_compile.export(model, POLICY, (x,)).module()(x)) < 1e-5


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x)


def test_bad_input_leaves_no_file(tmp_path, monkeypatch):
    x = torch.randn(2, 3, GRID[0], 2 * GRID[1], 2 * GRID[2])
    model, path = PatchAttention().eval(), tmp_path / "model.onnx"
    for opset in (19, 24, True, "23"):
        with pytest.raises(UsageError, match="opset must"):
            bsa_compile.export_onnx(model, POLICY, (x,), path, opset=opset)
    with pytest.raises(UsageError, match="path must be a file"):
        bsa_compile.export_onnx(model, POLICY, (x,), tmp_path)
    height = torch.export.Dim("height", min=2, max=16)
    with pytest.raises(GridError, match="dynamic_shapes must leave frames, height and width fixed"):
        bsa_compile.export_onnx(model, POLICY, (x,), path, dynamic_shapes=({3: 2 * height},))
    with pytest.raises(ExportError, match="model must be expressible in ONNX, got"):
        bsa_compile.export_onnx(Unknown(), POLICY, (torch.randn(2, 3, 3),), path)
    real_import = builtins.__import__

    def without_onnx(name, *args, **kwargs):
        if name.split(".")[0] in ("onnx", "onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("importlib.import_module", without_onnx)
        with pytest.raises(MissingExtraError, match=r"pip install 'bsa-compile\[onnx\]'"):
            bsa_compile.export_onnx(model, POLICY, (x,), path)
    assert not list(tmp_path.iterdir())


def test_an_old_file_survives_a_failed_export(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError):
        bsa_compile.export_onnx(Unknown(), POLICY, (torch.randn(2, 3, 3),), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
