"""The `torch.compile` backend: rewrite the captured graph, then hand it to inductor (or another compiler)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .adapters import is_configured, request_of, requests_in
from .errors import PolicyError, UsageError, must
from .grid import TokenGrid
from .passes.rewrite import rewrite
from .policy import BSAPolicy
from .report import Report

log = logging.getLogger("bsa_compile")

_LAST_REPORT: list[Report] = []

NOT_SEEN = "the model's configuration was not seen in the compiled code: the policy argument or the default counts"


def last_report() -> Report:
    """The report of the newest compilation in this process, whichever door it came through; empty before the first."""
    return _LAST_REPORT[-1] if _LAST_REPORT else Report()


def log_enabled(policy: BSAPolicy, where: str) -> None:
    """Log what runs, as LongCat-Video's users know the line."""
    if policy.enabled:
        log.info("Enabling Block Sparse Attention (BSA): %s (%s)", policy.describe(), where)
    else:
        log.info("Block Sparse Attention (BSA) is off (%s)", where)


@functools.cache
def source_digest() -> str:
    """Digest of the package's own sources.

    Inductor's and AOTAutograd's on-disk caches know an op by name only: code compiled from an older version of this
    package would be reused silently (pytorch #144344), so the digest goes into their keys.
    """
    from . import kernels, passes

    digest = hashlib.sha256()
    roots = {Path(__file__).parent, Path(next(iter(passes.__path__))), Path(next(iter(kernels.__path__)))}
    for root in sorted(roots):
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class BSABackend:
    """A Dynamo backend bound to one policy.

    Two backends are equal when they would compile the same code, so that Dynamo reuses compiled code among equal ones
    and never among different ones.

    Args:
        policy: what runs block-sparse; step conditions must be resolved already (`BSAPolicy.at_step`).
        grid: token grid of the self-attention, where the model does not tell.
        context_grid: the same, from the code around the call (`latent_grid`).
        mode, options, dynamic: as in `torch.compile`, for inductor.
        compiler: `inductor`, `eager`, or another backend that Dynamo knows by name.
        notes: what the report of a graph with attention in it should say besides.
    """

    def __init__(
        self,
        policy: BSAPolicy,
        *,
        grid: TokenGrid | None = None,
        context_grid: TokenGrid | None = None,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
        compiler: str = "inductor",
        notes: Sequence[str] = (),
    ) -> None:
        self.policy = policy
        self.notes = tuple(notes)
        self.grid = grid
        self.context_grid = context_grid
        self.compiler_name = compiler
        self.report = Report(policy=policy.describe(), digest=policy.digest)
        if compiler == "inductor":
            # What torch.compile itself builds: it knows mode, options and how cudagraph state is reset.
            self._inner: Any = torch._TorchCompileInductorWrapper(mode, dict(options or {}), dynamic)
            self._key: tuple[Any, ...] = (tuple(sorted((k, repr(v)) for k, v in self._inner.config.items())), dynamic)
        else:
            if mode is not None or options:
                raise UsageError(must("mode and options", "be left out", f"{mode!r}, {options!r}", "Use inductor."))
            self._inner = torch._dynamo.lookup_backend(compiler)
            self._key = ()

    @property
    def uses_cudagraphs(self) -> bool:
        """Whether inductor was asked to replay CUDA graphs, whose outputs the next replay overwrites."""
        return self.compiler_name == "inductor" and bool(self._inner.config.get("triton.cudagraphs"))

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the compiled code."""
        return (self.policy.digest, self.grid, self.context_grid, self.compiler_name, *self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BSABackend) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        rewritten, report = rewrite(graph_module, self.policy, self.grid, context_grid=self.context_grid)
        if report.sites:
            report.notes.extend(self.notes)
        self.report.add(report.sites, report.notes)
        _LAST_REPORT[:] = [report]
        for site in report.sites:
            log.debug("%s [%s]: %s", site.module or "<root>", site.role, site.outcome)
        tag = ".".join([torch.compiler.config.cache_key_tag, "bsa", source_digest(), self.policy.digest])
        with torch.compiler.config.patch(cache_key_tag=tag), self._order_of(rewritten):  # type: ignore[attr-defined]
            return self._inner(rewritten, example_inputs)

    def _order_of(self, graph_module: fx.GraphModule) -> AbstractContextManager[Any]:
        """Keep the order of a graph in which collectives are under way while others compute.

        To save memory inductor would start each of them right before it is waited for, and nothing would overlap.
        """
        setting = "reorder_for_peak_memory"
        if self.compiler_name != "inductor" or setting in self._inner.config:
            return contextlib.nullcontext()
        graphs = (m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule))
        if not any("_c10d_functional" in str(node.target) for graph in graphs for node in graph.nodes):
            return contextlib.nullcontext()
        return torch._inductor.config.patch(setting, False)

    def get_compiler_config(self) -> Any:
        """Asked by Dynamo, to tell apart compilations under different inductor settings."""
        inner = getattr(self._inner, "get_compiler_config", None)
        return inner() if inner else None

    def reset(self) -> None:
        """Asked by `torch._dynamo.reset`."""
        inner = getattr(self._inner, "reset", None)
        if inner:
            inner()


def effective_policy(policy: BSAPolicy | None, model: nn.Module | None) -> BSAPolicy:
    """Policy argument over the model's configuration over the default; what lost is logged.

    Whether it is switched on is `starts_enabled`'s to say.
    """
    configured = request_of(model).policy
    if policy is None:
        return configured or BSAPolicy()
    if configured is not None and configured != policy:
        log.info("the policy argument overrides the model's configuration (%s)", configured.describe())
    return policy


def starts_enabled(policy: BSAPolicy | None, model: nn.Module | None) -> bool:
    """Whether block sparse attention is on to begin with; what lost is logged.

    The model's own `enable_bsa()` and `disable_bsa()` over the policy argument over `enable_bsa` of its configuration;
    where nobody says anything, it is on.

    Args:
        policy: the policy argument, None where none was given.
        model: the model.
    """
    request = request_of(model)
    if policy is not None and not policy.enabled:
        return False  # there is nothing to switch on
    if request.switched is False:
        losing = (policy or request.policy or BSAPolicy()).describe()
        log.info("disable_bsa() was called on the model: it overrides the policy (%s)", losing)
        return False
    if request.configured is not False:
        return True
    if request.switched:
        log.info("enable_bsa() was called on the model: it overrides enable_bsa: false of its configuration")
    elif policy is not None:
        log.info("the policy argument overrides enable_bsa: false of the model's configuration")
    else:
        log.info("enable_bsa is false in the model's configuration: give a policy or call enable_bsa() to switch it on")
        return False
    return True


def _traced_variables() -> Iterator[Mapping[str, Any]]:
    """Variables of each frame that Dynamo is tracing right now, the innermost first."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        translator: Any = InstructionTranslator.current_tx()
    except (
        ImportError,
        AttributeError,
    ):  # private API, or nobody traces; without it the model's configuration may not be seen, and the report says so
        return
    while translator is not None:
        used = translator.f_code.co_names
        yield {**{n: translator.f_globals[n] for n in used if n in translator.f_globals}, **translator.f_locals}
        translator = getattr(translator, "parent", None)


