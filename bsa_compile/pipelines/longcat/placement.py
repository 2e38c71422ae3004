"""Where the parts of the model are: on the device while they are needed, in host memory else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bsa_compile.pipelines.longcat.config import LongCatPipelineConfig

HOST = torch.device("cpu")


class Placement:
    """Moves modules as the configuration says.

    Args:
        device: where everything computes.
        config: `offload` and `low_memory` count.
        transformer: stays on the device, with `low_memory` only while no other part runs there.
    """

    def __init__(self, device: torch.device, config: LongCatPipelineConfig, transformer: Any) -> None:
        self.device = device
        self._transformer = transformer
        self._alone = config.low_memory
        self._leaves = config.offload or config.low_memory

    @contextmanager
    def visiting(self, module: Any) -> Iterator[None]:
        """Have a text encoder or VAE on the device inside the block."""
        if self._alone:
            self._move(self._transformer, HOST)
        self._move(module, self.device)
        try:
            yield
        finally:
            if self._leaves:
                self._move(module, HOST)

    def denoising(self) -> None:
        """Have the transformer on the device from now on."""
        self._move(self._transformer, self.device)

    def _move(self, module: Any, device: torch.device) -> None:
        module.to(device)
        if device == HOST and self.device.type == "cuda":
            torch.cuda.empty_cache()  # or the next part would find the device full
