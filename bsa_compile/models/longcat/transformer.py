"""The LongCat-Video diffusion transformer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bsa_compile.errors import CheckpointError, InputError, UsageError, must
from bsa_compile.models.longcat.attention import KV, Attention, TokenSplit
from bsa_compile.models.longcat.block import LongCatBlock
from bsa_compile.models.longcat.checkpoint import CONFIG_NAME, load_weights, save_checkpoint
from bsa_compile.models.longcat.config import LongCatConfig
from bsa_compile.models.longcat.inputs import check_cache, check_cond_latents, check_inputs
from bsa_compile.models.longcat.layers import CaptionEmbedder, FinalLayer, PatchEmbed, TimestepEmbedder, unpatchify
from bsa_compile.models.longcat.lora import LoRAMixin
from bsa_compile.models.longcat.rope import rope_tables


class LongCatVideoTransformer3DModel(LoRAMixin):
    """Predicts the flow of a noisy video latent from timestep and text.

    Args:
        config: The architecture; None takes the released model's, or what `fields` say.
        **fields: Fields of `LongCatConfig`, when no `config` is given.

    Attributes:
        bsa_enabled: What was asked for: True, False, or None when nobody asked. The model itself attends densely
            either way; `bsa_compile.optimize` and the backend read this.
        bsa_params: The checkpoint's block-sparse parameters in LongCat's names, or None.
        gradient_checkpointing: Recompute each block in the backward pass.
        token_split: Which tokens this process holds between embedding and output; None: all. Inputs and outputs are
            whole, a KV cache holds the share's tokens.

    Source:
        The public LongCat-Video code and its checkpoint, whose parameter names these are.
    """

    def __init__(self, config: LongCatConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is not None and fields:
            raise UsageError(must("config", "come alone or as fields", f"config and {sorted(fields)}"))
        self.config = config = LongCatConfig(**fields) if config is None else config
        dim, t_dim = config.hidden_size, config.adaln_tembed_dim
        patch_values = config.patch_size[0] * config.patch_size[1] * config.patch_size[2] * config.out_channels
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(t_dim, config.frequency_embedding_size)
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim)
        self.blocks = nn.ModuleList(LongCatBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, patch_values, t_dim)
        self.gradient_checkpointing = False
        self.token_split: TokenSplit | None = None
        self.bsa_enabled: bool | None
        self._ask_for_bsa(True if config.enable_bsa else None)
        self.bsa_params: dict[str, Any] | None = copy.deepcopy(config.bsa_params)
        self._warned_dense = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that inputs are cast to."""
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.x_embedder.proj.weight.device

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> LongCatVideoTransformer3DModel:
        """Load a checkpoint folder in the official layout, in evaluation mode.

        The safetensors are memory-mapped and become the parameters, so no second copy is made; a cast or a move
        copies one tensor at a time. Files must not be overwritten in place while the model uses them.

        Args:
            folder: Holds `config.json` and `model.safetensors`, `diffusion_pytorch_model.safetensors` or shards
                with their `*.safetensors.index.json`.
            torch_dtype: A float dtype to cast to; None keeps the files'.
            device: Where to move to; None stays on the CPU.

        Raises:
            CheckpointError: The folder or a file is missing or corrupt, or does not fit; one error names all tensors
                at fault.
            UsageError: `torch_dtype` is not a float dtype.
        """
        path = Path(folder)
        if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
            raise UsageError(must("torch_dtype", "be a float torch.dtype", repr(torch_dtype)))
        if not path.is_dir():
            raise CheckpointError(must("folder", "be an existing checkpoint folder", repr(str(path))))
        config = LongCatConfig.from_file(path / CONFIG_NAME)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, path, dtype=torch_dtype, device=device)
        return model.eval()

    def save_pretrained(self, folder: str | PathLike[str], max_shard_size: int | str = "10GB") -> None:
        """Write `config.json` and safetensors that `from_pretrained` reads; LoRAs are not part of them.

        Args:
            folder: Made if absent; stays as it was if writing fails.
            max_shard_size: Bytes, or text such as "5GB".

        Raises:
            CheckpointError: `folder` is a file or holds weights under other names, or the model is on meta.
            UsageError: `max_shard_size` is malformed.
        """
        save_checkpoint(self, self.config.to_dict(), Path(folder), max_shard_size)

    def enable_bsa(self) -> None:
        """Ask for block-sparse attention; `bsa_compile.optimize` fulfils it."""
        self._ask_for_bsa(True)

    def disable_bsa(self) -> None:
        """Ask for dense attention."""
        self._ask_for_bsa(False)

    def _ask_for_bsa(self, enabled: bool | None) -> None:
        self.bsa_enabled = enabled
        for module in self.modules():
            if isinstance(module, Attention):
                module.bsa_enabled = enabled

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass and recompute the rest."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        num_cond_latents: int = 0,
        return_kv: bool = False,
        kv_cache_dict: Mapping[int, KV] | None = None,
        skip_crs_attn: bool = False,
        offload_kv_cache: bool = False,
    ) -> Tensor | tuple[Tensor, dict[int, KV]]:
        """Predict the flow.

        Args:
            hidden_states: Noisy latents `Float[Tensor, "b c_in t h w"]`; h, w need not be multiples of the patch.
            timestep: 0..1000, `Tensor["b"]` or one per latent frame, `Tensor["b t"]`.
            encoder_hidden_states: Text embeddings `Float[Tensor, "b 1 l c_text"]`.
            encoder_attention_mask: `Tensor["b l"]`, nonzero where the text token counts; None: all do.
            num_cond_latents: Conditioning frames: the first of `hidden_states`, or with a cache those it holds.
            return_kv: Also return each block's k and v, for use as `kv_cache_dict`.
            kv_cache_dict: Block index -> (k, v) of the conditioning frames, each
                `Float[Tensor, "1|b heads num_cond_latents*tokens_per_frame head_dim"]`, on any device.
            skip_crs_attn: Leave out cross-attention to the text.
            offload_kv_cache: Return k and v on the CPU.

        Returns:
            `Float32[Tensor, "b c_out t h w"]`, and with `return_kv` a dict of (k, v) by block index.

        Raises:
            InputError: A shape, the cache or `num_cond_latents` does not fit.
        """
        config = self.config
        check_inputs(config, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, num_cond_latents)
        batch, _, frames, height, width = hidden_states.shape
        dtype = self.dtype
        x, whole = self.x_embedder(hidden_states.to(dtype))
        split = self.token_split
        grid = whole if split is None else split.share(whole)
        rope_grid = whole
        if kv_cache_dict:
            if return_kv:
                raise InputError(must("return_kv", "be False when kv_cache_dict is given", True))
            check_cache(config, kv_cache_dict, batch, grid[1] * grid[2], num_cond_latents)
            rope_grid = (num_cond_latents + whole[0], whole[1], whole[2])
        else:
            check_cond_latents(num_cond_latents, frames)
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(batch, frames)
        # A bf16 model rounds its timesteps: the released weights are run so.
        t = self.t_embedder(timestep.to(dtype))  # [B, T, C_t]
        text, text_valid = None, None
        if not skip_crs_attn:
            text, text_valid = self._embed_text(encoder_hidden_states.to(dtype), encoder_attention_mask)
        rope = rope_tables(rope_grid, config.head_dim, x.device)
        if split is not None:
            x, rope = split.take(x), (split.take(rope[0]), split.take(rope[1]))

        kv_out: dict[int, KV] = {}
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            kv_cache = kv_cache_dict[i] if kv_cache_dict else None
            args = (x, text, text_valid, t, grid, rope, num_cond_latents, kv_cache, return_kv)
            out = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            if return_kv:
                x, k, v = out
                # v is a view of the whole qkv, which the cache must not keep alive.
                k, v = k.contiguous(), v.contiguous()
                kv_out[i] = (k.cpu(), v.cpu()) if offload_kv_cache else (k, v)
            else:
                x = out
        # Read on every path: Dynamo then guards on it, so switching BSA reaches the backend again.
        if self.bsa_enabled and not torch.compiler.is_compiling():
            self._warn_if_dense()
        patches = self.final_layer(x, t)
        if split is not None:
            patches = split.gather(patches, whole)
        latents = unpatchify(patches, whole, config.patch_size, config.out_channels)[..., :height, :width]
        return (latents, kv_out) if return_kv else latents

    def _embed_text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Text tokens `[B, L, C]`, and which of them count `[B, L]` (None: all)."""
        embedded = self.y_embedder(text).squeeze(1)
        if mask is None:
            return embedded, None
        if self.config.text_tokens_zero_pad:
            return embedded * mask[:, :, None].to(embedded.dtype), None
        return embedded, mask != 0

    def _warn_if_dense(self) -> None:
        """Say once that the request for block-sparse attention has no effect yet."""
        if not self._warned_dense and all(m.ran_dense for m in self.modules() if isinstance(m, Attention)):
            self._warned_dense = True
            warnings.warn(
                "enable_bsa was asked for, but attention ran dense: call bsa_compile.optimize(model).",
                UserWarning,
                stacklevel=5,  # past forward and nn.Module's two call layers
            )
