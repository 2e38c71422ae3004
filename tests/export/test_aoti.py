"""AOTInductor packages: they compute what the program computes, in a process that was checked."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

import bsa_compile
from bsa_compile.errors import ExportError, UsageError
from bsa_compile.exporting import aoti

from .support import GRID, POLICIES, PatchAttention, run_python


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    """Program, example input and package."""
    torch.manual_seed(0)
    t, h, w = GRID
    x = torch.randn(2, 3, t, 2 * h, 2 * w)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = bsa_compile.export(PatchAttention().eval(), POLICIES["both"], (x,), dynamic_shapes=({0: batch},))
    path = bsa_compile.package(program, tmp_path_factory.mktemp("package") / "model.pt2")
    return program, x, path


@pytest.mark.slow
@torch.no_grad()
def test_computes_what_the_program_computes(case):
    program, x, path = case
    loaded = bsa_compile.load_package(path)
    for inputs in (x, x[:1]):
        torch.testing.assert_close(loaded(inputs), program.module()(inputs), rtol=1e-5, atol=1e-5)
    assert str(loaded.report) == str(bsa_compile.report_of(program))
    assert len(loaded.report.rewritten) == 1
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]


@pytest.mark.slow
@torch.no_grad()
def test_runs_in_a_fresh_process(case, tmp_path):
    program, x, path = case
    torch.save((x, program.module()(x)), tmp_path / "case.pt")
    code = """
import sys, torch, bsa_compile
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(bsa_compile.load_package(sys.argv[1])(x), expected, rtol=1e-5, atol=1e-5)
print("equal")
"""
    assert run_python(code, path, tmp_path / "case.pt").strip() == "equal"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.1"}, "torch must be 2.1, for which the package was compiled, got"),
        ({"version": "0.0.1"}, "bsa_compile must be 0.0.1"),
        ({"AOTI_MACHINE": "s390x"}, "the processor must be s390x"),
        ({"AOTI_PLATFORM": "plan9"}, "the operating system must be plan9"),
        ({"AOTI_DEVICE_KEY": "cuda"}, "the device must be cuda"),
    ],
)
def test_a_process_that_differs_is_refused(case, monkeypatch, change, message):
    path = case[2]
    if "AOTI_DEVICE_KEY" in change and torch.cuda.is_available():
        pytest.skip("this machine has what the package would need")
    metadata = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(path), "model")
    about = json.loads(metadata["bsa_compile"])
    changed = {**metadata, **{k: v for k, v in change.items() if k.startswith("AOTI")}}
    changed["bsa_compile"] = json.dumps({**about, **{k: v for k, v in change.items() if not k.startswith("AOTI")}})
    monkeypatch.setattr(aoti, "_metadata", lambda path: changed)
    with pytest.raises(ExportError, match=message):
        bsa_compile.load_package(path)


def test_bad_files(tmp_path):
    with pytest.raises(ExportError, match=r"path must be a file made by bsa_compile.package"):
        bsa_compile.load_package(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(ExportError, match=r"path must be a file made by bsa_compile.package"):
        bsa_compile.load_package(tmp_path / "text.pt2")


def test_only_our_programs_are_packaged(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(UsageError, match=r"program must come from bsa_compile.export"):
        bsa_compile.package(program, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_leaves_nothing(tmp_path, monkeypatch):
    x = torch.randn(1, 3, 2, 4, 4)
    program = bsa_compile.export(PatchAttention().eval(), POLICIES["count"], (x,))

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(ExportError, match="program must compile with AOTInductor, got RuntimeError: no compiler"):
        bsa_compile.package(program, tmp_path / "deep" / "model.pt2")
    assert not list(tmp_path.rglob("*.pt2"))
    with pytest.raises(UsageError, match="path must be a file"):
        bsa_compile.package(program, tmp_path)


@pytest.mark.parametrize(
    ("device", "library", "refused"),
    [
        ("cuda", b"libm.so.6", True),
        ("cuda", b"libstdc++.so.6", False),
        ("cuda", b"." * ((1 << 20) - 5) + b"libstdc++.so.6", False),  # across the pieces that are read
        ("cpu", b"libm.so.6", False),
    ],
    ids=["cuda-static", "cuda-shared", "cuda-straddling", "cpu"],
)
def test_a_package_that_would_crash_is_refused(tmp_path, monkeypatch, device, library, refused):
    path = tmp_path / "model.pt2"
    monkeypatch.setattr(aoti, "_metadata", lambda path: {"AOTI_DEVICE_KEY": device})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/a.wrapper.so", library)
    if refused:
        with pytest.raises(ExportError, match=r"the C\+\+ compiler must link libstdc\+\+ dynamically"):
            aoti._check_linkage(path)
    else:
        aoti._check_linkage(path)
