"""The state behind an optimized model: what is switched on, and the code compiled for it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .adapters import adapter_for
from .backend import BSABackend
from .context import current_grid, current_step, latent_grid
from .errors import UnsupportedError, UsageError, must
from .grid import TokenGrid
from .module_tree import repeated_blocks, with_own_code
from .plain_errors import plain_errors
from .policy import BSAPolicy, Rule, reachable
from .report import Report

if TYPE_CHECKING:
    from .parallel import ContextParallel
    from .parallel.plan import Plan

# Grids, batch sizes and grad modes that a model may see under one policy before it is an error; Dynamo's own limit of 8
# would be reached by a handful of resolutions, and past it Dynamo runs the model dense without a word.
RECOMPILE_LIMIT = 64

_DENSE = BSAPolicy.dense()
_NO_STEP = "dense_steps and rules with steps did not apply in calls outside bsa_compile.step"


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
    return dataclasses.replace(policy, rules=reachable(rules))


_relative_policy = functools.lru_cache(maxsize=4096)(relative_policy)
_at_step = functools.lru_cache(maxsize=256)(BSAPolicy.at_step)


@dataclass(frozen=True)
class State:
    """What one call of an optimized model runs under.

    Attributes:
        switch: the policy in force, with its steps; the dense one while block sparse attention is off.
        policy: the same at the current step.
        grid: that of the surrounding `latent_grid`.
        plan: which tokens this process holds, where several share them.
    """

    switch: BSAPolicy
    policy: BSAPolicy
    grid: TokenGrid | None
    plan: Plan | None = None


_RUNNING: ContextVar[tuple[Runtime, State] | None] = ContextVar("bsa_compile_running", default=None)


class Runtime:
    """What is switched on, and the code compiled for it.

    Attributes:
        policy: what runs while block sparse attention is on; disabled, it keeps everything dense.
        off: whether somebody switched it off.
    """

    def __init__(
        self,
        tree: nn.Module,
        forward: Callable[..., Any],
        policy: BSAPolicy,
        *,
        off: bool,
        regional: bool,
        fullgraph: bool,
        backend_options: dict[str, Any],
        context: ContextParallel | None = None,
    ) -> None:
        self.tree = tree
        self.context = context
        self.policy = policy
        self.off = off
        self.adapter = adapter_for(tree)
        self._forward = forward
        self._fullgraph = fullgraph
        self._dynamic = backend_options["dynamic"]
        self._backend_options = backend_options
        # Keys are policies and not backends, whose hash is that of all that decides the compiled code.
        self._backends: dict[tuple[BSAPolicy, TokenGrid | None], BSABackend] = {}
        self._compiled: dict[tuple[str, BSAPolicy, TokenGrid | None], Callable[..., Any]] = {}
        # What was compiled while a policy was in force.
        self._used: dict[BSAPolicy, dict[tuple[str, BSAPolicy, TokenGrid | None], None]] = {}
        self._counted: set[State] = set()
        self._stepless: set[BSAPolicy] = set()
        self._blocks: list[tuple[str, tuple[str, ...]]] = []
        self._memory = _Memory()
        self.adapter.install(tree)
        if context is not None:
            context.install(tree)
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
            self._blocks.append((prefix, names))
            method = MethodType(own_forward, block)
            block.forward = functools.partial(self._call_block, prefix, names, method)  # type: ignore[method-assign]

    @property
    def uses_cudagraphs(self) -> bool:
        """Whether the next call overwrites the results of this one."""
        return BSABackend(self.policy, **self._backend_options).uses_cudagraphs

    @property
    def in_force(self) -> BSAPolicy:
        """The policy that the next call runs under, whatever the denoising step."""
        return _DENSE if self.off or not self.policy.enabled else self.policy

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self.adapter.before_call(self.tree, args, kwargs)
        if self.context is not None:
            return self.context.call(self._run, args, kwargs, self.policy, self._now().policy)
        return self._run(args, kwargs)

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with self._running("", args, kwargs) as state:
            if self.regional:
                return self._forward(*args, **kwargs)
            return self._code_for("", state.policy, state, self._forward)(*args, **kwargs)

    def _call_block(
        self, prefix: str, names: tuple[str, ...], method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with ExitStack() as stack:
            running = _RUNNING.get()
            if running is not None and running[0] is self:
                state = running[1]
                self._memory.keep(prefix, args, kwargs, state)
            else:  # checkpointing runs the block once more in the backward pass, or somebody calls it directly
                state = stack.enter_context(self._running(prefix, args, kwargs))
            stack.enter_context(plain_errors(self._compiler, f"{prefix}: "))
            if self.context is not None:
                self.context.use(state.plan)
            policy = _relative_policy(state.policy, prefix, names)
            code = functools.partial(self._code_for(prefix, policy, state, method), *args, **kwargs)
            return code() if self.context is None else self.context.run_block(code)

    # -- what a call runs under ---------------------------------------------------------------------------------------

    def _now(self) -> State:
        switch = self.in_force
        plan = self.context.plan if self.context is not None else None
        return State(switch, _at_step(switch, current_step()), current_grid(), plan)

    @contextmanager
    def _running(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[State]:
        """A call of the model, or of a block on its own; the blocks inside run under the same state."""
        now = self._now()
        # Activation checkpointing calls again from the backward pass, when steps, grids and switches may be others.
        recomputed = torch._C._current_graph_task_id() != -1
        state = self._memory.recall(prefix, args, kwargs, now) if recomputed else now
        self._memory.keep(prefix, args, kwargs, state)
        if now.switch.needs_step and current_step() is None and not recomputed:
            self._stepless.add(now.switch)
        token = _RUNNING.set((self, state))
        try:
            with ExitStack() as stack:
                if state.grid is not None and state.grid != now.grid:
                    stack.enter_context(latent_grid(*state.grid.shape))
                stack.enter_context(self._limits(state))
                stack.enter_context(plain_errors(self._compiler))
                yield state
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise self._too_many() from None
        finally:
            _RUNNING.reset(token)

    # -- compiled code ------------------------------------------------------------------------------------------------

    @property
    def _compiler(self) -> str:
        compiler = self._backend_options["compiler"]
        return compiler if isinstance(compiler, str) else getattr(compiler, "__name__", repr(compiler))

    def _backend(self, policy: BSAPolicy, grid: TokenGrid | None) -> BSABackend:
        backend = self._backends.get((policy, grid))
        if backend is None:
            backend = BSABackend(policy, context_grid=grid, **self._backend_options)
            self._backends[(policy, grid)] = backend
        return backend

    def _code_for(self, prefix: str, policy: BSAPolicy, state: State, method: Callable[..., Any]) -> Callable[..., Any]:
        key = (prefix, policy, state.grid)
        self._used.setdefault(state.switch, {})[key] = None
        compiled = self._compiled.get(key)
        if compiled is None:
            backend = self._backend(policy, state.grid)
            compiled = torch.compile(method, backend=backend, dynamic=self._dynamic, fullgraph=self._fullgraph)
            self._compiled[key] = compiled
        return compiled

    def _limits(self, state: State) -> AbstractContextManager[Any]:
        """Room for what is compiled under every policy: all of it counts on the same code, that of a block."""
        if state not in self._counted:
            self._counted.add(state)
            for policy in [_relative_policy(state.policy, *block) for block in self._blocks] or [state.policy]:
                self._backend(policy, state.grid)
        limit = RECOMPILE_LIMIT * len(self._backends)
        return torch._dynamo.config.patch(
            recompile_limit=limit,
            accumulated_recompile_limit=max(limit, torch._dynamo.config.accumulated_recompile_limit),
            fail_on_recompile_limit_hit=True,
        )

    def _too_many(self) -> UnsupportedError:
        count = len(self._backends)
        limit = f"differ in at most {RECOMPILE_LIMIT * count} ways ({RECOMPILE_LIMIT} under each of {count} policies)"
        what = "Input shapes, grad modes and dtypes count, and so do rules by module or step, which make a policy of "
        what += "their own for every block or step that they tell apart. "
        todo = "Pass dynamic=True to optimize, so that one compilation serves many shapes, or use fewer rules."
        return UnsupportedError(must("the calls of this model", limit, "one more", what + todo))

    def report(self) -> Report:
        """Every site compiled so far under the policy in force, blocks spelt out."""
        policy = self.in_force
        notes = [_NO_STEP] if policy in self._stepless else []
        report = Report(policy=policy.describe(), digest=policy.digest, notes=notes)
        for prefix, *key in self._used.get(policy, {}):
            backend = self._backends[tuple(key)]  # type: ignore[index]
            # Dynamo shares code among backends that would compile the same; they differ in what their rules are called.
            for compiled in self._backends.values():
                if compiled != backend or not compiled.report.graphs:
                    continue
                named = dict(zip(_rule_names(compiled.policy), _rule_names(backend.policy), strict=False))
                sites = [
                    dataclasses.replace(
                        site,
                        module=".".join(filter(None, (prefix, site.module))),
                        detail=named.get(site.detail, site.detail),
                    )
                    for site in compiled.report.sites
                ]
                report.add(sites, compiled.report.notes)
        return report


def _rule_names(policy: BSAPolicy) -> list[str]:
    return [rule.name or f"rule {position}" for position, rule in enumerate(reachable(policy.rules))]


class _Memory:
    """Which state a call ran under, by the tensor it was given.

    Activation checkpointing calls a block again with the tensors that it was given first.
    """

    def __init__(self) -> None:
        self._states = WeakTensorKeyDictionary()
        self._latest: State | None = None

    @staticmethod
    def _key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)

    def keep(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any], state: State) -> None:
        """Note the state of a call."""
        self._latest = state
        key = self._key(args, kwargs)
        if key is not None and torch.is_grad_enabled():
            self._states.setdefault(key, {})[prefix] = state

    def recall(self, prefix: str, args: Sequence[Any], kwargs: Mapping[str, Any], now: State) -> State:
        """The state of the call that is repeated in the backward pass.

        Raises:
            UsageError: it is not known, or cannot be had again, and differs from what holds now.
        """
        key = self._key(args, kwargs)
        known = self._states.get(key, {}) if key is not None else {}
        # A reentrant checkpoint gives copies of the tensors: then nothing but an unchanged state is safe.
        state = known.get(prefix, self._latest)
        if state is None or state == now or (prefix in known and (state.grid is not None or now.grid is None)):
            return state or now
        got = f"{_told(now)} instead of {_told(state)}"
        raise UsageError(
            must(
                "the policy, bsa_compile.step and latent_grid",
                "be those of the forward pass where activation checkpointing repeats it",
                got,
                "Checkpoint with use_reentrant=False.",
            )
        )


def _told(state: State) -> str:
    grid = f" on latent_grid {state.grid}" if state.grid is not None else " without latent_grid"
    return state.policy.describe() + grid
