"""FSDP2 over the ranks of the mesh: the same numbers, a share of the weights, a share of the file."""

from __future__ import annotations

import pytest

from bsa_compile.errors import CheckpointError

from . import fsdp
from .jobs import Case, model_of


@pytest.mark.parametrize(
    "case", [Case((3, 4, 5), {"context": 2}, cond=1), Case((3, 4, 6), {"ring": 2, "ulysses": 2})], ids=str
)
def test_sharded_weights_compute_the_same(pool, case):
    for output, weights in pool.run(case.ranks, fsdp.forward_and_gradients, case):
        assert output < 1e-5
        assert max(weights.values()) < 1e-5, weights


def test_each_rank_reads_its_share_alone(pool, tmp_path):
    model_of(4).save_pretrained(tmp_path, max_shard_size="100KB")
    for error, held, read, whole in pool.run(3, fsdp.load, Case((3, 4, 5), {"context": 3}), str(tmp_path)):
        assert error < 1e-5
        assert held < 0.4 * whole
        assert read < 0.4 * whole


def test_a_bad_checkpoint_is_an_error_on_every_rank(pool, tmp_path):
    model_of(4).save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    messages = pool.run(2, fsdp.load_error, str(tmp_path))
    assert len(set(messages)) == 1
    assert messages[0].startswith(CheckpointError.__name__)
