"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# Compiled code, timing and CI machines make per-example deadlines meaningless; in CI every run draws the same examples.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """No test sees code that another one compiled."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
