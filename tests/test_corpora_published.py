"""Corpora on small trees of exactly their published layouts."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus_trees import faults, read, sound, text
from sparq.audio.corpora import read_corpus
from sparq.audio.corpora.librilight import cut
from sparq.audio.prepare import Source, prepare
from sparq.errors import SparqError


def _librispeech(root: Path) -> Path:
    for subset, speaker, chapter in (("train-clean-100", "19", "198"), ("dev-other", "116", "288045"),
                                     ("test-clean", "1089", "134686")):  # fmt: skip
        place = root / subset / speaker / chapter
        lines = []
        for i, words in enumerate(("NORTHANGER ABBEY", "IT'S A DULL COUNTRY")):
            sound(place / f"{speaker}-{chapter}-{i:04d}.flac")
            lines.append(f"{speaker}-{chapter}-{i:04d} {words}")
        text(place / f"{speaker}-{chapter}.trans.txt", *lines)
    # What the archive also has.
    text(root / "SPEAKERS.TXT", ";ID  |SEX| SUBSET           |MINUTES| NAME", "19   | F | train-clean-100  | 25 | A B")
    text(root / "BOOKS.TXT", "|1 | a book")
    return root


def test_librispeech(tmp_path: Path) -> None:
    rows = read("librispeech", _librispeech(tmp_path / "LibriSpeech"))
    assert [(r.id, r.speaker, r.split, r.text) for r in rows] == [
        ("19-198-0000", "19", "train", "northanger abbey"),
        ("19-198-0001", "19", "train", "it's a dull country"),
        ("116-288045-0000", "116", "valid", "northanger abbey"),
        ("116-288045-0001", "116", "valid", "it's a dull country"),
        ("1089-134686-0000", "1089", "test-clean", "northanger abbey"),
        ("1089-134686-0001", "1089", "test-clean", "it's a dull country"),
    ]
    assert rows[0].path == tmp_path / "LibriSpeech" / "train-clean-100" / "19" / "198" / "19-198-0000.flac"
    assert {r.split for r in read("librispeech", tmp_path / "LibriSpeech", "dev-other")} == {"valid"}


def test_librispeech_faults(tmp_path: Path) -> None:
    root = _librispeech(tmp_path / "LibriSpeech")
    chapter = root / "dev-other" / "116" / "288045"
    (chapter / "116-288045-0000.flac").rename(chapter / "116-288045-0007.flac")
    assert [reason.split(": ")[0] for reason in faults("librispeech", root)] == [
        f"{chapter / '116-288045.trans.txt'} has no line for 116-288045-0007.flac"
    ]
    gone = [row for row in read_corpus("librispeech", root) if row.id == "116-288045-0000"]
    assert not gone[0].path.exists(), "a line without a recording stays, for the check of its audio to find"
    text(chapter / "116-288045.trans.txt", "116-288045-0000")
    with pytest.raises(SparqError, match=r"trans.txt, line 1 is '116-288045-0000': expected a new id, a space"):
        list(read_corpus("librispeech", root))
    (chapter / "116-288045.trans.txt").unlink()
    with pytest.raises(SparqError, match=r"no such transcript: .*116-288045.trans.txt"):
        list(read_corpus("librispeech", root))


def test_subsets_are_checked(tmp_path: Path) -> None:
    root = _librispeech(tmp_path / "LibriSpeech")
    for subsets, message in (
        (["train-clean-10"], "unknown subset 'train-clean-10': did you mean 'train-clean-100'"),
        (["train-clean-360"], "has no subset 'train-clean-360': expected LibriSpeech/train-clean-100/19/198/"),
        (["test-clean", "test-clean"], "subset 'test-clean' is listed twice"),
    ):
        with pytest.raises(SparqError, match=message):
            list(read_corpus("librispeech", root, subsets))
    with pytest.raises(SparqError, match="holds none of train-clean-100, "):
        list(read_corpus("librispeech", tmp_path))
    with pytest.raises(SparqError, match="no such folder: .*none; name the folder of the librispeech corpus"):
        list(read_corpus("librispeech", tmp_path / "none"))
    with pytest.raises(SparqError, match="unknown format 'librispeach': did you mean 'librispeech'"):
        list(read_corpus("librispeach", tmp_path))


def test_libritts(tmp_path: Path) -> None:
    place = tmp_path / "LibriTTS" / "train-clean-100" / "103" / "1241"
    for name, printed, spoken in (
        ("103_1241_000000_000001", "matters on Mr. Green's side", "matters on mister Green's side"),
        ("103_1241_000004_000001", "“50 miles!”", "“fifty miles!”"),
    ):
        sound(place / f"{name}.wav", rate=24_000)
        text(place / f"{name}.original.txt", printed)
        text(place / f"{name}.normalized.txt", spoken)
    text(place / "103_1241.trans.tsv", "103_1241_000000_000001\tmatters\tmatters")
    text(place / "103_1241.book.tsv", "103_1241_000000_000001\tmatters\tmatters\t1\t1\t1")
    rows = read("libritts", tmp_path / "LibriTTS")
    assert [(r.id, r.speaker, r.split, r.text) for r in rows] == [
        ("103_1241_000000_000001", "103", "train", "matters on mister green's side"),
        ("103_1241_000004_000001", "103", "train", "fifty miles"),
    ]
    (place / "103_1241_000004_000001.normalized.txt").unlink()
    assert "'103_1241_000004_000001': no such normalized text: " in faults("libritts", tmp_path / "LibriTTS")[0]


def test_vctk(tmp_path: Path) -> None:
    root = tmp_path / "VCTK-Corpus-0.92"
    for speaker, microphones in (("p225", (1, 2)), ("p280", (1,)), ("p315", (1,)), ("s5", (1, 2))):
        for microphone in microphones:
            sound(root / "wav48_silence_trimmed" / speaker / f"{speaker}_001_mic{microphone}.flac", rate=48_000)
        if speaker != "p315":
            text(root / "txt" / speaker / f"{speaker}_001.txt", "Please call Stella.")
    text(root / "wav48_silence_trimmed" / "log.txt", "a log")
    text(root / "speaker-info.txt", "ID  AGE  GENDER  ACCENTS  REGION COMMENTS", "p225  23  F    English    Southern")
    said = "please call stella"
    assert [(r.id, r.speaker, r.text) for r in read("vctk", root)] == [
        ("p225_001_mic1", "p225", said), ("p280_001_mic1", "p280", said), ("p315_001_mic1", "p315", ""),
        ("s5_001_mic1", "s5", said),
    ]  # fmt: skip
    assert [r.id for r in read("vctk", root, "mic2")] == ["p225_001_mic2", "s5_001_mic2"]
    assert len(read("vctk", root, "mic1", "mic2")) == 6
    (root / "txt" / "p280" / "p280_001.txt").unlink()
    assert [reason.split(": ")[0] for reason in faults("vctk", root)] == ["utterance 'p280_001_mic1'"]
    with pytest.raises(SparqError, match="unknown subset 'mic3': did you mean"):
        read("vctk", root, "mic3")
    with pytest.raises(SparqError, match="has no wav48_silence_trimmed: expected the folder VCTK-Corpus-0.92"):
        read("vctk", tmp_path)


def test_ljspeech(tmp_path: Path) -> None:
    root = tmp_path / "LJSpeech-1.1"
    for i in (1, 2, 3):
        sound(root / "wavs" / f"LJ001-000{i}.wav", rate=22_050)
    text(
        root / "metadata.csv",
        "LJ001-0001|Printing, in 1455,|Printing, in fourteen fifty-five,",
        'LJ001-0002|"a quotation that ends|"a quotation that ends',
        'LJ001-0003|in the next line."|in the next line."',
    )
    text(root / "README", "The LJ Speech Dataset")
    assert [(r.id, r.speaker, r.split, r.text) for r in read("ljspeech", root)] == [
        ("LJ001-0001", "LJ", "", "printing in fourteen fifty five"),
        ("LJ001-0002", "LJ", "", "a quotation that ends"),
        ("LJ001-0003", "LJ", "", "in the next line"),
    ]
    text(root / "metadata.csv", "LJ001-0001|Printing")
    with pytest.raises(SparqError, match=r"metadata.csv, line 1 has 2 fields: expected id\|printed\|spoken"):
        read("ljspeech", root)
    with pytest.raises(SparqError, match="unknown subset 'train': LJSpeech has no subsets"):
        read("ljspeech", root, "train")


@pytest.mark.parametrize("suffix", ["flac", "opus"])
def test_mls(tmp_path: Path, suffix: str) -> None:
    root = tmp_path / "mls_english"
    text(root / "metainfo.txt", " SPEAKER   |   GENDER   | PARTITION  |  MINUTES   |  BOOK ID   | TITLE | CHAPTER")
    for subset, id_, said in (("train", "4800_10003_000000", "oh my dear you must see him"),
                              ("dev", "5723_4772_000000", "he's gone"), ("test", "4084_6110_000000", "a")):  # fmt: skip
        speaker, book, _ = id_.split("_")
        sound(root / subset / "audio" / speaker / book / f"{id_}.{suffix}")
        text(root / subset / "transcripts.txt", f"{id_}\t{said}")
        text(root / subset / "segments.txt", f"{id_}\thttp://www.archive.org/download/a/a_01_64kb.mp3\t172.6\t189.5")
    text(root / "train" / "limited_supervision" / "9hr" / "handles.txt", "4800_10003_000000")
    assert [(r.id, r.speaker, r.split, r.text, r.path.suffix) for r in read("mls", root)] == [
        ("4800_10003_000000", "4800", "train", "oh my dear you must see him", f".{suffix}"),
        ("5723_4772_000000", "5723", "valid", "he's gone", f".{suffix}"),
        ("4084_6110_000000", "4084", "test", "a", f".{suffix}"),
    ]
    text(root / "dev" / "transcripts.txt", "5723_4772_000000 he's gone")
    with pytest.raises(SparqError, match=r"transcripts.txt, line 1 is .*: expected SPEAKER_BOOK_NUMBER"):
        read("mls", root, "dev")


def _librilight(root: Path, activity: object) -> Path:
    place = root / "small" / "100" / "sea_fairies_0812_librivox_64kb_mp3"
    sound(place / "01_baum_sea_fairies_64kb.flac", seconds=50)
    content = {
        "speaker": "100", "book_meta": {"id": "2389", "title": "Sea Fairies"}, "snr": 5.6, "voice_activity": activity,
    }  # fmt: skip
    (place / "01_baum_sea_fairies_64kb.json").write_text(json.dumps(content))
    return place


def test_librilight_is_cut_along_its_voice_activity(tmp_path: Path) -> None:
    _librilight(tmp_path, [[0.5, 8.0], [9.0, 19.5], [21.0, 22.0], [23.0, 49.0]])
    rows = read("librilight", tmp_path, "small")
    name = "100-sea_fairies_0812_librivox_64kb_mp3-01_baum_sea_fairies_64kb"
    assert [(r.id, r.speaker, r.split, r.text, r.start, r.seconds) for r in rows] == [
        (f"{name}-0000", "100", "", "", 0.5, 19.0),
        (f"{name}-0001", "100", "", "", 21.0, 1.0),
        (f"{name}-0002", "100", "", "", 23.0, 13.0),
        (f"{name}-0003", "100", "", "", 36.0, 13.0),
    ]
    report = prepare([Source(path=tmp_path, corpus="ll", format="librilight")], out=tmp_path / "run")
    assert (report.utterances, report.hours) == (4, pytest.approx(46 / 3600))


@pytest.mark.parametrize("activity", [None, [[1.0]], [[2.0, 1.0]], [[0.0, 2.0], [1.0, 3.0]], [["a", "b"]]])
def test_librilight_faults(tmp_path: Path, activity: object) -> None:
    place = _librilight(tmp_path, activity)
    assert "expected `voice_activity`, a list of [start, end] in seconds" in faults("librilight", tmp_path)[0]
    (place / "01_baum_sea_fairies_64kb.json").unlink()
    assert "no such file: " in faults("librilight", tmp_path)[0]


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 60)), max_size=12))
def test_cuts_cover_all_speech_once(steps: list[tuple[float, float]]) -> None:
    spans, time = [], 0.0
    for pause, length in steps:
        spans.append((time + pause, time + pause + length))
        time = spans[-1][1]
    segments = list(cut(spans, 20.0))
    edges = [(s.start, s.start + s.seconds) for s in segments]
    assert all(s.seconds <= 20.0 + 1e-9 for s in segments)
    assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(edges))
    for first, last in spans:
        inside = sum(max(0.0, min(last, end) - max(first, start)) for start, end in edges)
        assert inside == pytest.approx(last - first, abs=1e-6)
