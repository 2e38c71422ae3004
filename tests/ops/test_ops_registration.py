"""`torch.library.opcheck`, layouts, tags, flop formulas, and a machine without Triton."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from bsa_compile.errors import UnsupportedError
from bsa_compile.ops import block_sparse_attention, definitions
from bsa_compile.policy import keep_count
from bsa_compile.report import Site
from tests.attention_cases import Case

CASE = Case(batch=2, heads=4, heads_kv=2)
OPS = ("pool", "select", "attend", "attend_backward")


@pytest.mark.parametrize("layout", ["raster", "tile"])
def test_opcheck_pool_and_attend(layout):
    case = CASE.but(layout=layout)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    counts, indices = case.select(q.detach(), k.detach())
    opcheck(torch.ops.bsa.pool.default, (q, *case.grids[:2], layout))
    opcheck(torch.ops.bsa.attend.default, (q, k, v, counts, indices, *case.tail))


@pytest.mark.parametrize("criteria", [(0.5, None), (None, 0.6), (0.7, 0.4)], ids=["sparsity", "cdf", "both"])
def test_opcheck_select(criteria):
    q, k, _ = CASE.qkv()
    opcheck(torch.ops.bsa.select.default, (*CASE.pooled(q, k), *criteria, CASE.scale))


@pytest.mark.parametrize("with_lse_gradient", [False, True], ids=["out", "out+lse"])
def test_opcheck_attend_backward(with_lse_gradient):
    q, k, v = CASE.qkv()
    counts, indices = CASE.select(q, k)
    out, lse = CASE.attend(q, k, v, counts, indices)
    grads = torch.randn_like(out), torch.randn_like(lse) if with_lse_gradient else None
    opcheck(torch.ops.bsa.attend_backward.default, (*grads, q, k, v, out, lse, counts, indices, *CASE.tail))


def test_opcheck_anchor():
    q, k, v = CASE.but(heads=2, grid_q=(2, 2, 5), grid_k=(2, 2, 5)).qkv()
    # A composite op has no autograd registration of its own to check.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (q.requires_grad_(), k, v, [2, 2, 5], [2, 2, 5])
    opcheck(torch.ops.bsa.attention.default, args, test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_every_opaque_op_keeps_the_strides_it_was_traced_with(name):
    assert torch.Tag.needs_exact_strides in getattr(torch.ops.bsa, name).default.tags


@pytest.mark.parametrize("name", OPS)
def test_sizes_are_symbolic_in_every_schema(name):
    schema = str(getattr(torch.ops.bsa, name).default._schema)
    assert "int[]" not in schema.replace("SymInt[]", "")


@pytest.mark.parametrize("source", ["bhsd", "bshd", "fused", "expanded"])
def test_results_lie_in_memory_as_tokens_first(source):
    case = CASE.but(heads=2, batch=2)
    q, k, v = case.qkv()
    if source == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif source == "fused":
        q = torch.cat([q, q], -1)[..., : case.head_dim]
    elif source == "expanded":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    counts, indices = case.select(q, k)
    out, lse = case.attend(q, k, v, counts, indices)
    grads = case.gradients(q, k, v, counts, indices, torch.randn_like(out), None)
    for x in (out, *grads):
        assert x.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


def test_flops_count_the_selected_work_as_the_report_does():
    case = Case(grid_q=(4, 6, 6), grid_k=(4, 6, 6), tile_q=(2, 2, 3), tile_k=(2, 2, 3), heads=3, heads_kv=3, batch=2)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(q, k, v, grid_q=case.grid_q, tile_q=case.tile_q, sparsity=0.6)
        forward = counter.get_total_flops()
        out.sum().backward()
    keys = keep_count(12, 0.6) * 12
    attend = 4 * 2 * 3 * 144 * keys * 16
    assert forward == attend + 2 * 2 * 3 * 12 * 12 * 16
    assert counter.get_total_flops() == forward + attend * 5 // 2
    site = Site(
        "", "self", True, "rewritten", batch=2, heads=3, head_dim=16, tokens_q=144, tokens_k=144,
        grid_q=case.grid_q, grid_k=case.grid_k, tile_q=case.tile_q, tile_k=case.tile_k, sparsity=0.6,
    )  # fmt: skip
    assert site.flops == forward


def test_flops_by_mass_are_an_upper_bound():
    case = CASE
    q, k, v = case.qkv()
    with FlopCounterMode(display=False) as counter:
        case.attend(q, k, v, *case.but(sparsity=None, cdf_threshold=0.5).select(q, k))
    assert counter.get_total_flops() - 2 * 2 * 4 * case.num_q * case.num_k * 16 == 4 * 2 * 4 * 60 * 60 * 16


def test_flops_are_counted_also_when_the_counter_is_imported_later():
    code = """
    import importlib.util, sys, torch
    from bsa_compile.ops import block_sparse_attention
    for _ in range(2):  # Dynamo asks where modules are without importing them
        assert importlib.util.find_spec("torch.utils.flop_counter") is not None
    assert "torch.utils.flop_counter" not in sys.modules
    from torch.utils.flop_counter import FlopCounterMode
    x = torch.randn(1, 1, 8, 16)
    with FlopCounterMode(display=False) as counter:
        block_sparse_attention(x, x, x, grid_q=(2, 2, 2), tile_q=(2, 2, 1), sparsity=0.5)
    assert counter.get_total_flops() == 4 * 8 * 4 * 16 + 2 * 2 * 2 * 16, counter.get_total_flops()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_without_triton_everything_but_the_gpu_works():
    code = """
    import sys
    sys.modules["triton"] = None
    import torch
    from bsa_compile.errors import UnsupportedError
    from bsa_compile.ops import block_sparse_attention, definitions
    x = torch.randn(1, 1, 8, 16)
    assert block_sparse_attention(x, x, x, grid_q=(2, 2, 2), sparsity=0.5).shape == x.shape
    try:
        definitions.launcher("pool", "pool")
    except UnsupportedError as error:
        assert "triton must be installed" in str(error), error
    else:
        raise AssertionError("no error without triton")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_other_import_errors_of_a_launcher_are_not_hidden():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        definitions.launcher("no_such_module", "pool")


def test_a_second_derivative_is_refused_clearly():
    q, k, v = CASE.qkv()
    counts, indices = CASE.select(q, k)
    q.requires_grad_()
    out, _ = CASE.attend(q, k, v, counts, indices)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated once only"):
        grad.sum().backward()
