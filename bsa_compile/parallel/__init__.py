"""Context parallelism: the tokens of one video on many GPUs, by `optimize(model, policy, mesh=mesh)`."""

from __future__ import annotations

from .context import ContextParallel
from .weights import load_sharded, shard_weights

__all__ = ["ContextParallel", "load_sharded", "shard_weights"]
