"""A stand-in with the interface of the official LongCat-Video module: its class and method names, nothing else of it.

Like the official one it cannot attend by itself here, hides attention from Dynamo, keeps a numpy RoPE table per grid,
and packs the valid text tokens of a batch behind each other. Its block calls `forward_with_kv_cache` past the
attention's `__call__`, and its switch sets a flag on every block's attention. Its classes bear the official modules'
names, by which the adapter knows them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .support import CAPTION


class RotaryPositionalEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.freqs_dict = {}

    def register_grid_size(self, grid_size):
        if grid_size not in self.freqs_dict:
            t, h, w = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid_size), indexing="ij")
            angle = np.stack([t, h * 0.7, w * 0.3, t + h - w], -1).reshape(-1, 4).repeat(4, axis=-1)
            self.freqs_dict[grid_size] = torch.from_numpy(angle)

    def forward(self, q, k, grid_size):
        if grid_size not in self.freqs_dict:
            raise RuntimeError("numpy inside the traced graph")
        angle = self.freqs_dict[grid_size]
        return (x * angle.cos() + x.flip(-1) * angle.sin() for x in (q, k))


class Attention(nn.Module):
    def __init__(self, dim, heads, enable_bsa=False, bsa_params=None):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.enable_bsa, self.bsa_params = enable_bsa, bsa_params
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rope_3d = RotaryPositionalEmbedding()

    @torch.compiler.disable
    def _process_attn(self, q, k, v, shape):
        raise RuntimeError("needs flash-attn")

    def _qkv(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, shape=None, num_cond_latents=None, return_kv=False):
        q, k, v = self._qkv(x)
        cache = (k.clone(), v.clone())
        q, k = self.rope_3d(q, k, shape)
        if num_cond_latents:
            n = num_cond_latents * shape[1] * shape[2]
            cond = self._process_attn(
                q[:, :, :n].contiguous(), k[:, :, :n].contiguous(), v[:, :, :n].contiguous(), shape
            )
            out = torch.cat([cond, self._process_attn(q[:, :, n:].contiguous(), k, v, shape)], dim=2)
        else:
            out = self._process_attn(q, k, v, shape)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return (out, cache) if return_kv else out

    def forward_with_kv_cache(self, x, shape=None, num_cond_latents=None, kv_cache=None):
        q, k, v = self._qkv(x)
        k, v = torch.cat([kv_cache[0], k], dim=2), torch.cat([kv_cache[1], v], dim=2)
        t, h, w = shape
        padded = torch.cat([torch.zeros_like(kv_cache[0]), q], dim=2)
        padded, k = self.rope_3d(padded, k, (t + num_cond_latents, h, w))
        out = self._process_attn(padded[:, :, -q.shape[2] :], k, v, shape)
        return self.proj(out.transpose(1, 2).flatten(2))


class MultiHeadCrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.q_linear, self.kv_linear, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def _process_cross_attn(self, x, cond, kv_seqlen):
        raise RuntimeError("needs flash-attn")

    def forward(self, x, cond, kv_seqlen):
        return self._process_cross_attn(x, cond, kv_seqlen)


class Block(nn.Module):
    def __init__(self, dim, heads, enable_bsa, bsa_params):
        super().__init__()
        self.attn, self.cross_attn = Attention(dim, heads, enable_bsa, bsa_params), MultiHeadCrossAttention(dim, heads)

    def forward(self, x, y, lengths, shape, num_cond_latents, return_kv, kv_cache):
        if kv_cache is not None:
            return x + self.attn.forward_with_kv_cache(x, shape, num_cond_latents, kv_cache)
        out = self.attn(x, shape, num_cond_latents, return_kv)
        if return_kv:
            return x + out[0], out[1]
        x = x + out
        return x + self.cross_attn(x, y, lengths)


class LongCatVideoTransformer3DModel(nn.Module):
    def __init__(self, dim=32, heads=2, depth=2, **config):
        super().__init__()
        # As diffusers keeps it: the signature's defaults are filled in, and which those were is told.
        defaults = {"enable_bsa": False, "bsa_params": None}
        self.config = {**defaults, **config, "_use_default_values": [n for n in defaults if n not in config]}
        self.patch_size, self.cp_split_hw = (1, 2, 2), [1, 1]
        self.proj_in = nn.Conv3d(4, dim, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(CAPTION, dim)
        asked = (self.config["enable_bsa"], self.config["bsa_params"])
        self.blocks = nn.ModuleList(Block(dim, heads, *asked) for _ in range(depth))

    def enable_bsa(self):
        for block in self.blocks:
            block.attn.enable_bsa = True

    def disable_bsa(self):
        for block in self.blocks:
            block.attn.enable_bsa = False

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        encoder_attention_mask=None,
        num_cond_latents=0,
        return_kv=False,
        kv_cache_dict=None,
    ):
        shape = tuple(s // p for s, p in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        x = self.proj_in(hidden_states).flatten(2).transpose(1, 2) + timestep[:, None, None] / 1000
        y = self.text(encoder_hidden_states.squeeze(1))
        mask = torch.ones(y.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
        lengths = mask.sum(1).int().tolist()
        y = y.masked_select(mask[..., None] != 0).view(1, -1, y.shape[-1])
        caches = {}
        for i, block in enumerate(self.blocks):
            x = block(x, y, lengths, shape, num_cond_latents, return_kv, (kv_cache_dict or {}).get(i))
            if return_kv:
                x, caches[i] = x
        return (x, caches) if return_kv else x


for name, classes in {
    "attention": (Attention, MultiHeadCrossAttention),
    "rope_3d": (RotaryPositionalEmbedding,),
    "longcat_video_dit": (Block, LongCatVideoTransformer3DModel),
}.items():
    for cls in classes:
        cls.__module__ = f"longcat_video.modules.{name}"


def attend_with(model: nn.Module, self_attention) -> None:
    """Give the stand-in attention functions of the test's own, for the expected result."""

    def cross(module, x, cond, lengths):
        q = module.q_linear(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        k, v = module.kv_linear(cond).unflatten(-1, (2, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        parts = zip(q.split(1), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(*p) for p in parts])
        return module.proj(out.transpose(1, 2).flatten(2))

    for block in model.blocks:
        block.attn._process_attn = self_attention
        block.cross_attn._process_cross_attn = lambda *a, m=block.cross_attn: cross(m, *a)
