"""The k-means: assignment against brute force, fitting, its file, and the sample it is fitted on."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

from sparq.audio.manifest import Utterance
from sparq.errors import SparqError
from sparq.units import fit
from sparq.units.clustering import KMeansSettings, fit_kmeans
from sparq.units.features import FeatureSpec, load_extractor
from sparq.units.kmeans import KMeans

EXTRACTOR = {"kind": "hubert", "layer": 6, "dtype": "float32", "weights": "ab" * 32}
QUICK = {"num_starts": 2, "batch_frames": 500}


def blobs(k: int, dim: int, per_blob: int) -> tuple[np.ndarray, np.ndarray]:
    """Well separated clusters far from the origin, in random order; returns frames and true centers."""
    generator = np.random.default_rng(1)
    centers = generator.permutation(np.eye(dim)[:k] * 20) + 100
    frames = np.repeat(centers, per_blob, axis=0) + generator.normal(size=(k * per_blob, dim)) * 0.5
    return generator.permutation(frames).astype(np.float32), centers


@given(
    centroids=arrays(np.float32, (5, 3), elements=st.integers(-8, 8)),
    frames=arrays(np.float32, (9, 3), elements=st.integers(-8, 8)),
)
def test_assignment_is_brute_force_with_ties_to_the_lowest(centroids: np.ndarray, frames: np.ndarray) -> None:
    # Small integers and five times larger ones, whose mean is exact in float32, make ties exact.
    kmeans = KMeans(centroids=centroids * 5, metadata={"extractor": EXTRACTOR})
    distances = ((5 * frames[:, None].astype(np.float64) - 5 * centroids[None]) ** 2).sum(axis=2)
    units = kmeans.assign(frames * 5)
    assert units.dtype == np.uint16
    np.testing.assert_array_equal(units, distances.argmin(axis=1))
    assert kmeans.mean_squared_distance(frames * 5) == pytest.approx(distances.min(axis=1).mean(), rel=1e-5)


def test_assignment_far_from_the_origin_keeps_its_precision() -> None:
    generator = np.random.default_rng(2)
    centroids = (1000 + generator.normal(size=(50, 64))).astype(np.float32)
    frames = (1000 + generator.normal(size=(2000, 64))).astype(np.float32)
    distances = ((frames[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    units = KMeans(centroids=centroids, metadata={"extractor": EXTRACTOR}).assign(frames)
    np.testing.assert_array_equal(units, distances.argmin(axis=1))


def test_fit_finds_the_clusters_and_repeats_itself() -> None:
    frames, centers = blobs(k=12, dim=16, per_blob=200)
    settings = KMeansSettings(k=12, seed=3, **QUICK)
    kmeans = fit_kmeans(frames, settings, extractor=EXTRACTOR, facts={"sample": "x"})
    nearest = np.linalg.norm(kmeans.centroids[:, None] - centers[None], axis=2).argmin(axis=1)
    assert sorted(nearest) == list(range(12))
    assert np.linalg.norm(kmeans.centroids - centers[nearest], axis=1).max() < 0.5
    assert kmeans.metadata["mean_squared_distance"] == pytest.approx(16 * 0.25, rel=0.05)
    assert kmeans.metadata["num_frames"] == 2400
    assert kmeans.metadata["settings"]["seed"] == 3
    assert kmeans.metadata["sample"] == "x"

    again = fit_kmeans(frames.copy(), settings, extractor=EXTRACTOR, facts={"sample": "x"})
    assert again.fingerprint == kmeans.fingerprint
    other = fit_kmeans(frames, KMeansSettings(k=12, seed=4, **QUICK), extractor=EXTRACTOR, facts={"sample": "x"})
    assert other.fingerprint != kmeans.fingerprint


def test_file_roundtrip_is_exact(tmp_path: Path) -> None:
    frames, _ = blobs(k=4, dim=8, per_blob=20)
    kmeans = fit_kmeans(frames, KMeansSettings(k=4, **QUICK), extractor=EXTRACTOR)
    kmeans.save(tmp_path / "a.safetensors")
    loaded = KMeans.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded.centroids, kmeans.centroids)
    assert loaded.metadata == kmeans.metadata
    assert loaded.fingerprint == kmeans.fingerprint
    assert len(loaded.fingerprint) == 16
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # Other metadata, other name: the same centroids behind another extractor are another k-means.
    moved = KMeans(centroids=kmeans.centroids, metadata={**kmeans.metadata, "extractor": {"kind": "mfcc"}})
    assert moved.fingerprint != kmeans.fingerprint


def test_files_that_are_no_kmeans(tmp_path: Path) -> None:
    path = tmp_path / "kmeans.safetensors"
    good = KMeans(centroids=np.eye(3, dtype=np.float32), metadata={"extractor": EXTRACTOR})
    good.save(path)
    tensors = load_file(path)
    header = {"sparq": json.dumps({"format": "sparq-kmeans-1", "extractor": EXTRACTOR})}
    whole = path.read_bytes()

    def message() -> str:
        with pytest.raises(SparqError) as caught:
            KMeans.load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    save_file(tensors, path, metadata=header)
    KMeans.load(path)
    save_file(tensors, path)
    assert "expected one tensor 'centroids'" in message()
    save_file({"weights": tensors["centroids"]}, path, metadata=header)
    assert "expected one tensor 'centroids'" in message()
    save_file({"centroids": np.full((3, 3), np.nan, np.float32)}, path, metadata=header)
    assert "expected finite float32 centroids" in message()
    save_file({"centroids": np.zeros((3, 3), np.float64)}, path, metadata=header)
    assert "found float64 [3, 3]" in message()
    save_file(tensors, path, metadata={"sparq": "{"})
    assert "is not a k-means file" in message()
    for broken in (b"", b"pickle", whole[:-1]):
        path.write_bytes(broken)
        assert "is not a k-means file" in message()
    path.unlink()
    assert "no k-means at" in message()
    path.mkdir()
    assert "is not a k-means file" in message()


def test_another_extractor_is_refused_by_name() -> None:
    kmeans = KMeans(centroids=np.eye(39, dtype=np.float32), metadata={"extractor": EXTRACTOR})
    with pytest.raises(SparqError, match=r"fitted on hubert layer 6 float32, weights abababab, .* in use is mfcc"):
        kmeans.check_extractor(load_extractor(FeatureSpec(model="mfcc")))


def test_wrong_settings_and_frames() -> None:
    with pytest.raises(SparqError, match="number of units 1 is out of range: valid are 2 to 20992"):
        KMeansSettings(k=1)
    with pytest.raises(SparqError, match="number of units 30000 is out of range"):
        KMeansSettings(k=30_000)
    with pytest.raises(SparqError, match="patience is 0"):
        KMeansSettings(patience=0)
    frames = np.zeros((5, 2), np.float32)
    with pytest.raises(SparqError, match="5 frames of speech are too few for 200 units"):
        fit_kmeans(frames, KMeansSettings(), extractor=EXTRACTOR)
    frames[1, 1] = np.nan
    with pytest.raises(SparqError, match="NaN or infinity"):
        fit_kmeans(frames, KMeansSettings(k=2), extractor=EXTRACTOR)


def utterances(folder: Path, count: int) -> list[Utterance]:
    generator = np.random.default_rng(7)
    result = []
    for index in range(count):
        seconds = round(0.3 + 0.05 * (index % 7), 3)
        path = folder / f"u{index}.wav"
        soundfile.write(path, generator.normal(size=round(16_000 * seconds)) * 0.1, 16_000, subtype="FLOAT")
        split = "test" if index % 4 == 3 else "train"
        result.append(Utterance(id=f"u{index}", path=path, speaker="s", split=split, seconds=seconds, text="x"))
    return result


def test_sample_depends_on_ids_and_seed_only() -> None:
    clips = [
        Utterance(id=f"u{i}", path=Path("x"), split="train" if i % 3 else "valid", seconds=1.0 + i % 5)
        for i in range(300)
    ]
    draw = {"max_frames": 5000, "frame_rate": 50.0}
    sample = fit.sample_utterances(clips, seed=1, **draw)
    assert sample == fit.sample_utterances(clips[::-1], seed=1, **draw)
    assert {u.id for u in sample} != {u.id for u in fit.sample_utterances(clips, seed=2, **draw)}
    assert {u.split for u in sample} == {"train"}
    frames = [50 * u.seconds for u in sample]
    assert sum(frames) >= 5000 > sum(frames[:-1])
    # A smaller sample is the beginning of a larger one, and a large enough one is everything.
    assert (
        fit.sample_utterances(clips, seed=1, max_frames=500, frame_rate=50.0)
        == sample[: len(fit.sample_utterances(clips, seed=1, max_frames=500, frame_rate=50.0))]
    )
    assert len(fit.sample_utterances(clips, seed=1, max_frames=10**9, frame_rate=50.0)) == 200
    with pytest.raises(SparqError, match="no utterance of the split 'train'"):
        fit.sample_utterances([u for u in clips if u.split == "valid"], seed=1, **draw)


def test_fit_units_writes_once_and_ignores_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = utterances(tmp_path, 12)
    extractor = load_extractor(FeatureSpec(model="mfcc"))
    settings = KMeansSettings(k=8, **QUICK)
    first = fit.fit_units(clips, extractor, tmp_path / "a", settings, max_frames=100)
    second = fit.fit_units(clips[::-1], extractor, tmp_path / "b", settings, max_frames=100)
    assert first.metadata["num_frames"] == 100
    path = tmp_path / "a" / "kmeans.safetensors"
    assert path.read_bytes() == (tmp_path / "b" / "kmeans.safetensors").read_bytes()
    assert second.fingerprint == first.fingerprint
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kmeans.safetensors"]

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(fit, "_collect", never)
    assert fit.fit_units(clips, extractor, tmp_path / "a", settings, max_frames=100).fingerprint == first.fingerprint
    with pytest.raises(SparqError, match="was fitted with another settings"):
        fit.fit_units(clips, extractor, tmp_path / "a", KMeansSettings(k=9, **QUICK), max_frames=100)
    with pytest.raises(SparqError, match="was fitted with another sample"):
        fit.fit_units(clips[2:], extractor, tmp_path / "a", settings, max_frames=100)
    with pytest.raises(SparqError, match="max_frames 5 is less than the number of units 8"):
        fit.fit_units(clips, extractor, tmp_path / "a", settings, max_frames=5)


def test_a_sample_larger_than_memory_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [Utterance(id="u", path=tmp_path / "none.wav", split="train", seconds=3600.0)]

    class Memory:
        available = 1_000_000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(SparqError, match=r"take 0\.0 GB, but 0\.0 GB of memory are free: lower max_frames to 3205"):
        fit.fit_units(clips, load_extractor(FeatureSpec(model="mfcc")), tmp_path, KMeansSettings(k=2))
