"""Exported programs and packages on the GPU, in a fresh process too."""

from __future__ import annotations

import pytest
import torch

import bsa_compile
from bsa_compile.errors import ExportError

from ..compile.support import make_inputs, make_longcat, relative_error, run_reference
from ..export.support import GRID, POLICIES, run_python

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

POLICY = POLICIES["count"]
RUN = """
import sys, torch, bsa_compile
inputs, expected = torch.load(sys.argv[2])
if sys.argv[3] == "aoti":
    got = bsa_compile.load_package(sys.argv[1])(*inputs)
else:
    got = torch.export.load(sys.argv[1]).module()(*inputs)
print(float((got - expected).norm() / expected.norm()))
"""


@pytest.fixture(scope="module")
def case():
    """Model, inputs of a batch of two, and the program with a dynamic batch, all on the GPU."""
    model = make_longcat().cuda()
    inputs = tuple(x.cuda() for x in make_inputs(GRID, 2))
    batch = torch.export.Dim("batch", min=1, max=8)
    program = bsa_compile.export(model, POLICY, inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    return model, inputs, program


@torch.no_grad()
def test_program(case):
    model, inputs, program = case
    for some in (inputs, tuple(x[:1] for x in inputs)):
        assert relative_error(program.module()(*some), run_reference(model, POLICY, *some)) < 1e-4


@pytest.mark.parametrize("kind", ["pt2", "aoti"])
@torch.no_grad()
def test_files_run_in_a_fresh_process(case, tmp_path, kind):
    _, inputs, program = case
    path = tmp_path / "model.pt2"
    if kind == "aoti":
        try:
            bsa_compile.package(program, path)
        except ExportError as exc:
            if "libstdc++" not in str(exc):
                raise
            pytest.skip(str(exc))
    else:
        torch.export.save(program, path)
    torch.save((inputs, program.module()(*inputs)), tmp_path / "case.pt")
    assert float(run_python(RUN, path, tmp_path / "case.pt", kind)) < 1e-4
