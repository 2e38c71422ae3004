"""Recognises attention in a graph: which node, which tensors, and what was asked for that has no block-sparse form.

Everything goes by qualified name, so that neither flash-attn nor xformers need be installed. Arguments are bound by the
callee's own signature (schema, or `inspect.signature`), so that positional, keyword and mixed calls are all one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..ops.ring_share import Ring
from .calls import Call, call_of, is_pointwise, qualified_name, schema_of
from .modulepath import value

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_FLASH = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes")
_XFORMERS = ("query", "key", "value", "attn_bias", "p", "scale")
_MHA = ("query", "key", "value")

_ROLES_OF_ARGUMENTS = {
    "attn_mask": "mask",
    "attn_bias": "mask",
    "dropout_p": "dropout",
    "p": "dropout",
    "is_causal": "causal",
    "causal": "causal",
}
_SCALE = ("scale", "softmax_scale")
_IRRELEVANT = frozenset(
    {"query", "key", "value", "q", "k", "v", "enable_gqa", "deterministic", "num_splits", "pack_gqa", "sm_margin", "op"}
) | set(_SCALE)
_NEUTRAL = (None, False, 0)
_NO_WINDOW = (None, -1, (-1, -1), (None, None))

_FLASH_DENSE = ("flash_attn_func", "_flash_attn_forward", "fwd")
_LOWERED = ("_scaled_dot_product_", "_flash_attention_forward", "_efficient_attention_forward")
_MHA_NAMES = (
    "torch.nn.functional.multi_head_attention_forward",
    "torch._native_multi_head_attention",
    "aten::_native_multi_head_attention",
    "torch._transformer_encoder_layer_fwd",
    "aten::_transformer_encoder_layer_fwd",
)
_CHAIN = 8  # how far softmax and matmul may be apart in attention that is written out
_CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16", "contiguous", "clone")
_PASSIVE = frozenset((*_CASTS, "dropout", "native_dropout", "expand", "view", "reshape", "getitem"))


@dataclass(frozen=True)
class Match:
    """One attention call.

    Attributes:
        op: the entry point, for the report.
        q, k, v: the operands; None where the entry point packs them.
        q_dim, k_dim: the dimension of q and k that counts tokens.
        layout: `BHSD` or `BSHD`; empty where the operands are laid out in another way.
        scale: the given scale; None for 1 / sqrt(head_dim).
        gqa: whether fewer key heads than query heads are allowed.
        issue: (reason, detail) why the call has no block-sparse form, None if it has.
        anchor: whether it is `bsa::attention`, which brings its grids and role along.
        grid_q, grid_k, role: what the anchor says; the grids' items are ints or nodes.
        tuple_result: whether the output is item 0 of a tuple.
        like_q: whether the output is known to have q's layout.
        ring: axis, bounds, index and group of an anchor whose tokens are shared by a ring of ranks, else empty.
    """

    op: str
    q: fx.Node | None
    k: fx.Node | None
    v: fx.Node | None
    q_dim: int = 2
    k_dim: int = 2
    layout: str = ""
    scale: float | None = None
    gqa: bool = False
    issue: tuple[str, str] | None = None
    anchor: bool = False
    grid_q: tuple[Any, ...] = ()
    grid_k: tuple[Any, ...] = ()
    role: str = ""
    tuple_result: bool = False
    like_q: bool = True
    ring: tuple[Any, ...] = ()

    def here(self, grid: tuple[Any, ...]) -> tuple[Any, ...]:
        """The part of a grid that the operands hold: all of it, but for a ring's member."""
        return Ring.of(*self.ring).grid(grid) if self.ring else grid


def match(node: fx.Node) -> Match | None:
    """The attention call that `node` is, or None."""
    if node.op == "call_module":
        return _module(node)
    if node.op != "call_function":
        return None
    name = qualified_name(node.target)
    space, _, base = name.rpartition("::" if "::" in name else ".")
    if name in ("bsa::attention", "bsa::ring_attention"):
        return _anchor(node)
    if space == "bsa":
        return None
    if base == "scaled_dot_product_attention" and space in ("torch._C._nn", "torch.nn.functional", "torch", "aten"):
        return _attention(node, "sdpa", "BHSD", _SDPA)
    if "flash_attn" in space and base in _FLASH_DENSE:
        return _attention(node, "flash_attn", "BSHD", _FLASH, gqa=True)
    if space.startswith("xformers") and base == "memory_efficient_attention":
        return _attention(node, "xformers", "BSHD", _XFORMERS)
    if name in _MHA_NAMES:
        given = _bind(node, _MHA)
        dim = 0 if base == "multi_head_attention_forward" else 1
        return _hidden(node, base, given.get("query", given.get("src")), given.get("key"), dim)
    if name == "higher_order::flex_attention":
        return _hidden(node, base, node.args[0], node.args[1], 2)
    if space == "aten" and base.startswith(_LOWERED):
        given, dim = _bind(node, _MHA), 1 if base.startswith("_flash") or base.startswith("_eff") else 2
        issue = ("variant", "already lowered: rewrite the graph before run_decompositions()")
        return _hidden(node, base, given.get("query"), given.get("key"), dim, issue)
    if space not in ("torch", "aten", "_operator") and ("attn" in base or "attention" in base):
        return _foreign(node, name)
    return None


