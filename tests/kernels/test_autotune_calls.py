"""The launchers take what the search found."""

from __future__ import annotations

import torch

from bsa_compile.kernels import autotune
from bsa_compile.kernels.config import Launch
from tests.attention_cases import Case
from tests.kernels.support import check


def test_launchers_ask_once_for_each_kernel_and_run_what_they_are_told(monkeypatch, device):
    case = Case((2, 4, 6), (2, 2, 3), (2, 4, 6), (2, 2, 3), dtype=torch.float32)
    asked, nested = [], []
    monkeypatch.setattr(autotune, "enabled", lambda: True)

    def launch_for(key, path, device, run):
        kernel = key.split()[0]
        asked.append(kernel)
        before = len(asked)
        nested.append(run(Launch(16, 16, 4, 1)))  # as a search would; it must not search itself
        assert len(asked) == before
        return Launch(16, 32, 4, 1)

    monkeypatch.setattr(autotune, "launch_for", launch_for)
    results = check(case, device)
    assert asked == ["kernel=forward", "kernel=backward_q", "kernel=backward_k"]
    assert torch.allclose(nested[0][0].cpu(), results[0], atol=1e-5)
    for tried in nested[1:]:
        for ours, final in zip(tried, results[2:], strict=True):
            assert torch.allclose(ours.cpu(), final, atol=1e-4)
