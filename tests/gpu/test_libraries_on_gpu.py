"""Installed libraries are held to the tests of our own kernels; absent ones are skipped."""

from __future__ import annotations

import pytest
import torch

from bsa_compile import gating, reference
from bsa_compile.kernels import autotune
from bsa_compile.ops import block_sparse_attention, registry
from bsa_compile.structured import shared_fraction, structured_qkv
from tests.attention_cases import Case, assert_close, dense_mask_attention

pytestmark = pytest.mark.gpu

CASES = {
    "flash-attn-4": [(4, 4, 8)],
    "cudnn": [(4, 4, 4), (4, 4, 8)],
}


def case_of(tile, dtype=torch.bfloat16, layout="raster"):
    grids = ((8, 8, 16), tile, (4, 8, 24), tile)
    return Case(*grids, heads=2, heads_kv=2, head_dim=128, dtype=dtype, layout=layout)


@pytest.fixture
def library(request):
    name, tile = request.param
    if registry.installed_version(next(x.distribution for x in registry.declared() if x.name == name)) is None:
        pytest.skip(f"{name} is not installed")
    x = torch.empty(1, 1, 128, 128, dtype=torch.bfloat16, device="cuda")
    objection = next(x for x in registry.declared() if x.name == name).objection(
        x, x, x, (4, 4, 8), tile, (4, 4, 8), tile, "raster"
    )
    if objection is not None:
        pytest.skip(f"{name}: {objection}")
    return name, tile


LIBRARIES = [pytest.param((name, tile), id=f"{name} {tile}") for name, tiles in CASES.items() for tile in tiles]


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
@pytest.mark.parametrize("layout", ["raster", "tile"])
@pytest.mark.parametrize("grad_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_the_reference(library, dtype, grad_lse, layout):
    name, tile = library
    case = case_of(tile, dtype, layout)
    qkv, lists = case.qkv(), case.selection(0.6)  # some rows are empty, and the tails are poisoned
    grad_out = torch.randn(case.qkv()[0].shape, generator=case.generator()).to(dtype)
    out_lse = torch.randn(grad_out.shape[:3], generator=case.generator()) if grad_lse else None
    on_gpu = [x.cuda() for x in (*qkv, *lists)]
    out, lse = torch.ops.bsa.attend(*on_gpu, *case.tail, name)
    back = (grad_out.cuda(), None if out_lse is None else out_lse.cuda(), *on_gpu[:3], out, lse, *on_gpu[3:])
    ours = [x.cpu() for x in (out, lse, *torch.ops.bsa.attend_backward(*back, *case.tail, name))]
    truth = (
        *reference.attend(*qkv, *lists, *case.tail),
        *reference.attend_backward(grad_out, out_lse, *qkv, *lists, *case.tail),
    )
    mask = reference.token_mask(*lists, *case.grids, case.layout)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    torch_out, torch_lse = dense_mask_attention(*leaves, mask, case.scale)
    kept = torch.isfinite(truth[1])
    cotangent = torch.zeros_like(torch_lse[kept]) if out_lse is None else out_lse[kept].to(dtype)
    grads = torch.autograd.grad([torch_out, torch_lse[kept]], leaves, [grad_out, cotangent])
    size = 1 + float(truth[1][kept].abs().max())
    names = ("out", "lse", "dq", "dk", "dv")
    for what, a, b, c in zip(names, ours, (torch_out, torch_lse, *grads), truth, strict=True):
        assert_close(a, b.detach(), c, what, size * float(c.abs().max()) if what.startswith("d") else 0.0)


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_in_compiled_code_and_bit_equal_from_call_to_call(library):
    name, tile = library
    q, k, v = (x.requires_grad_() for x in structured_qkv((8, 16, 32), 2, 128, device="cuda"))

    def attend(q, k, v, who=name):
        return block_sparse_attention(q, k, v, grid_q=(8, 16, 32), tile_q=tile, sparsity=0.75, implementation=who)

    compiled = torch.compile(attend, fullgraph=True)
    out = compiled(q, k, v)
    assert torch.equal(out, attend(q, k, v))
    native = attend(q, k, v, "native")
    assert float((out - native).norm() / native.norm()) < 1e-2
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    ours = torch.autograd.grad(native.float().square().sum(), (q, k, v))
    for a, b in zip(grads, ours, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-2


def test_the_generator_shares_as_much_as_on_a_cpu():
    grid, tile = (24, 44, 80), (4, 4, 4)
    shares = []
    for device in ("cpu", "cuda"):
        q, k, _ = structured_qkv(grid, 1, 128, device=device)
        pooled = (gating.pool(x.cpu(), grid, tile) for x in (q, k))
        shares.append(shared_fraction(*gating.select(*pooled, 0.9375, None, 128**-0.5), grid, tile))
    assert 0.7 <= min(shares) <= max(shares) <= 0.8
    assert abs(shares[0] - shares[1]) < 0.02


def test_tuned_launches_give_the_same_numbers(monkeypatch, tmp_path):
    case = Case((4, 8, 8), (4, 4, 4), (4, 8, 8), (4, 4, 4), head_dim=64, dtype=torch.bfloat16)
    inputs = [x.cuda() for x in (*case.qkv(), *case.selection(0.6))]
    preset = torch.ops.bsa.attend(*inputs, *case.tail)
    grads = torch.ops.bsa.attend_backward(preset[0], None, *inputs[:3], *preset, *inputs[3:], *case.tail)
    monkeypatch.setenv(autotune.ASK, "1")
    monkeypatch.delenv(autotune.REFUSE, raising=False)
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path))
    tuned = torch.ops.bsa.attend(*inputs, *case.tail)
    tuned_grads = torch.ops.bsa.attend_backward(preset[0], None, *inputs[:3], *preset, *inputs[3:], *case.tail)
    assert autotune.cache_file(torch.device("cuda", torch.cuda.current_device())).is_file()
    for a, b in zip((tuned[0], *tuned_grads), (preset[0], *grads), strict=True):
        assert float((a.float() - b.float()).norm()) <= 1e-2 * float(b.float().norm())
