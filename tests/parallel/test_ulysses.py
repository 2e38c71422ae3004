"""Heads against tokens: every rank gets what one process computes."""

from __future__ import annotations

import pytest

from . import jobs
from .jobs import Case

CASES = [
    Case((4, 5, 6), {"context": 2}),
    Case((3, 5, 7), {"context": 3}, batch=2),  # four heads and 35 positions on three ranks
    Case((2, 3, 5), {"ulysses": 4}, cond=1),
    Case((3, 4, 5), {"context": 2}, heads=17, cond=1),  # two groups of heads: one attends while the other travels
    Case((5, 4, 6), {"context": 3}, cond=2, batch=2),
    Case((5, 4, 6), {"context": 2}, cond=2, cached=True, batch=2),
    Case((3, 3, 4), {"context": 4}, cond=1, cached=True, options={"offload_kv_cache": True}),
    Case((3, 4, 5), {"context": 2}, policy=None),
    Case((2, 1, 2), {"context": 4}),  # two ranks hold no token
    Case((3, 4, 6), {"cfg": 2, "context": 2}, batch=3, cond=1),
    Case((3, 4, 6), {"cfg": 2, "context": 2}),  # one sample for two groups: both compute it
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
        (Case((3, 4, 5), {"context": 3}, cond=1, batch=2), False),
        (Case((3, 4, 5), {"context": 2}, policy=None), True),
        (Case((4, 4, 5), {"context": 2}, cond=1, cached=True), False),
        (Case((4, 4, 5), {"cfg": 2, "context": 2}, batch=2), True),
        (Case((4, 4, 5), {"cfg": 2, "context": 2}), False),
    ],
    ids=str,
)
def test_gradients(pool, case, checkpointing):
    for errors in pool.run(case.ranks, jobs.gradients, case, checkpointing):
        assert max(errors.values()) < 1e-5, errors


def test_a_repeated_block_keeps_to_its_own_size(pool):
    case = Case((3, 4, 5), {"context": 2})
    assert all(error < 1e-5 for error in pool.run(2, jobs.recomputed_under_another_size, case))


def test_cache_is_sharded(pool):
    shares = pool.run(3, jobs.sharded_cache, Case((2, 5, 7), {"context": 3}))
    assert [per_rank[0] for per_rank in shares] == [(12, 35), (12, 35), (11, 35)]


def test_switching(pool):
    for errors in pool.run(2, jobs.switching, Case((4, 5, 6), {"context": 2})):
        assert max(errors) < 1e-5
