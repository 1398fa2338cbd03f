"""Training of a vocoder: losses, updates, validation, checkpoints, resuming.

The generator and the duration predictor share an optimizer; the discriminators have their own. Batches are a function
of the seed and the update, and nothing else is random, so that a resumed run ends with the weights of one that was
never stopped (on the same machine and thread count).

Accelerate says on which device this process computes and how many there are. Each has its part of every batch, and
gradients are averaged: by hand, since a generator is called by its parts, which DDP does not wrap.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from sparq.errors import SparqError
from sparq.files import fingerprint, write_text
from sparq.progress import progress
from sparq.vocoder.analysis import Recording
from sparq.vocoder.checkpoint import TrainProgress, load_state, save_state
from sparq.vocoder.content import ContentDistance
from sparq.vocoder.crops import Batch, Crops
from sparq.vocoder.discriminators import HifiGanDiscriminators, Judgment, SpectrogramDiscriminators
from sparq.vocoder.duration import duration_loss
from sparq.vocoder.excitation import frame_starts
from sparq.vocoder.light import LightGenerator
from sparq.vocoder.losses import (
    adversarial_loss,
    discriminator_loss,
    distances,
    matching_loss,
    pitch_loss,
)
from sparq.vocoder.settings import TrainSettings
from sparq.vocoder.voice import VocoderNetworks


class Trainer:
    """One training, from its checkpoint or from the start.

    Args:
        networks: generator and duration predictor, trained in place.
        recordings: the training split.
        settings: how.
        folder: holds `checkpoint/` and `train.jsonl`.
        identity: facts that a checkpoint must agree with, beside the settings.
        validate: called with the averaged networks; what it returns is logged.
        on_checkpoint: called after each checkpoint with the averaged networks, updates and seconds so far. Of several
            processes, only the first validates and writes.

    Raises:
        SparqError: `folder` has another training, or processes cannot share a batch evenly.
    """

    def __init__(
        self,
        networks: VocoderNetworks,
        recordings: Sequence[Recording],
        settings: TrainSettings,
        *,
        folder: Path,
        identity: Any,
        validate: Callable[[VocoderNetworks], dict[str, float]] | None = None,
        on_checkpoint: Callable[[VocoderNetworks, int, float], None] | None = None,
    ) -> None:
        self.settings, self.folder = settings, folder
        # Its mixed precision, which may be another training's in this process, is not used: see `_autocast`.
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.count: int = self.accelerator.num_processes
        if settings.batch % self.count:
            right = settings.batch + -settings.batch % self.count
            raise SparqError(
                f"train.batch is {settings.batch}, which {self.count} processes cannot share: set it to a multiple of"
                f" {self.count}, {right} say"
            )
        self.networks = networks.to(self.device)
        self.crops = Crops(
            recordings,
            frames=settings.frames,
            batch=settings.batch,
            seed=settings.seed,
            memory_hours=settings.memory_hours,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.critics: nn.Module = (
                SpectrogramDiscriminators()
                if isinstance(networks.generator, LightGenerator)
                else HifiGanDiscriminators()
            ).to(self.device)
        self.content = ContentDistance(settings.content_model).to(self.device) if settings.content_weight else None
        self.averaged = networks.copy()
        betas = (settings.beta1, settings.beta2)
        self.adam = torch.optim.AdamW(networks.parameters(), betas=betas, fused=True)
        self.critics_adam = torch.optim.AdamW(self.critics.parameters(), betas=betas, fused=True)
        self._validate, self._on_checkpoint = validate, on_checkpoint
        # How often it is saved or looked at, and what is kept in memory, does not change what is learned.
        idle = {"checkpoint_updates": 0, "validate_updates": 0, "memory_hours": 0}
        deciding = dataclasses.asdict(settings) | idle
        if not settings.content_weight:
            # Newer than the first trainings, which are to be gone on with.
            del deciding["content_weight"], deciding["content_model"]
        self.progress = TrainProgress(key=fingerprint(deciding, identity))
        self._restore()

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process validates and writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def log_file(self) -> Path:
        """A JSON line for each update."""
        return self.folder / "train.jsonl"

    def train(self, label: str, *, seconds: float | None = None) -> TrainProgress:
        """Do what is left of the updates, or as much as fits into some seconds; return how far it came."""
        began = time.monotonic()
        done_before = self.progress.seconds
        updates = self.settings.updates
        with progress(label, total=updates, unit="update", initial=self.progress.updates) as bar:
            for batch in self.crops.ahead(self.progress.updates, updates):
                losses = self._update(batch.share(self.accelerator.process_index, self.count).to(self.device))
                spent = time.monotonic() - began
                done = self.progress.updates + 1
                self.progress = dataclasses.replace(self.progress, updates=done, seconds=done_before + spent)
                bar.update()
                last = done == updates or (seconds is not None and self._any(spent > seconds))
                if done % self.settings.validate_updates == 0 or last:
                    losses |= self._validation()
                self._log(losses)
                if done % self.settings.checkpoint_updates == 0 or last:
                    self.save()
                if last:
                    break
        return self.progress

    def _update(self, batch: Batch) -> dict[str, float]:
        settings = self.settings
        adversarial = self.progress.updates >= settings.adversarial_from
        rate = settings.rate(self.progress.updates)
        losses: dict[str, Tensor] = {}
        with self._autocast():
            made, pitch = self._generate(batch)
        real = batch.samples
        if adversarial:
            losses["critics"] = self._update_critics(real, made.detach(), rate)
        total = made.new_zeros(())
        compared = distances(made, real)
        weighted = [
            ("mel", settings.mel_weight, compared.mel),
            ("spectral", settings.spectral_weight, compared.spectral),
            ("duration", settings.duration_weight, self._duration(batch)),
        ]
        if pitch is not None:
            weighted.append(("pitch", settings.pitch_weight, pitch))
        if self.content is not None:
            with self._autocast():
                weighted.append(("content", settings.content_weight, self.content(made, real)))
        for name, weight, loss in weighted:
            losses[name] = loss
            total = total + weight * loss
        if adversarial:
            with torch.no_grad():
                judged_real: Judgment = self.critics(real)
            judged: Judgment = self.critics(made)
            losses["adversarial"] = adversarial_loss(judged.scores)
            losses["matching"] = matching_loss(judged_real.features, judged.features)
            total = total + settings.adversarial_weight * losses["adversarial"]
            total = total + settings.matching_weight * losses["matching"]
        self.adam.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self._share_gradients(self.networks)
        losses["gradient"] = nn.utils.clip_grad_norm_(self.networks.parameters(), settings.clip_norm)
        _step(self.adam, rate)
        self._average()
        means = self.accelerator.reduce(torch.stack([v.detach().double() for v in losses.values()]), reduction="mean")
        values = dict(zip(losses, means.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise SparqError(f"update {self.progress.updates + 1} gave {values}: lower the learning rate")
        return values

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    def _generate(self, batch: Batch) -> tuple[Float[Tensor, "batch samples"], Float[Tensor, ""] | None]:
        generator = self.networks.generator
        if not isinstance(generator, LightGenerator):
            return generator(batch.units, batch.speaker), None
        controls = generator.controls(batch.units, batch.speaker)
        pitch = pitch_loss(controls.hertz, batch.hertz, batch.voiced)
        # Rendered at the true pitch: magnitudes at another one could not be compared bin by bin.
        starts = frame_starts(batch.hertz, batch.start)
        made = generator.render(controls._replace(hertz=batch.hertz), starts=starts, first=batch.first)
        return made, pitch

    def _duration(self, batch: Batch) -> Float[Tensor, ""]:
        log_rate = self.networks.duration(batch.runs, batch.runs_speaker, batch.real)
        return duration_loss(log_rate, batch.durations, batch.real)

    def _update_critics(self, real: Tensor, made: Tensor, rate: float) -> Float[Tensor, ""]:
        loss = discriminator_loss(self.critics(real).scores, self.critics(made).scores)
        self.critics_adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._share_gradients(self.critics)
        nn.utils.clip_grad_norm_(self.critics.parameters(), self.settings.clip_norm)
        _step(self.critics_adam, rate)
        return loss.detach()

    def _share_gradients(self, module: nn.Module) -> None:
        """Replace gradients by their means over all processes."""
        if self.count == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        means = self.accelerator.reduce(joined, reduction="mean").split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _any(self, fact: bool) -> bool:
        """Tell whether something is so in any process: all have to stop at the same update."""
        count: Tensor = self.accelerator.reduce(torch.tensor(float(fact), device=self.device), reduction="sum")
        return bool(count > 0)

    @torch.no_grad()
    def _average(self) -> None:
        # Shorter at first, so that the start does not linger.
        updates = self.progress.updates
        decay = min(self.settings.ema, (1 + updates) / (10 + updates))
        ours: list[Tensor] = list(self.averaged.parameters())
        theirs: list[Tensor] = list(self.networks.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def _validation(self) -> dict[str, float]:
        return {} if self._validate is None or not self.is_main else self._validate(self.averaged)

    def _log(self, losses: dict[str, float]) -> None:
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"update": self.progress.updates, "seconds": round(self.progress.seconds, 1)}
        record |= {name: float(f"{value:.5g}") for name, value in losses.items()}
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def save(self) -> None:
        """Write the checkpoint."""
        if self.is_main:
            save_state(self.folder / "checkpoint", self.progress, self._modules(), self._optimizers())
            if self._on_checkpoint is not None:
                self._on_checkpoint(self.averaged, self.progress.updates, self.progress.seconds)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        found = load_state(self.folder / "checkpoint", self.progress.key, self._modules(), self._optimizers())
        self.progress = found or self.progress
        if self.is_main:
            self._drop_lines_after_checkpoint()

    def _modules(self) -> dict[str, nn.Module]:
        return {"network": self.networks, "average": self.averaged, "critics": self.critics}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": self.adam, "critics_adam": self.critics_adam}

    def _drop_lines_after_checkpoint(self) -> None:
        # What was done after the last checkpoint is done, and logged, again.
        if self.log_file.exists():
            lines = self.log_file.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self.log_file, "".join(lines[: self.progress.updates]))


def _step(adam: torch.optim.Optimizer, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
