"""Stand-ins of flash-attn-4 and the cuDNN frontend that compute, on a CPU, what the libraries promise."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bsa_compile import reference
from bsa_compile.ops import libraries, registry
from bsa_compile.selection import BlockSelection


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both libraries stand in, and count as installed and as fit for a CPU; what they will be asked for."""
    made: list[str] = []
    for name, module in {**fake_flash_attention(made), **fake_cudnn(made)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "installed_version", lambda name: "1.0")
    monkeypatch.setattr(libraries._Limits, "__call__", lambda self, *case: True)
    return made


def by_blocks(q, k, v, counts, indices, volume, scale):
    """What follows q, k, v in a call of the reference to attend by contiguous blocks of `volume` tokens."""
    if counts is None:
        counts = torch.full(indices.shape[:3], indices.shape[3], dtype=torch.int32)
    grids = ((q.shape[2], 1, 1), (volume, 1, 1), (k.shape[2], 1, 1), (volume, 1, 1))
    return (counts, indices, *grids, scale, "raster")


class Block(SimpleNamespace):
    pass


def fake_flash_attention(calls: list[str]) -> dict[str, ModuleType]:
    def lists(given: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        assert not given.mask_block_cnt.any()
        return given.full_block_cnt, given.full_block_idx, given.block_size[0]

    def forward(q, k, v, softmax_scale, block_sparse_tensors=None, return_lse=False):
        if block_sparse_tensors is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None
        assert return_lse
        assert all(x.is_contiguous() for x in (q, k, v))
        calls.append("forward")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = reference.attend(q, k, v, *by_blocks(q, k, v, *lists(block_sparse_tensors), softmax_scale))
        return out.to(q.dtype).transpose(1, 2), lse.float()

    def backward(q, k, v, out, dout, lse, softmax_scale, dlse, block_sparse_tensors):
        calls.append("backward")
        counts, indices, volume = lists(block_sparse_tensors)
        turned = BlockSelection(counts, indices, q.shape[1] // volume).transposed()
        q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
        where = by_blocks(q, k, v, turned.kv_num_blocks, turned.kv_indices, volume, softmax_scale)
        truth, theirs = reference.attend(q, k, v, *where)
        assert torch.allclose(out.double(), truth, atol=1e-4)
        assert torch.allclose(lse.double(), theirs, atol=1e-4)
        grads = reference.attend_backward(dout, dlse, q, k, v, *where)
        return tuple(g.to(q.dtype).transpose(1, 2) for g in grads)

    package, cute, sparsity, interface = (ModuleType(n) for n in ("flash_attn", "cute", "block_sparsity", "interface"))
    cute.flash_attn_func, interface._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    sparsity.BlockSparseTensorsTorch = Block  # type: ignore[attr-defined]
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity", "flash_attn.cute.interface")
    return dict(zip(names, (package, cute, sparsity, interface), strict=True))


def fake_cudnn(calls: list[str]) -> dict[str, ModuleType]:
    def forward(q, k, v, index, *, q2k_block_nums, sparse_block_size, allow_empty_block_nums, softmax_scale, kv_splits):
        assert kv_splits == 1 or (kv_splits == "auto" and q2k_block_nums is None and sparse_block_size == 64)
        assert all(x.is_contiguous() for x in (q, k, v))
        assert allow_empty_block_nums == (q2k_block_nums is not None)
        calls.append("forward")
        out, lse = reference.attend(
            q, k, v, *by_blocks(q, k, v, q2k_block_nums, index, sparse_block_size, softmax_scale)
        )
        return {"o_tensor": out.to(q.dtype), "lse_tensor": lse.float()}

    def backward(dout, q, k, v, out, lse, index, *, q2k_block_nums, sparse_block_size, softmax_scale):
        calls.append("backward")
        where = by_blocks(q, k, v, q2k_block_nums, index, sparse_block_size, softmax_scale)
        assert torch.allclose(lse.double(), reference.attend(q, k, v, *where)[1], atol=1e-2)
        grads = reference.attend_backward(dout, None, q, k, v, *where)
        return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), (g.to(q.dtype) for g in grads), strict=True))

    module = ModuleType("cudnn")
    module.BSA = SimpleNamespace(  # type: ignore[attr-defined]
        block_sparse_attention_forward=forward, block_sparse_attention_backward=backward
    )
    return {"cudnn": module}
