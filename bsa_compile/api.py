"""`optimize`: one call makes a model's self-attention block-sparse and compiles it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from .adapters import adapter_for
from .backend import BSABackend, effective_policy, log_enabled
from .context import current_step
from .errors import BSACompileError, PolicyError, UnsupportedError, UsageError, must
from .grid import TokenGrid
from .module_tree import repeated_blocks, share_tree, with_own_code
from .policy import BSAPolicy, Rule
from .report import Report

log = logging.getLogger("bsa_compile")

# Grids, batch sizes and grad modes that one model may see before it is an error; Dynamo's own limit of 8 would be
# reached by a handful of resolutions, and past it Dynamo runs the model dense without a word.
RECOMPILE_LIMIT = 64


def relative_policy(policy: BSAPolicy, prefix: str, names: tuple[str, ...]) -> BSAPolicy:
    """The policy as one block sees it, with module paths relative to the block.

    Equal blocks under equal rules get equal policies, and so share compiled code.

    Args:
        policy: the whole model's policy.
        prefix: the block's path in the model.
        names: the block's own module paths, "" for itself.
    """
    rules: list[Rule] = []
    for position, rule in enumerate(policy.rules):
        named = dataclasses.replace(rule, name=rule.name or f"rule {position}")
        if rule.module is None:
            rules.append(named)
            continue
        hits = [n for n in names if fnmatch.fnmatchcase(f"{prefix}.{n}".rstrip("."), rule.module)]
        # A glob such as `blocks.0.*` names everything inside the block, though not the block itself.
        if set(names) - {""} <= set(hits):
            rules.append(dataclasses.replace(named, module=None))
        else:
            rules.extend(dataclasses.replace(named, module=glob.escape(n)) for n in hits)
    return dataclasses.replace(policy, rules=tuple(rules))


class _Runtime:
    """The state behind an optimized model: what is switched on, and the code compiled for it."""

    def __init__(
        self,
        tree: nn.Module,
        forward: Callable[..., Any],
        policy: BSAPolicy,
        *,
        enabled: bool,
        regional: bool,
        fullgraph: bool,
        backend_options: dict[str, Any],
    ) -> None:
        self.tree = tree
        self.policy = policy
        self.enabled = enabled
        self.adapter = adapter_for(tree)
        self._forward = forward
        self._fullgraph = fullgraph
        self._dynamic = backend_options["dynamic"]
        self._backend_options = backend_options
        self._backends: dict[BSAPolicy, BSABackend] = {}
        self._compiled: dict[tuple[str, BSAPolicy], Callable[..., Any]] = {}
        # What was compiled under which switch position and policy: (enabled, policy) -> {(prefix, backend)}.
        self._used: dict[tuple[bool, BSAPolicy], dict[tuple[str, BSABackend], None]] = {}
        self._notes: dict[str, None] = {}
        self.adapter.install(tree)
        self.regional = regional
        if regional:
            self._install_regional()

    def _install_regional(self) -> None:
        found = repeated_blocks(self.tree)
        if found is None:
            raise UsageError(
                must("regional", "be False for this model", True, "It has no list of blocks of one class.")
            )
        path, blocks = found
        own_forward = with_own_code(type(blocks[0]).forward)
        for index, block in enumerate(blocks):
            prefix = f"{path}.{index}" if path else str(index)
            names = tuple(name for name, _ in block.named_modules())
            method = MethodType(own_forward, block)
            block.forward = functools.partial(self._call_block, prefix, names, method)  # type: ignore[method-assign]

    def current_policy(self) -> BSAPolicy:
        """The policy of this very call: what is switched on, at the current denoising step."""
        if not self.enabled:
            return BSAPolicy.dense()
        step = current_step()
        if step is None and self.policy.needs_step:
            self._notes["dense_steps and rules with steps did not apply: no bsa_compile.step is active"] = None
        return self.policy.at_step(step)

    def _code_for(self, prefix: str, policy: BSAPolicy, method: Callable[..., Any]) -> Callable[..., Any]:
        backend = self._backends.get(policy)
        if backend is None:
            backend = self._backends[policy] = BSABackend(policy, **self._backend_options)
        self._used.setdefault((self.enabled, self.policy), {})[(prefix, backend)] = None
        compiled = self._compiled.get((prefix, policy))
        if compiled is None:
            compiled = torch.compile(method, backend=backend, dynamic=self._dynamic, fullgraph=self._fullgraph)
            self._compiled[(prefix, policy)] = compiled
        return compiled

    def _call_block(
        self, prefix: str, names: tuple[str, ...], method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        policy = _relative_policy(self.current_policy(), prefix, names)
        with _plain_errors(f"{prefix}: "):
            return self._code_for(prefix, policy, method)(*args, **kwargs)

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.adapter.before_call(self.tree, args, kwargs)
        call = self._forward if self.regional else self._code_for("", self.current_policy(), self._forward)
        limits = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True)
        with limits, _plain_errors():
            return call(*args, **kwargs)

    def report(self) -> Report:
        """Every site compiled so far under the current switch position and policy, blocks spelt out."""
        policy = self.policy if self.enabled else BSAPolicy.dense()
        report = Report(policy=policy.describe(), digest=policy.digest, notes=list(self._notes))
        for prefix, backend in self._used.get((self.enabled, self.policy), {}):
            sites = [
                dataclasses.replace(s, module=".".join(filter(None, (prefix, s.module)))) for s in backend.report.sites
            ]
            if backend.report.graphs:
                report.add(sites, backend.report.notes)
        return report


@contextmanager
def _plain_errors(where: str = "") -> Iterator[None]:
    """Our own clear texts, without Dynamo's wrapping; `where` goes in front, for a graph that knows only its block."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as exc:
        cause = getattr(exc, "inner_exception", None) or exc.__cause__
        if isinstance(cause, BSACompileError):
            raise type(cause)(f"{where}{cause}") from None
        raise
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        todo = "Pass dynamic=True to optimize, so that one compilation serves many shapes."
        raise UnsupportedError(
            must("input shapes", f"vary in at most {RECOMPILE_LIMIT} ways", "one more", todo)
        ) from None


