"""Facts about particular model classes that no graph shows; classes go by the end of their qualified name."""

from __future__ import annotations

from torch import fx

from .modulepath import module_class

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
