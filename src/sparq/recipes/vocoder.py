"""Training of a vocoder on a run's recordings and units."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float32

from sparq.audio.manifest import read_manifest
from sparq.configuration import apply_overrides, from_mapping, load_yaml, to_mapping
from sparq.errors import SparqError
from sparq.recipes.checks import NO_EFFECT, check, check_positive
from sparq.recipes.recipe import resolve_name
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.speech_sections import UnitsConfig
from sparq.recipes.vocoder_page import write_vocoder_page
from sparq.units import KMeans, read_summary, read_units
from sparq.vocoder.analysis import Recording, analyze
from sparq.vocoder.config import GeneratorConfig, HifiGanConfig, LightConfig
from sparq.vocoder.recognizer import Recognizer
from sparq.vocoder.settings import TrainSettings
from sparq.vocoder.speaker import VOICE_ENCODER, SpeakerEncoder, load_speaker_encoder
from sparq.vocoder.storage import (
    UnitSource,
    Vocoder,
    VocoderDescription,
    generator_kind,
    load_vocoder,
    save_vocoder,
)
from sparq.vocoder.training import Trainer
from sparq.vocoder.validation import Validation
from sparq.vocoder.voice import VocoderNetworks, build_networks

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VocoderRecipe:
    """What a vocoder is and how it is trained; `docs/vocoder.md` has the keys.

    Attributes:
        kind: which generator.
        light: shape of the light one.
        hifigan: shape of the unit HiFi-GAN.
        speaker_encoder: what makes the speaker vectors: `pretrained:voice-encoder`, or a folder or hub name; the
            generator's `speaker_dim` must be the length of its vectors.
        train: the training.
        threads: CPU threads; 0 for all cores.
        max_utterances: recordings of the training split that are used, from the first; 0 for all.
        validate_utterances: recordings of the split `valid` that are scored, evenly chosen; 0 for none.
        validate_wer: let Whisper write them down, too.
        default_voice: the speaker of the training split who speaks unless another voice is asked for; the one with
            most speech if empty.
    """

    kind: Literal["light", "hifigan"] = "light"
    light: LightConfig = field(default_factory=LightConfig)
    hifigan: HifiGanConfig = field(default_factory=HifiGanConfig)
    speaker_encoder: str = VOICE_ENCODER
    train: TrainSettings = field(default_factory=TrainSettings)
    threads: int = field(default=0, metadata=NO_EFFECT)
    max_utterances: int = 0
    validate_utterances: int = field(default=32, metadata=NO_EFFECT)
    validate_wer: bool = field(default=False, metadata=NO_EFFECT)
    default_voice: str = field(default="", metadata=NO_EFFECT)

    @property
    def generator(self) -> GeneratorConfig:
        """The shape of the chosen generator."""
        return self.light if self.kind == "light" else self.hifigan

    def validate(self) -> None:
        """Check values that types do not."""
        for name in ("threads", "max_utterances", "validate_utterances"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        train = self.train
        check_positive(
            "train", updates=train.updates, batch=train.batch, frames=train.frames, learning_rate=train.learning_rate,
            final_rate=train.final_rate, clip_norm=train.clip_norm, checkpoint_updates=train.checkpoint_updates,
            validate_updates=train.validate_updates,
        )  # fmt: skip
        for name in ("beta1", "beta2", "ema"):
            value = getattr(train, name)
            check(0 <= value < 1, f"train.{name}", value, "a number from 0 to below 1")


def load_vocoder_recipe(path: Path | None, overrides: Sequence[str] = ()) -> VocoderRecipe:
    """Read and check a vocoder's recipe; without a file every key has its default.

    `speaker_encoder` counts as a path if it starts with `.`, `~` or `/`, and then starts at the recipe's folder.

    Raises:
        SparqError: anything about it is wrong.
    """
    mapping = apply_overrides({} if path is None else load_yaml(path), overrides)
    recipe = from_mapping(VocoderRecipe, mapping)
    folder = Path.cwd() if path is None else path.resolve().parent
    encoder = resolve_name(recipe.speaker_encoder, "recipe.speaker_encoder", folder, os.environ)
    recipe = dataclasses.replace(recipe, speaker_encoder=encoder)
    recipe.validate()
    return recipe


def train_vocoder(
    recipe: VocoderRecipe, *, run: RunFolder, out: Path, start: Path | None = None, seconds: float | None = None
) -> Vocoder:
    """Train a vocoder, or go on with it, and return it.

    `out` gets `vocoder/`, the folder to use, `listen.html`, `train.jsonl`, `checkpoint/` and `analysis/`. The vocoder
    is written at every checkpoint, so that it can be listened to before the end.

    Args:
        recipe: what to train.
        run: a run with its manifest and units.
        out: where to; a training of the same settings is gone on with.
        start: a vocoder of the same shape and units whose weights it starts from.
        seconds: stop after so long, to be gone on with later.

    Raises:
        SparqError: the run has no units, `out` holds another training, or the start does not fit.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    kmeans = KMeans.load(run.kmeans)
    encoder = load_speaker_encoder(recipe.speaker_encoder)
    check(
        recipe.generator.speaker_dim == encoder.dim,
        f"{recipe.kind}.speaker_dim",
        recipe.generator.speaker_dim,
        f"{encoder.dim}, the length of the vectors of {recipe.speaker_encoder}",
    )
    # Of several processes the first one analyzes, and the others read what it wrote.
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        splits = {name: _recordings(run, name, recipe, kmeans, encoder, out) for name in ("train", "valid")}
    if not splits["train"]:
        raise SparqError(f"{run.units} has no training utterances: hold out less, or give more recordings")
    networks = build_networks(recipe.generator, num_units=kmeans.k, seed=recipe.train.seed)
    started = _start_from(networks, start, recipe, kmeans, encoder)
    voices = speaker_means(splits["train"])
    default = recipe.default_voice or next(iter(voices))
    if default not in voices:
        raise SparqError(f"default_voice {default!r} does not speak in the training split: {', '.join(voices)} do")

    def save(averaged: VocoderNetworks, updates: int, spent: float) -> None:
        description = VocoderDescription(
            kind=generator_kind(recipe.generator),
            generator=to_mapping(recipe.generator),
            num_units=kmeans.k,
            units_fingerprint=kmeans.fingerprint,
            units=_unit_source(run),
            speaker_encoder=encoder.fingerprint,
            speaker_encoder_reference=recipe.speaker_encoder,
            voices=tuple(voices),
            default_voice=default,
            training={
                "settings": to_mapping(recipe.train),
                "utterances": len(splits["train"]),
                "hours": round(sum(len(r.units) for r in splits["train"]) / 180_000, 3),
                "updates": updates,
                "seconds": round(spent, 1),
                **started,
            },
        )
        stacked = np.stack(list(voices.values()))
        save_vocoder(out / "vocoder", averaged, stacked, description, kmeans_file=run.kmeans)

    # Without the built-in encoder, so that trainings from before there were others go on.
    vectors = [] if recipe.speaker_encoder == VOICE_ENCODER else [encoder.fingerprint]
    trainer = Trainer(
        networks,
        splits["train"],
        recipe.train,
        folder=out,
        identity=[to_mapping(recipe.generator), recipe.max_utterances, kmeans.fingerprint, started, *vectors],
        validate=_validation(splits["valid"], recipe),
        on_checkpoint=save,
    )
    if trainer.crops.num_short:
        _LOG.info("  %d recordings are shorter than a piece and left out", trainer.crops.num_short)
    trainer.train("vocoder", seconds=seconds)
    if trainer.is_main and splits["valid"]:
        write_vocoder_page(out / "listen.html", trainer.averaged, splits["valid"], trainer.log_file)
    return load_vocoder(out / "vocoder")