def _running_variables() -> Iterator[Mapping[str, Any]]:
    """Variables of each running frame, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back


def _modules_in(variables: Mapping[str, Any]) -> Iterator[nn.Module]:
    """The modules that variables hold: as they are, as owner of a method, in a container, in a pipeline's `self`."""
    for name, value in list(variables.items()):
        while isinstance(value, (MethodType, functools.partial)):
            name, value = ("self", value.__self__) if isinstance(value, MethodType) else ("", value.func)
        held: Iterable[Any] = ()
        if isinstance(value, nn.Module):
            held = (value,)
        elif isinstance(value, (list, tuple)):
            held = tuple(value)
        elif isinstance(value, dict):
            held = tuple(value.values())
        elif name == "self":
            held = tuple(getattr(value, "__dict__", {}).values())
        yield from (item for item in held if isinstance(item, nn.Module))


def _traced_models(graph_module: fx.GraphModule) -> list[nn.Module]:
    """The models whose code a Dynamo graph holds, as far as they ask for anything (see `request_of`).

    The graph may hold a part of a model: a block between two graph breaks. So the code around is searched too, for
    models that the traced modules are parts of; what is not part of the graph has no say.
    """
    parts = {
        int(digits)
        for gm in graph_module.modules()
        if isinstance(gm, fx.GraphModule)
        for node in gm.graph.nodes
        for key in node.meta.get("nn_module_stack") or ()
        if (digits := str(key).partition("@")[0]).isdigit()  # Dynamo's key is the module's id, "@n" at its n-th call
    }
    traced = [list(_modules_in(scope)) for scope in _traced_variables()]
    if not parts:  # it calls no module, so it is the own code of one
        parts = {id(m) for modules in traced for m in modules}
    asking: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for modules in itertools.chain(traced, map(_modules_in, _running_variables())):
        for module in modules:
            if id(module) not in seen:
                seen.add(id(module))
                asking.update((id(m), m) for m in requests_in(module) if any(id(part) in parts for part in m.modules()))
        if any(is_configured(m) for m in asking.values()):
            break
    inner = {id(part) for m in asking.values() for part in m.modules() if part is not m}
    return [m for m in asking.values() if id(m) not in inner]


