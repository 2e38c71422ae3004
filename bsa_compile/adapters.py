"""What is known of particular models: where they attend, on which grid, and what they ask for.

An adapter prepares the private copy of a model's module tree that `optimize` makes, so the user's own model stays as it
was. It replaces the model's attention calls by the anchor `bsa_compile.attention`, which carries grid and role into
the traced graph, also where the graph holds a single block and the patch embedding is out of sight.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UnsupportedError, must
from .models.longcat.attention import Attention as LongCatAttention
from .ops import attention
from .policy import BSAPolicy

log = logging.getLogger("bsa_compile")


class Adapter:
    """Knows one family of models. The base class knows none and leaves the tree alone."""

    carries_grid = False

    def matches(self, model: nn.Module) -> bool:
        """Whether this adapter is made for the model."""
        return True

    def install(self, tree: nn.Module) -> None:
        """Replace attention calls in a private module tree."""

    def before_call(self, tree: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Run before each call of the tree, outside compiled code."""

    def switched(self, model: nn.Module) -> bool | None:
        """What was asked for by `enable_bsa()` or `disable_bsa()` of the model itself; None where nobody did."""
        return getattr(model, "bsa_enabled", None)


class LongCatAdapter(Adapter):
    """Our own LongCat DiT: its attention modules take the function that attends."""

    carries_grid = True

    def matches(self, model: nn.Module) -> bool:
        return any(isinstance(m, LongCatAttention) for m in model.modules())

    def install(self, tree: nn.Module) -> None:
        for module in tree.modules():
            if isinstance(module, LongCatAttention):
                module.attention_fn = attention


