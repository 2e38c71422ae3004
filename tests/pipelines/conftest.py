from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from bsa_compile.pipelines.longcat import LongCatPipeline, LongCatPipelineConfig

from .support import write_model

MISSING = [name for name in ("diffusers", "transformers", "av", "ftfy") if importlib.util.find_spec(name) is None]
EAGER = LongCatPipelineConfig(compile_backend="eager")


def pytest_collection_modifyitems(items):
    for item in items:
        if MISSING and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs bsa-compile[longcat]: no {', '.join(MISSING)}"))


@pytest.fixture(autouse=True, scope="package")
def _fresh_dynamo():
    """In place of the fixture of all tests: those of this folder share a pipeline, and with it what was compiled."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("longcat"))


@pytest.fixture(scope="session")
def shared_pipe(folder) -> LongCatPipeline:
    return LongCatPipeline.from_pretrained(folder, EAGER, device="cpu")


@pytest.fixture
def pipe(shared_pipe):
    """One pipeline for all tests, so that each stage compiles once; every test finds it as it was loaded."""
    yield shared_pipe
    shared_pipe.transformer.reset_bsa()
    shared_pipe.transformer.disable_all_loras()


@pytest.fixture(scope="session")
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def video():
    return np.random.default_rng(1).integers(0, 256, (20, 40, 60, 3), dtype=np.uint8)
