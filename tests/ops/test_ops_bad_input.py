"""Bad input is refused with a clear error, by the ops and by the functions, before anything runs."""

from __future__ import annotations

import math

import pytest
import torch

from bsa_compile.errors import BSACompileError, GridError, InputError, UnsupportedError
from bsa_compile.ops import attention, block_sparse_attention
from tests.attention_cases import Case

CASE = Case((2, 4, 6), (2, 2, 3), (2, 4, 6), (2, 2, 3), batch=2, heads=4, heads_kv=2)
Q, K, V = CASE.qkv()
COUNTS, INDICES = CASE.selection()
OUT, LSE = CASE.attend(Q, K, V, COUNTS, INDICES)


def call(**changes: object) -> object:
    arguments = {"q": Q, "k": K, "v": V, "grid_q": CASE.grid_q, "tile_q": CASE.tile_q, "sparsity": 0.5, **changes}
    return block_sparse_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def attend(**changes: object) -> object:
    names = ("q", "k", "v", "kv_num_blocks", "kv_indices", "grid_q", "tile_q", "grid_k", "tile_k", "scale", "layout")
    arguments = dict(zip(names, (Q, K, V, COUNTS, INDICES, *CASE.tail), strict=True))
    return torch.ops.bsa.attend(**{**arguments, **changes})


def backward(**changes: object) -> object:
    names = ("grad_out", "grad_lse", "q", "k", "v", "out", "lse", "kv_num_blocks", "kv_indices")
    arguments = dict(zip(names, (OUT, LSE, Q, K, V, OUT, LSE, COUNTS, INDICES), strict=True))
    arguments.update(zip(("grid_q", "tile_q", "grid_k", "tile_k", "scale", "layout"), CASE.tail, strict=True))
    return torch.ops.bsa.attend_backward(**{**arguments, **changes})


def anchor(**changes: object) -> object:
    return attention(**{"q": Q, "k": K, "v": V, "grid_q": CASE.grid_q, **changes})


