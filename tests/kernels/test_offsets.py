"""Offsets that need 64 bits, where int32 arithmetic would read other tokens."""

from __future__ import annotations

import pytest
import torch

from bsa_compile import reference
from bsa_compile.kernels.pool import pool
from tests.attention_cases import Case
from tests.huge_strides import spread
from tests.kernels.support import check


@pytest.mark.parametrize("over", ["heads", "tokens"])
@pytest.mark.parametrize("path", [None, "pointer"], ids=["box", "pointer"])
def test_offsets_that_need_64_bits(over, path, device, tmp_path):
    if device.type != "cpu":
        pytest.skip("a sparse file has no counterpart on a GPU; test_gpu.py has a view of as many elements")
    case = Case((2, 4, 4), (2, 2, 4), (2, 4, 8), (2, 2, 4), head_dim=32, dtype=torch.float16)
    near = case.qkv()
    far = tuple(spread(x, tmp_path / name, over=over) for name, x in zip("qkv", near, strict=True))
    pooled = pool(far[1], case.grid_k, case.tile_k)
    torch.testing.assert_close(pooled.double(), reference.pool(near[1], case.grid_k, case.tile_k), rtol=1e-6, atol=1e-6)
    check(case, device, far, **({} if path is None else {"path": path}))
