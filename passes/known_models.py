"""Facts that no graph shows: what a model marked, and what is known of classes, by the end of their qualified name."""

from __future__ import annotations

from torch import fx

from .modulepath import module_class

# As `bsa_compile.models.longcat.attention` names it; any model may mark its calls so.
_ROLE_MARK = "bsa_role"

_CACHED_FRAMES = (
    "bsa_compile.models.longcat.attention.Attention",
    "longcat_video.modules.attention.Attention",
)


def cache_holds_frames(node: fx.Node) -> bool:
    """Whether keys that a module puts before its own are whole latent frames on the same H x W, in order.

    True of LongCat's self-attention: its KV cache holds k and v of the conditioning frames.
    Source: `forward_with_kv_cache` of the public LongCat-Video code.
    """
    name = module_class(node)
    return any(name == known or name.endswith("." + known) for known in _CACHED_FRAMES)


def marked_role(node: fx.Node) -> str:
    """The role that the model gave to an attention call, "" where it said nothing.

    Written as `with torch.fx.traceback.annotate({"bsa_role": "cond"}): ...` around the call.
    """
    return (node.meta.get("custom") or {}).get(_ROLE_MARK, "")