def speaker_means(recordings: Sequence[Recording]) -> dict[str, Float32[np.ndarray, "speaker_dim"]]:
    """Return the mean vector of each speaker, of length 1; the one with most speech first."""
    frames: dict[str, int] = {}
    sums: dict[str, np.ndarray] = {}
    for recording in recordings:
        frames[recording.speaker] = frames.get(recording.speaker, 0) + len(recording.units)
        sums[recording.speaker] = sums.get(recording.speaker, 0) + recording.vector
    order = sorted(frames, key=lambda name: (-frames[name], name))
    return {name: (sums[name] / np.linalg.norm(sums[name])).astype(np.float32) for name in order}


def _recordings(
    run: RunFolder, split: str, recipe: VocoderRecipe, kmeans: KMeans, encoder: SpeakerEncoder, out: Path
) -> list[Recording]:
    if split not in read_summary(run.units)["splits"]:
        return []
    rows = list(read_units(run.units, split, expect_fingerprint=kmeans.fingerprint))
    if split == "train":
        rows = rows[: recipe.max_utterances or None]
    elif recipe.validate_utterances:
        rows = rows[:: max(1, len(rows) // recipe.validate_utterances)][: recipe.validate_utterances]
    else:
        rows = []
    if not rows:
        return []
    return analyze(
        read_manifest(run.manifest), rows, encoder, out / "analysis" / f"{split}.safetensors", label=f"analyze {split}"
    )


def _start_from(
    networks: VocoderNetworks, start: Path | None, recipe: VocoderRecipe, kmeans: KMeans, encoder: SpeakerEncoder
) -> dict[str, Any]:
    """Copy the weights of a vocoder; return what that says of the new one."""
    if start is None:
        return {}
    vocoder = load_vocoder(start, units_fingerprint=kmeans.fingerprint)
    if vocoder.description.config != recipe.generator:
        raise SparqError(f"vocoder {start} has another shape than the recipe: start from one of the same settings")
    if vocoder.description.speaker_encoder != encoder.fingerprint:
        raise SparqError(
            f"vocoder {start} knows vectors of speaker encoder {vocoder.description.speaker_encoder}, but"
            f" {recipe.speaker_encoder} is {encoder.fingerprint}: start from one of the same encoder"
        )
    networks.load_state_dict(vocoder.networks.state_dict())
    return {"start": vocoder.description.training}


def _validation(recordings: Sequence[Recording], recipe: VocoderRecipe) -> Validation | None:
    if not recordings:
        return None
    return Validation(recordings, Recognizer() if recipe.validate_wer else None)


def _unit_source(run: RunFolder) -> UnitSource:
    units = from_mapping(UnitsConfig, load_yaml(run.recipe)["units"], where=f"{run.recipe}: units")
    return UnitSource(**{f.name: getattr(units, f.name) for f in dataclasses.fields(UnitSource)})