def _attention(node: fx.Node, op: str, layout: str, names: Sequence[str], gqa: bool = False) -> Match:
    given = _bind(node, names)
    q, k, v = (given.get(long, given.get(short)) for long, short in (("query", "q"), ("key", "k"), ("value", "v")))
    issue, scale = None, None
    for name, got in given.items():
        if name in _SCALE:
            scale = got
        neutral = _NO_WINDOW if name.startswith("window") else _NEUTRAL
        if name in _IRRELEVANT or (not isinstance(got, fx.Node) and _plain(got) in neutral):
            continue
        issue = issue or (_ROLES_OF_ARGUMENTS.get(name, "variant"), f"{name}={got}")
    if scale is not None and not isinstance(scale, (int, float)):
        issue, scale = issue or ("variant", f"scale={scale} is not a constant"), None
    tuple_result = isinstance(value(node), (tuple, list))
    if tuple_result and any(user.users for user in node.users if not _takes_first(user, node)):
        issue = issue or ("variant", "its log-sum-exp is used")
    dim = layout.index("S")
    return Match(
        op, q, k, v, dim, dim, layout, scale, gqa or bool(given.get("enable_gqa")), issue, tuple_result=tuple_result
    )


def _anchor(node: fx.Node) -> Match:
    given = _bind(node, ("q", "k", "v", "grid_q", "grid_k", "role", "scale"))
    ring = tuple(given[name] for name in ("axis", "bounds", "index", "group")) if "group" in given else ()
    return Match(
        "bsa.ring_attention" if ring else "bsa.attention",
        given["q"],
        given["k"],
        given["v"],
        layout="BHSD",
        scale=given.get("scale"),
        gqa=True,
        anchor=True,
        grid_q=tuple(given["grid_q"]),
        grid_k=tuple(given["grid_k"]),
        role=given.get("role", "self"),
        ring=ring,
    )


def _hidden(node: fx.Node, op: str, q: Any, k: Any, dim: int, issue: tuple[str, str] | None = None) -> Match:
    issue = issue or ("opaque", op)
    q, k = (x if isinstance(x, fx.Node) else None for x in (q, k))
    return Match(op, q, k, None, dim, dim, issue=issue, tuple_result=isinstance(value(node), (tuple, list)))


def _foreign(node: fx.Node, name: str) -> Match | None:
    """A function of another library that is called attention and takes q, k, v: better reported than overlooked."""
    tensors = [a for a in node.all_input_nodes if isinstance(value(a), torch.Tensor)]
    if len(tensors) < 3:
        return None
    flash = "flash_attn" in name
    rank = value(tensors[0]).dim()
    dim = 0 if rank == 3 and flash else 1 if flash else max(rank - 2, 0)
    issue = ("variant", name) if flash else ("opaque", name)
    op = name.rpartition("::" if "::" in name else ".")[2]
    return replace(_hidden(node, op, tensors[0], tensors[1], dim, issue), like_q=False)


def _module(node: fx.Node) -> Match | None:
    owner = node.graph.owning_module
    module = None if owner is None else owner.get_submodule(str(node.target))
    if not isinstance(module, torch.nn.MultiheadAttention):
        return None
    given = dict(zip(_MHA, node.args, strict=False)) | dict(node.kwargs)
    return _hidden(node, "MultiheadAttention", given.get("query"), given.get("key"), 1 if module.batch_first else 0)


def written_out(node: fx.Node) -> Match | None:
    """Attention spelt as matmul, softmax, matmul, which `match` cannot see in one node."""
    outer = call_of(node)
    if outer is None or outer.name not in ("matmul", "bmm"):
        return None
    softmax = _back(outer.x, ("softmax", "_softmax"))
    inner = _back(softmax.x, ("matmul", "bmm", "baddbmm")) if softmax is not None else None
    if inner is None:
        return None
    q, k = (inner.get(i + (inner.name == "baddbmm")) for i in (0, 1))
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(value(q), torch.Tensor)):
        return None
    rank = value(q).dim()
    issue = ("opaque", "written out as matmul, softmax, matmul, in the model or by run_decompositions()")
    return Match("matmul-softmax-matmul", q, k, None, rank - 2, rank - 1, issue=issue)


def _back(node: Any, wanted: Sequence[str]) -> Call | None:
    """The nearest call of one of these names, upstream through views and elementwise operators alone."""
    front = [node] if isinstance(node, fx.Node) else []
    for _ in range(_CHAIN):
        calls = [call for n in front if (call := call_of(n)) is not None]
        found = next((call for call in calls if call.name in wanted), None)
        if found is not None:
            return found
        passed = [call for call in calls if call.name in _PASSIVE or is_pointwise(call.name)]
        front = list(dict.fromkeys(n for call in passed for n in call.node.all_input_nodes))
    return None


def _bind(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """Arguments by name."""
    target: Any = node.target
    schema = schema_of(target)
    if schema is not None:
        names = [a.name for a in schema.arguments]
    else:
        with contextlib.suppress(TypeError, ValueError):  # a builtin has no signature: the documented order holds
            names = [p for p in inspect.signature(target).parameters if p not in ("args", "kwargs")] or names
    given = dict(zip(names, node.args, strict=False))
    given.update((f"argument {i}", node.args[i]) for i in range(len(names), len(node.args)))
    return given | dict(node.kwargs)


def _plain(got: Any) -> Any:
    return tuple(got) if isinstance(got, (list, tuple)) else got


def _takes_first(user: fx.Node, node: fx.Node) -> bool:
    call = call_of(user)
    return call is not None and call.name == "getitem" and user.args == (node, 0)
