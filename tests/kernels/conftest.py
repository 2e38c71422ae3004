"""Without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is imported.

A run of this folder alone chooses it here. In a run of more, other tests may have imported Triton already
(torch._dynamo does) and must not see the variable; then `test_in_subprocess.py` runs this folder and the tests
themselves are skipped.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS_NO_KERNELS = ("test_in_subprocess.py", "test_config.py", "test_compile.py", "test_autotune.py")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def is_interpreting() -> bool:
    """Whether Triton is, or will be, imported in the interpreter's mode."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET") == "1"
    import triton.language as tl

    return type(tl.sum).__name__ == "InterpretedFunction"


def interpreter_fault() -> str:
    """Why the installed Triton cannot interpret anything, or nothing."""
    try:
        triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return ""
    if triton < (3, 7) and numpy >= (2, 4):
        # It turns arrays of one element into Python numbers, which NumPy refuses since 2.4.
        return f"the interpreter of Triton {version('triton')} fails with NumPy {version('numpy')}: needs numpy < 2.4"
    return ""


def pytest_configure(config: pytest.Config) -> None:
    # Called for the conftest of a subfolder only when the command line names something in it.
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    if "triton" not in sys.modules and all(HERE in (path, *path.parents) for path in paths) and not has_cuda():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # numpy, which computes for the interpreter, warns where the arithmetic makes NaN on purpose.
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(quiet)
    if has_cuda() or (is_interpreting() and not interpreter_fault()):
        return
    otherwise = "Triton was imported without its interpreter; test_in_subprocess.py runs this"
    skip = pytest.mark.skip(reason=interpreter_fault() or otherwise)
    for item in items:
        if HERE in item.path.parents and item.path.name not in NEEDS_NO_KERNELS and "gpu" not in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    import torch

    return torch.device("cuda" if has_cuda() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _faster_interpreter():
    """Triton's interpreter remaps its whole language at every call of a device function: once a launch is enough."""
    if not is_interpreting():
        yield
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: dict[int, object] = {}

    def patch_once(fn):
        key = id(fn.__globals__)
        if key not in seen:
            seen[key] = patch(fn)
        return seen[key]

    def launch_afresh(self, *args, **kwargs):
        seen.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            seen.clear()

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or INT32_MAX, so that what a launcher leaves unwritten is seen."""
    import torch

    empty = torch.empty

    def fill(*args, **kwargs):
        fresh = empty(*args, **kwargs)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

    monkeypatch.setattr(torch, "empty", fill)
