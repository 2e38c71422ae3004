"""The small autoencoder that stands where LongCat-Video has Wan's: 4 x 4 x 4 pixels to 16 channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

_EPS = 1e-6
_HALF = 2  # each of the decoder's two steps doubles time and both sides


class SmallAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A causal video autoencoder with the interface of diffusers' `AutoencoderKLWan`.

    Nothing in it sees later frames or is averaged over the picture: the first frames alone give the same latents as
    in front of others, and any size can be encoded.

    Args:
        z_dim: channels of the latents.
        width: channels of the encoder and of the decoder's first part.
        depth: residual blocks of each of them.
        late_width, late_depth: of the decoder at half the resolution of the pixels.
        scale_factor_spatial, scale_factor_temporal: pixels and frames per latent; 4 and 4.
        latents_mean, latents_std: statistics of the latents, one number a channel.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 16,
        width: int = 96,
        depth: int = 3,
        late_width: int = 48,
        late_depth: int = 2,
        scale_factor_spatial: int = 4,
        scale_factor_temporal: int = 4,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        values = 3 * _HALF**6  # of 4 x 4 x 4 pixels
        self.encoder = nn.Sequential(
            nn.Conv3d(values, width, 1), *(_Residual(width) for _ in range(depth)), _RMSNorm(width), nn.SiLU()
        )
        self.moments = nn.Conv3d(width, 2 * z_dim, 1)
        self.decoder = nn.Sequential(nn.Conv3d(z_dim, width, 1), *(_Residual(width) for _ in range(depth)))
        self.spread = nn.Conv3d(width, late_width * _HALF**3, 1)
        self.late = nn.Sequential(*(_Residual(late_width) for _ in range(late_depth)), _RMSNorm(late_width), nn.SiLU())
        self.pixels = nn.Conv3d(late_width, 3 * _HALF**3, 1)
        if latents_mean is None or latents_std is None:
            self.register_to_config(latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Distribution of the latents.

        Args:
            x: `Float[Tensor, "b 3 t h w"]` in [-1, 1]; t = 1 + a multiple of 4, h and w multiples of 4.
            return_dict: False gives a tuple.

        Returns:
            `latent_dist` over `Float[Tensor, "b z 1+(t-1)/4 h/4 w/4"]`.
        """
        x = torch.cat([x[:, :, :1].expand(-1, -1, 3, -1, -1), x], dim=2)  # the first latent holds the first frame alone
        moments = self.moments(self.encoder(_fold(x, 4)))
        found = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pixels of latents.

        Args:
            z: `Float[Tensor, "b z t h w"]`.
            return_dict: False gives a tuple.

        Returns:
            `sample`: `Float[Tensor, "b 3 1+4*(t-1) 4*h 4*w"]`, about in [-1, 1].
        """
        x = self.spread(self.decoder(z))
        x = self.pixels(self.late(_unfold(x, _HALF)))
        x = _unfold(x, _HALF)[:, :, 3:]
        return DecoderOutput(sample=x) if return_dict else (x,)

    def enable_tiling(self) -> None:
        """Nothing to do: a few frames' activations are small."""

    def disable_tiling(self) -> None:
        """Likewise."""


def _fold(x: Tensor, by: int) -> Tensor:
    """`[B, C, T, H, W]` -> `[B, C*by^3, T/by, H/by, W/by]`."""
    b, c, t, h, w = x.shape
    x = x.view(b, c, t // by, by, h // by, by, w // by, by).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, c * by**3, t // by, h // by, w // by)


def _unfold(x: Tensor, by: int) -> Tensor:
    """Inverse of `_fold`."""
    b, c, t, h, w = x.shape
    x = x.view(b, c // by**3, by, by, by, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, c // by**3, t * by, h * by, w * by)


class _RMSNorm(nn.Module):
    """Norm over the channels of each position, which neither time nor the picture's size has a part in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + _EPS)
        return (x * scale).to(x.dtype) * self.weight.view(1, -1, 1, 1, 1)


class _Residual(nn.Module):
    """A 3x3 convolution in space and one of three frames in time, the present one and the two before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _RMSNorm(channels), _RMSNorm(channels)
        self.space = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(channels, channels, (3, 1, 1))
        for parameter in self.time.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.space(F.silu(self.norm1(x)))
        y = F.pad(F.silu(self.norm2(y)), (0, 0, 0, 0, 2, 0))
        return x + self.time(y)
