"""From a prompt to the embeddings that the transformer reads."""

from __future__ import annotations

import html
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsa_compile.errors import require_extra

log = logging.getLogger("bsa_compile")


@dataclass(frozen=True)
class TextEmbeds:
    """Embedded prompts.

    Attributes:
        values: `Float[Tensor, "b 1 l c"]`.
        mask: `Int[Tensor, "b l"]`, 1 where a token counts.
    """

    values: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> TextEmbeds:
        return TextEmbeds(self.values.to(device), self.mask.to(device))


def clean(prompt: str) -> str:
    """The text as the model was trained on it: repaired Unicode, no HTML entities, single spaces."""
    ftfy: Any = require_extra("ftfy", "longcat")
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def encode(tokenizer: Any, encoder: Any, prompt: str, max_tokens: int, dtype: torch.dtype) -> TextEmbeds:
    """Embed one prompt with UMT5, padded to `max_tokens`; a warning tells of what is cut and of unknown words.

    Args:
        tokenizer: of transformers.
        encoder: `UMT5EncoderModel`, on any device.
        prompt: the text.
        max_tokens: l.
        dtype: of the embeddings.

    Returns:
        b = 1, on the encoder's device.
    """
    text = clean(prompt)
    tokens = tokenizer(
        [text],
        padding="max_length",
        max_length=max_tokens,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    whole = tokenizer(text, add_special_tokens=True).input_ids
    if tokenizer.unk_token_id in whole and (unknown := unknown_words(tokenizer, text)):
        log.warning("the model does not know %s: ignored", ", ".join(map(repr, unknown)))
    if len(whole) > max_tokens:
        log.warning("the prompt has %d tokens: all after the first %d are ignored", len(whole), max_tokens)
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
    with torch.no_grad():
        hidden = encoder(ids, mask).last_hidden_state
    return TextEmbeds(hidden.to(dtype)[:, None], mask)


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Words that a tokenizer has nothing for, in the order of the text."""
    words = dict.fromkeys(re.findall(r"\w+", text))
    return [word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids]


def joined(*texts: TextEmbeds) -> TextEmbeds:
    """One batch of several."""
    return TextEmbeds(torch.cat([t.values for t in texts]), torch.cat([t.mask for t in texts]))
