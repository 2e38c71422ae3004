"""Train the small text-to-video model that the package ships (`bsa_compile/data/small_longcat`).

As LongCat-Video was trained: first with dense attention, small videos before large ones, then with block-sparse
attention through this package's own backward. Before that the autoencoder. Clips are drawn while training goes on.

    python examples/train_tiny.py work --minutes 7     # again and again, until it says that training is complete

Each call goes on from where the last one stopped and stops by itself after `--minutes`. The finished model is written
to `work/model`, losses to `work/losses.json`. One H100 takes under 20 minutes in all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bsa_compile
from bsa_compile import BSAPolicy
from bsa_compile.pipelines.small import parts
from bsa_compile.pipelines.small.autoencoder import SmallAutoencoder
from bsa_compile.pipelines.small.captions import Caption, draw_caption, sample_captions
from bsa_compile.pipelines.small.clips import draw_clips

NO_TEXT = 0.1  # share of samples without a caption, for guidance
KL_WEIGHT = 5e-4
EMA = 0.998
WARM_UP = 100
VALIDATE_EVERY = 250
VALIDATION_CLIPS = 16
LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)  # noise levels at which the validation loss is taken
SPARSE = BSAPolicy(sparsity=0.9375)


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one kind of attention and one size.

    Attributes:
        steps: how many.
        batch: clips of a step.
        scale: of both sides of the clips.
        policy: attention; None: the autoencoder is trained.
        rate: learning rate at its start and its end.
        new_clips: clips drawn every step, which replace the oldest of the pool.
        pool: clips to choose from.
    """

    name: str
    steps: int
    batch: int
    scale: float
    policy: BSAPolicy | None
    rate: tuple[float, float]
    new_clips: int = 4
    pool: int = 1536

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return round(parts.HEIGHT * self.scale), round(parts.WIDTH * self.scale)


PHASES = (
    Phase("autoencoder", 2500, 8, 1.0, None, (2e-3, 1e-5)),
    Phase("dense small", 4000, 64, 0.5, BSAPolicy.dense(), (2e-3, 1e-3), new_clips=8, pool=4096),
    Phase("dense", 800, 16, 1.0, BSAPolicy.dense(), (1e-3, 7e-4)),
    Phase("block-sparse", 5000, 16, 1.0, SPARSE, (7e-4, 2e-5)),
)
SMOKE = tuple(
    Phase(p.name, 3, 2, 0.25 if p.scale == 1.0 else 0.125, p.policy, p.rate, new_clips=1, pool=2) for p in PHASES
)


