"""Context parallelism of an optimized LongCat DiT: what happens around each of its calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, must
from ..models.longcat import Attention, LongCatVideoTransformer3DModel
from ..policy import BSAPolicy, Rule
from .exchange import MeanOfGradients, gather_shares
from .mesh import Ranks, resolve, tile_units
from .plan import Plan
from .split import FrameSplit, even, starts

# Inputs with a batch axis, the first of which tells how large it is.
_BATCHED = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")


class ContextParallel:
    """Splits the tokens of every call among the ranks of a mesh.

    Each rank is given the whole inputs and gets the whole output, as on one GPU. A KV cache holds a rank's share.

    Args:
        model: the LongCat DiT that will be called.
        mesh: a `DeviceMesh`, see `resolve`.

    Attributes:
        ranks: this process's place.
        plan: of the call under way, or the latest one.

    Raises:
        UnsupportedError: the model is another.
        UsageError: the mesh cannot be used.
    """

    def __init__(self, model: nn.Module, mesh: Any) -> None:
        if not isinstance(model, LongCatVideoTransformer3DModel):
            want = "be bsa_compile's LongCatVideoTransformer3DModel with mesh="
            raise UnsupportedError(
                must("model", want, type(model).__name__, "Load the checkpoint with from_pretrained.")
            )
        self.heads = model.config.num_heads
        self.ranks: Ranks = resolve(mesh, self.heads)
        self.plan: Plan | None = None
        self._patch = model.config.patch_size
        self._signature = inspect.signature(type(model).forward)
        self._tree: Any = None
        self._attention: list[Attention] = []
        self._used: Plan | None = None

    def install(self, tree: nn.Module) -> None:
        """Take charge of a private module tree."""
        self._tree = tree
        self._attention = [m for m in tree.modules() if isinstance(m, Attention)]

    def use(self, plan: Plan | None) -> None:
        """Have the tree run by a plan: that of the call under way, or of the one that checkpointing repeats."""
        if plan is None or plan == self._used:
            return
        self._used = plan
        self._tree.token_split = plan
        for module in self._attention:
            module.attention_fn = plan.attend

    def call(self, run: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], policy: BSAPolicy) -> Any:
        """Run the model on this rank's share and join the results.

        Args:
            run: takes the arguments of the model's forward.
            args, kwargs: what the model was called with.
            policy: of the model, also while it is switched off: a share must not change with the switch.
        """
        try:
            given = self._signature.bind_partial(None, *args, **kwargs).arguments
        except TypeError:
            return run(args, kwargs)  # the model itself says best what is wrong
        del given["self"]
        latents = given.get("hidden_states")
        if not isinstance(latents, Tensor) or latents.dim() != 5:
            return run((), given)
        self.plan = self._plan(latents, policy)
        self.use(self.plan)
        given = {name: self._input(value) for name, value in given.items()}
        batches = self._batches(given)
        if batches is None:
            return run((), given)
        cfg = self.ranks.cfg
        first = starts(batches)[cfg.index]
        for name in _BATCHED:
            if given.get(name) is not None:
                given[name] = given[name].narrow(0, first, batches[cfg.index])
        result = run((), given)
        out, *rest = result if isinstance(result, tuple) else (result,)
        out = gather_shares(out, 0, batches, cfg.index, cfg.group, float(cfg.size))
        return (out, *rest) if rest else out

    def _plan(self, latents: Tensor, policy: BSAPolicy) -> Plan:
        height, width = (-(-n // p) for n, p in zip(latents.shape[3:], self._patch[1:], strict=True))
        ranks = self.ranks
        units = tile_units(list(_tiles(policy))) if ranks.ring.size > 1 else (1, 1)
        split = FrameSplit.of(height, width, ranks.ring.size, ranks.ulysses.size, units)
        return Plan(split, ranks, self.heads)

    def _input(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            return MeanOfGradients.apply(value, self.ranks.lines)
        return value

    def _batches(self, given: dict[str, Any]) -> tuple[int, ...] | None:
        """Samples of each group of ranks; None where every group computes all of them."""
        size, batch = self.ranks.cfg.size, len(given["hidden_states"])
        whole = all(len(given[n]) == batch for n in _BATCHED if isinstance(given.get(n), Tensor) and given[n].dim())
        return even(batch, size) if size > 1 and batch >= size and whole else None


def _tiles(policy: BSAPolicy) -> Iterator[tuple[int, int, int]]:
    """Every tile that a site may get."""
    sources: list[BSAPolicy | Rule] = [policy, *policy.rules]
    for source in sources:
        for tile in (source.chunk_3d_shape_q, source.chunk_3d_shape_k):
            if tile is not None:
                yield tile
