"""Inductor's caches on disk know an op by its name alone, and serve gradients of an older version (pytorch #144344)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, torch, bsa_compile
from torch._dynamo.utils import counters

class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return bsa_compile.attention(q, k, v, grid_q=(4, 4, 4)).sin()

torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
policy = bsa_compile.BSAPolicy(sparsity=0.5, chunk_3d_shape_q=(2, 2, 2), chunk_3d_shape_k=(2, 2, 2))
out = bsa_compile.optimize(Model(), policy)(q, k, v)
out.square().sum().backward()
sums = [float(x.double().abs().sum()) for x in (out, q.grad, k.grad, v.grad)]
print(json.dumps([bsa_compile.__file__, sums, counters["aot_autograd"]["autograd_cache_hit"]]))
"""


def run(root: Path, cache: Path) -> tuple[list[float], int]:
    """Output and gradients, summed, and how often the cache of a process before was hit."""
    environment = {"PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, **environment, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, sums, hits = json.loads(done.stdout.strip().splitlines()[-1])
    assert Path(loaded).is_relative_to(root)
    return sums, hits


def test_a_changed_backward_is_not_served_from_an_older_cache(tmp_path):
    first, _ = run(ROOT, tmp_path / "cache")
    again, hits = run(ROOT, tmp_path / "cache")
    assert again == first
    assert hits > 0  # the cache does work, so what follows is worth something
    tree = tmp_path / "tree"
    for name in ("bsa_compile", "passes", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = tree / "bsa_compile" / "ops" / "autograd.py"
    text = source.read_text()
    assert text.count("return *grads, *rest") == 1
    source.write_text(text.replace("return *grads, *rest", "return *(2 * g for g in grads), *rest"))
    changed, _ = run(tree, tmp_path / "cache")
    assert changed[0] == first[0]
    assert changed[1:] == pytest.approx([2 * x for x in first[1:]])
