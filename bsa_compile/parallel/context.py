"""Context parallelism of an optimized LongCat DiT: what happens around each of its calls."""

from __future__ import annotations

import contextlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ParallelError, UnsupportedError, UsageError, must
from ..models.longcat import Attention, LongCatVideoTransformer3DModel
from ..policy import BSAPolicy, Rule
from .agreement import agree, weights_digest
from .board import Board, named
from .exchange import MeanOfGradients, gather_shares
from .mesh import Ranks, check, resolve, tile_units
from .plan import Plan, overlapping_groups
from .split import FrameSplit, even, starts
from .watch import Watch, cuda_marks

TIMEOUT = 600.0

# Inputs with a batch axis, the first of which tells how large it is.
_BATCHED = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")


class ContextParallel:
    """Splits the tokens of every call among the ranks of a mesh.

    Each rank is given the whole inputs and gets the whole output, as on one GPU. A KV cache holds a rank's share.

    Args:
        model: the LongCat DiT that will be called.
        mesh: a `DeviceMesh`, see `resolve`.
        facts: what must be the same on every rank besides the model, by name.
        timeout: seconds that ranks wait for each other, before or within a call; None: for ever, and no rank is ended.

    Attributes:
        ranks: this process's place.
        plan: of the call under way, or the latest one.

    Raises:
        UnsupportedError: the model is another.
        UsageError: the mesh cannot be used.
        ParallelError: ranks differ in something, or one does not get here.
    """

    def __init__(
        self, model: nn.Module, mesh: Any, facts: Mapping[str, Any] | None = None, timeout: float | None = TIMEOUT
    ) -> None:
        if timeout is not None and (isinstance(timeout, bool) or not timeout > 0):
            raise UsageError(must("mesh_timeout", "be a number of seconds > 0, or None", repr(timeout)))
        if not isinstance(model, LongCatVideoTransformer3DModel):
            want, todo = "be bsa_compile's LongCatVideoTransformer3DModel with mesh=", "Use its from_pretrained."
            raise UnsupportedError(must("model", want, type(model).__name__, todo))
        names = check(mesh)
        self.heads = model.config.num_heads
        self.plan: Plan | None = None
        self._patch = model.config.patch_size
        self._signature = inspect.signature(type(model).forward)
        self._tree: Any = None
        self._attention: list[Attention] = []
        self._used: Plan | None = None
        self._calls = 0
        self._board = Board(mesh.mesh.flatten().tolist(), math.inf if timeout is None else timeout)
        known = {
            "the version of bsa_compile and torch": [_version(), torch.__version__],
            "mesh": [list(mesh.mesh.shape), list(names)],
            "the model's configuration": model.config.to_dict(),
            "the checkpoint (digest of its weights)": weights_digest(model),
            **(facts or {}),
        }
        agree(self._board, "start", known, "call optimize")
        self.ranks: Ranks = resolve(mesh, self.heads)
        mark = cuda_marks(model.device) if model.device.type == "cuda" else None
        self._watch = None if timeout is None else Watch(self._board, mark)
        if self._watch is not None:
            weakref.finalize(self, self._watch.close)

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

    def call(
        self,
        run: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        policy: BSAPolicy,
        in_force: BSAPolicy,
    ) -> Any:
        """Run the model on this rank's share and join the results.

        Args:
            run: takes the arguments of the model's forward.
            args, kwargs: what the model was called with.
            policy: of the model, also while it is switched off: a share must not change with the switch.
            in_force: the same at this denoising step, or the dense one.

        Raises:
            ParallelError: the ranks make different calls, or one of them is lost.
        """
        try:
            given = self._signature.bind_partial(None, *args, **kwargs).arguments
        except TypeError:
            return run(args, kwargs)  # the model itself says best what is wrong
        del given["self"]
        latents = given.get("hidden_states")
        if not isinstance(latents, Tensor) or latents.dim() != 5:
            return run((), given)
        self._agree(given, policy, in_force)
        with contextlib.ExitStack() as stack:
            if self._watch is not None:
                stack.enter_context(self._watch.inside())
            try:
                result = self._shared(run, given, policy)
                if self._watch is not None:
                    _at_gradient(result, self._watch.backward)
                return result
            except RuntimeError as exc:
                lost = self._watch.lost() if self._watch is not None and _from_collective(exc) else []
                if not lost:
                    raise
                got = f"{named(lost)} gone without a word"
                todo = "See what that rank logged last; a job with a checkpoint goes on with --resume."
                raise ParallelError(must("every rank of the mesh", "be alive", got, todo)) from exc

    def run_block(self, run: Callable[[], Any]) -> Any:
        """Run a block of the call under way and show that this rank has got on, then and in the backward pass."""
        if self._watch is None:
            return run()
        self._watch.move()
        result = run()
        _at_gradient(result, self._watch.move)
        return result

    def _agree(self, given: dict[str, Any], policy: BSAPolicy, in_force: BSAPolicy) -> None:
        """See that all ranks make the same call."""
        self._calls += 1
        cache = given.get("kv_cache_dict")
        facts = {
            **{f"the shape of {n}": list(given[n].shape) for n in _BATCHED if isinstance(given.get(n), Tensor)},
            **{n: given.get(n) for n in ("num_cond_latents", "return_kv", "skip_crs_attn", "offload_kv_cache")},
            "kv_cache_dict": None if cache is None else len(cache),
            "policy": [in_force.describe(), in_force.digest, policy.digest],
            "gradient mode and dtype": [torch.is_grad_enabled(), str(given["hidden_states"].dtype)],
            "active LoRAs": self._tree.active_loras,
        }
        agree(self._board, f"call {self._calls}", facts, f"make call {self._calls} of the model")
        if self._calls > 1:  # everybody is here, so everybody has read the facts of the call before
            self._board.take_down(f"call {self._calls - 1}")

    def _shared(self, run: Callable[..., Any], given: dict[str, Any], policy: BSAPolicy) -> Any:
        self.plan = self._plan(given["hidden_states"], policy)
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
        # Where gradients are recorded nothing overlaps: a traced collective with a gradient is waited for at once.
        groups = 1 if torch.is_grad_enabled() else overlapping_groups(self.heads, ranks.ulysses.size)
        return Plan(split, ranks, self.heads, groups)

    def _input(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            return MeanOfGradients.apply(value, self.ranks.lines)
        return value

    def _batches(self, given: dict[str, Any]) -> tuple[int, ...] | None:
        """Samples of each group of ranks; None where every group computes all of them."""
        size, batch = self.ranks.cfg.size, len(given["hidden_states"])
        whole = all(len(given[n]) == batch for n in _BATCHED if isinstance(given.get(n), Tensor) and given[n].dim())
        return even(batch, size) if size > 1 and batch >= size and whole else None


def _at_gradient(result: Any, tell: Callable[[], None]) -> None:
    """Have it told when the gradient of a result, or of the first of several, is there."""
    out = result[0] if isinstance(result, tuple) else result
    if isinstance(out, Tensor) and out.requires_grad:
        out.register_hook(lambda _: tell())


def _version() -> str:
    import bsa_compile

    return bsa_compile.__version__


def _from_collective(exc: RuntimeError) -> bool:
    """Whether a backend of torch.distributed raised it."""
    return isinstance(exc, dist.DistError) or any(word in str(exc) for word in ("gloo", "NCCL", "ProcessGroup"))


def _tiles(policy: BSAPolicy) -> Iterator[tuple[int, int, int]]:
    """Every tile that a site may get."""
    sources: list[BSAPolicy | Rule] = [policy, *policy.rules]
    for source in sources:
        for tile in (source.chunk_3d_shape_q, source.chunk_3d_shape_k):
            if tile is not None:
                yield tile
