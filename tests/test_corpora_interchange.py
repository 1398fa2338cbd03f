"""Manifests and folders of other toolkits: Kaldi, fairseq, Lhotse, Hugging Face."""

import json
from pathlib import Path
from typing import Any

import pytest

from corpus_trees import faults, read, sound, text
from sparq.audio.corpora import corpus_lists, read_corpus
from sparq.audio.waveform import Segment
from sparq.errors import SparqError


def _kaldi(place: Path) -> Path:
    sound(place / "audio" / "rec2.wav", seconds=3)
    sound(place / "audio" / "rec1.wav", seconds=3)
    text(place / "wav.scp", f"rec2 {place / 'audio' / 'rec2.wav'}", "rec1 audio/rec1.wav")
    text(place / "utt2spk", "ben-2 ben", "ann-1 ann", "rec1 ann", "rec2 ben")
    text(place / "text", "ben-2", "ann-1 HELLO  There", "rec2 two words", "rec1 one")
    return place


def test_kaldi_without_segments(tmp_path: Path) -> None:
    rows = read("kaldi", _kaldi(tmp_path / "data" / "train"))
    assert [(r.id, r.speaker, r.split, r.text, r.segment) for r in rows] == [
        ("rec2", "ben", "", "two words", None), ("rec1", "ann", "", "one", None),
    ]  # fmt: skip


def test_kaldi_with_segments(tmp_path: Path) -> None:
    place = _kaldi(tmp_path / "data" / "test_clean")
    text(place / "segments", "ben-2 rec1 0.5 1.25", "ann-1 rec2 0 3")
    assert [(r.id, r.speaker, r.split, r.text, r.segment) for r in read("kaldi", tmp_path / "data", "test_clean")] == [
        ("ben-2", "ben", "test", "", Segment(start=0.5, seconds=0.75)),
        ("ann-1", "ann", "test", "hello there", Segment(start=0.0, seconds=3.0)),
    ]
    assert [path.name for path in corpus_lists("kaldi", tmp_path / "data", ["test_clean"])] == [
        "wav.scp", "segments", "text", "utt2spk",
    ]  # fmt: skip
    text(place / "segments", "ben-2 rec3 0.5 1.25")
    assert "segments, line 1, utterance 'ben-2': no recording of that name in" in faults("kaldi", place)[0]
    for line in ("ben-2 rec1 0.5", "ben-2 rec1 1 0.5", "ben-2 rec1 a b", "ben-2 rec1 0 -1", ""):
        text(place / "segments", line)
        with pytest.raises(SparqError, match="segments, line 1 is '.*': expected"):
            list(read_corpus("kaldi", place))


def test_kaldi_commands_are_never_run(tmp_path: Path) -> None:
    place, trace = _kaldi(tmp_path), tmp_path / "trace"
    text(place / "wav.scp", f"rec1 touch {trace} |", "rec2 audio/rec2.wav")
    assert ["has a command, which is never run" in reason for reason in faults("kaldi", place)] == [True]
    assert not trace.exists()


def test_kaldi_faults(tmp_path: Path) -> None:
    place = _kaldi(tmp_path)
    text(place / "utt2spk", "rec2 ben")
    assert ["utterance 'rec1': no line of it in" in reason for reason in faults("kaldi", place)] == [True]
    text(place / "utt2spk", "rec1 ben", "rec1 ann")
    with pytest.raises(SparqError, match="utt2spk has 'rec1' twice: keep one"):
        list(read_corpus("kaldi", place))
    (place / "utt2spk").unlink()
    text(place / "wav.scp", "rec1")
    with pytest.raises(SparqError, match=r"wav.scp, line 1 is 'rec1': expected a name, a space and a value"):
        list(read_corpus("kaldi", place))
    (place / "wav.scp").unlink()
    with pytest.raises(SparqError, match=r"no such Kaldi list: .*wav.scp"):
        list(read_corpus("kaldi", place))


@pytest.mark.parametrize(("suffix", "lines"), [("wrd", ["HELLO THERE", "YES"]),
                                               ("ltr", ["H E L L O | T H E R E |", "Y E S |"]), ("", [])])  # fmt: skip
