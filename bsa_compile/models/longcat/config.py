"""The fields of the checkpoint's `config.json`, validated once."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bsa_compile.errors import CheckpointError, UsageError, must

CLASS_NAME = "LongCatVideoTransformer3DModel"

# Switches of the official code that choose an attention library; this model has one (SDPA), so they are only kept.
_KEPT_PREFIXES = ("_", "enable_flashattn")
_KEPT_KEYS = ("enable_xformers",)

_POSITIVE_INTS = (
    "in_channels",
    "out_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "caption_channels",
    "adaln_tembed_dim",
    "frequency_embedding_size",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongCatConfig:
    """The architecture of one LongCat-Video transformer; the defaults are the released 13.6 B model.

    Args:
        in_channels: Latent channels read.
        out_channels: Latent channels written.
        hidden_size: Width C of a token.
        depth: Number of blocks.
        num_heads: Attention heads; C / num_heads must be a multiple of 8.
        caption_channels: Width of a text embedding.
        mlp_ratio: The FFN's nominal width over C, before SwiGLU's 2/3 and rounding up to a multiple of 256.
        adaln_tembed_dim: Width of the timestep embedding.
        frequency_embedding_size: Width of the timestep's sinusoid.
        patch_size: Latent frames, rows and columns of a token; the first must be 1.
        enable_bsa: Whether the checkpoint asks for block-sparse attention; None: it does not say, and
            `bsa_compile.optimize` runs block-sparse.
        bsa_params: Its parameters in LongCat's names (`sparsity`, ...); kept as read, a policy checks them.
        cp_split_hw: The official code's context-parallel split; kept for saving, has no effect here.
        text_tokens_zero_pad: Padded text tokens are multiplied by 0 and attended to, instead of being left out.
        extra: Keys of the official file that mean nothing here; kept for saving.

    Raises:
        UsageError: A field is out of range, or two fields do not fit each other.

    Source:
        `LongCatVideoTransformer3DModel.__init__` of the public LongCat-Video code names the fields and defaults.
    """

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 4096
    depth: int = 48
    num_heads: int = 32
    caption_channels: int = 4096
    mlp_ratio: float = 4
    adaln_tembed_dim: int = 512
    frequency_embedding_size: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    enable_bsa: bool | None = None
    bsa_params: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    cp_split_hw: tuple[int, int] | None = None
    text_tokens_zero_pad: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTS:
            value = getattr(self, name)
            if not _is_positive_int(value):
                raise UsageError(must(name, "be a positive integer", repr(value)))
        ratio = self.mlp_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
            raise UsageError(must("mlp_ratio", "be a positive number", repr(ratio)))
        for name in ("enable_bsa", "text_tokens_zero_pad"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "enable_bsa" and value is None):
                raise UsageError(must(name, "be true or false", repr(value)))
        if self.bsa_params is not None and not isinstance(self.bsa_params, Mapping):
            raise UsageError(must("bsa_params", "be an object or null", repr(self.bsa_params)))
        object.__setattr__(self, "patch_size", _int_tuple("patch_size", self.patch_size, 3))
        if self.cp_split_hw is not None:
            object.__setattr__(self, "cp_split_hw", _int_tuple("cp_split_hw", self.cp_split_hw, 2))
        if self.patch_size[0] != 1:
            raise UsageError(must("patch_size", "start with 1 (one token row per latent frame)", self.patch_size))
        if self.hidden_size % self.num_heads or self.head_dim % 8:
            raise UsageError(
                must(
                    "hidden_size",
                    "be num_heads times a multiple of 8",
                    f"hidden_size {self.hidden_size}, num_heads {self.num_heads}",
                )
            )
        # The caller's dicts stay the caller's: a later edit of theirs must not change a frozen config.
        object.__setattr__(self, "bsa_params", copy.deepcopy(self.bsa_params))
        object.__setattr__(self, "extra", copy.deepcopy(dict(self.extra)))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> LongCatConfig:
        """Build a config from the keys of a `config.json`.

        Args:
            fields: The parsed file.
            source: What to call it in an error.

        Raises:
            CheckpointError: An unknown key, another model's class name, or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        values: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in fields.items():
            if key in known:
                values[key] = value
            elif key.startswith(_KEPT_PREFIXES) or key in _KEPT_KEYS:
                extra[key] = value
            else:
                near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.4)
                todo = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(sorted(known))}."
                raise CheckpointError(must(source, "hold only known keys", repr(key), todo))
        if extra.get("_class_name", CLASS_NAME) != CLASS_NAME:
            raise CheckpointError(must(f"{source}: _class_name", f"be {CLASS_NAME!r}", repr(extra["_class_name"])))
        try:
            return cls(**values, extra=extra)
        except UsageError as exc:
            raise CheckpointError(f"{source}: {exc}") from exc

    @classmethod
    def from_file(cls, path: Path) -> LongCatConfig:
        """Read a `config.json`.

        Raises:
            CheckpointError: The file is missing, not a JSON object, or `from_dict` refuses it.
        """
        fields = read_json_object(path)
        return cls.from_dict(fields, source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The keys of a `config.json`; `from_dict` gives this config back."""
        fields: dict[str, Any] = {"_class_name": CLASS_NAME, **copy.deepcopy(dict(self.extra))}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # What a file says nothing of must not become its word: enable_bsa: false would switch off.
            if field.name != "extra" and not (field.name == "enable_bsa" and value is None):
                fields[field.name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        return fields


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a file that must hold one JSON object.

    Raises:
        CheckpointError: The file is missing, unreadable, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(must(str(path), "exist", "no such file")) from exc
    except (OSError, ValueError) as exc:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(must(str(path), "be a readable JSON file", f"{type(exc).__name__}: {exc}")) from exc
    if not isinstance(value, dict):
        raise CheckpointError(must(str(path), "hold a JSON object", type(value).__name__))
    return value


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _int_tuple(name: str, value: object, length: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) != length or not all(_is_positive_int(v) for v in value):
        raise UsageError(must(name, f"be {length} positive integers", repr(value)))
    return tuple(value)
