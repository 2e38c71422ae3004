"""The transformer as the pipeline runs it: one place that calls it, and the run-time switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bsa_compile.adapters import Request, request_of
from bsa_compile.api import check_policy, optimize
from bsa_compile.backend import log_enabled
from bsa_compile.errors import CheckpointError, must
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.models.longcat.attention import KV
from bsa_compile.pipelines.longcat.config import LongCatPipelineConfig
from bsa_compile.pipelines.longcat.loading import DISTILL_LORA, REFINE_LORA
from bsa_compile.pipelines.longcat.prompts import TextEmbeds
from bsa_compile.policy import BSAPolicy

Cache = dict[int, KV]
R = TypeVar("R")


class PipelineTransformer:
    """The optimized DiT; what is not defined here is looked up on it (`report`, `config`, `load_lora`, ...).

    Attributes:
        model: what `bsa_compile.optimize` gave.
        switched: what `enable_bsa()` or `disable_bsa()` asked for; None when nobody did.
        checkpoint: what the checkpoint's `config.json` asks for.
        forward: what calls the model.
    """

    def __init__(
        self,
        dit: LongCatVideoTransformer3DModel,
        config: LongCatPipelineConfig,
        loras: Mapping[str, Path],
        mesh: Any = None,
    ) -> None:
        asked = request_of(dit)
        self.checkpoint = Request(None, asked.configured, asked.policy)
        # A model whose config.json says true is built switched on: that is no run-time call.
        self.switched = None if asked.switched and asked.configured else asked.switched
        self.model = optimize(
            dit,
            BSAPolicy.dense(),
            backend=config.compile_backend,
            mode=config.compile_mode,
            options=config.compile_options,
            dynamic=config.dynamic,
            mesh=mesh,
            mesh_timeout=config.mesh_timeout,
        )
        self.forward: Callable[..., Any] = self.model
        self._overwritten = self.model._bsa_runtime.uses_cudagraphs
        self._cache_on_cpu = config.cache_on_cpu
        self._lora_files = dict(loras)
        self._loaded: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet: copying and unpickling look names up before __init__ ran
            raise AttributeError(name)
        return getattr(self.model, name)

    # -- the run-time switch ------------------------------------------------------------------------------------------

    def enable_bsa(self) -> None:
        """Run every stage block-sparse, whatever the configurations say; a stage under way from its next step on."""
        self.switched = True
        self.model.enable_bsa()

    def disable_bsa(self) -> None:
        """Run every stage dense, until `enable_bsa()` or `reset_bsa()`."""
        self.switched = False
        self.model.disable_bsa()

    def reset_bsa(self) -> None:
        """Forget both calls: policy argument and configurations decide again."""
        self.switched = None

    def use(self, policy: BSAPolicy, where: str) -> None:
        """Run under a stage's policy, which has taken the switch into account, and log it.

        Args:
            policy: the stage's.
            where: the stage, and who asked for its policy.
        """
        check_policy(policy)
        runtime = self.model._bsa_runtime
        runtime.off, runtime.policy = False, policy
        self.model._tell(where, quiet=True)
        log_enabled(policy, where)

    # -- LoRA ---------------------------------------------------------------------------------------------------------

    def check_loras(self, names: Iterable[str]) -> None:
        """Refuse LoRAs that the model's folder lacks.

        Raises:
            CheckpointError: names all of them.
        """
        missing = [f"lora/{name}.safetensors" for name in names if name not in self._lora_files]
        if missing:
            raise CheckpointError(must("the model's folder", "hold the LoRAs of this job", f"no {', '.join(missing)}"))

    @contextmanager
    def loras(self, name: str | None) -> Iterator[None]:
        """Apply one of the folder's LoRAs, beside those that the user has enabled, inside the block."""
        before = self.model.active_loras
        kept = [key for key in before if key not in (DISTILL_LORA, REFINE_LORA)]
        if name is not None and name not in self._loaded:
            self.model.load_lora(self._lora_files[name], name)
            self._loaded.add(name)
        wanted = tuple([*kept, name] if name else kept)
        if wanted != before:
            self.model.enable_loras(wanted)
        try:
            yield
        finally:
            if self.model.active_loras != before:
                self.model.enable_loras(before)

    # -- calls --------------------------------------------------------------------------------------------------------

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextEmbeds,
        *,
        cond: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Predict the flow of the noisy latents.

        Args:
            latents: `Float32[Tensor, "1 c t h w"]`.
            timestep: 0..1000, a scalar.
            text: embeddings of b prompts; the latents are the same for all of them.
            cond: given latents `Float32[Tensor, "1 c t_c h w"]`, if any.
            cache: their KV cache; without one they are computed along, at timestep 0.

        Returns:
            `Float32[Tensor, "b c t h w"]`.
        """
        model, batch = self.model, len(text.values)
        count = 0 if cond is None else cond.shape[2]
        inputs = latents if cond is None or cache is not None else torch.cat([cond, latents], dim=2)
        times = timestep.to(inputs.device, torch.float32).expand(batch)
        if cond is not None:
            times = times[:, None].repeat(1, inputs.shape[2])
            if cache is None:
                times[:, :count] = 0
        with torch.no_grad():
            out = self.forward(
                inputs.to(model.dtype).expand(batch, -1, -1, -1, -1),
                times,
                text.values.to(model.dtype),
                text.mask,
                num_cond_latents=count,
                kv_cache_dict=cache,
            )
        return self._kept(out if cache is not None else out[:, :, count:])

    def encode(self, cond: Tensor, text: TextEmbeds) -> Cache:
        """The KV cache of given latents `Float32[Tensor, "1 c t_c h w"]`; the text is not looked at."""
        with torch.no_grad():
            _, cache = self.forward(
                cond.to(self.model.dtype),
                torch.zeros(1, cond.shape[2], device=cond.device),
                text.values[:1].to(self.model.dtype),
                return_kv=True,
                skip_crs_attn=True,
                offload_kv_cache=self._cache_on_cpu,
            )
        return self._kept(cache)

    def _kept(self, result: R) -> R:
        """The result of a call, in memory that the next call leaves alone."""
        return tree_map_only(Tensor, torch.clone, result) if self._overwritten else result