def test_fairseq(tmp_path: Path, suffix: str, lines: list[str]) -> None:
    for name in ("84/121123/84-121123-0000.flac", "84/121123/84-121123-0001.flac"):
        sound(tmp_path / "LibriSpeech" / name, seconds=1.5)
    for name in ("train", "valid"):
        rows = [f"84/121123/84-121123-000{i}.flac\t24000" for i in (0, 1)]
        text(tmp_path / "lists" / f"{name}.tsv", str(tmp_path / "LibriSpeech"), *rows)
        if suffix:
            text(tmp_path / "lists" / f"{name}.{suffix}", *lines)
    text(tmp_path / "lists" / "dict.ltr.txt", "| 94802", "E 51860")
    said = ["hello there", "yes"] if suffix else ["", ""]
    rows = read("fairseq", tmp_path / "lists")
    assert [(r.split, r.seconds, r.text) for r in rows] == [
        (split, 1.5, t) for split in ("train", "valid") for t in said
    ]
    assert rows[0].id == "84-121123-84-121123-0000"
    assert len(read("fairseq", tmp_path / "lists", "valid")) == 2
    with pytest.raises(SparqError, match=r"has no vald.tsv: did you mean 'valid'"):
        read("fairseq", tmp_path / "lists", "vald")


def test_fairseq_faults(tmp_path: Path) -> None:
    with pytest.raises(SparqError, match=r"holds no .tsv: expected fairseq's train.tsv"):
        read("fairseq", tmp_path)
    text(tmp_path / "train.tsv", ".", "a.wav\t16000", "b.wav\t16000")
    for lines, message in ((["one"], "has 1 lines, fewer than"), (["one", "two", "three"], "has more lines than")):
        text(tmp_path / "train.wrd", *lines)
        with pytest.raises(SparqError, match=message):
            list(read_corpus("fairseq", tmp_path))
    text(tmp_path / "train.tsv", ".", "a.wav 16000")
    with pytest.raises(SparqError, match=r"line 2 is 'a.wav 16000': expected a path below"):
        list(read_corpus("fairseq", tmp_path))


def _cut(**changes: Any) -> dict[str, Any]:
    """A cut with every field that Lhotse writes."""
    return {
        "id": "cut-1", "start": 0.5, "duration": 1.25, "channel": 0,
        "supervisions": [
            {"id": "sup-1", "recording_id": "rec-1", "start": 0.0, "duration": 1.25, "channel": 0,
             "text": "HELLO THERE", "language": "English", "speaker": "ann"},
        ],
        "recording": {
            "id": "rec-1", "sources": [{"type": "file", "channels": [0], "source": "audio/rec-1.wav"}],
            "sampling_rate": 16000, "num_samples": 48000, "duration": 3.0, "channel_ids": [0],
        },
        "type": "MonoCut", **changes,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_lhotse(tmp_path: Path, suffix: str) -> None:
    sound(tmp_path / "audio" / "rec-1.wav", seconds=3)
    second = {**_cut()["supervisions"][0], "id": "sup-2", "text": "again", "start": 2.0, "duration": 1.0}
    whole = _cut(id="cut-2", start=0, duration=3.0, supervisions=[*_cut()["supervisions"], second])
    other = _cut(id="cut-3", supervisions=[second, {**second, "speaker": "ben"}])
    lines = [json.dumps(cut) for cut in (_cut(), whole, other, _cut(id="cut-4", supervisions=[]))]
    text(tmp_path / f"librispeech_cuts_dev-clean.{suffix}", *lines)
    text(tmp_path / f"librispeech_recordings_dev-clean.{suffix}", "{}")
    rows = read("lhotse", tmp_path)
    assert [(r.id, r.speaker, r.split, r.text, r.start, r.seconds) for r in rows] == [
        ("cut-1", "ann", "valid", "hello there", 0.5, 1.25),
        ("cut-2", "ann", "valid", "hello there again", None, 3.0),
        ("cut-3", "", "valid", "again again", 0.5, 1.25),
        ("cut-4", "", "valid", "", 0.5, 1.25),
    ]


def _recording(**changes: Any) -> dict[str, Any]:
    return {**_cut()["recording"], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "MixedCut"}, "a cut of type 'MixedCut': save MonoCuts"),
        ({"recording": None}, "a cut of features without a recording"),
        ({"recording": _recording(transforms=[{"name": "Speed"}])}, "a recording with transforms"),
        (
            {"recording": _recording(sources=[{"type": "command", "channels": [0], "source": "touch trace"}])},
            "a source of type 'command', which is not read",
        ),
        (
            {"recording": _recording(sources=[{"type": "file", "channels": [0, 1], "source": "a.wav"}])},
            "a recording of 2 channels",
        ),
        ({"start": -1}, "start -1.0 and duration 1.25 are no times"),
    ],
)
def test_cuts_that_are_not_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    text(tmp_path / "cuts.jsonl", json.dumps(_cut(**changes)))
    reasons = faults("lhotse", tmp_path)
    assert len(reasons) == 1
    assert message in reasons[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is no cut: expected an object with an `id`"),
        (json.dumps({"id": "a", "type": "MonoCut", "recording": {}}), "is no cut that Lhotse writes .KeyError"),
    ],
)
def test_broken_lhotse_manifests(tmp_path: Path, line: str, message: str) -> None:
    text(tmp_path / "cuts.jsonl", line)
    with pytest.raises(SparqError, match=message):
        list(read_corpus("lhotse", tmp_path))


