"""Encoding of a manifest into shards of units, resumable at any moment."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt16

from sparq.audio.manifest import Utterance
from sparq.errors import SparqError
from sparq.files import fingerprint, sweep, write_json
from sparq.process_memory import trim_heap
from sparq.progress import progress
from sparq.units.dedup import deduplicate
from sparq.units.features import FeatureExtractor
from sparq.units.kmeans import KMeans
from sparq.units.reading import HOURS_BAR, group_utterances, read_groups
from sparq.units.store import SUMMARY, UnitUtterance, read_shard_metadata, shard_path, write_shard


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """How units are written.

    Attributes:
        dedup: write a run of equal units once, with its duration.
        shard_utterances: utterances in a shard at most (an hour of speech closes one too); clips are packed
            and batched within a shard only, so this number belongs to what the units are.
    """

    dedup: bool = True
    shard_utterances: int = 128

    def __post_init__(self) -> None:
        if self.shard_utterances < 1:
            raise SparqError(f"shard_utterances is {self.shard_utterances}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One row of the work list.

    Attributes:
        split: name of the split.
        index: number of the shard in its split.
        path: the file.
        utterances: what goes into it, in manifest order.
        identity: metadata that an existing file must have to count as this shard.
    """

    split: str
    index: int
    path: Path
    utterances: Sequence[Utterance]
    identity: dict[str, Any]


ShardRunner = Callable[[Sequence[Shard]], Iterator[Shard]]
"""Encodes shards in any order and yields each when its file is there."""


def encode_waveforms(
    waveforms: Sequence[Float32[np.ndarray, "_samples"]],
    extractor: FeatureExtractor,
    kmeans: KMeans,
    *,
    dedup: bool = True,
) -> list[tuple[UInt16[np.ndarray, "_units"], UInt16[np.ndarray, "_units"]]]:
    """Return (units, durations) of each clip of 16 kHz mono samples.

    Raises:
        SparqError: the k-means was fitted on another extractor.
    """
    kmeans.check_extractor(extractor)
    encoded = []
    for features in extractor.extract(waveforms):
        frames = kmeans.assign(features)
        encoded.append(deduplicate(frames) if dedup else (frames, np.ones_like(frames)))
    return encoded


def encode_units(
    utterances: Sequence[Utterance],
    extractor: FeatureExtractor,
    kmeans: KMeans,
    folder: Path,
    settings: EncodeSettings,
    *,
    runner: ShardRunner | None = None,
) -> dict[str, Any]:
    """Encode every split of a manifest into `folder`/SPLIT/NNNNN.parquet, then write `folder`/units.json.

    A shard is whole or absent. One that is there and belongs to this work is not redone, so a killed run goes
    on where it was and ends with the same bytes. No process but the runner's may write the folder meanwhile.

    Args:
        utterances: the manifest.
        extractor: the one that the k-means was fitted on.
        kmeans: turns frames into units.
        folder: where units live, `RUN/units`.
        settings: de-duplication and shard size.
        runner: encodes shards elsewhere; None does it here, one after another.

    Returns:
        The summary, as in units.json.

    Raises:
        SparqError: another extractor, shards of other work in the folder, unreadable audio, or an utterance
            without a single frame.
    """
    kmeans.check_extractor(extractor)
    sweep(folder)
    shards = plan_shards(utterances, kmeans, folder, settings)
    done = _check_existing(folder, shards)
    todo = [s for s in shards if s.path not in done]
    total, left = (sum(u.seconds for s in group for u in s.utterances) / 3600 for group in (shards, todo))
    start, hours = time.perf_counter(), 0.0
    with progress("units", total, "h", bar_format=HOURS_BAR, initial=total - left) as bar:
        for shard in runner(todo) if runner else _encode_here(todo, extractor, kmeans, settings):
            step = sum(u.seconds for u in shard.utterances) / 3600
            hours += step
            bar.set_postfix_str(f"{3600 * hours / (time.perf_counter() - start):.0f}x real time", refresh=False)
            bar.update(step)
    sweep(folder)  # what workers that died have left
    summary = _summarize(shards, extractor, kmeans, settings)
    write_json(folder / SUMMARY, summary)
    return summary


def _encode_here(
    shards: Sequence[Shard], extractor: FeatureExtractor, kmeans: KMeans, settings: EncodeSettings
) -> Iterator[Shard]:
    for shard, waveforms in zip(shards, read_groups([s.utterances for s in shards]), strict=True):
        _write(shard, waveforms, extractor, kmeans, dedup=settings.dedup)
        yield shard


