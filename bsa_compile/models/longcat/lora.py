"""LoRAs on a model: loading, making and training them, switching them on and off."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bsa_compile.errors import UsageError, must
from bsa_compile.files import check_writable, write_bytes
from bsa_compile.models.longcat.linear import LoRALinear, LoRATerm, in_dtype_of
from bsa_compile.models.longcat.lora_file import lora_tensors, read_lora

LORA_TARGETS = ("blocks.*.attn.*", "blocks.*.cross_attn.*", "blocks.*.ffn.*")
"""Where a new LoRA goes by default: every linear layer of attention and feed-forward."""

_PARTS = {"qkv": 3, "kv_linear": 2}
"""Fused layers, which have one `up` for each of what they compute. Source: the public LongCat-Video code."""


class LoRAMixin(nn.Module):
    """LoRAs for a model built of `LoRALinear`.

    Those of files (`load_lora`) and new ones (`add_lora`) have no effect before `enable_loras`. The parameters of the
    ones that are trained stand beside the model's own: `lora_parameters` has them, `parameters()` and `state_dict()`
    do not.
    """

    def __init__(self) -> None:
        super().__init__()
        # Loaded files stay on the CPU, memory-mapped; of the active ones, a copy is on the model's device.
        self._loras: dict[str, dict[str, LoRATerm]] = {}
        self._active_loras: tuple[str, ...] = ()

    @property
    def active_loras(self) -> tuple[str, ...]:
        """Keys of the LoRAs now applied, in order."""
        return self._active_loras

    def load_lora(
        self, path: str | PathLike[str], key: str, multiplier: float = 1.0, *, trainable: bool = False
    ) -> None:
        """Read a LoRA under a name; it has no effect before `enable_loras`.

        Args:
            path: A safetensors file in LongCat's LoRA layout.
            key: The name, not yet in use.
            multiplier: Strength.
            trainable: Train it further; its parameters are fp32 whatever the file's dtype.

        Raises:
            CheckpointError: The file is missing or corrupt, or does not fit the model; nothing is loaded then.
            UsageError: The name is in use, or `multiplier` is not a finite number.
        """
        self._check_new(key)
        _check_number("multiplier", multiplier)
        if not isinstance(trainable, bool):
            raise UsageError(must("trainable", "be True or False", repr(trainable)))
        modules = dict(self.named_modules())
        terms = read_lora(Path(path), modules, float(multiplier))
        if trainable:
            terms = {name: _trainable(term, modules[name].weight.device) for name, term in terms.items()}
        self._loras[key] = terms

    def add_lora(
        self,
        key: str,
        rank: int = 128,
        targets: Sequence[str] = LORA_TARGETS,
        *,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make a LoRA that can be trained; like a loaded one it has no effect before `enable_loras`.

        It begins as nothing (`lora_up` is zero), so the model gives what it gives without it. Its parameters are fp32,
        on the device of the layers; they are rounded to the model's dtype where they are used. `torch.export` with
        `strict=True` does not take them: save the LoRA and load it for that.

        Args:
            key: The name, not yet in use.
            rank: Of each term; a fused layer has one term of this rank for each of its parts.
            targets: Globs over the paths of linear layers.
            alpha: The terms are multiplied by alpha / rank; by default alpha is half the rank, as in the released ones.
            generator: On the CPU, of the initial `lora_down`; by default torch's own.

        Raises:
            UsageError: The name is in use, an argument is out of range, or a glob names no linear layer.

        Source:
            Initialisation: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); ranks and fused
            layers: the public LongCat-Video code.
        """
        self._check_new(key)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(must("rank", "be an integer >= 1", repr(rank)))
        if alpha is not None:
            _check_number("alpha", alpha)
        patterns = [targets] if isinstance(targets, str) else list(targets)
        layers = {name: m for name, m in self.named_modules() if isinstance(m, LoRALinear)}
        for pattern in patterns:
            if not isinstance(pattern, str) or not fnmatch.filter(layers, pattern):
                shown = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
                todo = f"Linear layers are named {shown}; for example {LORA_TARGETS[0]!r}."
                raise UsageError(must("targets", "be globs that name linear layers of the model", repr(pattern), todo))
        chosen = {name: m for name, m in layers.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
        if not chosen:
            raise UsageError(must("targets", "name at least one linear layer", targets))
        scale = torch.tensor((rank / 2 if alpha is None else alpha) / rank)
        self._loras[key] = {name: _new_term(name, m, rank, scale, generator) for name, m in chosen.items()}

    def lora_parameters(self, key: str) -> list[nn.Parameter]:
        """The parameters of a LoRA that is trained, for an optimizer.

        Raises:
            UsageError: No such name, or it was loaded without `trainable=True`.
        """
        self._check_loaded([key])
        terms = self._loras[key].values()
        if not all(term.trainable for term in terms):
            todo = "Make one with add_lora, or pass trainable=True to load_lora."
            raise UsageError(must("key", "name a LoRA that can be trained", repr(key), todo))
        return [x for term in terms for x in (term.down, *term.ups) if isinstance(x, nn.Parameter)]

    def lora_state_dict(self, key: str) -> dict[str, Tensor]:
        """A LoRA's tensors under their names in a file, as they are and where they are.

        Raises:
            UsageError: No such name.
        """
        self._check_loaded([key])
        return lora_tensors(self._loras[key])

    def save_lora(self, path: str | PathLike[str], key: str) -> None:
        """Write a LoRA in LongCat's layout: `load_lora` of the file gives the same outputs, to the bit.

        The multiplier that it was loaded with becomes a part of the file's `alpha_scale`.

        Args:
            path: A safetensors file, complete or not written at all; missing folders are made.
            key: The name.

        Raises:
            UsageError: No such name, or nothing can be written there.
            OSError: Writing failed; what was there stays.
        """
        tensors = {name: x.cpu().contiguous() for name, x in self.lora_state_dict(key).items()}
        write_bytes(check_writable(path, "path"), save(tensors, metadata={"format": "pt"}))

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
                terms[name] = (*terms.get(name, ()), _placed(stored, modules[name].weight))
        # Everything that can fail is done: from here on the switch is complete.
        for name, module in modules.items():
            if isinstance(module, LoRALinear):
                module.lora_terms = terms.get(name, ())
        self._active_loras = tuple(keys)

    def disable_all_loras(self) -> None:
        """Apply no LoRA; the loaded ones can be enabled again."""
        self.enable_loras([])

    @contextmanager
    def without_trainable_loras(self) -> Iterator[None]:
        """Leave the LoRAs that can be trained out inside a `with` block: what they start from, their teacher say."""
        layers = [m for m in self.modules() if isinstance(m, LoRALinear)]
        before = [layer.lora_terms for layer in layers]
        try:
            for layer in layers:
                layer.lora_terms = tuple(term for term in layer.lora_terms if not term.trainable)
            yield
        finally:
            for layer, terms in zip(layers, before, strict=True):
                layer.lora_terms = terms

    def _check_new(self, key: object) -> None:
        if not isinstance(key, str) or not key:
            raise UsageError(must("key", "be a name", repr(key)))
        if key in self._loras:
            raise UsageError(must("key", "be a new name", repr(key), "Choose another, or call unload_lora first."))

    def _check_loaded(self, keys: list[str]) -> None:
        unknown = [key for key in keys if key not in self._loras]
        if unknown:
            want = f"be among the loaded LoRAs {sorted(self._loras)}"
            raise UsageError(must("keys", want, unknown, "Call load_lora first."))


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(must(name, "be a finite number", repr(value)))


def _new_term(name: str, layer: LoRALinear, rank: int, scale: Tensor, generator: torch.Generator | None) -> LoRATerm:
    parts = _PARTS.get(name.rpartition(".")[2], 1)
    down = torch.empty(parts * rank, layer.in_features)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    ups = tuple(torch.zeros(layer.out_features // parts, rank) for _ in range(parts))
    # A scale of its own: safetensors refuses tensors that share memory.
    return _trainable(LoRATerm(down, ups, scale.clone()), layer.weight.device)


def _trainable(term: LoRATerm, device: torch.device) -> LoRATerm:
    """The term with parameters of its own."""
    down, *ups = (nn.Parameter(x.to(device, torch.float32, copy=True)) for x in (term.down, *term.ups))
    return LoRATerm(down, tuple(ups), None if term.scale is None else term.scale.to(device))


def _placed(stored: LoRATerm, weight: Tensor) -> LoRATerm:
    """A term as its layer holds it: itself where it is trained, else a copy that costs nothing more per call."""
    if not stored.trainable:
        return in_dtype_of(weight, stored)
    stored.move(weight.device)
    return stored
