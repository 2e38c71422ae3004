"""Fixtures of the compile tests."""

from __future__ import annotations

import pytest

from bsa_compile.models.longcat import LongCatVideoTransformer3DModel

from .support import make_longcat


@pytest.fixture
def longcat() -> LongCatVideoTransformer3DModel:
    return make_longcat()
