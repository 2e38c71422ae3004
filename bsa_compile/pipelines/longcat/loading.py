"""Loading LongCat-Video's folder with the libraries that its parts were made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsa_compile.errors import CheckpointError, MissingExtraError, must
from bsa_compile.models.longcat import LongCatVideoTransformer3DModel
from bsa_compile.models.longcat.config import read_json_object
from bsa_compile.pipelines.longcat.defaults import GenerationDefaults

EXTRA = "longcat"
DISTILL_LORA, REFINE_LORA = "cfg_step_lora", "refinement_lora"
_MODULES = ("diffusers", "transformers", "av", "ftfy")
_TOKENIZERS = ("tokenizer.json", "spiece.model")
_WEIGHTS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "dit": "diffusion_pytorch_model",
}
_SAMPLES = 16  # values of each tensor that tell one set of weights from another


@dataclass
class Components:
    """The parts of a LongCat-Video folder.

    Attributes:
        tokenizer: of transformers.
        text_encoder: `UMT5EncoderModel`.
        vae: `AutoencoderKLWan` of diffusers.
        scheduler: `FlowMatchEulerDiscreteScheduler` of diffusers.
        dit: our transformer.
        loras: name -> file, for the LoRAs that are there.
        defaults: of a call's arguments.
    """

    tokenizer: Any
    text_encoder: Any
    vae: Any
    scheduler: Any
    dit: LongCatVideoTransformer3DModel
    loras: Mapping[str, Path]
    defaults: GenerationDefaults


def check_extra() -> None:
    """Raise one error that names every library that is missing.

    Raises:
        MissingExtraError: one is.
    """
    import importlib.util

    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        todo = f"Run: pip install 'bsa-compile[{EXTRA}]'."
        raise MissingExtraError(must(", ".join(missing), "be installed for this feature", "no such module", todo))


def lora_path(folder: Path, name: str) -> Path:
    """Where a LoRA of the folder lies."""
    return folder / "lora" / f"{name}.safetensors"


def missing_pieces(folder: Path, loras: Iterable[str] = ()) -> list[str]:
    """Every file that a generation needs and that is not there, as paths relative to the folder."""
    missing = []
    if not any((folder / "tokenizer" / name).is_file() for name in _TOKENIZERS):
        missing.append(f"tokenizer/{' or '.join(_TOKENIZERS)}")
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        missing.append("scheduler/scheduler_config.json")
    for part, stem in _WEIGHTS.items():
        if not (folder / part / "config.json").is_file():
            missing.append(f"{part}/config.json")
        missing += [f"{part}/{name}" for name in _missing_weights(folder / part, stem)]
    missing += [str(path.relative_to(folder)) for name in loras if not (path := lora_path(folder, name)).is_file()]
    return missing


def _missing_weights(folder: Path, stem: str) -> list[str]:
    """Names of weight files that are not there: the single one, or shards that the index names."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        names = {f"{stem}.safetensors", "model.safetensors"}
        return [] if any((folder / name).is_file() for name in names) else [f"{stem}.safetensors"]
    try:
        shards = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{indices[0].name} (unreadable)"]
    return sorted(name for name in shards if not (folder / name).is_file())


def check_folder(folder: str | Path, loras: Iterable[str] = ()) -> Path:
    """See that everything is there before anything is loaded.

    Raises:
        MissingExtraError: a library is not installed; all are named in one error.
        CheckpointError: files are missing; all are named in one error.
    """
    check_extra()
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(must("model", "be LongCat-Video's folder", f"no folder {str(folder)!r}"))
    if missing := missing_pieces(folder, loras):
        todo = "Give LongCat-Video's whole folder"
        todo += "; the small model has no LoRAs to refine and distill with." if loras else "."
        raise CheckpointError(must(f"{folder}", "hold all parts of the model", f"none of {', '.join(missing)}", todo))
    return folder