_relative_policy = functools.lru_cache(maxsize=4096)(relative_policy)


class OptimizedModel:
    """What `optimize` adds to a model's class. The result is also an instance of the model's own class."""

    _bsa_runtime: _Runtime

    @property
    def report(self) -> Report:
        """Every attention site compiled so far: block-sparse, or dense and why."""
        return self._bsa_runtime.report()

    @property
    def policy(self) -> BSAPolicy:
        """The policy in force while block sparse attention is on."""
        return self._bsa_runtime.policy

    def set_policy(self, policy: BSAPolicy) -> None:
        """Replace the policy from the next call on; going back to an earlier one compiles nothing anew."""
        if not isinstance(policy, BSAPolicy):
            raise PolicyError(must("policy", "be a BSAPolicy", type(policy).__name__))
        self._bsa_runtime.policy = policy
        log_enabled(policy, "set_policy")

    def _set_enabled(self, enabled: bool, where: str) -> None:
        runtime = self._bsa_runtime
        runtime.enabled = enabled
        if "bsa_enabled" in self.__dict__:  # the model's own record of what was asked
            self.__dict__["bsa_enabled"] = enabled
        log_enabled(runtime.policy if enabled else BSAPolicy.dense(), where)

    def enable_bsa(self) -> None:
        """Switch block sparse attention on, from the next call on."""
        self._set_enabled(True, "enable_bsa()")

    def disable_bsa(self) -> None:
        """Switch it off: the same compiled model with dense attention, from the next call on."""
        self._set_enabled(False, "disable_bsa()")

    @contextmanager
    def bsa_disabled(self) -> Iterator[None]:
        """Switch it off inside a `with` block."""
        before = self._bsa_runtime.enabled
        self._set_enabled(False, "bsa_disabled()")
        try:
            yield
        finally:
            self._set_enabled(before, "end of bsa_disabled()")

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

    Returns:
        An instance of the model's class and of `OptimizedModel`: `report`, `policy`, `set_policy`, `enable_bsa`,
        `disable_bsa`, `bsa_disabled`.

    Raises:
        PolicyError: `policy` is no BSAPolicy.
        GridError: `grid` is not three positive integers; at the first call, if sources of the grid disagree.
        UsageError: `model` is no plain nn.Module or is optimized already, or `regional=True` on a model without
            repeated blocks.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UsageError(must("model", "be an nn.Module that torch.compile can trace", type(model).__name__))
    if isinstance(model, OptimizedModel):
        raise UsageError(must("model", "not be optimized already", type(model).__name__, "Use its set_policy."))
    if policy is not None and not isinstance(policy, BSAPolicy):
        raise PolicyError(must("policy", "be a BSAPolicy", type(policy).__name__))
    backend_options: dict[str, Any] = {
        "grid": None if grid is None else TokenGrid.of(grid),
        "mode": mode,
        "options": options,
        "dynamic": dynamic,
        "compiler": backend,
    }
    policy = effective_policy(policy, model)
    probe = BSABackend(policy, **backend_options)  # refuses bad options now, not at the first call
    tree = share_tree(model)
    cls = type(model)
    adapter = adapter_for(model)
    if regional is None:
        regional = adapter.carries_grid and repeated_blocks(model) is not None and not probe.uses_cudagraphs
    elif regional and probe.uses_cudagraphs:
        # Equal blocks share one graph: the replay for the next block would overwrite this block's output.
        raise UsageError(must("regional", "be False with CUDA graphs", True, "Drop regional or the mode."))
    asked_off = getattr(model, "bsa_enabled", None) is False
    forward = MethodType(cls.forward if regional else with_own_code(cls.forward), tree)
    runtime = _Runtime(
        tree,
        forward,
        policy,
        enabled=policy.enabled and not asked_off,
        regional=regional,
        fullgraph=fullgraph,
        backend_options=backend_options,
    )

    @functools.wraps(cls.forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._bsa_runtime(args, kwargs)

    # The class keeps the model's name: save_pretrained and configuration files record it.
    names = {"forward": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    tree.__class__ = cast(Any, type(cls.__name__, (OptimizedModel, cls), names))
    tree.__dict__["_bsa_runtime"] = runtime
    if "bsa_enabled" in tree.__dict__:
        tree.__dict__["bsa_enabled"] = runtime.enabled
    if asked_off:
        log.info("disable_bsa() was called on the model: it overrides the policy (%s)", policy.describe())
    log_enabled(policy if runtime.enabled else BSAPolicy.dense(), "optimize")
    return tree
