"""One name and one way to read arguments for the many spellings of an operator in a graph.

`x.transpose(1, 2)` is a method call in a Dynamo graph, `torch.transpose(x, 1, 2)` a builtin, `aten.transpose.int` an
OpOverload after export, `x += y` a call of `operator.iadd`; all of them reach the rules as a `Call` with a base name.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn

_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "multiply": "mul",
    "subtract": "sub",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "broadcast_to": "expand",
    "expand_as": "expand",
    "constant_pad_nd": "pad",
    "_native_multi_head_attention": "native_multi_head_attention",
}
_OPERATOR_MODULES = ("_operator", "operator")


@dataclass(frozen=True)
class Call:
    """An operator call.

    Attributes:
        node: the node.
        name: base name without overload, module or trailing underscore.
        inplace: whether it writes to its first argument.
    """

    node: fx.Node
    name: str
    inplace: bool = False

    @property
    def x(self) -> Any:
        """The first argument, by position or by the names torch gives it."""
        if self.node.args:
            return self.node.args[0]
        for key in ("input", "self", "tensor", "tensors", "x"):
            if key in self.node.kwargs:
                return self.node.kwargs[key]
        return next(iter(self.node.kwargs.values()), None)

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """The argument at `position` or under one of `names`."""
        if position < len(self.node.args):
            return self.node.args[position]
        return next((self.node.kwargs[n] for n in names if n in self.node.kwargs), default)

    def rest(self, position: int, *names: str) -> list[Any]:
        """Integers given one by one (`permute(0, 2, 1)`) or as one list (`permute([0, 2, 1])`)."""
        given = list(self.node.args[position:])
        if len(given) == 1 and isinstance(given[0], (list, tuple)):
            return list(given[0])
        if given:
            return given
        named = self.get(position, *names)
        return list(named) if isinstance(named, (list, tuple)) else [] if named is None else [named]


def qualified_name(target: Any) -> str:
    """`namespace::name` of a custom or ATen op, `module.name` of a Python or builtin function."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target._name}"
    if isinstance(target, types.MethodDescriptorType):
        return f"torch.Tensor.{target.__name__}"
    name = getattr(target, "__name__", type(target).__name__)
    return f"{getattr(target, '__module__', None) or ''}.{name}"


def schema_of(target: Any) -> torch.FunctionSchema | None:
    """The schema of an op; of a packet, that of its first overload."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


_MODULES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear,), "linear"),
    ((nn.Conv1d,), "conv1d"),
    ((nn.Conv2d,), "conv2d"),
    ((nn.Conv3d,), "conv3d"),
    ((nn.LayerNorm, nn.RMSNorm, nn.GroupNorm), "layer_norm"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity), "dropout"),
    ((nn.Embedding,), "embedding"),
    ((nn.Flatten, nn.Unflatten), "view"),
    ((nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Mish, nn.LeakyReLU, nn.ELU, nn.Softmax), "softmax"),
)


def module_call(node: fx.Node, module: nn.Module) -> Call | None:
    """A `call_module` of a module of `torch.nn` as the operator that does the same to positions."""
    name = next((name for kinds, name in _MODULES if type(module) in kinds), None)
    return None if name is None else Call(node, name)


def call_of(node: fx.Node) -> Call | None:
    """The node as a call of an operator of torch or Python; None for functions of other libraries."""
    if node.op == "call_method":
        return _named(node, str(node.target))
    if node.op != "call_function":
        return None
    name = qualified_name(node.target)
    if "::" in name:
        namespace, base = name.split("::", 1)
        return _named(node, base) if namespace in ("aten", "prims") else None
    module, _, base = name.rpartition(".")
    if module in _OPERATOR_MODULES:
        inplace = base[:1] == "i" and hasattr(torch.Tensor, f"__{base}__") and base not in ("inv", "invert", "index")
        call = _named(node, base[1:] if inplace else base)
        return Call(node, call.name, inplace) if inplace else call
    if module.split(".")[0] == "einops":
        return _named(node, base) if base == "rearrange" else None
    if module == "builtins" or module == "torch" or module.startswith("torch."):
        return _named(node, base)
    return None


def _named(node: fx.Node, name: str) -> Call:
    inplace = False
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        if name[:1] in "ir" and name[1:] in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
            inplace, name = name[0] == "i", name[1:]
    elif name.endswith("_") and name not in _ALIASES:
        inplace, name = True, name.rstrip("_")
    return Call(node, _ALIASES.get(name, name), inplace)


@cache
def is_pointwise(name: str) -> bool:
    """Whether ATen tags an operator of this name as elementwise."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
