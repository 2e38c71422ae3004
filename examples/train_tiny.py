"""Train the small text-to-video model that the package ships (`bsa_compile/data/small_longcat`).

As LongCat-Video was trained: first with dense attention, small videos before large ones, then with block-sparse
attention through this package's own backward. Before that the autoencoder. Clips are drawn while training goes on.

    python examples/train_tiny.py work --minutes 7     # again and again, until it says that training is complete

Each call goes on from where the last one stopped and stops by itself after `--minutes`. The finished model is written
to `work/model`, losses to `work/losses.json`. One H100 takes about 20 minutes in all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bsa_compile
from bsa_compile import BSAPolicy
from bsa_compile.pipelines.small import parts
from bsa_compile.pipelines.small.autoencoder import SmallAutoencoder
from bsa_compile.pipelines.small.dataset import ClipBatch, ClipDataset

NO_TEXT = 0.1  # share of samples without a caption, for guidance
KL_WEIGHT = 1e-4
STATISTICS_CLIPS = 48
EMA = 0.998
WARM_UP = 100
VALIDATE_EVERY = 250
VALIDATION_CLIPS = 16
LEVELS = (0.25, 0.5, 0.75, 0.9, 0.97, 0.99)  # noise levels at which the validation loss is taken
WINDOW = 13  # frames of a clip that the autoencoder is shown
DENSE, SPARSE = BSAPolicy.dense(), BSAPolicy(sparsity=0.9375)
PREPARATION = 80  # seconds until a phase's first step: its pool is filled, its graphs are compiled


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one kind of attention and one size.

    Attributes:
        steps: how many.
        batch: clips of a step.
        scale: of both sides of the clips.
        policy: attention; None: the autoencoder is trained.
        rate: learning rate at its start and its end.
        pool: clips to choose from.
        new_clips: clips that take the place of the oldest ones in every step.
        dense_every: every so many steps one with dense attention, so that what it learned is not lost; 0: none.
    """

    name: str
    steps: int
    batch: int
    scale: float
    policy: BSAPolicy | None
    rate: tuple[float, float]
    pool: int = 512
    new_clips: int = 2
    dense_every: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return round(parts.HEIGHT * self.scale), round(parts.WIDTH * self.scale)


PHASES = (
    Phase("autoencoder", 2500, 8, 1.0, None, (2e-3, 1e-5)),
    Phase("dense small", 3000, 64, 0.5, DENSE, (2e-3, 1e-3), pool=2048, new_clips=4),
    # Long enough to unlearn what small videos teach wrongly: a second shape wherever there is room for one.
    Phase("dense", 1500, 16, 1.0, DENSE, (1e-3, 7e-4)),
    Phase("block-sparse", 4600, 16, 1.0, SPARSE, (7e-4, 2e-5), dense_every=4),
)
SMOKE = tuple(replace(p, steps=3, batch=2, scale=p.scale / 4, pool=3, new_clips=1) for p in PHASES)


class Samples(NamedTuple):
    """Encoded clips on the device.

    Attributes:
        latents: `BFloat16[Tensor, "b c t h w"]`, normalised.
        tokens: token ids and mask `Int64[Tensor, "b 2 l"]`.
    """

    latents: Tensor
    tokens: Tensor

    def part(self, which: slice) -> Samples:
        """Some of them."""
        return Samples(*(values[which] for values in self))