def encode_shard(shard: Shard, extractor: FeatureExtractor, kmeans: KMeans, *, dedup: bool) -> None:
    """Read, encode and write one shard, whole or not at all.

    Raises:
        SparqError: unreadable audio, or an utterance without a single frame.
    """
    (waveforms,) = read_groups([shard.utterances])
    _write(shard, waveforms, extractor, kmeans, dedup=dedup)


def plan_shards(utterances: Sequence[Utterance], kmeans: KMeans, folder: Path, settings: EncodeSettings) -> list[Shard]:
    """Return the work list: splits in order of first appearance, utterances in manifest order."""
    splits: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        splits.setdefault(utterance.split, []).append(utterance)
    shards = []
    for split, members in splits.items():
        for index, group in enumerate(group_utterances(members, settings.shard_utterances)):
            identity = {
                "kmeans": kmeans.fingerprint,
                "k": kmeans.k,
                "dedup": settings.dedup,
                "utterances": fingerprint([[u.id, u.speaker, u.corpus, u.text, u.seconds] for u in group]),
            }
            path = shard_path(folder, split, index)
            shards.append(Shard(split=split, index=index, path=path, utterances=group, identity=identity))
    return shards


def _check_existing(folder: Path, shards: Sequence[Shard]) -> set[Path]:
    """Return the shards that are done; refuse foreign shards."""
    planned = {s.path: s for s in shards}
    done = set()
    for split in sorted({s.split for s in shards}):
        for path in sorted((folder / split).glob("*.parquet")):
            shard = planned.get(path)
            found = read_shard_metadata(path)
            remedy = f"remove {path.parent} or use another run folder"
            if shard is None:
                raise SparqError(f"{path} belongs to a longer manifest or a smaller shard size: {remedy}")
            if found.get("kmeans") != shard.identity["kmeans"]:
                raise SparqError(
                    f"{path} holds units of k-means {found.get('kmeans')}, not {shard.identity['kmeans']}: {remedy}"
                )
            for key, value in shard.identity.items():
                if found.get(key) != value:
                    raise SparqError(f"{path} was made with other {key} ({found.get(key)}, now {value}): {remedy}")
            done.add(path)
    return done


def _write(
    shard: Shard,
    waveforms: Sequence[Float32[np.ndarray, "_samples"]],
    extractor: FeatureExtractor,
    kmeans: KMeans,
    *,
    dedup: bool,
) -> None:
    rows = []
    encoded = encode_waveforms(waveforms, extractor, kmeans, dedup=dedup)
    for utterance, waveform, (units, durations) in zip(shard.utterances, waveforms, encoded, strict=True):
        if units.size == 0:
            raise SparqError(
                f"utterance {utterance.id!r} ({utterance.path}) has {len(waveform)} samples, "
                "too few for one frame: leave it out of the manifest"
            )
        rows.append(
            UnitUtterance(
                id=utterance.id,
                speaker=utterance.speaker,
                corpus=utterance.corpus,
                text=utterance.text,
                seconds=utterance.seconds,
                units=units,
                durations=durations,
            )
        )
    counts = {
        "num_units": sum(row.units.size for row in rows),
        "num_frames": sum(int(row.durations.sum()) for row in rows),
    }
    write_shard(shard.path, rows, {**shard.identity, **counts})
    trim_heap()


def _summarize(
    shards: Sequence[Shard], extractor: FeatureExtractor, kmeans: KMeans, settings: EncodeSettings
) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    for shard in shards:
        counts = read_shard_metadata(shard.path)
        split = splits.setdefault(
            shard.split, {"shards": 0, "utterances": 0, "seconds": 0.0, "num_frames": 0, "num_units": 0}
        )
        split["shards"] += 1
        split["utterances"] += len(shard.utterances)
        split["seconds"] = round(split["seconds"] + sum(u.seconds for u in shard.utterances), 3)
        split["num_frames"] += counts["num_frames"]
        split["num_units"] += counts["num_units"]
    return {
        "kmeans": kmeans.fingerprint,
        "k": kmeans.k,
        "extractor": extractor.fingerprint,
        "frame_rate": extractor.frame_rate,
        "dedup": settings.dedup,
        "shard_utterances": settings.shard_utterances,
        "splits": splits,
    }
