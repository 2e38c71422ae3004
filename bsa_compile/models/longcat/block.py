"""One transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bsa_compile.models.longcat.attention import KV, Attention, CrossAttention, Grid
from bsa_compile.models.longcat.config import LongCatConfig
from bsa_compile.models.longcat.layers import FeedForward, LayerNorm, gated_residual, modulate
from bsa_compile.models.longcat.linear import Float32Linear
from bsa_compile.models.longcat.rope import Rope


class LongCatBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated per latent frame."""

    def __init__(self, config: LongCatConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Float32Linear(config.adaln_tembed_dim, 6 * dim))
        self.mod_norm_attn = LayerNorm(dim, affine=False)
        self.mod_norm_ffn = LayerNorm(dim, affine=False)
        self.pre_crs_attn_norm = LayerNorm(dim, affine=True)
        self.attn = Attention(dim, config.num_heads)
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.ffn = FeedForward(dim, int(dim * config.mlp_ratio))

    def forward(
        self,
        x: Tensor,
        text: Tensor | None,
        text_valid: Tensor | None,
        t: Tensor,
        grid: Grid,
        rope: Rope,
        num_cond_latents: int = 0,
        kv_cache: KV | None = None,
        return_kv: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run the block.

        Args:
            x: `Float[Tensor, "b t*h*w c"]`.
            text: `Float[Tensor, "b l c"]`, or None to leave cross-attention out.
            text_valid: `Bool[Tensor, "b l"]`, or None when all text tokens count.
            t: Timestep embedding of every latent frame, `Float32[Tensor, "b t c_t"]`.
            grid: (t, h, w) of `x`.
            rope: Tables of the keys' grid, see `Attention.forward`.
            num_cond_latents: Conditioning frames, see `Attention.forward`.
            kv_cache: Their k and v, when they are not in `x`.
            return_kv: Also return this block's k and v.

        Returns:
            x, or (x, k, v).
        """
        modulation = self.adaLN_modulation(t).unsqueeze(2)  # [B, T, 1, 6 * C]
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = modulation.chunk(6, dim=-1)

        x_m = modulate(self.mod_norm_attn, x, shift_attn, scale_attn).to(x.dtype)
        update, (k, v) = self.attn(x_m, grid, rope, num_cond_latents, kv_cache, return_kv)
        x = gated_residual(x, gate_attn, update)

        if text is not None:
            # Conditioning frames in x get nothing from the text; with a cache, x holds none.
            skipped = 0 if kv_cache is not None else num_cond_latents
            if skipped < grid[0]:
                first = skipped * grid[1] * grid[2]
                update = self.cross_attn(self.pre_crs_attn_norm(x[:, first:]), text, text_valid)
                x = x + (F.pad(update, (0, 0, first, 0)) if skipped else update)

        x_m = modulate(self.mod_norm_ffn, x, shift_ffn, scale_ffn).to(x.dtype)
        x = gated_residual(x, gate_ffn, self.ffn(x_m))
        return (x, k, v) if return_kv else x
