"""The first step of a run: manifests and files to one checked manifest, on made-up and on human speech."""

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sparq.audio.manifest import Utterance, read_manifest, write_manifest
from sparq.audio.prepare import Source, prepare
from sparq.audio.splits import HeldOut
from sparq.audio.spool import Spool
from sparq.audio.summary import format_report
from sparq.errors import SparqError


def _corpus(folder: Path, num_speakers: int = 3, each: int = 4, text: str = "hello there") -> Path:
    """A manifest of noise; utterance i of a speaker lasts 0.5 (i + 1) seconds."""
    utterances = []
    for speaker in range(num_speakers):
        for i in range(each):
            path = folder / "audio" / f"s{speaker}-{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng([speaker, i]).standard_normal(8000 * (i + 1)) * 0.1
            soundfile.write(path, noise, 16_000)
            seconds = 0.5 * (i + 1)
            utterances.append(Utterance(id=path.stem, path=path, speaker=f"s{speaker}", seconds=seconds, text=text))
    write_manifest(folder / "corpus.tsv", utterances)
    return folder / "corpus.tsv"


def _break(manifest: Path, **texts: str) -> None:
    """Replace fields of rows: `s0-1="seconds=9"`."""
    lines = [line.split("\t") for line in manifest.read_text(encoding="utf-8").splitlines()]
    for row in lines[1:]:
        change = texts.get(row[0].replace("-", "_"))
        if change is not None:
            column, value = change.split("=", 1)
            row[lines[0].index(column)] = value
    manifest.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def _read(out: Path) -> tuple[bytes, ...]:
    return tuple((out / name).read_bytes() for name in ("manifest.tsv", "prepare.json", "rejected.jsonl"))


def _rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_two_sources(tmp_path: Path) -> None:
    a, b = _corpus(tmp_path / "a"), _corpus(tmp_path / "b", num_speakers=2, each=1, text="")
    sources = [
        Source(path=a, corpus="one", held_out=HeldOut(test_speakers=("s1",), valid_fraction=0.25)),
        Source(path=b, corpus="two"),
    ]
    report = prepare(sources, out=tmp_path / "run")
    utterances = read_manifest(tmp_path / "run" / "manifest.tsv")
    assert [u.id for u in utterances] == (
        [f"one-s{s}-{i}" for s in range(3) for i in range(4)] + ["two-s0-0", "two-s1-0"]
    )
    assert {u.corpus for u in utterances} == {"one", "two"}
    assert {u.split for u in utterances if u.id.startswith("one-s1")} == {"test"}
    assert all(u.path.is_file() for u in utterances)
    assert [u.seconds for u in utterances[:4]] == [0.5, 1.0, 1.5, 2.0]

    parts = {(p.corpus, p.split): p for p in report.parts}
    assert {key: (p.utterances, p.with_text) for key, p in parts.items()} == {
        ("one", "test"): (4, 4),
        ("one", "train"): (5, 5),
        ("one", "valid"): (3, 3),
        ("two", "train"): (2, 0),
    }
    assert parts["one", "test"].speakers == 1
    assert parts["two", "train"].speakers == 2
    assert parts["one", "test"].hours == pytest.approx(5.0 / 3600)
    assert (report.utterances, report.hours) == (14, pytest.approx(16.0 / 3600))
    assert [(d.lower, d.upper, d.utterances) for d in report.durations[:3]] == [
        (0, 1, 5),
        (1, 2, 6),
        (2, 5, 3),
    ]
    assert sum(d.utterances for d in report.durations) == 14
    assert report.text_characters == {" ": 12, "e": 36, "h": 24, "l": 24, "o": 12, "r": 12, "t": 12}

    saved = json.loads((tmp_path / "run" / "prepare.json").read_text())
    assert saved["parts"][0] == {
        "corpus": "one", "split": "test", "utterances": 4, "with_text": 4, "speakers": 1, "hours": 5.0 / 3600,
    }  # fmt: skip
    assert (saved["rejected"], saved["reasons"]) == (0, [])
    assert (tmp_path / "run" / "rejected.jsonl").read_bytes() == b""


