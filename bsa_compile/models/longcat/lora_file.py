"""LoRA files in LongCat's layout: reading, checking, and what to write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bsa_compile.errors import CheckpointError, must
from bsa_compile.models.longcat.linear import LoRALinear, LoRATerm

_PREFIX = "lora___lorahyphen___"
_DOT = "___lorahyphen___"
_DEFAULT_ALPHA = 64.0
_SHOWN = 10


def read_lora(path: Path, targets: Mapping[str, nn.Module], multiplier: float) -> dict[str, LoRATerm]:
    """Read a LoRA file and check all of it against the modules that it names.

    Args:
        path: A safetensors file.
        targets: Module path -> module, of the model that will carry the LoRA.
        multiplier: Strength; the file's own `alpha_scale` (64 / rank when absent) comes on top.

    Returns:
        Module path -> its term, tensors memory-mapped.

    Raises:
        CheckpointError: The file is missing, corrupt or empty, or anything in it fits no linear layer of the model.

    Source:
        Key names and alpha's default: the public LongCat-Video code.
    """
    try:
        tensors = load_file(path, device="cpu")
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(
            must(str(path), "be a readable safetensors file", f"{type(exc).__name__}: {exc}")
        ) from exc
    grouped: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        if not name.startswith(_PREFIX) or not suffix:
            problems.append(f"unknown key {key!r}")
        else:
            grouped.setdefault(name.removeprefix(_PREFIX).replace(_DOT, "."), {})[suffix] = tensor
    terms: dict[str, LoRATerm] = {}
    for name, parts in grouped.items():
        try:
            terms[name] = _read_term(parts, targets.get(name), multiplier)
        except ValueError as exc:
            problems.append(f"{name}: {exc}")
    if not tensors:
        problems.append("no tensors")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = "; ".join(problems[:_SHOWN]) + more
        raise CheckpointError(must(str(path), "be a LoRA of this model", shown, "Nothing was loaded."))
    return terms


def _read_term(parts: dict[str, Tensor], target: nn.Module | None, multiplier: float) -> LoRATerm:
    """Check one module's tensors; a ValueError says what is wrong with them."""
    if not isinstance(target, LoRALinear):
        raise ValueError("no linear layer of that name")
    parts = dict(parts)
    alpha = parts.pop("alpha_scale", None)
    down = parts.pop("lora_down.weight", None)
    single = parts.pop("lora_up.weight", None)
    blocks: list[Tensor] = []
    while (up := parts.pop(f"lora_up.blocks.{len(blocks)}.weight", None)) is not None:
        blocks.append(up)
    if parts:
        raise ValueError(f"unknown keys {sorted(parts)}")
    if down is None or (single is None) == (not blocks):
        raise ValueError("needs lora_down.weight and either lora_up.weight or lora_up.blocks.{i}.weight")
    ups = tuple(blocks) if single is None else (single,)
    if not all(x.is_floating_point() for x in (down, *ups)):
        raise ValueError("tensors are not floats")
    if down.ndim != 2 or any(up.ndim != 2 for up in ups):
        raise ValueError("lora_down and lora_up are not matrices")
    rank = down.shape[0] // len(ups)
    fits = rank > 0 and down.shape == (rank * len(ups), target.in_features)
    if not fits or any(up.shape[1] != rank for up in ups) or sum(up.shape[0] for up in ups) != target.out_features:
        raise ValueError(
            f"lora_down {list(down.shape)} and lora_up {[list(up.shape) for up in ups]} do not fit the layer's "
            f"{target.in_features} inputs and {target.out_features} outputs"
        )
    if alpha is None:
        scale = _DEFAULT_ALPHA / rank
    elif alpha.numel() == 1 and math.isfinite(alpha.item()):
        scale = float(alpha.item())
    else:
        raise ValueError(f"alpha_scale is not one finite number: {alpha}")
    return LoRATerm(down, ups, torch.tensor(multiplier * scale, dtype=torch.float32))


def lora_tensors(terms: Mapping[str, LoRATerm]) -> dict[str, Tensor]:
    """The tensors of a LoRA under their names in a file: what `read_lora` reads as the same terms.

    Args:
        terms: Module path -> its term, with a scale.
    """
    tensors: dict[str, Tensor] = {}
    for name, term in terms.items():
        key = _PREFIX + name.replace(".", _DOT)
        tensors[f"{key}.lora_down.weight"] = term.down.detach()
        for i, up in enumerate(term.ups):
            part = f"lora_up.blocks.{i}.weight" if len(term.ups) > 1 else "lora_up.weight"
            tensors[f"{key}.{part}"] = up.detach()
        assert term.scale is not None
        tensors[f"{key}.alpha_scale"] = term.scale.detach()
    return tensors
