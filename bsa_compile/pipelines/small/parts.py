"""The small model's parts, made new, and its folder in LongCat-Video's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bsa_compile.files import write_text
from bsa_compile.models.longcat import LongCatConfig, LongCatVideoTransformer3DModel
from bsa_compile.pipelines.longcat.defaults import DEFAULTS_NAME, GenerationDefaults
from bsa_compile.pipelines.small.autoencoder import SmallAutoencoder
from bsa_compile.pipelines.small.captions import vocabulary

HEIGHT, WIDTH, FRAMES = 192, 224, 49
"""Size of its videos: a grid of 13 x 24 x 28 tokens."""

TEXT_TOKENS = 24
TEXT_WIDTH = 64
SHIFT = 8.0
"""Shift of the noise levels, in training and sampling alike."""

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"

DEFAULTS = GenerationDefaults(
    height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=24, guidance_scale=1.0, refine_steps=24
)


def new_dit() -> LongCatVideoTransformer3DModel:
    """LongCat's architecture, 5.4 million parameters; modulation and head start at zero."""
    config = LongCatConfig(
        hidden_size=192,
        depth=8,
        num_heads=3,
        caption_channels=TEXT_WIDTH,
        adaln_tembed_dim=64,
        frequency_embedding_size=128,
        text_tokens_zero_pad=True,
        enable_bsa=True,
        bsa_params={"sparsity": 0.9375, "chunk_3d_shape_q": [4, 4, 4], "chunk_3d_shape_k": [4, 4, 4]},
    )
    return LongCatVideoTransformer3DModel(config)


def new_tokenizer() -> Any:
    """A tokenizer of transformers over the words of captions; letter case and punctuation do not count."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate((PAD, END, UNKNOWN, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, words[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=TEXT_TOKENS,
    )


def new_text_encoder() -> Any:
    """A `UMT5EncoderModel` of two small layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=3 + len(vocabulary()),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def new_scheduler() -> Any:
    """Flow-match Euler of diffusers with the small model's shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def write_folder(
    folder: Path,
    *,
    dit: LongCatVideoTransformer3DModel,
    text_encoder: Any,
    vae: SmallAutoencoder,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write all parts in LongCat-Video's layout; the modules are cast to `dtype` in place."""
    modules: dict[str, Any] = {"dit": dit, "text_encoder": text_encoder, "vae": vae}
    for name, module in modules.items():
        module.to(dtype=dtype).save_pretrained(folder / name)
    new_tokenizer().save_pretrained(folder / "tokenizer")
    new_scheduler().save_pretrained(folder / "scheduler")
    write_text(folder / DEFAULTS_NAME, json.dumps(DEFAULTS.to_dict(), indent=2) + "\n")
