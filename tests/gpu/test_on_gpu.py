"""The whole chain on a CUDA GPU: ops against the fp64 reference, optimized models, CUDA graphs, training."""

from __future__ import annotations

import pytest
import torch

import bsa_compile
from bsa_compile import reference
from bsa_compile.ops import block_sparse_attention
from bsa_compile.policy import BSAPolicy
from tests.compile.support import make_inputs, make_longcat, relative_error, run_reference

pytestmark = pytest.mark.gpu

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(4, 4, 4), chunk_3d_shape_k=(4, 4, 4))
GRID = (6, 9, 14)  # partial tiles on every axis


def on_gpu(dtype=torch.float32):
    return make_longcat().to("cuda", dtype), [x.to("cuda") for x in make_inputs(GRID)]


CASES = {
    "square": {"grid_q": (6, 9, 14), "tile_q": (4, 4, 4), "sparsity": 0.75},
    "cdf": {"grid_q": (6, 9, 14), "tile_q": (4, 4, 4), "cdf_threshold": 0.6},
    "both": {"grid_q": (6, 9, 14), "tile_q": (2, 4, 8), "sparsity": 0.75, "cdf_threshold": 0.5},
    "rectangular": {
        "grid_q": (2, 9, 14),
        "grid_k": (5, 9, 14),
        "tile_q": (4, 4, 4),
        "tile_k": (4, 4, 8),
        "sparsity": 0.7,
    },
    "odd tile": {"grid_q": (6, 9, 14), "tile_q": (3, 5, 2), "sparsity": 0.8},
}


@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_and_gradients_against_the_reference(case, dtype, head_dim):
    options = CASES[case]
    grid_k = options.get("grid_k", options["grid_q"])
    torch.manual_seed(0)

    def tokens(grid):
        return grid[0] * grid[1] * grid[2]

    q = torch.randn(2, 4, tokens(options["grid_q"]), head_dim, device="cuda", dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(2, 2, tokens(grid_k), head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
    )
    out, lse = block_sparse_attention(q, k, v, return_lse=True, **options)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad((out * grad).sum() + lse.sum(), (q, k, v))
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    full = {"tile_k": options["tile_q"], "grid_k": grid_k, "sparsity": None, "cdf_threshold": None, **options}
    # The selection of the GPU is given to the reference: a tie within rounding may fall either way.
    pooled = [
        torch.ops.bsa.pool(x.detach(), list(g), list(full[t]))
        for x, g, t in ((q, options["grid_q"], "tile_q"), (k, grid_k, "tile_k"))
    ]
    counts, indices = torch.ops.bsa.select(*pooled, full["sparsity"], full["cdf_threshold"], head_dim**-0.5)
    ref_out, ref_lse = reference.attend(
        *exact, counts.cpu(), indices.cpu(), full["grid_q"], full["tile_q"], grid_k, full["tile_k"], head_dim**-0.5
    )
    ref_grads = torch.autograd.grad((ref_out * grad.cpu().double()).sum() + ref_lse.sum(), exact)
    bound = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(out.cpu(), ref_out) < bound
    assert float((lse.cpu().double() - ref_lse).abs().max()) < (1e-5 if dtype == torch.float32 else 1e-3)
    for got, want in zip(grads, ref_grads, strict=True):
        assert got.dtype == dtype
        assert relative_error(got.cpu(), want) < bound


def test_selection_on_gpu_and_cpu_agree():
    torch.manual_seed(0)
    # Integers: every product and sum is exact, so ties are ties on both.
    q, k = (torch.randint(-3, 4, (2, 4, 50, 32)).float() for _ in range(2))
    for sparsity, cdf in ((0.8, None), (None, 0.7), (0.9, 0.5), (0.0, None), (None, 1.0)):
        cpu = torch.ops.bsa.select(q, k, sparsity, cdf, 0.1)
        gpu = torch.ops.bsa.select(q.cuda(), k.cuda(), sparsity, cdf, 0.1)
        a, b = (bsa_compile.BlockSelection(c.cpu(), i.cpu(), 50) for c, i in (cpu, gpu))
        b.validate()
        assert torch.equal(a.to_dense(), b.to_dense()), (sparsity, cdf)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_optimized_model_computes_the_reference(backend, dtype):
    model, inputs = on_gpu(dtype)
    fast = bsa_compile.optimize(model, POLICY, backend=backend)
    with torch.no_grad():
        out, want, dense = fast(*inputs), run_reference(model, POLICY, *inputs), model(*inputs)
    assert len(fast.report.rewritten) == 2
    # In bf16 rounding upstream of the gate may swap a tile; far below the distance to the dense result all the same.
    bound = 1e-5 if dtype == torch.float32 else 0.5 * relative_error(dense, want)
    assert relative_error(out, want) < bound


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_inductor_modes(mode):
    model, inputs = on_gpu()
    fast = bsa_compile.optimize(model, POLICY, mode=mode)
    with torch.no_grad():
        want = run_reference(model, POLICY, *inputs)
        for _ in range(4):
            assert relative_error(fast(*inputs).clone(), want) < 1e-3


def test_the_op_can_be_captured_in_a_cuda_graph():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 64, device="cuda", dtype=torch.bfloat16).unbind(0)

    def run():
        return block_sparse_attention(q, k, v, grid_q=(8, 8, 8), sparsity=0.75)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, run())


def test_the_forward_and_backward_are_bit_equal_from_call_to_call():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 4096, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    results = []
    for _ in range(3):
        out = block_sparse_attention(q, k, v, grid_q=(16, 16, 16), sparsity=0.8)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_gpu(checkpointing):
    model, inputs = on_gpu()
    fast = bsa_compile.optimize(model, POLICY)
    fast.gradient_checkpointing = checkpointing
    fast(*inputs).square().mean().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    run_reference(model, POLICY, *inputs).square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert relative_error(got[name], p.grad) < 1e-3, name


def test_training_inside_autocast_runs_in_bf16():
    model, inputs = on_gpu()
    fast = bsa_compile.optimize(model, POLICY)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = fast(*inputs).float().square().mean()
    loss.backward()
    assert len(fast.report.rewritten) == 2
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("op", ["pool", "select", "attend", "attend_backward"])
def test_opcheck_on_cuda(op):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 60, 16, device="cuda", requires_grad=op in ("pool", "attend")) for _ in range(3))
    grid, tile = [3, 4, 5], [2, 2, 2]
    with torch.no_grad():
        pooled = [torch.ops.bsa.pool(x, grid, tile) for x in (q, k)]
        counts, indices = torch.ops.bsa.select(*pooled, 0.5, None, 0.25)
        rest = (counts, indices, grid, tile, grid, tile, 0.25)
        out, lse = torch.ops.bsa.attend(q, k, v, *rest)
    args = {
        "pool": (q, grid, tile),
        "select": (*pooled, 0.5, None, 0.25),
        "attend": (q, k, v, *rest),
        "attend_backward": (torch.randn_like(out), None, q, k, v, out, lse, *rest),
    }[op]
    torch.library.opcheck(getattr(torch.ops.bsa, op).default, args)