def test_workers_and_repetition_change_nothing(tmp_path: Path) -> None:
    source = Source(path=_corpus(tmp_path), corpus="c", held_out=HeldOut(test_fraction=0.3))
    (tmp_path / "audio" / "s0-2.wav").write_bytes(b"")
    (tmp_path / "audio" / "s2-0.wav").unlink()
    outputs = []
    for workers in (1, 2, 5, 2):
        prepare([source], out=tmp_path / "run", skip_bad=True, workers=workers)
        outputs.append(_read(tmp_path / "run"))
    assert len(set(outputs)) == 1


def test_a_split_column_is_used_as_it_is(tmp_path: Path) -> None:
    manifest = _corpus(tmp_path, num_speakers=1, each=3)
    _break(manifest, s0_0="split=train", s0_1="split=valid", s0_2="split=test-x")
    prepare([Source(path=manifest, corpus="c", held_out=HeldOut(test_fraction=0.9))], out=tmp_path / "run")
    assert [u.split for u in read_manifest(tmp_path / "run" / "manifest.tsv")] == ["train", "valid", "test-x"]


def _fault(source: Source, out: Path, **options: float) -> str:
    with pytest.raises(SparqError) as caught:
        prepare([source], out=out, **options)
    assert not out.exists(), "nothing is written on a fault"
    assert "\n" not in str(caught.value)
    return str(caught.value)


