"""Result files that several runs fill, and figures over samples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bsa_compile.benchmarking import results
from bsa_compile.errors import UsageError


def test_a_second_run_adds_to_the_file_of_the_first(tmp_path):
    path = tmp_path / "found.json"

    def new(**more):
        return {**results.header("kind", torch.device("cpu")), "repeats": (1, 2), "cells": [], **more}

    first, second = new(), new(date="another day")
    results.keep_earlier(first, path, "cells", ["repeats"])
    assert first["cells"] == []
    first["cells"] = results.put_row([{"n": 3}, {"n": 1}], {"n": 2}, lambda row: row["n"])
    assert first["cells"] == [{"n": 1}, {"n": 2}, {"n": 3}]
    path.write_text(json.dumps(first))
    results.keep_earlier(second, path, "cells", ["repeats"])
    assert second["cells"] == first["cells"]
    with pytest.raises(UsageError, match=r"one of the same repeats, got .* with \[1, 2\] instead of \[2\]"):
        results.keep_earlier(new(repeats=[2]), path, "cells", ["repeats"])
    with pytest.raises(UsageError, match="one of the same kind"):
        results.keep_earlier(new(kind="other"), path, "cells", [])
    with pytest.raises(UsageError, match="a new file or results with rows"):
        results.keep_earlier(new(), path, "rows", [])
    path.write_text("no JSON")
    with pytest.raises(UsageError, match="a new file or results with cells"):
        results.keep_earlier(new(), path, "cells", [])


def test_a_row_takes_the_place_of_its_like():
    rows = results.put_row([{"n": 1, "s": "old"}], {"n": 1, "s": "new"}, lambda row: row["n"])
    assert rows == [{"n": 1, "s": "new"}]


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_intervals_are_those_of_the_tables(right, of, low, high):
    found = results.share(right, of)
    assert found["share"] == right / of
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_bound_is_where_the_share_is_1_96_deviations_away(case):
    right, of = case
    found = results.share(right, of)
    assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1
    for bound in (found["low"], found["high"]):
        if 0 < bound < 1:  # the equation that the interval solves
            away = abs(found["share"] - bound) / math.sqrt(bound * (1 - bound) / of)
            assert away == pytest.approx(1.959964, rel=1e-5)


@pytest.mark.parametrize(("right", "of"), [(0, 0), (2, 1), (-1, 3)])
def test_a_share_needs_trials(right, of):
    with pytest.raises(UsageError, match=f"{right} of {of}"):
        results.share(right, of)


def test_spread_counts_what_is_finite():
    found = results.spread([30.0, math.inf, 34.0, 29.0])
    assert found == {"mean": pytest.approx(31.0), "std": pytest.approx(np.std([30, 34, 29], ddof=1)), "n": 3}
    assert results.spread([5.0]) == {"mean": 5.0, "std": None, "n": 1}
    assert results.spread([math.inf]) == {"mean": None, "std": None, "n": 0}