class OfficialLongCatAdapter(Adapter):
    """The official LongCat-Video module as it stands, known by its class names; nothing of it is imported.

    Its attention needs flash-attn or xformers, hides behind an all-to-all that Dynamo may not trace, and computes the
    RoPE table in numpy on first use. All three are replaced or done ahead of the call.

    Source: the module structure of meituan-longcat/LongCat-Video, `longcat_video/modules/attention.py`.
    """

    carries_grid = True

    _PACKAGE = "longcat_video"
    # Class name -> the module that defines it; variants of the model (avatar) define such classes elsewhere.
    _HOMES: ClassVar[dict[str, str]] = {
        "Attention": "longcat_video.modules.attention",
        "MultiHeadCrossAttention": "longcat_video.modules.attention",
        "RotaryPositionalEmbedding": "longcat_video.modules.rope_3d",
    }

    @classmethod
    def _is_official(cls, module: nn.Module, name: str) -> bool:
        return type(module).__name__ == name and type(module).__module__ == cls._HOMES[name]

    @classmethod
    def _is_related(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Attention" and type(module).__module__.split(".")[0] == cls._PACKAGE

    def matches(self, model: nn.Module) -> bool:
        return any(self._is_related(m) for m in model.modules())

    def install(self, tree: nn.Module) -> None:
        """Replace attention calls in a private module tree.

        Raises:
            UnsupportedError: the model is another variant of LongCat-Video, or runs context-parallel.
        """
        for module in tree.modules():
            if self._is_related(module) and not self._is_official(module, "Attention"):
                # Such a variant calls its attention in ways of its own: its grids and roles would be guesses.
                raise UnsupportedError(
                    must(
                        "model",
                        f"attend through {self._HOMES['Attention']}.Attention",
                        f"{type(module).__module__}.Attention",
                        "This variant is not known; call bsa_compile.attention in it, which takes grid and role.",
                    )
                )
        split = getattr(tree, "cp_split_hw", None) or (1, 1)
        if split[0] * split[1] > 1:
            raise UnsupportedError(
                must("cp_split_hw", "be [1, 1]", list(split), "Its context parallelism is not supported here.")
            )
        for module in tree.modules():
            if self._is_official(module, "Attention"):
                self._install_attention(module)
            elif self._is_official(module, "MultiHeadCrossAttention"):
                module._process_cross_attn = functools.partial(_official_cross_attention, module)  # type: ignore

    @staticmethod
    def _install_attention(module: Any) -> None:
        module._process_attn = functools.partial(_official_self_attention, module)
        module.bsa_whole_role = "self"
        module.enable_bsa = False  # its own BSA would run instead of the function above
        cls: Any = type(module)
        module.__class__ = _with_cached_calls(cls)

    def before_call(self, tree: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        names = (
            "hidden_states",
            "timestep",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "num_cond_latents",
            "return_kv",
        )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        latents, cond = given.get("hidden_states"), given.get("num_cond_latents") or 0
        patch: Any = getattr(tree, "patch_size", None)
        if not isinstance(latents, Tensor) or latents.dim() != 5 or not isinstance(cond, int) or patch is None:
            return  # the model itself says best what is wrong with its input
        t, h, w = (size // p for size, p in zip(latents.shape[2:], patch, strict=True))
        # Frames encoded for the cache are cond frames, and so are all where no noise frame is left, though the
        # attention call itself does not say so.
        role = "cond" if given.get("return_kv") or cond >= t else "self"
        for module in tree.modules():
            if self._is_official(module, "Attention"):
                module.bsa_whole_role = role  # type: ignore[assignment]
            elif self._is_official(module, "RotaryPositionalEmbedding"):
                for frames in {t, t + cond}:
                    module.register_grid_size((frames, h, w))  # type: ignore[operator]

    def switched(self, model: nn.Module) -> bool | None:
        """Its `enable_bsa()` and `disable_bsa()` leave their mark on the blocks' attention alone."""
        flags = {bool(getattr(m, "enable_bsa", False)) for m in model.modules() if self._is_official(m, "Attention")}
        if len(flags) > 1:
            log.info("enable_bsa differs among the model's blocks: it is not looked at, give a policy with rules")
        configured = bool(_configuration(model).get("enable_bsa"))
        return None if flags in (set(), {configured}) or len(flags) > 1 else not configured


class _CachedCalls:
    """Leads `forward_with_kv_cache` through the module's own call.

    The official block calls that method directly: the trace would take it for the block's own code, and rules for
    `blocks.*.attn` would miss the cached calls.
    """

    def forward(self, *args: Any, bsa_cached: bool = False, **kwargs: Any) -> Any:
        method: Any = getattr(super(), "forward_with_kv_cache" if bsa_cached else "forward")
        return method(*args, **kwargs)

    def forward_with_kv_cache(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = self
        return call(*args, bsa_cached=True, **kwargs)


@functools.cache  # one class for all blocks: they share compiled code only if they are of one class
def _with_cached_calls(cls: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_CachedCalls, cls), names)


def _official_self_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, shape: Sequence[int]) -> Tensor:
    if q.shape[2] == 0:  # all frames are cond frames, no noise frame asks for anything
        return v[:, :, :0]
    _, height, width = shape
    area = height * width
    grid_q, grid_k = ((x.shape[2] // area, height, width) for x in (q, k))
    if grid_q[0] == grid_k[0]:
        # All frames, or the cond frames among themselves; `shape` is the whole latent's.
        role = module.bsa_whole_role if grid_q[0] == shape[0] else "cond"
    else:
        role = "noise" if grid_k[0] == shape[0] else "cached"
    return attention(q, k, v, grid_q=grid_q, grid_k=grid_k, role=role)


def _official_cross_attention(module: Any, x: Tensor, cond: Tensor, kv_seqlen: Sequence[int]) -> Tensor:
    batch, tokens, width = x.shape
    q = module.q_linear(x).view(batch, tokens, module.num_heads, module.head_dim)
    kv = module.kv_linear(cond).view(1, -1, 2, module.num_heads, module.head_dim)
    k, v = kv.unbind(2)
    q, k = module.q_norm(q).transpose(1, 2), module.k_norm(k).transpose(1, 2)
    v = v.transpose(1, 2)
    outs, start = [], 0
    for i, length in enumerate(kv_seqlen):  # the texts of the batch lie packed behind each other
        keys, values = k[:, :, start : start + length], v[:, :, start : start + length]
        outs.append(F.scaled_dot_product_attention(q[i : i + 1], keys, values))
        start += length
    return module.proj(torch.cat(outs).transpose(1, 2).reshape(batch, tokens, width))


ADAPTERS: tuple[Adapter, ...] = (LongCatAdapter(), OfficialLongCatAdapter())


def adapter_for(model: nn.Module) -> Adapter:
    """The first adapter made for the model, or one that does nothing."""
    return next((a for a in ADAPTERS if a.matches(model)), Adapter())


# -- what a model asks for --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a model itself asks for; None where it says nothing.

    Attributes:
        switched: by `enable_bsa()` or `disable_bsa()`.
        configured: by `enable_bsa` of its configuration.
        policy: the parameters of its configuration, switched on whatever `configured` says.
    """

    switched: bool | None = None
    configured: bool | None = None
    policy: BSAPolicy | None = None


_NAMES = ("enable_bsa", "bsa_params")


def is_configured(module: nn.Module) -> bool:
    """Whether a module has a place for block-sparse parameters, as a model has: `bsa_params`, or a `config` with it."""
    return hasattr(module, "bsa_params") or any(_has(getattr(module, "config", None), name) for name in _NAMES)


def requests_in(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a tree that ask for something, from the root down."""
    return (m for m in model.modules() if is_configured(m) or hasattr(m, "bsa_enabled"))


def request_of(model: nn.Module | None) -> Request:
    """What a model asks for, or the first model inside of it that asks for anything.

    Read are `bsa_enabled` and `bsa_params`, which our LongCat DiT keeps, the switches of the official module, and
    `enable_bsa` and `bsa_params` of a `config`, as diffusers models have it.

    Raises:
        PolicyError: the parameters are malformed.
    """
    asking = next(requests_in(model), None) if model is not None else None
    if asking is None:
        return Request()
    values = _configuration(asking)
    params = getattr(asking, "bsa_params", None) or values.get("bsa_params")
    return Request(
        switched=adapter_for(asking).switched(asking),
        configured=values.get("enable_bsa"),
        policy=BSAPolicy.from_config({"enable_bsa": True, "bsa_params": params}) if params else None,
    )


def _has(config: Any, name: str) -> bool:
    return name in config if isinstance(config, Mapping) else hasattr(config, name)


def _configuration(model: nn.Module) -> dict[str, Any]:
    """`enable_bsa` and `bsa_params` as a model's configuration gives them; what it does not give is left out."""
    config: Any = getattr(model, "config", None)
    values = config if isinstance(config, Mapping) else {n: getattr(config, n, None) for n in _NAMES}
    # diffusers fills in the defaults of the model's signature, and tells which: they are nobody's word.
    filled = values.get("_use_default_values") or ()
    return {n: values[n] for n in _NAMES if values.get(n) is not None and n not in filled}