_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "no such audio file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "not audio": (lambda path: path.write_text("text " * 99), "is not audio"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is truncated"),
    "silent": (lambda path: soundfile.write(path, np.zeros(16_000), 16_000), "is silent"),
    "nan": (
        lambda path: soundfile.write(path, np.full(16_000, np.nan), 16_000, subtype="FLOAT"),
        "16000 samples that are NaN",
    ),
    "other length": (
        lambda path: soundfile.write(path, np.ones(16_000 * 2), 16_000),
        "lasts 2.000 s, but its manifest says 1.000 s",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_bad_file_is_an_error_or_listed(tmp_path: Path, fault: str) -> None:
    source = Source(path=_corpus(tmp_path), corpus="c", held_out=HeldOut(test_fraction=0.3))
    whole = prepare([source], out=tmp_path / "whole")
    spoil, message = _FAULTS[fault]
    for name in ("s0-1", "s2-1"):
        spoil(tmp_path / "audio" / f"{name}.wav")
    error = _fault(source, tmp_path / "run")
    assert "utterance 'c-s0-1'" in error  # the first in the order of the manifest
    assert message in error
    report = prepare([source], out=tmp_path / "run", skip_bad=True)
    rejected = _rejected(tmp_path / "run")
    assert [r["id"] for r in rejected] == ["c-s0-1", "c-s2-1"]
    assert report.reasons == tuple(r["reason"] for r in rejected)
    assert all(message in r["reason"] for r in rejected)
    assert [r["path"] for r in rejected] == [str(tmp_path / "audio" / f"{name}.wav") for name in ("s0-1", "s2-1")]
    assert report.utterances == whole.utterances - 2
    # The good ones keep their splits.
    before = {u.id: u for u in read_manifest(tmp_path / "whole" / "manifest.tsv", require_audio=False)}
    assert all(before[u.id] == u for u in read_manifest(tmp_path / "run" / "manifest.tsv"))


def test_unfit_rows_are_listed_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    manifest = _corpus(tmp_path)
    _break(manifest, s0_1="text=привет", s1_0="text=...", s1_2="seconds=long")
    (tmp_path / "audio" / "s1-1.wav").unlink()
    source = Source(path=manifest, corpus="c")
    assert "CYRILLIC SMALL LETTER PE" in _fault(source, tmp_path / "run")
    prepare([source], out=tmp_path / "run", skip_bad=True)
    assert [r["id"] for r in _rejected(tmp_path / "run")] == ["c-s0-1", "c-s1-0", "c-s1-1", "c-s1-2"]


def test_length_limit(tmp_path: Path) -> None:
    source = Source(path=_corpus(tmp_path), corpus="c")
    assert "longer than the limit of 1.8 s" in _fault(source, tmp_path / "run", max_seconds=1.8)


def test_faults_of_sources(tmp_path: Path) -> None:
    manifest, out = _corpus(tmp_path), tmp_path / "run"
    with pytest.raises(SparqError, match="no sources"):
        prepare([], out=out)
    assert "contains ' '" in _fault(Source(path=manifest, corpus="my corpus"), out)
    assert "corpus.tsv: no utterance of test speaker 'bob'" in _fault(
        Source(path=manifest, corpus="c", held_out=HeldOut(test_speakers=("bob",))), out
    )
    with pytest.raises(SparqError, match=r"id 'c-s0-0' comes from .*: give each source another"):
        prepare([Source(path=manifest, corpus="c")] * 2, out=out)
    everything = Source(path=manifest, corpus="c", held_out=HeldOut(test_fraction=1.0))
    assert "no utterance is left in the split 'train' (12 accepted" in _fault(everything, out)
    for path in (tmp_path / "audio").iterdir():
        path.write_bytes(b"")
    assert "(0 accepted, 12 rejected)" in _fault(Source(path=manifest, corpus="c"), out, skip_bad=True)


def test_memory_does_not_hold_the_audio(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    soundfile.write(path, np.random.default_rng(0).standard_normal(8_000 * 240) * 0.1, 8_000)
    write_manifest(tmp_path / "m.tsv", [Utterance(id=f"u{i}", path=path) for i in range(3)])
    tracemalloc.start()
    prepare([Source(path=tmp_path / "m.tsv", corpus="c")], out=tmp_path / "run")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6, "one file alone is 15 MB at 16 kHz"


def test_format_report(tmp_path: Path) -> None:
    manifest = _corpus(tmp_path, each=2)
    for name in ("s0-1", "s2-1"):
        (tmp_path / "audio" / f"{name}.wav").unlink()
    source = Source(path=manifest, corpus="c", held_out=HeldOut(test_speakers=("s1",)))
    report = prepare([source], out=tmp_path / "run", skip_bad=True)
    lines = format_report(report, max_rejected=1).splitlines()
    assert lines[:4] == [
        "corpus  split  utterances  with text  speakers  hours",
        "c       test            2          2         1  0.000",
        "c       train           2          2         2  0.000",
        "total                   4          4            0.001",
    ]
    assert lines[5:8] == [
        "seconds  utterances",
        "    0-1           3  " + "#" * 40,
        "    1-2           1  " + "#" * 13,
    ]
    assert lines[-4] == "text characters: ehlort"
    assert lines[-3] == "rejected: 2"
    assert lines[-2].startswith("  utterance 'c-s0-1': no such audio file")
    assert lines[-1] == "  ... and 1 more: see rejected.jsonl"


def test_human_speech(tmp_path: Path, human_data: Path) -> None:
    """AN4, five utterances each of four speakers, of whom one is held out; one file is cut."""
    an4 = human_data / "an4"
    rows = read_manifest(an4 / "transcripts.tsv")
    speakers = sorted({row.speaker for row in rows})
    chosen = [
        row for speaker in speakers[:4] for row in [r for r in rows if r.speaker == speaker and r.seconds > 1][:5]
    ]
    lines = (an4 / "transcripts.tsv").read_text().splitlines()
    kept = {row.id for row in chosen}
    (tmp_path / "audio").mkdir()
    for row in chosen:
        shutil.copy(row.path, tmp_path / "audio")
    manifest = tmp_path / "transcripts.tsv"
    manifest.write_text("\n".join([lines[0], *(x for x in lines[1:] if x.split("\t")[0] in kept)]) + "\n")
    rule = HeldOut(test_fraction=0.2, valid_fraction=0.1, test_split="test-unseen-voice")
    source = Source(path=manifest, corpus="an4", held_out=rule)

    report = prepare([source], out=tmp_path / "run")
    utterances = read_manifest(tmp_path / "run" / "manifest.tsv")
    stated = {f"an4-{row.id}": row for row in chosen}
    assert len(utterances) == len(stated) == report.utterances
    for utterance in utterances:
        assert utterance.seconds == pytest.approx(stated[utterance.id].seconds, abs=0.1)
        assert utterance.text == stated[utterance.id].text
        assert utterance.text == utterance.text.lower()
    unseen = {u.speaker for u in utterances if u.split == "test-unseen-voice"}
    assert len(unseen) == 1
    assert not unseen & {u.speaker for u in utterances if u.split != "test-unseen-voice"}
    assert report.rejected == 0

    bad = tmp_path / "audio" / chosen[3].path.name
    bad.write_bytes(bad.read_bytes()[:-400])
    assert "is truncated" in _fault(source, tmp_path / "other")
    report = prepare([source], out=tmp_path / "run", skip_bad=True)
    assert [r["id"] for r in _rejected(tmp_path / "run")] == [f"an4-{chosen[3].id}"]
    assert report.utterances == len(stated) - 1


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).standard_normal(1600) * 0.1, 16_000)
    peaks = []
    for num_rows in (500, 5000):
        rows = "".join(f"u{i}\ta.wav\ts{i % 20}\tsomething is said here\n" for i in range(num_rows))
        (tmp_path / "m.tsv").write_text("id\tpath\tspeaker\ttext\n" + rows)
        source = Source(path=tmp_path / "m.tsv", corpus="c", held_out=HeldOut(test_fraction=0.1, valid_fraction=0.1))
        tracemalloc.start()
        report = prepare([source], out=tmp_path / "run")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.utterances == num_rows
    # 4500 utterances held in Python would take more than 3 MB.
    assert peaks[1] < peaks[0] + 1e6


