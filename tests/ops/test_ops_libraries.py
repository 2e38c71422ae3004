"""Adapters of installed libraries, with stand-ins that compute what the libraries promise, and what `auto` chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bsa_compile
from bsa_compile import reference
from bsa_compile.errors import PolicyError, UnsupportedError
from bsa_compile.grid import from_tiles, to_tiles
from bsa_compile.ops import attend_implementations, registry, tile_order, wins
from bsa_compile.ops.wins import Win
from tests.attention_cases import Case
from tests.library_stand_ins import stand_in

CASE = Case((4, 4, 6), (2, 2, 3), (2, 6, 8), (2, 3, 2), heads=2, heads_kv=2, head_dim=16)  # 12 tokens a tile
NAMES = ("flash-attn-4", "cudnn")


@pytest.fixture
def calls(monkeypatch):
    """Both libraries stand in, and count as installed and as fit for the CPU; what they were asked for."""
    return stand_in(monkeypatch)


@pytest.mark.parametrize("layout", ["raster", "tile"])
@pytest.mark.parametrize("heads_first", [True, False])
def test_tile_order_and_back(layout, heads_first):
    grid, tile = (4, 6, 6), (2, 3, 2)
    x = torch.randn(2, 144, 3, 8).transpose(1, 2)
    blocks = tile_order.blocks_of(x, grid, tile, layout, heads_first)
    wanted = to_tiles(x, grid, tile).flatten(2, 3) if layout == "raster" else x
    assert torch.equal(blocks, wanted if heads_first else wanted.transpose(1, 2))
    assert blocks.is_contiguous()
    back = tile_order.tokens_of(blocks, grid, tile, layout, heads_first)
    assert torch.equal(back, x)
    assert back.transpose(1, 2).is_contiguous()
    lse = x[..., 0]
    there = tile_order.lse_blocks(lse, grid, tile, layout)
    assert torch.equal(there, wanted[..., 0])
    assert torch.equal(tile_order.lse_tokens(there, grid, tile, layout), lse)
    if layout == "raster":
        assert torch.equal(from_tiles(wanted.unflatten(2, (-1, 12)), grid, tile), x)


@pytest.mark.parametrize("layout", ["raster", "tile"])
@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients_come_back_in_the_order_of_the_tokens(calls, name, layout):
    case = CASE.but(layout=layout, batch=2)
    q, k, v = case.qkv()
    lists = case.selection(0.6)  # some rows are empty, and the tails are poisoned
    out, lse = torch.ops.bsa.attend(q, k, v, *lists, *case.tail, name)
    truth = reference.attend(q, k, v, *lists, *case.tail)
    assert torch.allclose(out.double(), truth[0], atol=1e-5)
    assert torch.allclose(lse.double(), truth[1], atol=1e-5)
    half = [x.bfloat16() if name == "cudnn" else x for x in (q, k, v, out, torch.randn_like(out))]
    q, k, v, out, grad_out = half
    grads = torch.ops.bsa.attend_backward(grad_out, None, q, k, v, out, lse, *lists, *case.tail, name)
    truth = reference.attend_backward(grad_out, None, q, k, v, *lists, *case.tail)
    for ours, theirs in zip(grads, truth, strict=True):
        assert torch.allclose(ours.double(), theirs, atol=1e-4 if q.dtype == torch.float32 else 5e-2, rtol=1e-2)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize(
    ("name", "dtype", "grad_lse", "deterministic", "theirs"),
    [
        ("flash-attn-4", torch.float32, True, False, True),
        ("flash-attn-4", torch.float32, False, True, False),
        ("cudnn", torch.bfloat16, True, False, False),
        ("cudnn", torch.bfloat16, False, True, False),
        ("cudnn", torch.float16, False, False, False),
    ],
)
def test_ours_goes_backward_where_theirs_cannot(calls, name, dtype, grad_lse, deterministic, theirs):
    case = CASE.but(dtype=dtype)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    lists = case.selection(0.6)
    grads = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for who in (name, "native"):
            out, lse = torch.ops.bsa.attend(q, k, v, *lists, *case.tail, who)
            loss = out.float().square().sum() + (lse.masked_fill(lse.isinf(), 0).sum() if grad_lse else 0)
            grads.append(torch.autograd.grad(loss, (q, k, v)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["forward", "backward"] if theirs else ["forward"]
    for ours, native in zip(*grads, strict=True):
        assert torch.allclose(ours, native, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-2)


def on_hopper(monkeypatch, **changes: Any) -> tuple[Any, ...]:
    """A case as a Hopper GPU would see it: tensors are only asked for what they are."""
    given = {"dtype": torch.bfloat16, "heads_kv": 8, "head_dim": 128, "tile": (4, 4, 8), "grid": (8, 8, 16)}
    given |= {"capability": (9, 0), "device": "cuda"} | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: given["capability"])
    device = SimpleNamespace(type=given["device"])
    q = SimpleNamespace(device=device, dtype=given["dtype"], shape=(1, 8, 1024, given["head_dim"]))
    k = SimpleNamespace(device=device, dtype=given["dtype"], shape=(1, given["heads_kv"], 1024, given["head_dim"]))
    return q, k, k, given["grid"], given["tile"], given["grid"], given.get("tile_k", given["tile"]), "raster"


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("flash-attn-4", {}, None),
        ("cudnn", {}, None),
        ("cudnn", {"tile": (4, 4, 4)}, None),
        ("flash-attn-4", {"tile": (4, 4, 4)}, "tiles hold 128 tokens"),
        ("cudnn", {"tile": (4, 8, 8)}, "tiles hold 64 or 128 tokens"),
        ("cudnn", {"tile_k": (4, 4, 4)}, r"got \(128, 64\)"),
        ("cudnn", {"device": "cpu"}, "needs a CUDA GPU, got cpu"),
        ("cudnn", {"capability": (8, 0)}, r"compute capability 9.0 \(Hopper\), got 8.0"),
        ("cudnn", {"dtype": torch.float32}, "bfloat16 or float16, got float32"),
        ("flash-attn-4", {"head_dim": 64}, "head_dim is 128, got 64"),
        ("cudnn", {"heads_kv": 2}, "as many key heads as query heads, got 2 and 8"),
        ("flash-attn-4", {"grid": (8, 8, 12)}, "no partial tiles"),
    ],
)
def test_a_library_says_what_it_does_not_take(monkeypatch, name, changes, why):
    monkeypatch.setattr(registry, "installed_version", lambda name: "1.0")
    monkeypatch.setattr(registry, "_describe", lambda *case: "this case")
    case = on_hopper(monkeypatch, **changes)
    if why is None:
        assert registry.choose(name, *case).name == name
    else:
        with pytest.raises(UnsupportedError, match=why):
            registry.choose(name, *case)


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_is_not_installed_names_its_extra(monkeypatch, name):
    monkeypatch.setattr(registry, "installed_version", lambda name: None)
    assert attend_implementations()[:2] == ("native", "auto")
    assert name not in attend_implementations()
    q, k, v = CASE.qkv()
    with pytest.raises(UnsupportedError, match=r"is not installed. Run: pip install 'bsa-compile\[peers\]'"):
        torch.ops.bsa.attend(q, k, v, *CASE.selection(), *CASE.tail, name)
    with pytest.raises(PolicyError, match=r"is not installed. Run: pip install 'bsa-compile\[peers\]'"):
        bsa_compile.optimize(torch.nn.Linear(2, 2), bsa_compile.BSAPolicy(attend=name))
    with pytest.raises(PolicyError, match=r"cudnn and flash-attn-4 by pip install 'bsa-compile\[peers\]'"):
        bsa_compile.optimize(torch.nn.Linear(2, 2), bsa_compile.BSAPolicy(attend="other"))


WIN = Win("flash-attn-4", False, (9, 0), (torch.bfloat16,), 128, 128, 1024, "some.json")


@pytest.mark.parametrize(
    ("win", "changes", "installed", "name", "reason"),
    [
        (WIN, {}, True, "flash-attn-4", "some.json"),
        (WIN, {}, False, "native", "flash-attn-4 is not installed"),
        (WIN, {"grid": (8, 8, 12), "tile": (4, 4, 8)}, True, "native", "no library"),  # 768 tokens, too few
        (WIN, {"grid": (8, 8, 20)}, True, "native", "no partial tiles"),
        (WIN, {"capability": (10, 0)}, True, "native", "no library"),
        (WIN, {"tile": (4, 4, 4)}, True, "native", "no library"),
        (WIN, {"device": "cpu"}, True, "native", "no library"),
        (WIN, {"device": "meta"}, True, "native", "the device that runs it decides"),
        (None, {}, True, "native", "no library"),
    ],
)
def test_auto_goes_by_the_table_of_wins(monkeypatch, win, changes, installed, name, reason):
    monkeypatch.setattr(registry, "installed_version", lambda name: "1.0" if installed else None)
    monkeypatch.setattr(wins, "WINS", (win,) if win else ())
    case = on_hopper(monkeypatch, **changes)
    choice = registry.choose("auto", *case)
    assert choice.name == name
    assert reason in choice.reason
    assert registry.choose("auto", *case, backward=True).name == "native"


def test_every_entry_of_the_table_names_a_library_and_a_file_that_is_there():
    root = __import__("pathlib").Path(bsa_compile.__file__).parents[1]
    for win in wins.WINS:
        assert win.implementation in NAMES
        assert (root / "benchmarks" / "results" / win.evidence).is_file()


def test_auto_is_native_here_and_the_report_says_so():
    q, k, v = CASE.qkv()
    lists = CASE.selection()
    both = [torch.ops.bsa.attend(q, k, v, *lists, *CASE.tail, who)[0] for who in ("auto", "native")]
    assert torch.equal(*both)

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return bsa_compile.attention(q, k, v, grid_q=(4, 4, 6))

    q = torch.randn(1, 2, 96, 16)
    fast = bsa_compile.optimize(
        Model(),
        bsa_compile.BSAPolicy(attend="auto", chunk_3d_shape_q=(2, 2, 3), chunk_3d_shape_k=(2, 2, 3)),
        backend="eager",
    )
    fast(q, q, q)
    (site,) = fast.report.sites
    assert (site.attend, site.attend_reason) == ("native", "auto: no library was measured to be faster for this case")
    assert "attend by native (auto: no library" in site.outcome
    assert "attend by native (auto" in str(fast.report)