class Losses(nn.Module):
    """A function that computes losses, with the modules whose parameters they depend on."""

    def __init__(self, compute: Callable[..., dict[str, Tensor]], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._compute, self._modules_used = compute, nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self._compute(*inputs)


class RecordedStep:
    """Muon's step, replayed as a CUDA graph.

    Its two thousand small kernels, launched one by one, kept the GPU waiting for a quarter of the time. The rate is
    another in every step and cannot be recorded; but what Muon adds to a parameter is proportional to it, so a step at
    a rate of 1 is replayed, and the parameters go only that share of the way.

    Args:
        optimizer: which has made a step: its state exists.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._before = [torch.empty_like(p) for p in self._parameters]
        self._gradients = [torch.empty_like(p) for p in self._parameters]
        self._graph = torch.cuda.CUDAGraph()
        given = [p.grad for p in self._parameters]
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        with torch.cuda.graph(self._graph):
            optimizer.step()
        for p, gradient in zip(self._parameters, given, strict=True):
            p.grad = gradient

    @torch.no_grad()
    def __call__(self, rate: float) -> None:
        torch._foreach_copy_(self._gradients, [p.grad for p in self._parameters])
        torch._foreach_copy_(self._before, self._parameters)
        self._graph.replay()
        torch._foreach_lerp_(self._before, self._parameters, rate)
        torch._foreach_copy_(self._parameters, self._before)


class Trainer:
    """Everything that is trained, and where it stands."""

    def __init__(self, folder: Path, device: torch.device, phases: tuple[Phase, ...], backend: str) -> None:
        torch.manual_seed(0)
        self.folder, self.device, self.phases, self.backend = folder, device, phases, backend
        self.vae = SmallAutoencoder().to(device, memory_format=torch.channels_last_3d)
        self.dit, self.text = parts.new_dit().to(device), parts.new_text_encoder().to(device)
        self.average = nn.ModuleList([copy.deepcopy(m) for m in (self.dit, self.text)]).requires_grad_(False)
        self.tokenizer = parts.new_tokenizer()
        self.phase, self.step = 0, 0
        self.losses: list[dict[str, Any]] = []
        matrices = [p for name, p in self.dit.blocks.named_parameters() if p.ndim == 2 and "adaLN" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in (*self.dit.parameters(), *self.text.parameters()) if id(p) not in chosen]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "vae": torch.optim.AdamW(self.vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0),
            # Where AdamW alone needs about 1.7 times as many steps for the same loss (docs/small-model.md).
            "matrices": torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            "others": torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01),
        }
        self.fast: Any = None
        self._muon: RecordedStep | None = None
        if self.state_path.exists():
            self._load()
        self._take_statistics()

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
        statistics = [self.vae.config.latents_mean, self.vae.config.latents_std]
        where = {
            "phase": str(self.phase),
            "step": str(self.step),
            "losses": json.dumps(self.losses),
            "statistics": json.dumps(statistics),
        }
        new = self.state_path.with_suffix(".new")
        save_file({k: v.detach().contiguous().clone() for k, v in self._tensors().items()}, new, metadata=where)
        new.replace(self.state_path)
        (self.folder / "losses.json").write_text(json.dumps(self.losses) + "\n")

    def _load(self) -> None:
        with safe_open(self.state_path, framework="pt", device=str(self.device)) as file:
            where, names = file.metadata(), list(file.keys())
            stored = {name: file.get_tensor(name) for name in names}
        self.phase, self.step, self.losses = int(where["phase"]), int(where["step"]), json.loads(where["losses"])
        mean, std = json.loads(where["statistics"])
        self.vae.register_to_config(latents_mean=mean, latents_std=std)
        for name, module in (("vae", self.vae), ("dit", self.dit), ("text", self.text), ("average", self.average)):
            prefix = f"{name}/"
            module.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
        for name, optimizer in self.optimizers.items():
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer/{name}/{i}/"
                state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
                if "step" in state:
                    state["step"] = state["step"].cpu()
                if state:
                    optimizer.state[p] = state

    # -- data ---------------------------------------------------------------------------------------------------------

    def clips(self, name: str, size: tuple[int, int], window: int | None = None) -> ClipDataset:
        """The data set of that name, drawn on the device."""
        return ClipDataset(name, parts.FRAMES, *size, window, device=self.device)

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of clips `[B, 3, T, H, W]` in [-1, 1]."""
        with torch.no_grad(), self.autocast():
            latents = self.vae.encode(video).latent_dist.sample().float()
        return (latents - self.latent_mean) / self.latent_std

    def _take_statistics(self) -> None:
        config = self.vae.config
        self.latent_mean, self.latent_std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    def measure_latents(self) -> None:
        """Mean and standard deviation of each channel, into the autoencoder's configuration."""
        self.latent_mean, self.latent_std = torch.zeros(1, device=self.device), torch.ones(1, device=self.device)
        clips = self.clips("statistics", self.phases[-1].size)
        found = torch.cat([self.encode(clips.batch(i, 1).video) for i in range(STATISTICS_CLIPS)])
        mean, std = found.mean((0, 2, 3, 4)), found.std((0, 2, 3, 4))
        self.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self._take_statistics()

    def tokens(self, captions: list[str]) -> Tensor:
        """Token ids and mask of captions `Int64[Tensor, "b 2 l"]`, on the CPU."""
        found = self.tokenizer(
            captions, padding="max_length", max_length=parts.TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        return torch.stack([found.input_ids, found.attention_mask], dim=1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    # -- training -----------------------------------------------------------------------------------------------------

    def run(self, minutes: float) -> bool:
        """Train until the time is up; whether training is complete."""
        first, until = self.phase, time.monotonic() + 60 * minutes
        while self.phase < len(self.phases):
            if self.phase > first and time.monotonic() + PREPARATION > until:
                return False  # the phase's preparation would be lost, and the time exceeded
            phase = self.phases[self.phase]
            steps = self._autoencoder_steps(phase) if phase.policy is None else self._dit_steps(phase)
            began, shown = time.monotonic(), self.step
            for losses in steps:
                self.step += 1
                if self.step % 25 == 0 or self.step == phase.steps:
                    seconds = (time.monotonic() - began) / max(1, self.step - shown)
                    began, shown = time.monotonic(), self.step
                    entry = {
                        "phase": phase.name,
                        "step": self.step,
                        **{k: float(v.detach()) for k, v in losses.items()},
                    }
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

    def recorded(
        self, compute: Callable[..., dict[str, Tensor]], modules: Sequence[nn.Module], inputs: tuple[Tensor, ...]
    ) -> Callable[..., Any]:
        """`compute`, on a GPU replayed as CUDA graphs: launched one by one, its small kernels keep the GPU waiting.

        Args:
            compute: losses from tensors; they are valid until its next call.
            modules: whose parameters the losses depend on.
            inputs: of the first call; those of all others have the same sizes.
        """
        if self.device.type != "cuda":
            return compute
        return torch.cuda.make_graphed_callables(Losses(compute, modules), inputs, allow_unused_input=True)

    def _update(self, names: tuple[str, ...], phase: Phase, loss: Tensor) -> None:
        optimizers = {name: self.optimizers[name] for name in names}
        groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        rate = self._rate(phase)
        for group in groups:
            group["lr"] = rate
        for name, optimizer in optimizers.items():
            if name == "matrices" and self._muon is not None:
                self._muon(rate)
                continue
            optimizer.step()
            if name == "matrices" and self.device.type == "cuda":
                self._muon = RecordedStep(optimizer)

    def _autoencoder_steps(self, phase: Phase) -> Iterator[dict[str, Tensor]]:
        height, width = phase.size
        sizes = [(height, width), (height // 2, width // 2)]  # in turns: both are generated later
        sources = [self.clips(phase.name, size, WINDOW) for size in sizes]
        recorded: dict[int, Callable[..., Any]] = {}
        while True:
            turn = self.step % len(sizes)
            video = sources[turn].batch(self.step * phase.batch, phase.batch).video
            if turn not in recorded:
                recorded[turn] = self.recorded(self._reconstruct, [self.vae], (video,))
            losses = recorded[turn](video)
            self._update(("vae",), phase, losses["loss"])
            yield losses

    def _reconstruct(self, video: Tensor) -> dict[str, Tensor]:
        """How well the autoencoder gives a video back, and how far its latents are from unit noise (nats each)."""
        with self.autocast():
            found = self.vae.encode(video).latent_dist
            out = self.vae.decode(found.sample()).sample.float()
        # Over all axes: `found.kl()` sums over three of the four.
        kl = 0.5 * (found.mean.square() + found.var - 1 - found.logvar).float().mean()
        psnr = -10 * torch.log10((out.detach() - video).square().mean() / 4)
        return {"loss": (out - video).abs().mean() + KL_WEIGHT * kl, "kl": kl.detach(), "psnr": psnr}

    def _dit_steps(self, phase: Phase) -> Iterator[dict[str, Tensor]]:
        assert phase.policy is not None
        self.vae.requires_grad_(False)
        pool = ClipPool(self, phase, self.step)
        parameters = [*self.dit.parameters(), *self.text.parameters()]
        validation = self._samples(self.clips("validation", phase.size).batch(0, VALIDATION_CLIPS))
        recorded: dict[BSAPolicy, Callable[..., Any]] = {}
        while True:
            policy = DENSE if phase.dense_every and self.step % phase.dense_every == 0 else phase.policy
            batch = pool.draw(self.step)
            inputs = (batch.latents, batch.tokens, *self._noise(batch.latents, seed=self.step))
            if policy not in recorded:
                recorded[policy] = self.recorded(partial(self._flow_loss, policy), [self.dit, self.text], inputs)
            losses = recorded[policy](*inputs)
            self._update(("matrices", "others"), phase, losses["loss"])
            with torch.no_grad():
                early = self.phases[self.phase - 1].policy is None  # the average follows faster at the very start
                kept = min(EMA, (1 + self.step) / (10 + self.step)) if early else EMA
                torch._foreach_lerp_(list(self.average.parameters()), parameters, 1 - kept)
            if (self.step + 1) % VALIDATE_EVERY == 0 or self.step + 1 == phase.steps:
                losses = {**losses, **self._validate(validation, phase)}
            yield losses

    def _samples(self, clips: ClipBatch) -> Samples:
        return Samples(
            self.encode(clips.video).to(torch.bfloat16),
            self.tokens(clips.captions).to(self.device, non_blocking=True),
        )

    def _use(self, policy: BSAPolicy) -> None:
        if self.fast is None:
            self.fast = bsa_compile.optimize(self.dit, policy, backend=self.backend)
        self.fast.set_policy(policy)

    def _noise(self, latents: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and a level `[B]`.

        Levels are uniform, then shifted: where a shape is, and that there is one, shows in so many latents that it is
        settled above a level of 0.99, which a logit-normal draw leaves out.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        level = torch.rand(len(latents), generator=generator, device=self.device)
        level = parts.SHIFT * level / (1 + (parts.SHIFT - 1) * level)
        return torch.randn(latents.shape, generator=generator, device=self.device), level

    def _flow_loss(self, policy: BSAPolicy, *inputs: Tensor) -> dict[str, Tensor]:
        self._use(policy)
        return {"loss": self._flow_error(*inputs).mean()}

    def _flow_error(self, latents: Tensor, tokens: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Flow matching: mean squared error `[B]` of what is predicted for latents minus noise.

        All latents count the same. If those of the shape counted more, a place where it may be would be predicted as
        one where it is, and shapes would come out too large.
        """
        latents, mix = latents.float(), level.view(-1, 1, 1, 1, 1)
        ids, mask = tokens.unbind(1)
        with self.autocast():
            text = self.text(ids, mask).last_hidden_state[:, None]
            predicted = self.fast((1 - mix) * latents + mix * noise, 1000 * level, text, mask)
        return (predicted.float() - (latents - noise)).square().flatten(1).mean(1)

    def _validate(self, held_out: Samples, phase: Phase) -> dict[str, Tensor]:
        """Loss on clips that training never saw, with both kinds of attention where the phase has the full size."""
        found = {}
        for name, policy in {"dense": DENSE, "block_sparse": SPARSE}.items():
            if phase.scale != self.phases[-1].scale and name != "dense":
                continue
            self._use(policy)
            errors = []
            for seed, level in enumerate(LEVELS):
                generator = torch.Generator(self.device).manual_seed(seed)
                for start in range(0, len(held_out.latents), 8):
                    batch = held_out.part(slice(start, start + 8))
                    noise = torch.randn(batch.latents.shape, generator=generator, device=self.device)
                    with torch.no_grad():
                        at = torch.full_like(noise[:, 0, 0, 0, 0], level)
                        errors.append(self._flow_error(batch.latents, batch.tokens, noise, at))
            found[f"validation_{name}"] = torch.cat(errors).mean()
        return found

    def export(self) -> Path:
        """Write the averaged weights as a model folder."""
        folder = self.folder / "model"
        dit, text = (copy.deepcopy(m) for m in self.average)
        parts.write_folder(folder, dit=dit, text_encoder=text, vae=copy.deepcopy(self.vae))
        return folder


class ClipPool:
    """Encoded clips; in every step new ones take the place of the oldest.

    Args:
        trainer: encodes.
        phase: size, and how many.
        step: where the phase stands: no clip is drawn twice, except those that are in the pool when training stops.
    """

    def __init__(self, trainer: Trainer, phase: Phase, step: int) -> None:
        self._trainer, self._phase = trainer, phase
        self._clips = trainer.clips(phase.name, phase.size)
        self._next = step * phase.new_clips
        pieces = [self._fresh() for _ in range(math.ceil(phase.pool / phase.new_clips))]
        self._samples = Samples(*(torch.cat(values)[: phase.pool] for values in zip(*pieces, strict=True)))
        self._no_text = trainer.tokens([""]).to(trainer.device)

    def _fresh(self) -> Samples:
        """As many new clips as a step takes in."""
        first, self._next = self._next, self._next + self._phase.new_clips
        return self._trainer._samples(self._clips.batch(first, self._phase.new_clips))

    def draw(self, step: int) -> Samples:
        """A batch, after new clips have come in. The GPU never waits for the CPU here."""
        phase, device = self._phase, self._trainer.device
        start = self._next % phase.pool
        slots = slice(start, start + phase.new_clips)
        for kept, new in zip(self._samples, self._fresh(), strict=True):
            kept[slots] = new[: len(kept[slots])]
        generator = torch.Generator(device).manual_seed(step)
        chosen = torch.randint(phase.pool, (phase.batch,), generator=generator, device=device)
        batch = Samples(*(values[chosen] for values in self._samples))
        silent = torch.rand(phase.batch, 1, 1, generator=generator, device=device) < NO_TEXT
        return batch._replace(tokens=torch.where(silent, self._no_text, batch.tokens))


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