def _speaking_model(graph_module: fx.GraphModule, default: bool) -> tuple[nn.Module | None, list[str]]:
    """The model whose requests count for a graph, and what the report should say of it.

    Args:
        graph_module: the graph.
        default: whether no policy was given, so that the model's parameters would have counted.
    """
    models = _traced_models(graph_module)
    if not models or (default and not is_configured(models[0])):
        return (models[0] if models else None), [NOT_SEEN]
    first = models[0]
    if any(request_of(m) != request_of(first) for m in models[1:]):
        return first, [f"several models in one graph ask for different things: {type(first).__name__} counts"]
    return first, []


def bsa(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="bsa", options={"policy": policy, "mode": ..., <inductor options>})`.

    Without a policy the model's configuration (`enable_bsa` and `bsa_params` of its `config.json`) counts, then the
    default. The model's `disable_bsa()` switches it off and `enable_bsa()` on again, also where the compiled code is a
    wrapper around the model or a part of it. `last_report()` tells what was done. Rules that depend on the denoising
    step do not match here: use `optimize` for them.

    Raises:
        PolicyError: `options["policy"]` is neither a `BSAPolicy` nor a JSON object of one.
    """
    options = dict(options or {})
    policy = options.pop("policy", None)
    if isinstance(policy, Mapping):
        policy = BSAPolicy.from_dict(policy)
    if policy is not None and not isinstance(policy, BSAPolicy):
        raise PolicyError(must('options["policy"]', "be a BSAPolicy or a JSON object", type(policy).__name__))
    grid = options.pop("grid", None)
    mode = options.pop("mode", None) or mode
    compiler = options.pop("compiler", "inductor")
    model, notes = _speaking_model(graph_module, default=policy is None)
    request = request_of(model)
    if policy is not None and not policy.enabled and request.switched and not request.configured:
        policy = dataclasses.replace(policy, enabled=True)
        log.info("enable_bsa() was called on the model: it overrides the policy argument, which is disabled")
    chosen = effective_policy(policy, model) if starts_enabled(policy, model) else BSAPolicy.dense()
    log_enabled(chosen, "torch.compile backend")
    backend = BSABackend(
        chosen,
        grid=TokenGrid.of(grid) if grid is not None else None,
        mode=mode,
        options=options,
        compiler=compiler,
        notes=notes,
    )
    return backend(graph_module, example_inputs)
