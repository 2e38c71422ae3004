"""The `torch.compile` backend: rewrite the captured graph, then hand it to inductor (or another compiler)."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .errors import PolicyError, UsageError, must
from .grid import TokenGrid
from .passes.rewrite import rewrite
from .policy import BSAPolicy
from .report import Report

log = logging.getLogger("bsa_compile")

_LAST_REPORT: list[Report] = []


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
        mode, options, dynamic: as in `torch.compile`, for inductor.
        compiler: `inductor`, `eager`, or another backend that Dynamo knows by name.
    """

    def __init__(
        self,
        policy: BSAPolicy,
        *,
        grid: TokenGrid | None = None,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
        compiler: str = "inductor",
    ) -> None:
        self.policy = policy
        self.grid = grid
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
        return (self.policy.digest, self.grid, self.compiler_name, *self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BSABackend) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        rewritten, report = rewrite(graph_module, self.policy, self.grid)
        self.report.add(report.sites, report.notes)
        _LAST_REPORT[:] = [report]
        for site in report.sites:
            log.debug("%s [%s]: %s", site.module or "<root>", site.role, site.outcome)
        tag = ".".join([torch.compiler.config.cache_key_tag, "bsa", source_digest(), self.policy.digest])
        with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            return self._inner(rewritten, example_inputs)

    def get_compiler_config(self) -> Any:
        """Asked by Dynamo, to tell apart compilations under different inductor settings."""
        inner = getattr(self._inner, "get_compiler_config", None)
        return inner() if inner else None

    def reset(self) -> None:
        """Asked by `torch._dynamo.reset`."""
        inner = getattr(self._inner, "reset", None)
        if inner:
            inner()


def model_request(model: Any) -> tuple[bool | None, BSAPolicy | None]:
    """What a model itself asks for: whether BSA is on (None: nobody said), and its configuration's parameters.

    Read are `bsa_enabled` and `bsa_params`, which our LongCat DiT keeps, or `enable_bsa` and `bsa_params` of a
    `config`, as diffusers models have it.
    """
    config = getattr(model, "config", None)
    values: dict[str, Any] = {}
    for name in ("enable_bsa", "bsa_params"):
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            values[name] = value
    params = getattr(model, "bsa_params", None)
    if params is not None:
        values["bsa_params"] = params
    enabled = getattr(model, "bsa_enabled", values.get("enable_bsa"))
    policy = BSAPolicy.from_config({**values, "enable_bsa": True}) if values.get("bsa_params") else None
    return enabled, policy


def effective_policy(policy: BSAPolicy | None, model: Any) -> BSAPolicy:
    """Policy argument over the model's configuration over the default; what lost is logged."""
    _, configured = model_request(model)
    if policy is None:
        return configured or BSAPolicy()
    if configured is not None and configured != policy:
        log.info("the policy argument overrides the model's configuration (%s)", configured.describe())
    return policy


def _traced_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is tracing right now, where it can be told."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        frame_locals = InstructionTranslator.current_tx().f_locals
    except Exception:  # private API; without it the model's own configuration is not seen, and the report says so
        return None
    modules = [v for v in frame_locals.values() if isinstance(v, torch.nn.Module)]
    return modules[0] if modules else None


def bsa(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="bsa", options={"policy": policy, "mode": ..., <inductor options>})`.

    Without a policy the model's configuration (`bsa_params` of its `config.json`) counts, then the default. The
    model's `disable_bsa()` switches it off and `enable_bsa()` on again. `last_report()` tells what was done. Rules that
    depend on the denoising step do not match here: use `optimize` for them.

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
    model = _traced_module()
    policy = effective_policy(policy, model)
    if model_request(model)[0] is False and getattr(model, "bsa_enabled", None) is False:
        policy = BSAPolicy.dense()
    log_enabled(policy, "torch.compile backend")
    backend = BSABackend(
        policy, grid=TokenGrid.of(grid) if grid is not None else None, mode=mode, options=options, compiler=compiler
    )
    return backend(graph_module, example_inputs)
