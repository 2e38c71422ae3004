"""What of a trace's communication is hidden."""

from __future__ import annotations

import pytest

from bsa_compile.benchmarking import overlap


def test_communication_and_what_of_it_is_hidden():
    kernels = [
        ("ncclDevKernel_SendRecv", (0.0, 1000.0)),
        ("triton_attend", (500.0, 800.0)),
        ("triton_pool", (700.0, 900.0)),  # together with the one before
        ("triton_attend", (2000.0, 3000.0)),
        ("ncclDevKernel_AllGather", (2500.0, 4000.0)),
        ("Memcpy DtoD", (3900.0, 3950.0)),
    ]
    assert overlap.shares(kernels) == {"communication_ms": 2.5, "hidden_ms": 0.95, "work_ms": 1.45}


def test_nothing_ran():
    assert overlap.shares([]) == {"communication_ms": 0.0, "hidden_ms": 0.0, "work_ms": 0.0}


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [([(2, 3), (0, 1)], [(0, 1), (2, 3)]), ([(0, 5), (1, 2), (4, 6)], [(0, 6)]), ([(0, 1), (1, 2)], [(0, 2)])],
)
def test_union(spans, wanted):
    assert overlap.union(spans) == wanted
