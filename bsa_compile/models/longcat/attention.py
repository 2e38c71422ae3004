"""Self-attention over the video's tokens and cross-attention to the text."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsa_compile.models.longcat.layers import RMSNorm
from bsa_compile.models.longcat.linear import LoRALinear
from bsa_compile.models.longcat.rope import Rope, rotate

Grid = tuple[int, int, int]
"""Tokens along t, h, w."""

Role = Literal["self", "cond", "noise", "cached"]

ROLE_MARK = "bsa_role"
"""Key of the role in `node.meta["custom"]` of a traced attention call, where the passes look for it."""

KV = tuple[Tensor, Tensor]
"""k (after its norm, before RoPE) and v, each `Float[Tensor, "b h s d"]`."""


class AttentionFn(Protocol):
    """What `Attention.attention_fn` must be: q, k, v `[B, H, S, D]` -> `[B, H, Sq, D]`, told what the tokens are."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, grid_q: Grid, grid_k: Grid, role: Role) -> Tensor: ...


class TokenSplit(Protocol):
    """What `LongCatVideoTransformer3DModel.token_split` must be: a share of each frame's tokens, one of several.

    A share holds every latent frame, and of each frame the same positions. Then whatever happens per frame or per token
    is the same on a share as on the whole; only attention, which the `attention_fn` of the blocks does, needs the rest.
    """

    def share(self, grid: Grid) -> Grid:
        """(t, h', w') of the share of a whole grid, h' * w' tokens per frame."""
        ...

    def take(self, x: Tensor) -> Tensor:
        """The share's tokens of `Float[Tensor, "... t*h*w c"]`."""
        ...

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        """All tokens `Float[Tensor, "b t*h*w c"]` of the whole grid, given those of the share."""
        ...


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, grid_q: Grid, grid_k: Grid, role: Role) -> Tensor:
    """Attend to every key; the grids and the role are for those who do better.

    While Dynamo traces, the call's node is marked with the role: that frames are being encoded for a cache, for
    example, is nothing that the graph would show. The mark changes nothing of what the graph computes.

    Args:
        q: `Float[Tensor, "b h s_q d"]`, any strides with a unit last stride.
        k: `Float[Tensor, "b h s_k d"]`, likewise.
        v: `Float[Tensor, "b h s_k d"]`, likewise.
        grid_q: (t, h, w) of the queries, t*h*w = s_q.
        grid_k: (t, h, w) of the keys, t*h*w = s_k.
        role: "self", "cond" (conditioning frames among themselves), "noise" (the other frames over all) or "cached"
            (new frames over cached and new ones).

    Returns:
        `Float[Tensor, "b h s_q d"]`.
    """
    if not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v)
    with torch.fx.traceback.annotate({ROLE_MARK: role}):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention with 3-D RoPE, conditioning frames and a KV cache.

    `attention_fn` is the one place that attends; set it on an instance to replace the dense default.

    Attributes:
        bsa_enabled: What the model asks for: True, False, or None when nobody asked.
        ran_dense: Whether a call outside compiled code attended densely though block-sparse attention was asked for.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = LoRALinear(dim, 3 * dim)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.proj = LoRALinear(dim, dim)
        self.attention_fn: AttentionFn = dense_attention
        self.bsa_enabled: bool | None = None
        self.ran_dense = False

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        rope: Rope,
        num_cond_latents: int = 0,
        kv_cache: KV | None = None,
        return_kv: bool = False,
    ) -> tuple[Tensor, KV]:
        """Attend, and give the k and v that a later call could use as its cache.

        Args:
            x: `Float[Tensor, "b t*h*w c"]`.
            grid: (t, h, w) of `x`.
            rope: Tables of the grid of the keys: `grid`, or with a cache (t + num_cond_latents, h, w).
            num_cond_latents: Conditioning frames: the first of `x`, or those in the cache.
            kv_cache: k and v of the conditioning frames, batch 1 or b, on any device.
            return_kv: `x` is being encoded for a cache, so it follows the rule of conditioning frames.

        Returns:
            `Float[Tensor, "b t*h*w c"]` and (k, v) of `x`, views of larger tensors.
        """
        batch, tokens, channels = x.shape
        t, h, w = grid
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        kv = (k, v)
        cond_tokens = num_cond_latents * h * w
        if kv_cache is not None:
            k, v = (torch.cat([_like(cached, new), new], dim=2) for cached, new in zip(kv_cache, kv, strict=True))
            cos, sin = rope
            q, k = rotate(q, (cos[cond_tokens:], sin[cond_tokens:])), rotate(k, rope)
            out = self._attend(q, k, v, grid_q=grid, grid_k=(t + num_cond_latents, h, w), role="cached")
        else:
            q, k = rotate(q, rope), rotate(k, rope)
            if num_cond_latents == 0 or num_cond_latents == t:
                role: Role = "cond" if return_kv or num_cond_latents else "self"
                out = self._attend(q, k, v, grid_q=grid, grid_k=grid, role=role)
            else:
                cond, noise = (num_cond_latents, h, w), (t - num_cond_latents, h, w)
                q_c, k_c, v_c = (z[:, :, :cond_tokens] for z in (q, k, v))
                out_cond = self._attend(q_c, k_c, v_c, grid_q=cond, grid_k=cond, role="cond")
                out_noise = self._attend(q[:, :, cond_tokens:], k, v, grid_q=noise, grid_k=grid, role="noise")
                out = torch.cat([out_cond, out_noise], dim=2)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels)), kv

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, grid_q: Grid, grid_k: Grid, role: Role) -> Tensor:
        # Dynamo guards on what was asked for: after a switch the backend is reached again, also where the compiled code
        # holds no more of the model than this module: a block alone, or what follows a graph break.
        if self.bsa_enabled and not torch.compiler.is_compiling():
            self.ran_dense = self.attention_fn is dense_attention
        return self.attention_fn(q, k, v, grid_q=grid_q, grid_k=grid_k, role=role)


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the text's; no RoPE."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q_linear = LoRALinear(dim, dim)
        self.kv_linear = LoRALinear(dim, 2 * dim)
        self.proj = LoRALinear(dim, dim)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x: Tensor, text: Tensor, text_valid: Tensor | None = None) -> Tensor:
        """Attend to the valid text tokens; a sample that has none attends to nothing and gets `proj(0)`.

        Args:
            x: `Float[Tensor, "b n c"]`.
            text: `Float[Tensor, "b l c"]`.
            text_valid: `Bool[Tensor, "b l"]`, or None when all are.

        Returns:
            `Float[Tensor, "b n c"]`.
        """
        batch, tokens, channels = x.shape
        q = self.q_linear(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv_linear(text).view(batch, text.shape[1], 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if text_valid is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            any_valid = text_valid.any(dim=1, keepdim=True)
            # A row that masks everything is NaN in some SDPA kernels: let it attend anywhere and drop the result.
            mask = (text_valid | ~any_valid)[:, None, None, :]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out = out.masked_fill(~any_valid[:, :, None, None], 0.0)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))


def _like(cached: Tensor, new: Tensor) -> Tensor:
    """The cached tensor on `new`'s device, in its dtype and batch; a batch of 1 is expanded, not copied."""
    return cached.to(device=new.device, dtype=new.dtype).expand(new.shape[0], -1, -1, -1)
