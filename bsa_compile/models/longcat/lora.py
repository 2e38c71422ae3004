"""LoRA files: reading, checking, and switching them on and off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bsa_compile.errors import CheckpointError, UsageError, must
from bsa_compile.models.longcat.linear import LoRALinear, LoRATerm

_PREFIX = "lora___lorahyphen___"
_DOT = "___lorahyphen___"
_DEFAULT_ALPHA = 64.0
_SHOWN = 10


class StoredTerm(NamedTuple):
    """A module's term as its file holds it, and the factor it is to be multiplied by."""

    term: LoRATerm
    scale: float


def read_lora(path: Path, targets: Mapping[str, nn.Module], multiplier: float) -> dict[str, StoredTerm]:
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
    terms: dict[str, StoredTerm] = {}
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


def _read_term(parts: dict[str, Tensor], target: nn.Module | None, multiplier: float) -> StoredTerm:
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
    return StoredTerm(LoRATerm(down, ups), multiplier * scale)


class LoRAMixin(nn.Module):
    """`load_lora`, `enable_loras`, `disable_all_loras` for a model built of `LoRALinear`."""

    def __init__(self) -> None:
        super().__init__()
        # Loaded files stay on the CPU, memory-mapped; only the active ones are on the model's device.
        self._loras: dict[str, dict[str, StoredTerm]] = {}
        self._active_loras: tuple[str, ...] = ()

    @property
    def active_loras(self) -> tuple[str, ...]:
        """Keys of the LoRAs now applied, in order."""
        return self._active_loras

    def load_lora(self, path: str | PathLike[str], key: str, multiplier: float = 1.0) -> None:
        """Read a LoRA under a name; it has no effect before `enable_loras`.

        Args:
            path: A safetensors file in LongCat's LoRA layout.
            key: The name, not yet in use.
            multiplier: Strength.

        Raises:
            CheckpointError: The file is missing or corrupt, or does not fit the model; nothing is loaded then.
            UsageError: The name is in use, or `multiplier` is not a finite number.
        """
        if key in self._loras:
            raise UsageError(must("key", "be a new name", repr(key), "Choose another, or call unload_lora first."))
        if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not math.isfinite(multiplier):
            raise UsageError(must("multiplier", "be a finite number", repr(multiplier)))
        self._loras[key] = read_lora(Path(path), dict(self.named_modules()), float(multiplier))

    def unload_lora(self, key: str) -> None:
        """Forget a loaded LoRA.

        Raises:
            UsageError: No such name, or it is active.
        """
        self._check_loaded([key])
        if key in self._active_loras:
            raise UsageError(must("key", "not be active", repr(key), "Call disable_all_loras or enable others first."))
        del self._loras[key]

    def enable_loras(self, keys: Iterable[str]) -> None:
        """Apply these LoRAs and no others: each layer gives `y + sum(up(down(x)) * multiplier * alpha_scale)`.

        Raises:
            UsageError: A name is not loaded or comes twice; the active set stays as it was.
        """
        keys = [keys] if isinstance(keys, str) else list(keys)
        self._check_loaded(keys)
        if len(set(keys)) != len(keys):
            raise UsageError(must("keys", "name each LoRA once", keys))
        modules = dict(self.named_modules())
        terms: dict[str, tuple[LoRATerm, ...]] = {}
        for key in keys:
            for name, stored in self._loras[key].items():
                terms[name] = (*terms.get(name, ()), _place(stored, modules[name].weight))
        # Everything that can fail is done: from here on the switch is complete.
        for name, module in modules.items():
            if isinstance(module, LoRALinear):
                module.lora_terms = terms.get(name, ())
        self._active_loras = tuple(keys)

    def disable_all_loras(self) -> None:
        """Apply no LoRA; the loaded ones can be enabled again."""
        self.enable_loras([])

    def _check_loaded(self, keys: list[str]) -> None:
        unknown = [key for key in keys if key not in self._loras]
        if unknown:
            want = f"be among the loaded LoRAs {sorted(self._loras)}"
            raise UsageError(must("keys", want, unknown, "Call load_lora first."))


def _place(stored: StoredTerm, weight: Tensor) -> LoRATerm:
    """The term on the weight's device and dtype, its scale multiplied into `ups`.

    In `ups` the scale costs nothing per call, and a new multiplier changes no constant that compiled code would guard.
    """
    ups = tuple((up.to(weight.device, torch.float32) * stored.scale).to(weight.dtype) for up in stored.term.ups)
    return LoRATerm(stored.term.down.to(weight.device, weight.dtype), ups)
