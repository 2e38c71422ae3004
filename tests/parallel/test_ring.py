"""Keys and values move round: every rank gets what one process computes, under its selection."""

from __future__ import annotations

import pytest

from . import jobs
from .jobs import Case

CASES = [
    Case((4, 5, 6), {"ring": 2}),
    Case((3, 7, 5), {"ring": 3}, batch=2, cond=1),
    Case((4, 5, 6), {"ring": 2}, cond=2, cached=True),
    Case((3, 5, 6), {"ring": 2}, policy=None),
    Case((3, 4, 8), {"ring": 2, "ulysses": 2}, cond=1, batch=2),
    Case((3, 2, 5), {"ring": 4}),  # two tile columns: two ranks hold no token
    Case((3, 5, 7), {"context": 4}, heads=3),  # more ranks than heads: three heads, so two in a ring of two
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(pool, case):
    for error, sites in pool.run(case.ranks, jobs.forward, case):
        assert error < 1e-5
        if case.policy is not None:
            assert all(done == total > 0 for done, total in sites)


@pytest.mark.parametrize(
    ("case", "checkpointing"),
    [
        (Case((3, 5, 5), {"ring": 3}, cond=1, batch=2), False),
        (Case((3, 4, 5), {"ring": 2}, policy=None), False),
        (Case((4, 4, 6), {"ring": 2, "ulysses": 2}), True),
        (Case((3, 2, 5), {"ring": 4}), False),
    ],
    ids=str,
)
def test_gradients(pool, case, checkpointing):
    for errors in pool.run(case.ranks, jobs.gradients, case, checkpointing):
        assert max(errors.values()) < 1e-5, errors
