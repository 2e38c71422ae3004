"""Context parallelism: the tokens of one video on many GPUs, by `optimize(model, policy, mesh=mesh)`."""

from __future__ import annotations

from .context import ContextParallel

__all__ = ["ContextParallel"]
