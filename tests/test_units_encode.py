"""Encoding into shards: contents, resuming after kill -9, foreign files, and the reader."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

import small_world
from sparq.audio.manifest import Utterance
from sparq.audio.waveform import read_waveform
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.units import encode
from sparq.units.clustering import KMeansSettings
from sparq.units.dedup import deduplicate, expand
from sparq.units.encode import EncodeSettings, encode_units, encode_waveforms
from sparq.units.features import FeatureExtractor, FeatureSpec, load_extractor
from sparq.units.fit import fit_units, take_units
from sparq.units.kmeans import KMeans
from sparq.units.store import read_summary, read_units

SMALL = EncodeSettings(shard_utterances=4)
SETTINGS = KMeansSettings(k=8, num_starts=1, batch_frames=500)
UNIT_LISTS = st.lists(st.integers(0, 3), max_size=60).map(lambda u: np.array(u, np.uint16))


@given(units=UNIT_LISTS)
def test_deduplication_roundtrip(units: np.ndarray) -> None:
    short, durations = deduplicate(units)
    assert short.dtype == durations.dtype == np.uint16
    np.testing.assert_array_equal(expand(short, durations), units)
    assert int(durations.sum()) == len(units)
    assert (durations > 0).all()
    assert (short[1:] != short[:-1]).all()


def test_runs_beyond_16_bits_are_split() -> None:
    units = np.repeat(np.array([1, 2, 3], np.uint16), [5, 2 * 65_535, 65_536])
    short, durations = deduplicate(units)
    assert short.tolist() == [1, 2, 2, 3, 3]
    assert durations.tolist() == [5, 65_535, 65_535, 65_535, 1]
    np.testing.assert_array_equal(expand(short, durations), units)


def write_clips(folder: Path, count: int = 18) -> list[Utterance]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    result = []
    for index in range(count):
        samples = 4800 + 811 * index
        tone = np.sin(np.cumsum(generator.normal(0.3, 0.1, samples))) * 0.2
        path = folder / f"u{index}.wav"
        soundfile.write(path, tone + generator.normal(size=samples) * 0.01, 16_000, subtype="FLOAT")
        split = "train" if index % 3 else "test-unseen"
        result.append(
            Utterance(
                id=f"u{index}", path=path, speaker=f"s{index % 2}", split=split, seconds=samples / 16_000,
                text=f"text {index} é" if index % 5 else "",
            )
        )  # fmt: skip
    return result


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return load_extractor(FeatureSpec(model="mfcc"))


@pytest.fixture(scope="module")
def kmeans(clips: list[Utterance], extractor: FeatureExtractor, tmp_path_factory: pytest.TempPathFactory) -> KMeans:
    return fit_units(clips, extractor, tmp_path_factory.mktemp("kmeans"), SETTINGS)


def shards(folder: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return dict(sorted(files.items()))


def test_shards_hold_what_was_said(
    clips: list[Utterance], extractor: FeatureExtractor, kmeans: KMeans, tmp_path: Path
) -> None:
    summary = encode_units(clips, extractor, kmeans, tmp_path, SMALL)
    assert sorted(shards(tmp_path)) == [
        "test-unseen/00000.parquet", "test-unseen/00001.parquet",
        "train/00000.parquet", "train/00001.parquet", "train/00002.parquet", "units.json",
    ]  # fmt: skip
    assert summary == read_summary(tmp_path)
    for split in ("train", "test-unseen"):
        wanted = [u for u in clips if u.split == split]
        found = list(read_units(tmp_path, split, expect_fingerprint=kmeans.fingerprint))
        assert [(r.id, r.speaker, r.text, r.seconds) for r in found] == [
            (u.id, u.speaker, u.text, u.seconds) for u in wanted
        ]
        for row, utterance in zip(found, wanted, strict=True):
            frames = kmeans.assign(extractor.extract([read_waveform(utterance.path)])[0])
            np.testing.assert_array_equal(expand(row.units, row.durations), frames)
            assert (row.units[1:] != row.units[:-1]).all()
            assert row.units.dtype == row.durations.dtype == np.uint16
        counts = summary["splits"][split]
        assert counts["utterances"] == len(wanted)
        assert counts["num_units"] == sum(len(r.units) for r in found)
        assert counts["num_frames"] == sum(int(r.durations.sum()) for r in found)
        assert counts["seconds"] == pytest.approx(sum(u.seconds for u in wanted), abs=1e-3)


def test_without_deduplication_every_frame_stays(
    clips: list[Utterance], extractor: FeatureExtractor, kmeans: KMeans, tmp_path: Path
) -> None:
    encode_units(clips, extractor, kmeans, tmp_path / "all", EncodeSettings(dedup=False))
    encode_units(clips, extractor, kmeans, tmp_path / "short", EncodeSettings(dedup=True))
    pairs = zip(read_units(tmp_path / "all", "train"), read_units(tmp_path / "short", "train"), strict=True)
    for long, short in pairs:
        assert (long.durations == 1).all()
        np.testing.assert_array_equal(long.units, expand(short.units, short.durations))
        assert len(short.units) < len(long.units)


def test_resuming_redoes_only_what_is_missing(
    clips: list[Utterance],
    extractor: FeatureExtractor,
    kmeans: KMeans,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode_units(clips, extractor, kmeans, tmp_path, SMALL)
    whole = shards(tmp_path)
    (tmp_path / "train" / "00001.parquet").unlink()
    (tmp_path / "units.json").unlink()
    for name in ("train/.00002.4242.partial.parquet", ".units.4242.partial.json", ".kmeans.4242.partial.safetensors"):
        (tmp_path / name).write_bytes(b"half")
    written = []
    original = encode.write_shard
    monkeypatch.setattr(encode, "write_shard", lambda path, *a: (written.append(path.name), original(path, *a)))
    encode_units(clips, extractor, kmeans, tmp_path, SMALL)
    assert written == ["00001.parquet"]
    assert shards(tmp_path) == whole


KILLER = """
import os, random, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_units_encode import SETTINGS, write_clips
from sparq.units import EncodeSettings, FeatureSpec, encode_units, fit_units, load_extractor

