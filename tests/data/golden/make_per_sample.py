"""Make `io_per_sample.safetensors`: the official module's outputs for a batch whose samples keep to their own text.

In `io.safetensors`, `out.plain`, `out.cond` and `out.lora` (the outputs with batch 2) were recorded with a stand-in for
flash-attn that dropped the sample boundaries of cross-attention: there each sample attends to both samples' text. The
official code passes the boundaries (`cu_seqlens_k`; xformers: `BlockDiagonalMask`), and this script keeps them.

    python make_per_sample.py <folder that holds the official package longcat_video>     # needs diffusers and einops

Keys: `out.plain`, `out.cond`, `out.lora` as in README.md; `out.plain.drop` is `out.plain` with `text_tokens_zero_pad`
false, where padded text tokens are left out.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> tuple[Tensor]:
    """flash-attn's dense entry point, [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2),)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: int) -> tuple:
    """flash-attn's entry point for joined samples, [total, H, D]: each sample's queries see its own keys."""
    sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    samples = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True)
    return (torch.cat([attend(*(x[None] for x in sample))[0][0] for sample in samples]),)


def official(checkout: str, **overrides: Any) -> torch.nn.Module:
    """The official module with the golden weights, its GPU-only imports replaced."""
    flash: Any = types.ModuleType("flash_attn_interface")
    flash.flash_attn_func, flash.flash_attn_varlen_func = attend, attend_varlen
    bsa: Any = types.ModuleType("longcat_video.block_sparse_attention")
    bsa.__path__ = []
    interface: Any = types.ModuleType(f"{bsa.__name__}.bsa_interface")
    interface.flash_attn_bsa_3d = None
    sys.modules.update({m.__name__: m for m in (flash, bsa, interface)})
    sys.path.insert(0, checkout)
    from longcat_video.modules.longcat_video_dit import LongCatVideoTransformer3DModel

    fields = {k: v for k, v in json.loads((HERE / "config.json").read_text()).items() if not k.startswith("_")}
    model = LongCatVideoTransformer3DModel(**{**fields, **overrides}, enable_flashattn3=True, cp_split_hw=[1, 1])
    model.load_state_dict(load_file(HERE / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def main(checkout: str) -> None:
    """Run the official module and write the file."""
    io = load_file(HERE / "io.safetensors")
    x, t, y, mask = (io[k] for k in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"))
    model = official(checkout)
    out = {
        "out.plain": model(x, t, y, mask),
        "out.cond": model(x, io["timestep.cond"], y, mask, num_cond_latents=1),
        "out.plain.drop": official(checkout, text_tokens_zero_pad=False)(x, t, y, mask),
    }
    model.load_lora(str(HERE / "lora.safetensors"), "lora", 1.0, lora_network_dim=4, lora_network_alpha=2)
    model.enable_loras(["lora"])
    out["out.lora"] = model(x, t, y, mask)
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "io_per_sample.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
