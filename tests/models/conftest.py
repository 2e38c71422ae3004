from __future__ import annotations

import pytest
from longcat_cases import GOLDEN, golden_model
from safetensors.torch import load_file
from torch import Tensor

from bsa_compile.models.longcat import LongCatVideoTransformer3DModel


@pytest.fixture
def model() -> LongCatVideoTransformer3DModel:
    return golden_model()


@pytest.fixture
def io() -> dict[str, Tensor]:
    return load_file(GOLDEN / "io.safetensors")
