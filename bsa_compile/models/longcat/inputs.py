"""Checks of the transformer's inputs: shapes only, so that they cost nothing and vanish from a traced graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bsa_compile.errors import InputError, must
from bsa_compile.models.longcat.attention import KV
from bsa_compile.models.longcat.config import LongCatConfig


def check_inputs(
    config: LongCatConfig,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None,
    num_cond_latents: int,
) -> None:
    """Refuse what `LongCatVideoTransformer3DModel.forward` cannot run.

    Raises:
        InputError: A tensor's rank, channels or batch, or `num_cond_latents`, does not fit.
    """
    shape = hidden_states.shape
    # One by one: min() of symbolic sizes would compare them with each other, and guard on who is smaller.
    if hidden_states.ndim != 5 or shape[1] != config.in_channels or shape[2] < 1 or shape[3] < 1 or shape[4] < 1:
        want = f"have shape [B, {config.in_channels}, T, H, W] with T, H, W >= 1"
        raise InputError(must("hidden_states", want, tuple(shape)))
    if not hidden_states.is_floating_point():
        raise InputError(must("hidden_states", "be a float tensor", hidden_states.dtype))
    batch, frames = shape[0], shape[2]
    if (
        timestep.ndim not in (1, 2)
        or timestep.shape[0] != batch
        or (timestep.ndim == 2 and timestep.shape[1] != frames)
    ):
        want = "have shape [B] or [B, T], B and T those of hidden_states"
        raise InputError(must("timestep", want, f"{tuple(timestep.shape)} for hidden_states {tuple(shape)}"))
    text = encoder_hidden_states.shape
    if encoder_hidden_states.ndim != 4 or text[0] != batch or text[1] != 1 or text[3] != config.caption_channels:
        want = f"have shape [B, 1, L, {config.caption_channels}], B that of hidden_states"
        raise InputError(must("encoder_hidden_states", want, f"{tuple(text)} for hidden_states {tuple(shape)}"))
    if encoder_attention_mask is not None:
        mask = encoder_attention_mask.shape
        if encoder_attention_mask.ndim != 2 or mask[0] != batch or mask[1] != text[2]:
            want = "have shape [B, L], B and L those of encoder_hidden_states"
            raise InputError(
                must("encoder_attention_mask", want, f"{tuple(mask)} for encoder_hidden_states {tuple(text)}")
            )
    if isinstance(num_cond_latents, bool) or not isinstance(num_cond_latents, int | torch.SymInt):
        raise InputError(must("num_cond_latents", "be an integer", repr(num_cond_latents)))
    if num_cond_latents < 0:
        raise InputError(must("num_cond_latents", "be at least 0", num_cond_latents))


def check_cond_latents(num_cond_latents: int, frames: int) -> None:
    """Without a cache, the conditioning frames are among the frames given.

    Raises:
        InputError: There are more of them than frames.
    """
    if num_cond_latents > frames:
        raise InputError(
            must(
                "num_cond_latents",
                "be at most the number of latent frames given",
                f"{num_cond_latents} of {frames}",
                "Pass kv_cache_dict when the conditioning frames are in a cache.",
            )
        )


def check_cache(
    config: LongCatConfig, cache: Mapping[int, KV], batch: int, tokens_per_frame: int, num_cond_latents: int
) -> None:
    """Refuse a KV cache that does not belong to this model, batch, resolution or number of frames.

    Args:
        config: The model's.
        cache: Block index -> (k, v), each `Float[Tensor, "1|b h c*tokens_per_frame d"]`.
        batch: b.
        tokens_per_frame: Tokens of one latent frame.
        num_cond_latents: c, the frames that the cache must hold.

    Raises:
        InputError: What the cache holds is something else.
    """
    if num_cond_latents == 0:
        raise InputError(
            must(
                "num_cond_latents",
                "be the number of cached latent frames when kv_cache_dict is given",
                0,
                "Pass num_cond_latents.",
            )
        )
    if len(cache) != config.depth or any(i not in cache for i in range(config.depth)):
        want = f"hold one entry for each of the blocks 0..{config.depth - 1}"
        raise InputError(must("kv_cache_dict", want, f"keys {sorted(cache, key=str)}"))
    length = num_cond_latents * tokens_per_frame
    for i, entry in cache.items():
        if len(entry) != 2:
            raise InputError(must(f"kv_cache_dict[{i}]", "be a pair (k, v)", f"{len(entry)} items"))
        for name, x in zip(("k", "v"), entry, strict=True):
            what = f"kv_cache_dict[{i}].{name}"
            if x.ndim != 4 or x.shape[1] != config.num_heads or x.shape[3] != config.head_dim:
                want = f"have shape [1 or B, {config.num_heads}, S, {config.head_dim}]"
                raise InputError(must(what, want, tuple(x.shape)))
            if x.shape[0] != 1 and x.shape[0] != batch:
                raise InputError(must(what, "have batch 1 or that of hidden_states", f"{x.shape[0]} for {batch}"))
            if x.shape[2] != length:
                raise InputError(
                    must(
                        what,
                        "hold num_cond_latents times the tokens of one latent frame",
                        f"{x.shape[2]} tokens for {num_cond_latents} frames of {tokens_per_frame}",
                        "Pass the num_cond_latents and the resolution that the cache was made with.",
                    )
                )
