"""Linear layers that can carry low-rank terms beside their weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRATerm(NamedTuple):
    """One low-rank term `up(down(x)) * scale`.

    A fused layer (qkv) has one `up` per part: the rows of `down` split evenly over the parts, and the parts' outputs
    are concatenated.

    Args:
        down: `Float[Tensor, "n*r in"]`.
        ups: n tensors `Float[Tensor, "out_i r"]`.
        scale: `Float32[Tensor, ""]`, a tensor because compiled code would guard on a number; None: it is in `ups`.
    """

    down: Tensor
    ups: tuple[Tensor, ...]
    scale: Tensor | None = None

    @property
    def trainable(self) -> bool:
        """Whether its matrices are parameters: then the term is used as it is, and not a copy of it."""
        return isinstance(self.down, nn.Parameter)

    def map(self, fn: Callable[[Tensor], Tensor]) -> LoRATerm:
        """The term with `fn` applied to each of its tensors."""
        return LoRATerm(fn(self.down), tuple(map(fn, self.ups)), None if self.scale is None else fn(self.scale))

    def move(self, device: torch.device) -> None:
        """Move a trainable term, and gradients with it, so that its parameters stay those that an optimizer knows."""
        for x in (self.down, *self.ups, self.scale):
            if x is not None and x.device != device:
                x.data = x.data.to(device)
                if x.grad is not None:
                    x.grad.data = x.grad.data.to(device)


def in_dtype_of(weight: Tensor, term: LoRATerm) -> LoRATerm:
    """A term as the layer of this weight applies it: on its device, in its dtype, the scale multiplied into `ups`.

    The product is rounded once, so that a term gives the same bits while it is trained and when it is read from a file.
    """
    if term.scale is None:
        return term
    scale = term.scale.to(weight.device)
    ups = tuple((up.to(weight.device, torch.float32) * scale).to(weight.dtype) for up in term.ups)
    return LoRATerm(term.down.to(weight.device, weight.dtype), ups)


def low_rank(x: Tensor, down: Tensor, ups: tuple[Tensor, ...]) -> Tensor:
    """`Float[Tensor, "... in"]` -> `Float[Tensor, "... out"]`: each `up` of its share of `down(x)`, concatenated."""
    hidden = F.linear(x, down)  # [..., n * r]
    if len(ups) == 1:
        return F.linear(hidden, ups[0])
    return torch.cat([F.linear(part, up) for part, up in zip(hidden.chunk(len(ups), dim=-1), ups, strict=True)], dim=-1)


class LoRALinear(nn.Linear):
    """`nn.Linear` plus the active LoRA terms.

    The terms are a plain attribute, not the module's parameters or buffers: `state_dict()` and `parameters()` are those
    of `nn.Linear`, while `.to()` moves the terms along. Dynamo guards on the tuple, so compiled code sees every change.
    Trainable terms keep their dtype whatever the weight's: small steps would be lost in bf16.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.lora_terms: tuple[LoRATerm, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """`Float[Tensor, "... in"]` -> `Float[Tensor, "... out"]`."""
        y = F.linear(x, self.weight, self.bias)
        for term in self.lora_terms:
            term = in_dtype_of(self.weight, term)
            y = y + low_rank(x, term.down, term.ups)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> LoRALinear:
        # nn.Module routes .to(), .cuda(), .half() ... through here.
        super()._apply(fn, *args, **kwargs)
        self.lora_terms = tuple(_applied(fn, term) for term in self.lora_terms)
        return self


def _applied(fn: Callable[[Tensor], Tensor], term: LoRATerm) -> LoRATerm:
    if not term.trainable:
        return term.map(fn)
    device = fn(term.down.new_empty(0)).device
    if device.type == "meta":  # no tensor can become a meta one in place
        return term.map(fn)
    term.move(device)
    return term


class Float32Linear(LoRALinear):
    """A linear layer that computes in fp32 whatever its weight's dtype, inside an autocast region too.

    Source:
        The official code runs timestep embedding, modulation and final layer in an fp32 autocast region.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`Float[Tensor, "... in"]` of any float dtype -> `Float[Tensor, "... out"]` fp32."""
        device_type = x.device.type
        # `torch.amp.is_autocast_available` would say which devices know autocast, but Dynamo cannot trace it
        # before torch 2.12.
        if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
            # F.linear is on autocast's list: fp32 operands alone would be cast down again.
            with torch.autocast(device_type, enabled=False):
                return self._forward_fp32(x)
        return self._forward_fp32(x)

    def _forward_fp32(self, x: Tensor) -> Tensor:
        x = x.float()
        y = F.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())
        for term in self.lora_terms:
            term = in_dtype_of(self.weight, term)
            y = y + low_rank(x, term.down.float(), tuple(up.float() for up in term.ups))
        return y
