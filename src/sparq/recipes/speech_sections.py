"""The sections of a recipe about speech: recordings, units and vocabulary.

Attributes say where a default comes from, if it has a source.

"SpARQ" is the outlier-free speech paper of 2025, "VoxtLM" is Maiti et al. 2023, whose pipeline it follows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparq.audio.corpora import FORMATS
from sparq.errors import SparqError, near_matches
from sparq.recipes.checks import (
    ADDED_LATER,
    NO_EFFECT,
    check,
    check_identifier,
    check_not_empty,
    check_positive,
    check_unique,
)

MAX_UNITS = 1000
"""The largest k-means that is supported, VoxtLM's largest; unit u is the character chr(0x4E00 + u)."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus: a manifest, or a folder of a known format, and how it is split.

    Attributes:
        manifest: TSV with a row for each utterance; a relative path starts at the recipe's folder, and
            `${NAME}` is the environment variable of that name.
        folder: in place of a manifest, the folder of a corpus as it is published; paths as above.
        format: what the folder holds, a name in `sparq.audio.corpora.FORMATS`.
        subsets: the parts of the folder to read, such as `train-clean-100`; all that are there if empty.
        corpus: name of the corpus, for counts and results.
        splits: `published` keeps the splits that the corpus comes with, `drawn` holds out by the rules below.
        test_speakers: speakers held out as the test split; if empty they are drawn.
        test_fraction: part of the utterances held out for test, filled with whole speakers if
            `speaker_disjoint`; without effect if `test_speakers` are named.
        valid_fraction: part of the utterances held out for validation, whose speakers are heard in training;
            checkpoints are chosen on it.
        speaker_disjoint: hold out whole speakers, so that the test is about unheard voices.
        test_split: name of the test split; must start with `test`.
    """

    corpus: str
    manifest: Path | None = None
    folder: Path | None = None
    format: str | None = None
    subsets: tuple[str, ...] = ()
    splits: Literal["published", "drawn"] = "published"
    test_speakers: tuple[str, ...] = ()
    test_fraction: float = 0.1
    valid_fraction: float = 0.05
    speaker_disjoint: bool = True
    test_split: str = "test"

    @property
    def path(self) -> Path:
        """The manifest, or the folder."""
        path = self.manifest or self.folder
        assert path is not None, "a valid source has one of them"
        return path

    @property
    def layout(self) -> str:
        """The name of the format in `FORMATS`."""
        return self.format or "manifest"

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check_not_empty(where, corpus=self.corpus)
        if self.manifest is None and self.folder is None:
            raise SparqError(f"{where}.manifest is missing: expected a manifest, or a folder and its format")
        if self.manifest is not None and (self.folder or self.format or self.subsets):
            raise SparqError(f"{where} has a manifest, and a folder, format or subsets: expected one or the other")
        if self.folder is not None:
            formats = [name for name in FORMATS if name != "manifest"]
            if self.format not in formats:
                right = near_matches(self.format, formats) if self.format else f"expected one of {', '.join(formats)}"
                raise SparqError(f"{where}.format is {self.format!r}: {right}")
        check_unique(f"{where}.subsets", self.subsets)
        check_unique(f"{where}.test_speakers", self.test_speakers)
        for name, value in (("test_fraction", self.test_fraction), ("valid_fraction", self.valid_fraction)):
            check(0 <= value < 1, f"{where}.{name}", value, "at least 0 and less than 1")
        held_out = self.test_fraction + self.valid_fraction
        check(held_out < 1, f"{where}: test_fraction + valid_fraction", held_out, "less than 1")
        check_identifier(f"{where}.test_split", self.test_split, start="test")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which recordings are used.

    Attributes:
        sources: the corpora.
        skip_bad: leave bad recordings out, counted and listed, instead of stopping at the first.
        max_seconds: longer recordings are bad; attention is quadratic in their length.
    """

    sources: tuple[SourceConfig, ...]
    skip_bad: bool = field(default=False, metadata=NO_EFFECT)
    max_seconds: float = 60.0

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check(len(self.sources) > 0, f"{where}.sources", [], "at least one source")
        for index, source in enumerate(self.sources):
            source.validate(f"{where}.sources[{index}]")
        check_positive(where, max_seconds=self.max_seconds)