def test_a_cut_gzip_file_is_said_to_be_cut(tmp_path: Path) -> None:
    path = text(tmp_path / "cuts.jsonl.gz", *[json.dumps(_cut(id=f"cut-{i}")) for i in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SparqError, match=r"cannot read Lhotse manifest .*cuts.jsonl.gz after line \d+: Compressed"):
        list(read_corpus("lhotse", tmp_path))


def test_huggingface_audio_folder(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        sound(tmp_path / "data" / split / "a b.wav")
        sound(tmp_path / "data" / split / "more" / "c.wav")
        text(
            tmp_path / "data" / split / "metadata.csv", "file_name,speaker_id,transcription",
            'a b.wav,7,"Yes, and\nno"', "more/c.wav,8,ok",
        )  # fmt: skip
    rows = read("huggingface", tmp_path)
    assert [(r.id, r.speaker, r.split, r.text) for r in rows] == [
        (f"{split}-{id_}", speaker, name, said)
        for split, name in (("test", "test"), ("train", "train"), ("validation", "valid"))
        for id_, speaker, said in (("a_b", "7", "yes and no"), ("more-c", "8", "ok"))
    ]
    assert {r.split for r in read("huggingface", tmp_path, "test")} == {"test"}
    with pytest.raises(SparqError, match=r"has no tset/metadata.csv: did you mean 'test'"):
        read("huggingface", tmp_path, "tset")


def test_huggingface_single_metadata(tmp_path: Path) -> None:
    records = [{"file_name": n, "sentence": "Hi!", "speaker": 3, "up_votes": 2} for n in ("a.wav", "train/b.wav")]
    for record in records:
        sound(tmp_path / str(record["file_name"]))
    text(tmp_path / "metadata.jsonl", *map(json.dumps, records))
    assert [(r.id, r.speaker, r.split, r.text) for r in read("huggingface", tmp_path)] == [
        ("a", "3", "", "hi"), ("train-b", "3", "train", "hi"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("metadata.csv", ["file,text", "a.wav,x"], "line 2 has no file_name: name the sound file"),
        ("metadata.csv", ["file_name,text", "a.wav"], "line 2 has not as many fields as the header"),
        ("metadata.csv", ["file_name,text", "a.wav,x,y"], "line 2 has not as many fields as the header"),
        ("metadata.csv", ["file_name,text", 'a.wav,"x'], "is not CSV: unexpected end of data"),
        ("metadata.jsonl", ["[1]"], "line 1 is no JSON object"),
        ("metadata.jsonl", ["{"], "line 1 is not JSON"),
        ("metadata.csv", ["file_name,text"], "has no recordings of the format huggingface"),
        ("train-00000-of-00001.parquet", ["PAR1"], "holds its audio inside: write each `audio.bytes` to a file"),
        ("README.md", ["---"], r"has no metadata.csv or metadata.jsonl"),
    ],
)
def test_huggingface_faults(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    text(tmp_path / "data" / name, *lines)
    with pytest.raises(SparqError, match=message) as caught:
        list(read_corpus("huggingface", tmp_path))
    assert "\n" not in str(caught.value)