BAD = [
    (call, {"grid_q": (2, 4, 5)}, GridError, "token axis of x must hold 40 tokens"),
    (call, {"grid_q": (2, 4, 0)}, GridError, "three positive integers"),
    (call, {"grid_q": (2, 4, -6)}, GridError, "three positive integers"),
    (call, {"grid_q": (8, 6)}, GridError, "three positive integers"),
    (call, {"grid_k": (2, 4, 5)}, GridError, "hold 40 tokens"),
    (call, {"tile_q": (2, 0, 3)}, GridError, "tile must be three positive integers"),
    (call, {"tile_k": (2, 2)}, GridError, "tile must be three positive integers"),
    (call, {"layout": "tiles"}, InputError, "layout must be one of raster, tile"),
    (call, {"sparsity": None}, InputError, "sparsity or cdf_threshold must be given"),
    (call, {"sparsity": math.nan}, InputError, r"sparsity must be a number in \[0, 1\], got nan"),
    (call, {"sparsity": 1.1}, InputError, r"sparsity must be a number in \[0, 1\]"),
    (call, {"sparsity": -0.1}, InputError, r"sparsity must be a number in \[0, 1\]"),
    (call, {"cdf_threshold": math.nan}, InputError, r"cdf_threshold must be a number in \(0, 1\], got nan"),
    (call, {"cdf_threshold": 0.0}, InputError, r"cdf_threshold must be a number in \(0, 1\]"),
    (call, {"scale": math.nan}, InputError, "scale must be a number finite, got nan"),
    (call, {"scale": math.inf}, InputError, "scale must be"),
    (call, {"implementation": "fast"}, UnsupportedError, "implementation must be one of native"),
    (call, {"q": Q.half()}, InputError, "have one dtype"),
    (call, {"v": V.bfloat16()}, InputError, "q, k and v must have one dtype"),
    (call, {"q": Q.int(), "k": K.int(), "v": V.int()}, UnsupportedError, "float32, float16 or bfloat16"),
    (call, {"k": K.to("meta")}, InputError, "be on one device"),
    (call, {"v": V.to("meta")}, InputError, "be on one device"),
    (call, {"q": Q[0]}, InputError, r"x must be \[B, H, S, D\], got 3 dimensions"),
    (call, {"q": Q[:0]}, InputError, "non-empty"),
    (call, {"q": Q[:, :0]}, InputError, "non-empty"),
    (call, {"k": K[:, :, :0]}, InputError, "non-empty"),
    (call, {"q": Q[:, :3]}, InputError, "heads of q must be a multiple"),
    (call, {"k": K[:1]}, InputError, "same batch and head_dim"),
    (call, {"v": V[:, :1]}, InputError, "k and v must have the same shape"),
    (
        call,
        {"q": Q[..., :8], "k": K[..., :8], "v": V[..., :8]},
        UnsupportedError,
        r"multiple of 8 in \[16, 256\], got 8",
    ),
    (
        call,
        {x: t.repeat(1, 1, 1, 2)[..., :20] for x, t in zip("qkv", (Q, K, V), strict=True)},
        UnsupportedError,
        "got 20",
    ),
    (
        call,
        {x: t.repeat(1, 1, 1, 17)[..., :264] for x, t in zip("qkv", (Q, K, V), strict=True)},
        UnsupportedError,
        "got 264",
    ),
    (attend, {"kv_indices": INDICES.long()}, InputError, "must be int32"),
    (attend, {"kv_num_blocks": COUNTS[:, :2]}, InputError, "kv_num_blocks must be"),
    (attend, {"kv_num_blocks": COUNTS[..., None]}, InputError, "kv_num_blocks must be"),
    (attend, {"kv_indices": INDICES[:, :, :1]}, InputError, "kv_indices must be"),
    (attend, {"kv_indices": INDICES[..., :0]}, InputError, "at least one key tile"),
    (attend, {"kv_indices": INDICES.to("meta")}, InputError, "be on one device"),
    (attend, {"q": Q.transpose(2, 3).contiguous().transpose(2, 3)}, InputError, "q must have a unit last stride"),
    (attend, {"v": V.transpose(2, 3).contiguous().transpose(2, 3)}, InputError, "v must have a unit last stride"),
    (attend, {"grid_q": [2, 4, 5]}, GridError, "token axis of q must hold 40 tokens"),
    (attend, {"grid_k": [2, 4, 7]}, GridError, "token axis of k must hold 56 tokens"),
    (attend, {"tile_k": [2, -2, 3]}, GridError, "tile_k must be three positive integers"),
    (attend, {"layout": "tile", "tile_q": [2, 2, 4]}, GridError, "in padded tiles of 2x2x4"),
    (attend, {"scale": math.nan}, InputError, "scale must be"),
    (attend, {"implementation": "fast"}, UnsupportedError, "one of native"),
    (backward, {"grad_out": OUT[:1]}, InputError, "grad_out must have the shape"),
    (backward, {"out": OUT[..., :8]}, InputError, "out must have the shape"),
    (backward, {"grad_lse": LSE[..., None]}, InputError, "grad_lse must have the shape"),
    (backward, {"lse": LSE[:, :1], "grad_lse": None}, InputError, r"lse must be \[B, H, Sq\]"),
    (backward, {"grad_out": OUT.half()}, InputError, "grad_out must be torch.float32"),
    (backward, {"grad_out": OUT.to("meta")}, InputError, "be on one device"),
    (anchor, {"grid_q": (2, 4, 5)}, GridError, "token axis of q must hold 40 tokens"),
    (anchor, {"grid_k": (2, 4, 5)}, GridError, "token axis of k must hold 40 tokens"),
    (anchor, {"grid_q": (2, 24)}, GridError, "three positive integers"),
    (anchor, {"role": "other"}, InputError, "role must be one of self"),
    (anchor, {"scale": math.nan}, InputError, "scale must be"),
    (anchor, {"q": Q[0]}, InputError, "q must be"),
    (anchor, {"q": Q[:, :3]}, InputError, "heads of q must be a multiple"),
    (anchor, {"v": V.to("meta")}, InputError, "be on one device"),
]


@pytest.mark.parametrize(("function", "changes", "kind", "text"), BAD, ids=lambda x: getattr(x, "__name__", None))
def test_bad_input_is_refused(function, changes, kind, text):
    with pytest.raises(kind, match=text) as caught:
        function(**changes)
    assert isinstance(caught.value, BSACompileError)


@pytest.mark.parametrize("function", [call, attend, backward, anchor])
def test_the_same_calls_without_the_fault_are_accepted(function):
    function()


def test_fp64_is_for_the_cpu_alone():
    from bsa_compile.ops import validate

    with pytest.raises(UnsupportedError, match="float64 on cuda"):
        validate.check_dtype("q", torch.empty(0, dtype=torch.float64, device="meta").as_subclass(OnCuda))


class OnCuda(torch.Tensor):
    device = torch.device("cuda")  # type: ignore[assignment]


def test_a_wrong_grid_is_named_when_compiling_too():
    f = torch.compile(lambda q, k, v: attention(q, k, v, grid_q=(2, 4, 5)), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="token axis of q must hold 40 tokens"):
        f(Q, K, V)
