import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv

from bsa_compile.passes.sizes import Sizes, of, product

S, T, C = sympy.symbols("s t c", integer=True, positive=True)
H = FloorDiv(S, 2)
SIZES = Sizes()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (12, 4, 3),
        (12, 5, None),
        (12, 0, None),
        (0, 4, 0),
        (T * H**2, H**2, T),
        (T * H * H, H, T * H),
        (6 * T, 3, 2 * T),
        (6 * T, 4, None),
        (T * H**2 + C * H**2, H**2, T + C),
        (H, T, None),
        (C, H**2, None),
        (12, T, None),
        (H**2, 1, H**2),
    ],
)
def test_quotient(a, b, expected):
    assert SIZES.quotient(a, b) == expected


def test_same_knows_algebra_but_no_hints():
    assert SIZES.same(T * (H + 1), T * H + T)
    assert not SIZES.same(T, S)
    assert not SIZES.same(T, 4)


@pytest.mark.parametrize(
    ("value", "size", "expected"),
    [(-3, 10, 7), (3, 10, 3), (-T, T * H + C, T * H + C - T), (T, T * H, T), (T - C, T, None)],
)
def test_index(value, size, expected):
    assert SIZES.index(value, size) == expected


def test_product_of_ints_is_an_int():
    assert product((2, 3)) == 6
    assert isinstance(product((2, 3)), int)
    assert of(sympy.Integer(3)) == 3
    assert of(True) is None
