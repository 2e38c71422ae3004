"""Public kernels compute offsets in int32: large videos read other tokens. Here on the CPU; see tests/kernels too."""

from __future__ import annotations

import pytest
import torch

from bsa_compile import reference
from bsa_compile.ops import block_sparse_attention
from tests.attention_cases import Case, assert_close
from tests.huge_strides import spread


@pytest.mark.parametrize("over", ["heads", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_that_need_64_bits(over, dtype, tmp_path):
    case = Case(dtype=dtype, heads=4, heads_kv=4, head_dim=32)
    q, k, v = case.qkv()
    far = [spread(x, tmp_path / name, over=over) for name, x in zip("qkv", (q, k, v), strict=True)]
    counts, indices = case.select(q, k)
    for a, b in zip(case.select(*far[:2]), (counts, indices), strict=True):
        assert torch.equal(a, b)
    grad_out = torch.randn(q.shape, generator=case.generator()).to(dtype)
    grads = case.gradients(*far, counts, indices, spread(grad_out, tmp_path / "grad", over=over), None)
    truth = reference.attend_backward(grad_out, None, q, k, v, counts, indices, *case.tail)
    near = case.gradients(q, k, v, counts, indices, grad_out, None)
    for ours, theirs, exact in zip(grads, near, truth, strict=True):
        assert_close(ours, theirs, exact)
    out, lse = case.attend(*far, counts, indices)
    for ours, exact in zip((out, lse), case.attend(q, k, v, counts, indices), strict=True):
        torch.testing.assert_close(ours, exact)
    options = {"grid_q": case.grid_q, "grid_k": case.grid_k, "tile_q": case.tile_q, "tile_k": case.tile_k}
    whole = block_sparse_attention(*far, sparsity=case.sparsity, **options)
    torch.testing.assert_close(whole, out)