class Trainer:
    """Everything that is trained, and where it stands."""

    def __init__(self, folder: Path, device: torch.device, phases: tuple[Phase, ...], backend: str) -> None:
        torch.manual_seed(0)
        self.folder, self.device, self.phases, self.backend = folder, device, phases, backend
        self.vae = SmallAutoencoder().to(device)
        self.dit, self.text = parts.new_dit().to(device), parts.new_text_encoder().to(device)
        self.average = nn.ModuleList([copy.deepcopy(m) for m in (self.dit, self.text)]).requires_grad_(False)
        self.tokenizer = parts.new_tokenizer()
        self.phase, self.step = 0, 0
        self.losses: list[dict[str, Any]] = []
        self.optimizers = {
            "vae": torch.optim.AdamW(self.vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0),
            "dit": torch.optim.AdamW(
                [*self.dit.parameters(), *self.text.parameters()], betas=(0.9, 0.99), weight_decay=0.01
            ),
        }
        self.fast: Any = None
        if self.state_path.exists():
            self._load()

    @property
    def state_path(self) -> Path:
        return self.folder / "state.safetensors"

    # -- state on disk ------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        modules = {"vae": self.vae, "dit": self.dit, "text": self.text, "average": self.average}
        found = {f"{name}/{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                for key, value in optimizer.state.get(p, {}).items():
                    found[f"optimizer/{name}/{i}/{key}"] = value
        return found

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        where = {"phase": str(self.phase), "step": str(self.step), "losses": json.dumps(self.losses)}
        new = self.state_path.with_suffix(".new")
        save_file({k: v.detach().contiguous().clone() for k, v in self._tensors().items()}, new, metadata=where)
        new.replace(self.state_path)
        (self.folder / "losses.json").write_text(json.dumps(self.losses) + "\n")

    def _load(self) -> None:
        with safe_open(self.state_path, framework="pt", device=str(self.device)) as file:
            where, names = file.metadata(), list(file.keys())
            stored = {name: file.get_tensor(name) for name in names}
        self.phase, self.step, self.losses = int(where["phase"]), int(where["step"]), json.loads(where["losses"])
        for name, module in (("vae", self.vae), ("dit", self.dit), ("text", self.text), ("average", self.average)):
            prefix = f"{name}/"
            module.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
        for name, optimizer in self.optimizers.items():
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer/{name}/{i}/"
                state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
                if state:
                    state["step"] = state["step"].cpu()
                    optimizer.state[p] = state

    # -- data ---------------------------------------------------------------------------------------------------------

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of clips."""
        with torch.no_grad(), self.autocast():
            latents = self.vae.encode(video).latent_dist.sample().float()
        mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in self._statistics())
        return (latents - mean) / std

    def _statistics(self) -> tuple[list[float], list[float]]:
        return self.vae.config.latents_mean, self.vae.config.latents_std

    def measure_latents(self) -> None:
        """Mean and standard deviation of each channel, into the autoencoder's configuration."""
        self.vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
        rng = random.Random(99)
        captions = [draw_caption(rng) for _ in range(48)]
        height, width = self.phases[-1].size
        with torch.no_grad():
            found = torch.cat(
                [
                    self.encode(draw_clips([c], parts.FRAMES, height, width, seed=i, device=self.device))
                    for i, c in enumerate(captions)
                ]
            )
        mean, std = found.mean((0, 2, 3, 4)), found.std((0, 2, 3, 4))
        self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    def embed(self, encoder: nn.Module, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings `[B, 1, L, C]` and their mask."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=parts.TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        return encoder(ids, mask).last_hidden_state[:, None], mask

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    # -- training -----------------------------------------------------------------------------------------------------

    def run(self, minutes: float) -> bool:
        """Train until the time is up; whether training is complete."""
        until = time.monotonic() + 60 * minutes
        while self.phase < len(self.phases):
            phase = self.phases[self.phase]
            steps = self._autoencoder_steps(phase) if phase.policy is None else self._dit_steps(phase)
            began, shown = time.monotonic(), self.step
            for losses in steps:
                self.step += 1
                if self.step % 25 == 0 or self.step == phase.steps:
                    seconds = (time.monotonic() - began) / max(1, self.step - shown)
                    began, shown = time.monotonic(), self.step
                    entry = {"phase": phase.name, "step": self.step, **{k: float(v) for k, v in losses.items()}}
                    self.losses.append(entry)
                    if self.step % 100 == 0 or len(entry) > 3 or self.step == phase.steps:
                        print(json.dumps({**entry, "s/step": round(seconds, 4)}), flush=True)
                if self.step >= phase.steps:
                    break
                if time.monotonic() > until:
                    self.save()
                    return False
            if phase.policy is None:
                self.measure_latents()
            self.phase, self.step = self.phase + 1, 0
            self.save()
        return True

    def _rate(self, phase: Phase) -> float:
        """Cosine from the phase's first to its last rate, after a warm-up."""
        high, low = phase.rate
        share = self.step / phase.steps
        return min(1.0, (self.step + 1) / WARM_UP) * (low + (high - low) * 0.5 * (1 + math.cos(math.pi * share)))

    def _update(self, name: str, phase: Phase, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        optimizer = self.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = self._rate(phase)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def _autoencoder_steps(self, phase: Phase) -> Iterator[dict[str, Tensor]]:
        parameters = list(self.vae.parameters())
        frames = 1 + 4 * 3
        while True:
            rng = random.Random(self.step)
            height, width = (side // (1 + self.step % 2) for side in phase.size)
            captions = [draw_caption(rng) for _ in range(phase.batch)]
            video = draw_clips(captions, parts.FRAMES, height, width, seed=self.step, device=self.device)
            start = rng.randrange(parts.FRAMES - frames + 1)
            video = video[:, :, start : start + frames]
            with self.autocast():
                found = self.vae.encode(video).latent_dist
                out = self.vae.decode(found.sample()).sample.float()
            error = (out - video).abs().mean()
            kl = found.kl().mean() / found.mean[0].numel()
            self._update("vae", phase, error + KL_WEIGHT * kl, parameters)
            psnr = -10 * torch.log10((out.detach() - video).square().mean() / 4)
            yield {"loss": error.detach(), "kl": kl.detach(), "psnr": psnr}

    def _dit_steps(self, phase: Phase) -> Iterator[dict[str, Tensor]]:
        assert phase.policy is not None
        self.vae.requires_grad_(False)
        self._use(phase.policy)
        height, width = phase.size
        pool = ClipPool(self, phase, first=phase.pool + self.step * phase.new_clips)
        parameters = [*self.dit.parameters(), *self.text.parameters()]
        validation = self._validation_set(height, width)
        while True:
            latents, captions = pool.draw(self.step)
            loss = self._loss(latents, captions, seed=self.step)
            self._update("dit", phase, loss, parameters)
            with torch.no_grad():
                kept = min(EMA, (1 + self.step) / (10 + self.step)) if self.phase == 1 else EMA
                torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - kept)
            losses = {"loss": loss.detach()}
            if (self.step + 1) % VALIDATE_EVERY == 0 or self.step + 1 == phase.steps:
                losses |= self._validate(validation, phase)
            yield losses

    def _use(self, policy: BSAPolicy) -> None:
        if self.fast is None:
            self.fast = bsa_compile.optimize(self.dit, policy, backend=self.backend)
        self.fast.set_policy(policy)

    def _loss(self, latents: Tensor, captions: list[str], seed: int) -> Tensor:
        """Flow matching: predict data minus noise, at shifted logit-normal noise levels."""
        generator = torch.Generator(self.device).manual_seed(seed)
        count = len(latents)
        level = torch.randn(count, generator=generator, device=self.device).sigmoid()
        level = parts.SHIFT * level / (1 + (parts.SHIFT - 1) * level)
        noise = torch.randn(latents.shape, generator=generator, device=self.device)
        return self._flow_error(latents, noise, level, captions).mean()

    def _flow_error(self, latents: Tensor, noise: Tensor, level: Tensor, captions: list[str]) -> Tensor:
        """Mean squared error of each sample's predicted flow `[B]`."""
        mix = level.view(-1, 1, 1, 1, 1)
        with self.autocast():
            text, mask = self.embed(self.text, captions)
            predicted = self.fast((1 - mix) * latents + mix * noise, 1000 * level, text, mask)
        return (predicted.float() - (latents - noise)).square().flatten(1).mean(1)

    def _validation_set(self, height: int, width: int) -> tuple[Tensor, Tensor, list[str]]:
        captions = sample_captions(VALIDATION_CLIPS, seed=-1)
        video = draw_clips(captions, parts.FRAMES, height, width, seed=-1, device="cpu")
        latents = torch.cat([self.encode(v[None].to(self.device)) for v in video])
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        return latents, noise, [c.text for c in captions]

    def _validate(self, held_out: tuple[Tensor, Tensor, list[str]], phase: Phase) -> dict[str, Tensor]:
        """Loss on clips that training never saw, with both kinds of attention where the phase has the full size."""
        latents, noise, captions = held_out
        found = {}
        sides = {"dense": BSAPolicy.dense(), "block_sparse": SPARSE}
        for name, policy in sides.items():
            if phase.scale != self.phases[-1].scale and name != "dense":
                continue
            self._use(policy)
            with torch.no_grad():
                errors = []
                for level in LEVELS:
                    for i in range(0, len(latents), 8):
                        piece = slice(i, i + 8)
                        levels = torch.full((len(latents[piece]),), level, device=self.device)
                        errors.append(self._flow_error(latents[piece], noise[piece], levels, captions[piece]))
                found[f"validation_{name}"] = torch.cat(errors).mean()
        assert phase.policy is not None
        self._use(phase.policy)
        return found

    def export(self) -> Path:
        """Write the averaged weights as a model folder."""
        folder = self.folder / "model"
        dit, text = (copy.deepcopy(m) for m in self.average)
        parts.write_folder(folder, dit=dit, text_encoder=text, vae=copy.deepcopy(self.vae))
        return folder


class ClipPool:
    """Latents of clips; some are replaced by newly drawn ones at every step.

    Args:
        trainer: encodes.
        phase: size, and how many.
        first: number of the first clip to draw: every clip of a phase is drawn once, however often training stops.
    """

    def __init__(self, trainer: Trainer, phase: Phase, first: int) -> None:
        self._trainer, self._phase, self._next = trainer, phase, first
        self._latents: list[Tensor] = []
        self._captions: list[str] = []
        while len(self._latents) < phase.pool:
            self._add()

    def _add(self) -> None:
        rng = random.Random(f"{self._phase.name} {self._next}")
        caption: Caption = draw_caption(rng)
        height, width = self._phase.size
        trainer = self._trainer
        video = draw_clips([caption], parts.FRAMES, height, width, seed=rng.getrandbits(40), device=trainer.device)
        latents = trainer.encode(video)[0].to(torch.bfloat16)
        slot = self._next % self._phase.pool
        if len(self._latents) < self._phase.pool:
            self._latents.append(latents)
            self._captions.append(caption.text)
        else:
            self._latents[slot], self._captions[slot] = latents, caption.text
        self._next += 1

    def draw(self, step: int) -> tuple[Tensor, list[str]]:
        """A batch, after new clips have taken the place of old ones."""
        for _ in range(self._phase.new_clips):
            self._add()
        rng = random.Random(f"{self._phase.name} batch {step}")
        chosen = rng.sample(range(len(self._latents)), self._phase.batch)
        captions = ["" if rng.random() < NO_TEXT else self._captions[i] for i in chosen]
        return torch.stack([self._latents[i] for i in chosen]).float(), captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the state of training and the finished model go")
    parser.add_argument("--minutes", type=float, default=7.0, help="stop after so many (default: 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few steps of tiny clips, to see that all of it runs")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(options.folder, torch.device(options.device), SMOKE if options.smoke else PHASES, options.backend)
    complete = trainer.run(options.minutes)
    folder = trainer.export()
    print("training is complete" if complete else "not complete: call again", f"- wrote {folder}")


if __name__ == "__main__":
    main()