@dataclass(frozen=True, kw_only=True)
class UnitsConfig:
    """How speech becomes units: a layer of a self-supervised model, then k-means.

    Attributes:
        features: `hubert` (SpARQ section 3.1), a folder or hub name of HuBERT, wav2vec2, WavLM or Whisper,
            `pretrained:NAME` for a model that `sparq pretrained` caches, or `mfcc`. A path starts with `.`,
            `~` or `/`.
        layer: which layer's output; 6 of HuBERT-base in VoxtLM.
        k: number of units; 200 in SpARQ (appendix E.3).
        kmeans: centroids to take instead of fitting some: the units of another run, of a model or of a vocoder. `k` is
            then theirs.
        max_frames: frames sampled for the k-means; more change its centroids little and do not fit into
            memory.
        dedup: merge runs of one unit and keep their lengths as durations. VoxtLM keeps the runs; merged
            sequences are about half as long.
        dtype: type of the extractor's arithmetic.
        n_init: k-means restarts, of which the best is kept; 20 is the field's custom.
        shard_utterances: utterances in one atomic Parquet file, the most that a killed run repeats.
        workers: processes that encode shards, one thread each; 0 does it in this process with all threads. With `ray:
            local`, the CPUs that Ray gets.
        ray: address of a Ray cluster that encodes shards, `auto`, or `local` for one on this machine; null for none.
    """

    features: str = "hubert"
    layer: int = 6
    k: int = 200
    kmeans: Path | None = field(default=None, metadata=ADDED_LATER)
    max_frames: int = 10_000_000
    dedup: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    n_init: int = 20
    shard_utterances: int = 128
    workers: int = field(default=0, metadata=NO_EFFECT)
    ray: str | None = field(default=None, metadata=NO_EFFECT)

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check_not_empty(where, features=self.features)
        check(self.layer >= 0, f"{where}.layer", self.layer, "at least 0")
        check_positive(where, n_init=self.n_init, shard_utterances=self.shard_utterances)
        check(self.workers >= 0, f"{where}.workers", self.workers, "at least 0")
        check(self.ray != "", f"{where}.ray", self.ray, "HOST:PORT, auto, local, or null")
        check(2 <= self.k <= MAX_UNITS, f"{where}.k", self.k, f"from 2 to {MAX_UNITS}")
        check(self.max_frames >= self.k, f"{where}.max_frames", self.max_frames, f"at least {where}.k, {self.k}")


@dataclass(frozen=True, kw_only=True)
class VocabConfig:
    """The joint vocabulary: one SentencePiece model over units and text.

    Attributes:
        size: number of pieces; 5000 for 200 units in VoxtLM.
        model_type: SentencePiece's algorithm; unigram in VoxtLM.
        text_repeat: how often each line of text counts beside one line of units.
        extra_text: more text files, a sentence a line, plain or `.gz`; paths as in a source's manifest.
        extra_lines: take a random sample of so many lines of each of these; 0 takes all. SentencePiece holds
            them in memory; VoxtLM fits its model on at most 700,000.
    """

    size: int = 5000
    model_type: Literal["unigram", "bpe"] = "unigram"
    text_repeat: int = 1
    extra_text: tuple[Path, ...] = ()
    extra_lines: int = 0

    def validate(self, where: str) -> None:
        """Check values and combinations."""
        check_positive(where, size=self.size, text_repeat=self.text_repeat)
        check(self.extra_lines >= 0, f"{where}.extra_lines", self.extra_lines, "at least 0")
