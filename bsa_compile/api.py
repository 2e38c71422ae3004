"""`optimize`: one call makes a model's self-attention block-sparse and compiles it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from .adapters import adapter_for, request_of
from .backend import BSABackend, effective_policy, log_enabled, source_digest, starts_enabled
from .errors import BSACompileError, PolicyError, UsageError, must
from .grid import TokenGrid
from .module_tree import repeated_blocks, share_tree, with_own_code
from .ops import attend_implementations, how_to_get
from .policy import BSAPolicy
from .report import Report
from .runtime import Runtime

log = logging.getLogger("bsa_compile")


class OptimizedModel:
    """What `optimize` adds to a model's class. The result is also an instance of the model's own class."""

    _bsa_runtime: Runtime

    @property
    def report(self) -> Report:
        """Every attention site compiled so far under the policy in force: block-sparse, or dense and why."""
        return self._bsa_runtime.report()

    @property
    def policy(self) -> BSAPolicy:
        """What runs while block sparse attention is switched on; a disabled policy keeps everything dense."""
        return self._bsa_runtime.policy

    def set_policy(self, policy: BSAPolicy) -> None:
        """Replace the policy from the next call on; going back to an earlier one compiles nothing anew.

        A `disable_bsa()` before stays in force.

        Raises:
            PolicyError: `policy` is no BSAPolicy, or names an unknown implementation.
        """
        check_policy(policy)
        self._bsa_runtime.policy = policy
        held = self._bsa_runtime.off and policy.enabled
        self._tell("set_policy" + (": disable_bsa() stays in force, call enable_bsa() to switch it on" if held else ""))

    def enable_bsa(self) -> None:
        """Switch block sparse attention on, from the next call on, also where the policy is disabled."""
        runtime = self._bsa_runtime
        runtime.off = False
        if not runtime.policy.enabled:
            runtime.policy = _switched_on(runtime.policy, "enable_bsa() overrides the policy")
        self._tell("enable_bsa()")

    def disable_bsa(self) -> None:
        """Switch it off: the same compiled model with dense attention, until `enable_bsa()`."""
        self._bsa_runtime.off = True
        self._tell("disable_bsa()")

    @contextmanager
    def bsa_disabled(self, *, quiet: bool = False) -> Iterator[None]:
        """Switch it off inside a `with` block.

        Args:
            quiet: log nothing, for a block that runs in every step of a training.
        """
        before = self._bsa_runtime.off
        self._bsa_runtime.off = True
        self._tell("bsa_disabled()", quiet)
        try:
            yield
        finally:
            self._bsa_runtime.off = before
            self._tell("end of bsa_disabled()", quiet)

    def _tell(self, where: str, quiet: bool = False) -> None:
        """Log what runs from now on, and keep the model's own record of it."""
        runtime = self._bsa_runtime
        if "bsa_enabled" in self.__dict__:
            self.__dict__["bsa_enabled"] = runtime.in_force.enabled
        if not quiet:
            log_enabled(runtime.in_force, where if runtime.policy.enabled else f"{where}: the policy is disabled")

    def __deepcopy__(self, memo: Any) -> Any:
        raise UsageError(must("model", "be copied before optimize", "a copy of the optimized one"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(must("model", "be saved with save_pretrained or state_dict", "pickling of the optimized one"))


def optimize(
    model: nn.Module,
    policy: BSAPolicy | None = None,
    *,
    grid: TokenGrid | Sequence[int] | None = None,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    backend: str = "inductor",
    regional: bool | None = None,
    fullgraph: bool = False,
    mesh: Any = None,
    mesh_timeout: float | None = 600.0,
) -> Any:
    """Make the self-attention of a video diffusion transformer block-sparse, and compile it.

    The result computes with the same parameters (state_dict, device moves, LoRA and attributes work on it as on the
    model, of whose class it remains an instance); the model passed in stays as it was. Compilation happens at the first
    call. `result.report` tells of every attention site what was done and why.

    Args:
        model: a LongCat DiT (ours or the official module), or any video diffusion transformer whose token grid can be
            traced to its patch embedding.
        policy: what runs block-sparse. By default the model's configuration (`bsa_params` of `config.json`), else
            sparsity 0.9375 with chunks [4,4,4].
        grid: (t, h, w) of the self-attention's tokens, for a model that does not tell.
        mode, options, dynamic: as in `torch.compile`.
        backend: `inductor`, `eager`, or another Dynamo backend that compiles the rewritten graph.
        regional: compile the model's repeated blocks one by one (equal blocks compile once) instead of the whole
            model; by default where the model is known to carry its grid into every block, and not with CUDA graphs.
        fullgraph: as in `torch.compile`.
        mesh: a `DeviceMesh` whose ranks share the tokens of each call, and who all make the same calls. Its dimension
            is named `context`; or `ring`, `ulysses` or both to choose how they exchange; one named `cfg` before them
            shares out the batch. LongCat DiT of this package only.
        mesh_timeout: seconds that the ranks wait for one that died or hangs, before the job ends with a message that
            names it; longer than the compilation of a block takes. None: for ever.

    Returns:
        An instance of the model's class and of `OptimizedModel`: `report`, `policy`, `set_policy`, `enable_bsa`,
        `disable_bsa`, `bsa_disabled`.

    Raises:
        PolicyError: `policy` is no BSAPolicy, or names an unknown implementation.
        GridError: `grid` is not three positive integers; at the first call, if sources of the grid disagree.
        UsageError: `model` is no plain nn.Module or is optimized already, `backend`, `mode` or `options` are unknown,
            or `regional=True` on a model without repeated blocks, or `mesh` is no mesh that can be used.
        UnsupportedError: `mesh` is given with another model than the LongCat DiT.
        ParallelError: the ranks of `mesh` differ in policy, checkpoint, versions or options; one error names them.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UsageError(must("model", "be an nn.Module that torch.compile can trace", type(model).__name__))
    if isinstance(model, OptimizedModel):
        raise UsageError(must("model", "not be optimized already", type(model).__name__, "Use its set_policy."))
    if policy is not None:
        check_policy(policy)
    _check_compiler(backend, mode, options)
    backend_options: dict[str, Any] = {
        "grid": None if grid is None else TokenGrid.of(grid),
        "mode": mode,
        "options": options,
        "dynamic": dynamic,
        "compiler": backend,
    }
    try:
        probe = BSABackend(BSAPolicy(), **backend_options)  # refuses bad options now, not at the first call
    except BSACompileError:
        raise
    except RuntimeError as exc:
        raise UsageError(must("options", "hold what inductor takes", f"an error: {str(exc).splitlines()[0]}")) from None
    chosen = effective_policy(policy, model)
    request = request_of(model)
    if policy is not None and not policy.enabled and request.switched and not request.configured:
        chosen = _switched_on(policy, "enable_bsa() was called on the model: it overrides the policy argument")
    elif policy is not None and not policy.enabled and request.configured:
        log.info("the policy argument, which is disabled, overrides enable_bsa: true of the model's configuration")
    elif not starts_enabled(policy, model) and request.switched is not False:
        chosen = dataclasses.replace(chosen, enabled=False)
    context = None
    if mesh is not None:
        from .parallel import ContextParallel  # torch may have been built without torch.distributed

        facts = {
            "policy": [chosen.describe(), chosen.digest, request.switched],
            "the sources of bsa_compile": source_digest(),
            "grid, mode, options, dynamic, backend": [str(v) for v in backend_options.values()],
            "regional and fullgraph": [regional, fullgraph],
        }
        context = ContextParallel(model, mesh, facts, mesh_timeout)
    tree = share_tree(model)
    cls = type(tree)
    adapter = adapter_for(model)
    if regional is None:
        regional = adapter.carries_grid and repeated_blocks(model) is not None and not probe.uses_cudagraphs
    elif regional and probe.uses_cudagraphs:
        # Equal blocks share one graph: the replay for the next block would overwrite this block's output.
        raise UsageError(must("regional", "be False with CUDA graphs", True, "Drop regional or the mode."))
    forward = MethodType(cls.forward if regional else with_own_code(cls.forward), tree)
    runtime = Runtime(
        tree,
        forward,
        chosen,
        off=request.switched is False,
        regional=regional,
        fullgraph=fullgraph,
        backend_options=backend_options,
        context=context,
    )

    @functools.wraps(cls.forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._bsa_runtime(args, kwargs)

    # The class keeps the model's name: save_pretrained and configuration files record it.
    names = {"forward": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    tree.__class__ = cast(Any, type(cls.__name__, (OptimizedModel, cls), names))
    tree.__dict__["_bsa_runtime"] = runtime
    optimized: Any = tree
    optimized._tell("optimize")
    return optimized


def check_policy(policy: Any) -> None:
    """Refuse what is no policy, or one that nothing here can run.

    Raises:
        PolicyError: `policy` is no BSAPolicy, or names an unknown implementation.
    """
    if not isinstance(policy, BSAPolicy):
        raise PolicyError(must("policy", "be a BSAPolicy", type(policy).__name__))
    known = attend_implementations()
    if policy.attend not in known:
        todo = how_to_get(policy.attend)
        raise PolicyError(must("policy's attend", f"be one of {', '.join(known)}", repr(policy.attend), todo))


def _check_compiler(backend: Any, mode: Any, options: Any) -> None:
    """Refuse what Dynamo or inductor would refuse later, or at length."""
    known = set(torch._dynamo.list_backends(exclude_tags=())) - {"bsa"}  # that one would rewrite the graph once more
    if not callable(backend) and (not isinstance(backend, str) or backend not in known):
        raise UsageError(must("backend", f"be one of {', '.join(sorted(known))}", repr(backend)))
    if mode is not None and mode not in torch._inductor.list_mode_options():
        raise UsageError(must("mode", f"be one of {', '.join(torch._inductor.list_mode_options())}", repr(mode)))
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(must("options", "be a dict of inductor's options", repr(options)))
    choices = torch._inductor.list_options()
    for name in options or ():
        if not isinstance(name, str) or name.replace("-", "_") not in choices:
            near = difflib.get_close_matches(str(name), choices, n=3)
            hint = f"Did you mean {', '.join(near)}?" if near else "torch._inductor.list_options() names them."
            raise UsageError(must("options", "hold only options of inductor", repr(name), hint))


def _switched_on(policy: BSAPolicy, why: str) -> BSAPolicy:
    """A disabled policy's parameters in force."""
    enabled = dataclasses.replace(policy, enabled=True)
    log.info("%s, which is disabled: its parameters run (%s)", why, enabled.describe())
    return enabled
