"""A LongCat-Video folder in the real layout, written with tiny random-weight instances of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.models.longcat.lora_file import _DOT, _PREFIX

TEXT_WIDTH = 16
WORDS = ("a", "red", "ball", "rolls", "over", "grass", "blurry", "blue", "square")


def dit_fields(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "caption_channels": TEXT_WIDTH,
        "adaln_tembed_dim": 16,
        "frequency_embedding_size": 16,
        "text_tokens_zero_pad": True,
        **changes,
    }


def write_model(folder: Path, **dit_changes: Any) -> Path:
    """Write everything that the released folder holds."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
        )
    )
    encoder.save_pretrained(folder / "text_encoder")
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    dit = LongCatVideoTransformer3DModel(**dit_fields(**dit_changes))
    with torch.no_grad():
        for parameter in dit.parameters():  # modulation and head start at zero, which would hide every mistake
            parameter.normal_(0, 0.2)
    dit.save_pretrained(folder / "dit")
    for index, name in enumerate(("cfg_step_lora", "refinement_lora")):
        write_lora(folder / "lora" / f"{name}.safetensors", dit, seed=index)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with UMT5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def write_lora(path: Path, dit: LongCatVideoTransformer3DModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("blocks.0.attn.proj", "blocks.1.ffn.w2"):
        layer = dit.get_submodule(name)
        key = _PREFIX + name.replace(".", _DOT)
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, 2, generator=generator)
        tensors[f"{key}.alpha_scale"] = torch.tensor(0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
