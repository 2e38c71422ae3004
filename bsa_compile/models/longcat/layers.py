"""Norms, embedders, feed-forward and head: everything of the transformer but attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsa_compile.models.longcat.linear import Float32Linear, LoRALinear

NORM_EPS = 1e-6
_TIMESTEP_MAX_PERIOD = 10000.0
_FFN_MULTIPLE = 256


class RMSNorm(nn.Module):
    """RMS norm over the last dim in fp32, cast back, then times the weight; the input's dtype comes out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`Float[Tensor, "... d"]` -> the same shape and dtype."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + NORM_EPS)
        # Under autocast the weight is fp32 and would lift q and k above v's dtype; attention wants one dtype.
        return (normed.to(x.dtype) * self.weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in fp32; the input's dtype comes out."""

    def __init__(self, dim: int, *, affine: bool) -> None:
        super().__init__(dim, eps=NORM_EPS, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """`Float[Tensor, "... d"]` -> the same shape and dtype."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`norm(x) * (scale + 1) + shift` in fp32, each frame with its own shift and scale.

    Args:
        norm: A norm without affine parameters.
        x: `Float[Tensor, "b n c"]`, n = frames * tokens of a frame.
        shift: `Float32[Tensor, "b frames 1 c"]`.
        scale: Like `shift`.

    Returns:
        `Float32[Tensor, "b n c"]`.
    """
    batch, tokens, channels = x.shape
    frames = shift.shape[1]
    x = norm(x.float()).view(batch, frames, tokens // frames, channels)
    return (x * (scale + 1) + shift).view(batch, tokens, channels)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update` in fp32, each frame with its own gate; the dtype of `x` comes out.

    Args:
        x: `Float[Tensor, "b n c"]`.
        gate: `Float32[Tensor, "b frames 1 c"]`.
        update: `Float[Tensor, "b n c"]`.
    """
    batch, tokens, channels = x.shape
    frames = gate.shape[1]
    update = gate * update.view(batch, frames, tokens // frames, channels)
    return (x + update.view(batch, tokens, channels)).to(x.dtype)


class PatchEmbed(nn.Module):
    """Latents to tokens: a Conv3d whose kernel is its stride. Odd sizes are padded with zeros at the far edge."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """`Float[Tensor, "b c_in t h w"]` -> tokens `Float[Tensor, "b n c"]` in raster order, and their grid."""
        pad_h, pad_w = -x.shape[3] % self.patch_size[1], -x.shape[4] % self.patch_size[2]
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        x = self.proj(x)  # [B, C, T, H', W']
        _, _, t, h, w = x.shape
        # Without the copy, eager residuals would keep the channel-major strides through all blocks.
        return x.flatten(2).transpose(1, 2).contiguous(), (t, h, w)


class TimestepEmbedder(nn.Module):
    """Sinusoid of the timestep, then a two-layer MLP, all in fp32."""

    def __init__(self, dim: int, frequency_size: int) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(Float32Linear(frequency_size, dim), nn.SiLU(), Float32Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """`Float[Tensor, "..."]` in 0..1000 -> `Float32[Tensor, "... c_t"]`."""
        half = self.frequency_size // 2
        steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(_TIMESTEP_MAX_PERIOD) * steps / half)
        angles = timestep.float().unsqueeze(-1) * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(F.pad(sinusoid, (0, 1)) if self.frequency_size % 2 else sinusoid)


class CaptionEmbedder(nn.Module):
    """Text embeddings to the transformer's width."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.y_proj = nn.Sequential(LoRALinear(in_channels, dim), nn.GELU(approximate="tanh"), LoRALinear(dim, dim))

    def forward(self, caption: Tensor) -> Tensor:
        """`Float[Tensor, "... c_text"]` -> `Float[Tensor, "... c"]`."""
        return self.y_proj(caption)


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`, its width two thirds of `nominal_dim`, rounded up to a multiple of 256."""

    def __init__(self, dim: int, nominal_dim: int) -> None:
        super().__init__()
        hidden = -(-int(2 * nominal_dim / 3) // _FFN_MULTIPLE) * _FFN_MULTIPLE
        self.w1 = LoRALinear(dim, hidden, bias=False)
        self.w2 = LoRALinear(hidden, dim, bias=False)
        self.w3 = LoRALinear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`Float[Tensor, "... c"]` -> the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches, in fp32."""

    def __init__(self, dim: int, patch_values: int, t_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(dim, affine=False)
        self.linear = Float32Linear(dim, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Float32Linear(t_dim, 2 * dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Tokens `Float[Tensor, "b n c"]` and timesteps `Float32[Tensor, "b t c_t"]` -> `Float32[Tensor, "b n p"]`."""
        shift, scale = self.adaLN_modulation(t).unsqueeze(2).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final, x, shift, scale))


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int], channels: int) -> Tensor:
    """Patches back to latents: `[B, T*H*W, p_t*p_h*p_w*C]` -> `[B, C, T*p_t, H*p_h, W*p_w]`."""
    (t, h, w), (p_t, p_h, p_w) = grid, patch_size
    x = x.view(x.shape[0], t, h, w, p_t, p_h, p_w, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(x.shape[0], channels, t * p_t, h * p_h, w * p_w)