clips = write_clips(Path({root!r}) / "audio", 24)

def work(folder):
    extractor = load_extractor(FeatureSpec(model="mfcc"))
    kmeans = fit_units(clips, extractor, folder, SETTINGS)
    encode_units(clips, extractor, kmeans, folder, EncodeSettings(shard_utterances=2))

def child(folder, kill_after=None):
    pid = os.fork()
    if pid == 0:
        work(folder)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, 9)
    return os.waitpid(pid, 0)[1]

start = time.perf_counter()
assert child(Path({root!r}) / "whole") == 0
duration = time.perf_counter() - start
print(duration, [child(Path({root!r}) / "killed", random.uniform(0, duration * 0.5)) for _ in range(3)])
assert child(Path({root!r}) / "killed") == 0
"""


def test_kill_9_at_random_moments_leaves_no_trace(tmp_path: Path) -> None:
    # Fitting and encoding run in forked children of a fresh process, which pays for the imports once.
    script = KILLER.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, killed = shards(tmp_path / "whole"), shards(tmp_path / "killed")
    assert len(whole) == 4 + 8 + 2  # shards of the two splits, the k-means and the summary
    assert "[9, " in done.stdout or ", 9" in done.stdout, f"no child was killed in time: {done.stdout}"
    assert whole == killed, done.stdout


def test_foreign_shards_are_refused_and_left_alone(
    clips: list[Utterance], extractor: FeatureExtractor, kmeans: KMeans, tmp_path: Path
) -> None:
    encode_units(clips, extractor, kmeans, tmp_path, SMALL)
    before = shards(tmp_path)
    other = KMeans(centroids=kmeans.centroids + 1, metadata=kmeans.metadata)
    renamed = [dataclasses.replace(u, text="other") if u.id == "u7" else u for u in clips]
    for arguments, message in [
        ((clips, extractor, other, tmp_path, SMALL), f"holds units of k-means {kmeans.fingerprint}, not"),
        ((renamed, extractor, kmeans, tmp_path, SMALL), "was made with other utterances"),
        ((clips[:-6], extractor, kmeans, tmp_path, SMALL), "belongs to a longer manifest"),
        ((clips[3:], extractor, kmeans, tmp_path, SMALL), "was made with other utterances"),
        (
            (clips, extractor, kmeans, tmp_path, EncodeSettings(shard_utterances=4, dedup=False)),
            r"was made with other dedup \(True, now False\)",
        ),
    ]:
        with pytest.raises(SparqError, match=message) as caught:
            encode_units(*arguments)
        assert "remove" in str(caught.value)
        assert shards(tmp_path) == before
    (tmp_path / "train" / "00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(SparqError, match="is not a shard of units"):
        encode_units(clips, extractor, kmeans, tmp_path, SMALL)


def test_what_cannot_be_encoded(
    clips: list[Utterance], extractor: FeatureExtractor, kmeans: KMeans, tmp_path: Path
) -> None:
    foreign = KMeans(centroids=kmeans.centroids, metadata={"extractor": {"kind": "hubert", "layer": 6}})
    with pytest.raises(SparqError, match="fitted on hubert layer 6, but the extractor in use is mfcc"):
        encode_units(clips, extractor, foreign, tmp_path, SMALL)
    raw = [dataclasses.replace(clips[0], split="")]
    with pytest.raises(SparqError, match="use the manifest that `sparq prepare` writes"):
        encode_units(raw, extractor, kmeans, tmp_path, SMALL)
    gone = [*clips[:8], dataclasses.replace(clips[8], path=tmp_path / "gone.wav")]
    with pytest.raises(SparqError, match=r"gone\.wav"):
        encode_units(gone, extractor, kmeans, tmp_path, SMALL)
    assert not (tmp_path / "units.json").exists()
    assert not list(tmp_path.rglob("*.partial*"))
    with pytest.raises(SparqError, match="shard_utterances is 0"):
        EncodeSettings(shard_utterances=0)

    class Deaf:
        frame_rate, dim, fingerprint = 50.0, 39, extractor.fingerprint

        def extract(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
            return [np.empty((0, 39), np.float32) for _ in waveforms]

    with pytest.raises(SparqError, match=r"utterance 'u0' .* has 4800 samples, too few for one frame"):
        encode_units(clips[:1], Deaf(), kmeans, tmp_path / "deaf", SMALL)


def test_reader_faults(clips: list[Utterance], extractor: FeatureExtractor, kmeans: KMeans, tmp_path: Path) -> None:
    with pytest.raises(SparqError, match=r"no finished units in .*: run `sparq units` first"):
        read_units(tmp_path, "train")
    encode_units(clips, extractor, kmeans, tmp_path, SMALL)
    with pytest.raises(SparqError, match="unknown split 'trian': did you mean 'train'"):
        read_units(tmp_path, "trian")
    with pytest.raises(SparqError, match=f"come from k-means {kmeans.fingerprint}, but 0123 is expected"):
        read_units(tmp_path, "train", expect_fingerprint="0123")
    second = tmp_path / "train" / "00001.parquet"
    table = pq.read_table(second)
    pq.write_table(table.replace_schema_metadata({b"sparq": b'{"kmeans": "x"}'}), second)
    with pytest.raises(SparqError, match=r"00001\.parquet comes from k-means x"):
        read_units(tmp_path, "train")
    second.unlink()
    with pytest.raises(SparqError, match=r"00001\.parquet is missing: run `sparq units` again"):
        read_units(tmp_path, "train")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "units.json").write_text("[]")
    with pytest.raises(SparqError, match="is not a summary of units"):
        read_units(tmp_path, "train")


@pytest.mark.pretrained
def test_units_of_real_speech_with_real_whisper(whisper_folder: Path, human_data: Path, tmp_path: Path) -> None:
    lines = (human_data / "an4" / "transcripts.tsv").read_text(encoding="utf-8").splitlines()[1:25]
    clips = [
        Utterance(
            id=i,
            path=human_data / "an4" / path,
            speaker=speaker,
            split="train",
            seconds=float(seconds),
            text=text,
        )
        for i, speaker, path, seconds, text in (line.split("\t") for line in lines)
    ]
    extractor = load_extractor(FeatureSpec(model=str(whisper_folder), layer=2))
    kmeans = fit_units(clips, extractor, tmp_path, KMeansSettings(k=50, num_starts=2))
    encode_units(clips, extractor, kmeans, tmp_path, EncodeSettings())
    rows = list(read_units(tmp_path, "train"))
    for row, clip in zip(rows, clips, strict=True):
        assert int(row.durations.sum()) == pytest.approx(50 * clip.seconds, abs=1)
    used = np.unique(np.concatenate([r.units for r in rows]))
    assert len(used) > 40
    frames = sum(int(r.durations.sum()) for r in rows)
    assert 0.3 < sum(len(r.units) for r in rows) / frames < 0.9

    # Whatever is encoded with a clip, its units stay; bfloat16 moves some at the borders of clusters.
    alone = [encode_waveforms([read_waveform(c.path)], extractor, kmeans)[0] for c in clips[:6]]
    packed = [expand(r.units, r.durations) for r in rows[:6]]
    same = np.concatenate([expand(*a) for a in alone]) == np.concatenate(packed)
    assert same.mean() > 0.97


def test_units_of_centroids_from_elsewhere(
    clips: list[Utterance], extractor: FeatureExtractor, kmeans: KMeans, tmp_path: Path
) -> None:
    source = tmp_path / "model" / "kmeans.safetensors"
    kmeans.save(source)
    folder = tmp_path / "units"
    taken = take_units(source, extractor, folder, k=kmeans.k)
    assert (folder / "kmeans.safetensors").read_bytes() == source.read_bytes()
    encode_units(clips, extractor, taken, folder, EncodeSettings())
    fitted = tmp_path / "fitted"
    encode_units(clips, extractor, fit_units(clips, extractor, fitted, SETTINGS), fitted, EncodeSettings())
    assert shards(folder) == shards(fitted)
    assert take_units(source, extractor, folder, k=kmeans.k).fingerprint == kmeans.fingerprint
    with pytest.raises(SparqError, match=f"has {kmeans.k} units, but units.k is 200: set it to {kmeans.k}"):
        take_units(source, extractor, folder, k=200)
    other = KMeans(centroids=kmeans.centroids + 1, metadata=kmeans.metadata)
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(SparqError, match=r"is another k-means than .*other.safetensors: remove"):
        take_units(tmp_path / "other.safetensors", extractor, folder, k=kmeans.k)
    with pytest.raises(SparqError, match="no k-means at"):
        take_units(tmp_path / "none.safetensors", extractor, tmp_path / "new", k=kmeans.k)
    assert not (tmp_path / "new").exists()


def test_a_run_with_the_units_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = small_world.make_corpus(tmp_path / "corpus")
    first = small_world.write_recipe(tmp_path / "a.yaml", manifest, tmp_path / "no-backbone-needed")
    assert main(["run", str(first), "--until", "units", "--out", str(tmp_path / "a")]) == 0
    second = small_world.write_recipe(
        tmp_path / "b.yaml", manifest, tmp_path / "no-backbone-needed",
        **{"seed": 7, "units.kmeans": "a/units/kmeans.safetensors"},
    )  # fmt: skip
    command = ["run", str(second), "--until", "units", "--out", str(tmp_path / "b")]
    assert main(command) == 0
    # Another seed would have fitted other centroids.
    files = [tmp_path / run / "units" / "kmeans.safetensors" for run in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert "units: already done" in capsys.readouterr().err
    KMeans(centroids=KMeans.load(files[0]).centroids + 1, metadata=KMeans.load(files[0]).metadata).save(files[0])
    assert main(command) == 2
    assert "units" in capsys.readouterr().err
