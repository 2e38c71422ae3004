"""Dimensions of ONNX values as the sizes that the passes compute with: ints, and expressions over named dimensions."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..passes.sizes import Size, of

if TYPE_CHECKING:
    import onnx_ir as ir


def size_of(dimension: int | ir.SymbolicDim) -> Size | None:
    """The size that a dimension stands for, None for one without a name."""
    if isinstance(dimension, int):
        return dimension
    return None if dimension.value is None else of(_evaluate(str(dimension.value), _symbol))


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


def _evaluate(text: str, named: Callable[[str], Any]) -> Any:
    """The value of `2*batch` and the like, as exporters write them; any other text is a name."""

    def value(expression: ast.expr) -> Any:
        if isinstance(expression, ast.Constant) and isinstance(expression.value, int):
            return expression.value
        if isinstance(expression, ast.Name):
            return named(expression.id)
        if isinstance(expression, ast.BinOp):
            a, b = value(expression.left), value(expression.right)
            if isinstance(expression.op, ast.Add):
                return a + b
            if isinstance(expression.op, ast.Sub):
                return a - b
            if isinstance(expression.op, ast.Mult):
                return a * b
        if isinstance(expression, ast.UnaryOp) and isinstance(expression.op, ast.USub):
            return -value(expression.operand)
        raise ValueError(text)

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        return named(text)


class Dimensions:
    """Turns dimensions into sizes of tensors; the same name is the same size everywhere.

    Args:
        shape_env: where the symbols live.

    Attributes:
        names: the name in the ONNX file of each symbol.
    """

    def __init__(self, shape_env: ShapeEnv) -> None:
        self._shape_env = shape_env
        self._symbols: dict[str, torch.SymInt] = {}
        self.names: dict[str, str] = {}

    def of(self, dimension: int | ir.SymbolicDim) -> int | torch.SymInt:
        """The size that a dimension stands for; a new unknown where it has no name."""
        if isinstance(dimension, int):
            return dimension
        return self._new("?") if dimension.value is None else _evaluate(str(dimension.value), self._named)

    def _named(self, name: str) -> torch.SymInt:
        if name not in self._symbols:
            self._symbols[name] = self._new(name)
        return self._symbols[name]

    def _new(self, name: str) -> torch.SymInt:
        symbol = self._shape_env.create_unbacked_symint()
        torch._check(symbol >= 0)
        self.names[str(symbol.node.expr)] = name
        return symbol
