"""Putting in another implementation of attend by name."""

from __future__ import annotations

import pytest
import torch

from bsa_compile import cpu
from bsa_compile.errors import UnsupportedError, UsageError
from bsa_compile.ops import attend_implementations, block_sparse_attention, register_attend, registry
from tests.attention_cases import Case

CASE = Case((2, 4, 6), (2, 2, 3), (2, 4, 6), (2, 2, 3))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def doubled(*args):
    out, lse = cpu.attend(*args)
    return out * 2, lse


def call(implementation, *inputs):
    q, k, v = inputs or CASE.qkv()
    options = {"grid_q": CASE.grid_q, "tile_q": CASE.tile_q, "sparsity": 0.5}
    return block_sparse_attention(q, k, v, implementation=implementation, **options)


def test_native_is_built_in_and_cannot_be_replaced():
    assert attend_implementations() == ("native", "auto")
    for name in ("native", "auto"):
        for replace in (False, True):
            with pytest.raises(UsageError, match=name):
                register_attend(name, doubled, replace=replace)


def test_a_registered_implementation_runs_in_eager_and_compiled_code():
    register_attend("doubled", doubled)
    assert attend_implementations() == ("native", "auto", "doubled")
    q, k, v = CASE.qkv()
    expected = call("native") * 2
    assert torch.equal(call("doubled"), expected)
    compiled = torch.compile(lambda q, k, v: call("doubled", q, k, v), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected)


def test_a_name_is_taken_once_unless_replaced():
    register_attend("mine", doubled)
    with pytest.raises(UsageError, match="replace=True"):
        register_attend("mine", cpu.attend)
    register_attend("mine", cpu.attend, replace=True)
    assert torch.equal(call("mine"), call("native"))
    with pytest.raises(UsageError, match="non-empty"):
        register_attend("", doubled)


def test_an_unknown_name_lists_the_known_ones():
    register_attend("mine", doubled)
    with pytest.raises(UnsupportedError, match="one of native, auto, mine, got 'other'"):
        call("other")


@pytest.mark.parametrize(("answer", "text"), [(False, "'picky'"), ("only 128-token tiles", "only 128-token tiles")])
def test_what_an_implementation_does_not_support_is_an_error_and_not_a_fallback(answer, text):
    register_attend("picky", doubled, supports=lambda *case: answer)
    with pytest.raises(UnsupportedError, match=text):
        call("picky")
    with pytest.raises(Exception, match=text):
        torch.compile(lambda q, k, v: call("picky", q, k, v), fullgraph=True, backend="eager")(*CASE.qkv())


def test_supports_sees_the_case():
    seen = []
    register_attend("mine", cpu.attend, supports=lambda *case: seen.append(case) or True)
    call("mine")
    (case,) = seen
    assert [tuple(x.shape) for x in case[:3]] == [(1, 2, 48, 16)] * 3
    assert case[3:] == (CASE.grid_q, CASE.tile_q, CASE.grid_k, CASE.tile_k, "raster")


def test_gradients_need_a_registered_backward():
    register_attend("forward only", cpu.attend)
    q, k, v = (x.requires_grad_() for x in CASE.qkv())
    with pytest.raises(UnsupportedError, match="have a backward"):
        call("forward only", q, k, v).sum().backward()

    def halved(*args):
        return tuple(g / 2 for g in cpu.attend_backward(*args))

    register_attend("forward only", cpu.attend, halved, replace=True)
    ours = torch.autograd.grad(call("forward only", q, k, v).sum(), (q, k, v))
    native = torch.autograd.grad(call("native", q, k, v).sum(), (q, k, v))
    for a, b in zip(ours, native, strict=True):
        assert torch.equal(a, b / 2)


def test_an_implementation_may_return_any_memory_order():
    def contiguous(*args):
        out, lse = cpu.attend(*args)
        return out.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)

    register_attend("other order", contiguous)
    case = CASE.but(batch=2)
    q, k, v = case.qkv()
    out, lse = torch.ops.bsa.attend(q, k, v, *case.selection(), *case.tail, "other order")
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
