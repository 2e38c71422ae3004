"""Calls of the launchers on a `Case`, and their comparison with the fp64 reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bsa_compile import reference
from bsa_compile.kernels.attend_backward import attend_backward
from bsa_compile.kernels.attend_forward import attend_forward
from tests.attention_cases import Case, assert_close, dense_mask_attention

Tensors = tuple[Tensor, ...]


def gradients_for(case: Case) -> tuple[Tensor, Tensor]:
    """Random grad_out and grad_lse."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad_out = torch.randn(case.batch, case.heads, case.tokens("q"), case.head_dim, generator=generator)
    return grad_out.to(case.dtype), torch.randn(case.batch, case.heads, case.tokens("q"), generator=generator)


def run(
    case: Case,
    device: torch.device,
    qkv: Tensors,
    lists: Tensors,
    grads: tuple[Tensor, Tensor | None] | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensors:
    """(out, lse), and with `grads` also (dq, dk, dv), on the CPU. Strides survive the way to the device."""
    q, k, v, counts, indices = (x.to(device) for x in (*qkv, *lists))
    tail = (*(tuple(g) for g in case.grids), case.scale if scale is None else scale, case.layout)
    results = attend_forward(q, k, v, counts, indices, *tail, **options)
    if grads is not None:
        grad_out, grad_lse = (None if g is None else g.to(device) for g in grads)
        results += attend_backward(grad_out, grad_lse, q, k, v, *results, counts, indices, *tail, **options)
    return tuple(x.cpu() for x in results)


def check(
    case: Case,
    device: torch.device,
    qkv: Tensors | None = None,
    grad_lse: bool = True,
    scale: float | None = None,
    **options: Any,
) -> Tensors:
    """Forward and backward against fp64, allowed twice the error of torch in the same dtype."""
    qkv = case.qkv() if qkv is None else qkv
    lists, grads = case.selection(0.6), gradients_for(case)
    grad_out, grad_l = grads[0], grads[1] if grad_lse else None
    ours = run(case, device, qkv, lists, (grad_out, grad_l), scale, **options)
    tail = (*case.grids, case.scale if scale is None else scale, case.layout)
    truth = (
        *reference.attend(*qkv, *lists, *tail),
        *reference.attend_backward(grad_out, grad_l, *qkv, *lists, *tail),
    )
    mask = reference.token_mask(*lists, *case.grids, case.layout)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out, lse = dense_mask_attention(*leaves, mask, tail[4])
    kept = torch.isfinite(truth[1])
    assert bool(kept.any())
    cotangent = torch.zeros_like(lse[kept]) if grad_l is None else grad_l[kept].to(case.dtype)
    torchs = (out, lse, *torch.autograd.grad([out, lse[kept]], leaves, [grad_out, cotangent]))
    size = 1 + float(truth[1][kept].abs().max())  # p is recomputed as exp(s - lse), to an ulp of lse
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), ours, torchs, truth, strict=True):
        assert a.dtype == (torch.float32 if name == "lse" else case.dtype)
        assert_close(a, b.detach(), c, name, size * float(c.abs().max()) if name.startswith("d") else 0.0)
    return ours
