"""Exact arithmetic on sizes that may be symbolic, without adding a guard.

A size is an `int` or a sympy expression over the symbols of the graph's `ShapeEnv`. Comparing two `SymInt`s with `==`
and using the result as a bool would guard on it, that is specialise the graph; everything here only asks what is known
already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = Any
"""`int` or `sympy.Expr`."""


def of(value: Any) -> Size:
    """The size that an `int`, a `SymInt` or an expression stands for; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, torch.SymInt):
        value = value.node.expr
    if isinstance(value, sympy.Integer):
        return int(value)
    return value if isinstance(value, sympy.Expr) else None


def shape(tensor: torch.Tensor) -> tuple[Size, ...]:
    """The sizes of a (fake) tensor."""
    return tuple(of(s) for s in tensor.shape)


def product(values: Iterable[Size]) -> Size:
    """Their product; 1 for none."""
    total: Size = 1
    for value in values:
        total = total * value
    return of(total)


def total(values: Iterable[Size]) -> Size:
    """Their sum; 0 for none."""
    result: Size = 0
    for value in values:
        result = result + value
    return of(result)


class Sizes:
    """What is known of the sizes of one graph.

    Args:
        shape_env: the graph's `ShapeEnv`, None where every size is an `int`.
    """

    def __init__(self, shape_env: Any = None) -> None:
        self.shape_env = shape_env
        self._same: dict[tuple[Size, Size], bool] = {}
        self._quotient: dict[tuple[Size, Size], Size | None] = {}

    def same(self, a: Size, b: Size) -> bool:
        """Whether a and b are equal for every value of the symbols."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        if a == b:  # structural: sympy adds no guard
            return True
        key = (a, b)
        if key not in self._same:
            self._same[key] = bool(sympy.expand(a - b) == 0) or self._known(sympy.Eq(a, b)) is True
        return self._same[key]

    def all_same(self, a: Iterable[Size], b: Iterable[Size]) -> bool:
        """Whether two sequences of sizes are equal item by item."""
        a, b = tuple(a), tuple(b)
        return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b, strict=True))

    def quotient(self, a: Size, b: Size) -> Size | None:
        """`a / b` where b is known to divide a, else None."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b if b != 0 and a % b == 0 else None
        key = (a, b)
        if key not in self._quotient:
            self._quotient[key] = self._divide(a, b)
        return self._quotient[key]

    def at_least(self, a: Size, b: Size) -> bool | None:
        """Whether a >= b: True, False, or None where it depends on the symbols."""
        if isinstance(a, int) and isinstance(b, int):
            return a >= b
        if self.same(a, b):
            return True
        return self._known(sympy.Ge(a, b))

    def index(self, value: Size, size: Size) -> Size | None:
        """A Python index or slice bound as a position counted from the front; None where its sign is not known."""
        positive = self.at_least(value, 0)
        if positive is None:
            return None
        return value if positive else of(size + value)

    def _divide(self, a: Size, b: Size) -> Size | None:
        if self.same(a, 0):
            return 0
        if self.same(b, 0):
            return None
        a, b = sympy.sympify(a), sympy.sympify(b)
        # Functions such as FloorDiv stand for one unknown each: the quotient is that of two polynomials.
        names = {f: sympy.Dummy() for f in sorted(a.atoms(sympy.Function) | b.atoms(sympy.Function), key=str)}
        ratio = sympy.cancel(a.xreplace(names) / b.xreplace(names))
        numerator, denominator = sympy.fraction(ratio)
        if denominator != 1 or not all(c.is_integer for c in numerator.expand().as_coefficients_dict().values()):
            return None
        return of(numerator.xreplace({dummy: f for f, dummy in names.items()}))

    def _known(self, condition: Any) -> bool | None:
        if condition in (sympy.true, sympy.false):
            return bool(condition)
        if self.shape_env is not None:
            condition = self.shape_env._maybe_evaluate_static(condition)
        return None if condition is None or condition not in (sympy.true, sympy.false) else bool(condition)