def load_components(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    loras: Iterable[str] = (),
    load_dit: Callable[..., LongCatVideoTransformer3DModel] = LongCatVideoTransformer3DModel.from_pretrained,
) -> Components:
    """Load everything; the transformer goes to the device, the text encoder and the VAE stay in host memory.

    Args:
        folder: LongCat-Video's: `tokenizer`, `text_encoder`, `vae`, `scheduler`, `dit`, `lora`.
        dtype: of all weights.
        device: of the transformer.
        loras: names of LoRAs that must be there.
        load_dit: what loads the transformer.

    Raises:
        MissingExtraError: diffusers, transformers, PyAV or ftfy is not installed.
        CheckpointError: pieces are missing (all named in one error), corrupt, or do not fit each other.
    """
    folder = check_folder(folder, loras)
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, UMT5EncoderModel

    def load(part: str, make: Callable[..., Any], **options: Any) -> Any:
        try:
            return make(folder / part, local_files_only=True, **options)
        except MissingExtraError:
            raise
        except Exception as exc:  # these libraries raise whatever their own libraries raise
            first = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
            raise CheckpointError(must(f"{folder / part}", "be loadable", f"an error: {first}")) from exc

    scheduler = load("scheduler", FlowMatchEulerDiscreteScheduler.from_pretrained)
    tokenizer = load("tokenizer", AutoTokenizer.from_pretrained)
    vae = load(
        "vae",
        _vae_class(folder).from_pretrained,
        torch_dtype=dtype,
        use_safetensors=True,
        low_cpu_mem_usage=False,  # diffusers would ask for accelerate, and the VAE is small
    )
    dit = load_dit(folder / "dit", torch_dtype=dtype, device=device)
    with _quiet():
        text_encoder = load("text_encoder", UMT5EncoderModel.from_pretrained, dtype=dtype, use_safetensors=True)
    found = {name: lora_path(folder, name) for name in (DISTILL_LORA, REFINE_LORA)}
    parts = Components(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval().requires_grad_(False),
        vae=vae.eval().requires_grad_(False),
        scheduler=scheduler,
        dit=dit.requires_grad_(False),
        loras={name: path for name, path in found.items() if path.is_file()},
        defaults=GenerationDefaults.from_folder(folder),
    )
    _check_fit(folder, parts)
    return parts


def _vae_class(folder: Path) -> Any:
    """Wan's autoencoder, or the small one of the model that the package ships."""
    if read_json_object(folder / "vae" / "config.json").get("_class_name") == "SmallAutoencoder":
        from bsa_compile.pipelines.small.autoencoder import SmallAutoencoder

        return SmallAutoencoder
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers, whose switch is global."""
    from transformers.utils import logging as settings

    before = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            settings.enable_progress_bar()


def vae_factors(folder: str | Path) -> tuple[int, int]:
    """Pixels and frames per latent, from the VAE's `config.json` alone: sizes can be checked before weights are loaded.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    fields = read_json_object(Path(folder) / "vae" / "config.json")
    factors = tuple(fields.get(f"scale_factor_{name}", usual) for name, usual in (("spatial", 8), ("temporal", 4)))
    if not all(isinstance(f, int) and f > 0 for f in factors):
        raise CheckpointError(must(f"{folder}: vae/config.json", "hold positive scale factors", factors))
    return factors[0], factors[1]


def _check_fit(folder: Path, parts: Components) -> None:
    config = parts.dit.config
    problems = []
    if parts.vae.config.z_dim != config.in_channels or config.in_channels != config.out_channels:
        sizes = f"{config.in_channels} to {config.out_channels}"
        problems.append(f"latent channels: vae has {parts.vae.config.z_dim}, dit {sizes}")
    if parts.text_encoder.config.d_model != config.caption_channels:
        widths = f"text_encoder has {parts.text_encoder.config.d_model}, dit {config.caption_channels}"
        problems.append(f"width of the text: {widths}")
    if parts.scheduler.config.stochastic_sampling:
        problems.append("the scheduler draws noise (stochastic_sampling), so that no result could be repeated")
    if problems:
        raise CheckpointError(must(f"the parts of {folder}", "fit each other", "; ".join(problems)))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits that tell one set of weights from another: names, shapes, and a few values of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach()
        whole = getattr(x, "full_tensor", None)  # a weight that ranks share out: gathered, one at a time
        flat = (x if whole is None else whole()).reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].double().cpu().numpy().tobytes()
        digest.update(f"{name}{list(tensors[name].shape)}".encode() + sample)
    return digest.hexdigest()[:16]
