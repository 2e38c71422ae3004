"""What is known of particular models: where they attend, and on which grid.

An adapter prepares the private copy of a model's module tree that `optimize` makes, so the user's own model stays as it
was. It replaces the model's attention calls by the anchor `bsa_compile.attention`, which carries grid and role into
the traced graph, also where the graph holds a single block and the patch embedding is out of sight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UnsupportedError, must
from .models.longcat.attention import Attention as LongCatAttention
from .ops import attention


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

    @staticmethod
    def _is_official(module: nn.Module, name: str) -> bool:
        cls = type(module)
        return cls.__name__ == name and cls.__module__.split(".")[0] == "longcat_video"

    def matches(self, model: nn.Module) -> bool:
        return any(self._is_official(m, "Attention") for m in model.modules())

    def install(self, tree: nn.Module) -> None:
        split = getattr(tree, "cp_split_hw", None) or (1, 1)
        if split[0] * split[1] > 1:
            raise UnsupportedError(
                must("cp_split_hw", "be [1, 1]", list(split), "Its context parallelism is not supported here.")
            )
        for module in tree.modules():
            if self._is_official(module, "Attention"):
                module._process_attn = functools.partial(_official_self_attention, module)  # type: ignore[assignment]
            elif self._is_official(module, "MultiHeadCrossAttention"):
                module._process_cross_attn = functools.partial(_official_cross_attention, module)  # type: ignore
            if hasattr(module, "enable_bsa"):
                module.enable_bsa = False  # type: ignore[assignment]  # its own BSA would run instead of the function above

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
        latents, cond = given["hidden_states"], given.get("num_cond_latents") or 0
        patch = tree.patch_size
        t, h, w = (size // p for size, p in zip(latents.shape[2:], patch, strict=True))  # type: ignore[arg-type]
        for module in tree.modules():
            if self._is_official(module, "Attention"):
                # Frames encoded for the cache are cond frames, though the call itself does not say so.
                module.bsa_whole_role = "cond" if given.get("return_kv") else "self"  # type: ignore[assignment]
            elif self._is_official(module, "RotaryPositionalEmbedding"):
                for frames in {t, t + cond}:
                    module.register_grid_size((frames, h, w))  # type: ignore[operator]


def _official_self_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, shape: Sequence[int]) -> Tensor:
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