def test_splits_are_published_or_drawn(tmp_path: Path) -> None:
    root = tmp_path / "LibriSpeech"
    for subset, speaker in (("train-clean-100", "19"), ("dev-clean", "84"), ("test-other", "367")):
        place = root / subset / speaker / "1"
        place.mkdir(parents=True)
        for i in range(5):
            noise = np.random.default_rng(i).standard_normal(8000) * 0.1
            soundfile.write(place / f"{speaker}-1-{i:04d}.flac", noise, 16_000)
        lines = "".join(f"{speaker}-1-{i:04d} HELLO\n" for i in range(5))
        (place / f"{speaker}-1.trans.txt").write_text(lines)
    source = Source(path=root, corpus="ls", format="librispeech", held_out=HeldOut(test_speakers=("19",)))
    report = prepare([source], out=tmp_path / "run")
    assert {(p.split, p.utterances) for p in report.parts} == {("train", 5), ("valid", 5), ("test-other", 5)}
    report = prepare([dataclasses.replace(source, splits="drawn")], out=tmp_path / "run")
    assert {(p.split, p.utterances) for p in report.parts} == {("train", 10), ("test", 5)}
    report = prepare([dataclasses.replace(source, subsets=("train-clean-100",))], out=tmp_path / "run")
    assert {(p.split, p.utterances) for p in report.parts} == {("train", 5)}


def test_segments_of_one_file(tmp_path: Path) -> None:
    """What is prepared can be read again, and is the same speech."""
    soundfile.write(tmp_path / "long.flac", np.random.default_rng(0).standard_normal(44_100 * 5) * 0.1, 44_100)
    rows = "a\tlong.flac\t0\t1.5\nb\tlong.flac\t1.5\t2\nc\tlong.flac\t4\t1.25\nd\tlong.flac\t4.5\t2\n"
    (tmp_path / "m.tsv").write_text("id\tpath\tstart\tseconds\n" + rows)
    report = prepare([Source(path=tmp_path / "m.tsv", corpus="c")], out=tmp_path / "run", skip_bad=True)
    utterances = read_manifest(tmp_path / "run" / "manifest.tsv")
    assert [(u.start, u.seconds) for u in utterances] == [(0.0, 1.5), (1.5, 2.0), (4.0, 1.0)]
    assert "a segment from 4.500 s to 6.500 s is wanted" in report.reasons[0]
    again = prepare([Source(path=tmp_path / "run" / "manifest.tsv", corpus="c")], out=tmp_path / "again")
    assert again.hours == pytest.approx(report.hours)


def test_ids_twice_in_a_source(tmp_path: Path) -> None:
    manifest = _corpus(tmp_path, num_speakers=1, each=2)
    manifest.write_text(manifest.read_text() + manifest.read_text().splitlines()[1] + "\n")
    assert "corpus.tsv: duplicate id 's0-0' (" in _fault(Source(path=manifest, corpus="c"), tmp_path / "run")


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def fill() -> None:
        with Spool() as spool:
            spool._db.execute("PRAGMA max_page_count = 20")
            for i in range(5000):
                spool.add(0, Utterance(id=f"u{i}", path=tmp_path / "a.wav"), f"c-u{i}")

    with pytest.raises(SparqError, match="no space left on the disk for temporary files"):
        fill()
