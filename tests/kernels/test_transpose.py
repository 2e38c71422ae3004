"""`transpose_selection` against loops."""

from __future__ import annotations

import pytest
import torch

from bsa_compile.kernels import transpose
from bsa_compile.kernels.transpose import transpose_selection
from tests.attention_cases import INT32_MAX, pack

pytestmark = pytest.mark.usefixtures("poisoned")


def check(mask: torch.Tensor, device: torch.device) -> None:
    counts, lists = pack(mask)
    batch, heads, tiles_q, tiles_k = mask.shape
    offsets, indices = (x.cpu() for x in transpose_selection(counts.to(device), lists.to(device), tiles_k))
    assert offsets.shape == (batch, heads, tiles_k + 1)
    assert indices.shape == (batch, heads, tiles_q * lists.shape[-1])
    for b in range(batch):
        for h in range(heads):
            assert offsets[b, h, 0] == 0
            for j in range(tiles_k):
                row = indices[b, h, offsets[b, h, j] : offsets[b, h, j + 1]]
                assert torch.equal(row, mask[b, h, :, j].nonzero().flatten().int()), (b, h, j)
            assert bool((indices[b, h, offsets[b, h, -1] :] == INT32_MAX).all())


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 1, 33, 17), (1, 2, 70, 3)], ids=lambda shape: "x".join(map(str, shape))
)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_lists_of_query_tiles(shape, density, device):
    generator = torch.Generator().manual_seed(0)
    check(torch.rand(shape, generator=generator) < density, device)


def test_scratch_is_bounded_by_working_on_some_heads_at_a_time(device, monkeypatch):
    monkeypatch.setattr(transpose, "SCRATCH_BYTES", 4 * 7 * 2)
    check(torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.5, device)


def test_no_lists_at_all(device):
    offsets, indices = transpose_selection(
        torch.zeros(1, 2, 0, dtype=torch.int32, device=device),
        torch.zeros(1, 2, 0, 4, dtype=torch.int32, device=device),
        5,
    )
    assert not offsets.any()
    assert indices.numel() == 0
