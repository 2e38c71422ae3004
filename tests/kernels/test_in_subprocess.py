"""Runs this folder under Triton's interpreter when this process cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kernels.conftest import HERE, NEEDS_NO_KERNELS, has_cuda, interpreter_fault, is_interpreting


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    if has_cuda():
        pytest.skip("the kernels' tests run here, on the GPU")
    if is_interpreting():
        pytest.skip("the kernels' tests run here, interpreted")
    if interpreter_fault():
        pytest.skip(interpreter_fault())
    others = [f"--ignore={HERE / name}" for name in NEEDS_NO_KERNELS]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE), *others],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
