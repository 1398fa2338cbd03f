"""Fitting of the k-means of a run: a seeded sample of the training speech, its features, the centroids."""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
from jaxtyping import Float32

from sparq.audio.manifest import Utterance
from sparq.errors import SparqError
from sparq.files import atomic_path, fingerprint, sweep
from sparq.progress import progress
from sparq.units.clustering import KMeansSettings, fit_kmeans
from sparq.units.features import FeatureExtractor, describe
from sparq.units.kmeans import KMeans
from sparq.units.reading import HOURS_BAR, group_utterances, read_groups

MAX_FRAMES = 10_000_000
"""55 hours at 50 Hz: more frames hardly move 200 centroids."""

_GROUP = 128


def fit_units(
    utterances: Sequence[Utterance],
    extractor: FeatureExtractor,
    folder: Path,
    settings: KMeansSettings,
    *,
    max_frames: int = MAX_FRAMES,
) -> KMeans:
    """Fit a k-means on a sample of the `train` split and write `folder`/kmeans.safetensors.

    Utterances are drawn in an order that only their ids and the seed decide, until they fill `max_frames`; so
    long utterances count by their length, and the order of the manifest does not matter. The sample is held
    in memory: 4 x dim bytes a frame, which is 15 GB for 10 million frames of 384 numbers.

    If the file is there and was fitted with the same extractor, sample and settings, it is returned as it is.

    Args:
        utterances: the manifest; other splits than `train` are left out.
        extractor: makes the frames.
        folder: where units live, `RUN/units`.
        settings: of the k-means.
        max_frames: frames of the sample at most.

    Raises:
        SparqError: no training speech, too few frames, too little memory, or a k-means of other settings is
            there.
    """
    if max_frames < settings.k:
        raise SparqError(f"max_frames {max_frames} is less than the number of units {settings.k}: raise it")
    sample = sample_utterances(utterances, seed=settings.seed, max_frames=max_frames, frame_rate=extractor.frame_rate)
    facts = {"max_frames": max_frames, "sample": fingerprint([u.id for u in sample])}
    path = folder / "kmeans.safetensors"
    sweep(folder)
    if path.exists():
        return _same_or_error(path, extractor, {"settings": asdict(settings), **facts})
    frames = _collect(sample, extractor, max_frames)
    kmeans = fit_kmeans(frames, settings, extractor=extractor.fingerprint, facts=facts)
    kmeans.save(path)
    return kmeans


def take_units(source: Path, extractor: FeatureExtractor, folder: Path, *, k: int) -> KMeans:
    """Return a k-means that was fitted elsewhere, and copy its file into a folder of units.

    Args:
        source: the file, `kmeans.safetensors` of another run, a model or a vocoder.
        extractor: which must be the one that it was fitted on.
        folder: where units live, `RUN/units`.
        k: how many units are expected.

    Raises:
        SparqError: it is no such file, of another extractor or number of units, or the folder has another k-means.
    """
    kmeans = KMeans.load(source)
    kmeans.check_extractor(extractor)
    if kmeans.k != k:
        raise SparqError(f"{source} has {kmeans.k} units, but units.k is {k}: set it to {kmeans.k}")
    path = folder / "kmeans.safetensors"
    sweep(folder)
    if not path.exists():
        with atomic_path(path) as temporary:
            shutil.copyfile(source, temporary)
    elif KMeans.load(path).fingerprint != kmeans.fingerprint:
        raise SparqError(f"{path} is another k-means than {source}: remove {folder} or use another run folder")
    return kmeans


def sample_utterances(
    utterances: Sequence[Utterance], *, seed: int, max_frames: int, frame_rate: float
) -> list[Utterance]:
    """Return training utterances in an order that ids and seed decide, as many as fill `max_frames`.

    Raises:
        SparqError: there is no training utterance.
    """
    train = [u for u in utterances if u.split == "train"]
    if not train:
        raise SparqError(f"no utterance of the split 'train' among {len(utterances)}: the k-means needs some")
    chosen, frames = [], 0.0
    for utterance in sorted(train, key=lambda u: _draw(seed, u.id)):
        if frames >= max_frames:
            break
        chosen.append(utterance)
        frames += utterance.seconds * frame_rate
    return chosen


def _draw(seed: int, id_: str) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}:{id_}".encode()).digest(), id_


def _same_or_error(path: Path, extractor: FeatureExtractor, wanted: dict[str, object]) -> KMeans:
    kmeans = KMeans.load(path)
    kmeans.check_extractor(extractor)
    for key, value in wanted.items():
        if kmeans.metadata.get(key) != value:
            raise SparqError(
                f"{path} was fitted with another {key} ({kmeans.metadata.get(key)}, now {value}): "
                f"remove {path.parent} or use another run folder"
            )
    return kmeans


def _collect(
    sample: Sequence[Utterance], extractor: FeatureExtractor, max_frames: int
) -> Float32[np.ndarray, "frames dim"]:
    bound = min(max_frames, sum(math.ceil(u.seconds * extractor.frame_rate) + 1 for u in sample))
    size, free = 4 * bound * extractor.dim, psutil.virtual_memory().available
    if size > free:
        raise SparqError(
            f"{bound} frames of {describe(extractor.fingerprint)} for the k-means take {size / 1e9:.1f} GB, "
            f"but {free / 1e9:.1f} GB of memory are free: lower max_frames to {free // (8 * extractor.dim)}"
        )
    frames = np.empty((bound, extractor.dim), np.float32)
    filled = 0
    for clip in _features(sample, extractor):
        taken = min(len(clip), bound - filled)
        frames[filled : filled + taken] = clip[:taken]
        filled += taken
    return frames[:filled]


def _features(sample: Sequence[Utterance], extractor: FeatureExtractor) -> Iterator[Float32[np.ndarray, "_frames dim"]]:
    groups = group_utterances(sample, _GROUP)
    hours = sum(u.seconds for u in sample) / 3600
    with progress("k-means features", hours, "h", bar_format=HOURS_BAR) as bar:
        for group, waveforms in zip(groups, read_groups(groups), strict=True):
            yield from extractor.extract(waveforms)
            bar.update(sum(u.seconds for u in group) / 3600)
