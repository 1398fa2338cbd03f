"""Manifests: a round trip changes nothing, text has one spelling, each fault has its line."""

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparq.audio.manifest import Utterance, read_manifest, write_manifest
from sparq.audio.text import normalize_text
from sparq.audio.waveform import Segment
from sparq.errors import SparqError


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _fault(path: Path, **options: bool) -> str:
    with pytest.raises(SparqError) as caught:
        read_manifest(path, **{"require_audio": False, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- text


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("PRINTING, in the only sense", "printing in the only sense"),
        ("It’s  Fred's -- \t 'tis the boys'!", "it's fred's 'tis the boys'"),
        ("rock ' n ' roll '' ", "rock n roll"),
        ("ﬁne ｆｕｌｌ Ⅷ ½", "fine full viii 1 2"),
        ("Übergrößenträger naïve İzmir", "übergrößenträger naïve izmir"),
        ("u\u0308ber", "über"),
        ("x\u0301\u0302", "x"),
        ("<generatetext> a|b_c", "generatetext a b c"),
        ("50% $3.20", "50 3 20"),
        ("… — “ ”", ""),
        ("", ""),
    ],
)
def test_normalize_text(raw: str, normal: str) -> None:
    assert normalize_text(raw) == normal


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("hello 世界", "CJK UNIFIED IDEOGRAPH-4E16"),
        ("привет", "CYRILLIC SMALL LETTER PE"),
        ("5 µm", "GREEK SMALL LETTER MU"),
        ("٣", "ARABIC-INDIC DIGIT THREE"),
        ("한", "HANGUL SYLLABLE HAN"),
        ("〇", "IDEOGRAPHIC NUMBER ZERO"),
    ],
)
def test_other_scripts_are_named(raw: str, name: str) -> None:
    with pytest.raises(SparqError, match=re.escape(name)):
        normalize_text(raw)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\u01c5 \u1e9e \u0130\u0307 ŉ")
@settings(max_examples=300)
def test_normal_text_has_only_what_it_may(raw: str) -> None:
    try:
        text = normalize_text(raw)
    except SparqError:
        return
    assert normalize_text(text) == text
    assert text == unicodedata.normalize("NFKC", text).lower()
    assert text == " ".join(text.split(" ")).strip()
    for character in text.replace(" ", "").replace("'", ""):
        assert character in "0123456789" or unicodedata.name(character).startswith("LATIN ")
        assert not 0x4E00 <= ord(character) <= 0x9FFF


# --- reading and writing


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_normalized_as_all_text_is(raw: str) -> None:
    """A dash counts as a space, but it is no ASCII."""
    assert normalize_text(raw) == normalize_text(raw + "–")


_NAMES = st.text(st.characters(categories=["L", "N", "P"], exclude_characters="/\\"), min_size=1, max_size=8)
_TEXTS = st.text(st.sampled_from("abc' é"), max_size=12).map(normalize_text)
_UTTERANCES = st.lists(
    st.builds(
        Utterance,
        id=_NAMES,
        path=st.lists(_NAMES.filter(lambda name: name.strip(".")), min_size=1, max_size=3).map(
            lambda parts: Path("/audio").joinpath(*parts)
        ),
        speaker=st.one_of(st.just(""), _NAMES),
        split=st.sampled_from(["", "train", "valid", "test", "test-unseen-voice", "test_2.b"]),
        start=st.one_of(st.none(), st.floats(0, 1e6)),
        seconds=st.floats(0, 1e6, exclude_min=True),
        corpus=st.one_of(st.just(""), _NAMES),
        text=_TEXTS,
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda utterance: utterance.id,
)


@given(_UTTERANCES)
@settings(max_examples=50)
def test_roundtrip(tmp_path_factory: pytest.TempPathFactory, utterances: list[Utterance]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "manifest.tsv"
    write_manifest(path, utterances)
    first = path.read_bytes()
    assert read_manifest(path, require_audio=False) == utterances
    write_manifest(path, read_manifest(path, require_audio=False))
    assert path.read_bytes() == first


def test_paths_below_the_manifest_are_relative_and_move_with_it(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    audio = old / "audio" / "a.wav"
    audio.parent.mkdir(parents=True)
    audio.touch()
    outside = tmp_path / "b.wav"
    outside.touch()
    write_manifest(old / "m.tsv", [Utterance(id="a", path=audio), Utterance(id="b", path=outside)])
    assert "\taudio/a.wav\t" not in (old / "m.tsv").read_text().splitlines()[0]
    assert (old / "m.tsv").read_text().splitlines()[1].split("\t")[1] == "audio/a.wav"
    assert (old / "m.tsv").read_text().splitlines()[2].split("\t")[1] == str(outside)
    old.rename(new)
    assert [u.path for u in read_manifest(new / "m.tsv")] == [new / "audio" / "a.wav", outside]


def test_a_relative_manifest_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.wav").touch()
    _write(Path("m.tsv"), "id\tpath", "a\ta.wav")
    assert read_manifest("m.tsv") == [Utterance(id="a", path=tmp_path / "a.wav")]


def test_column_order_byte_order_mark_and_carriage_returns_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    path.write_bytes(b"\xef\xbb\xbftext\tpath\tid\tseconds\r\nHello, You\ta.wav\ta\t1.5\r\n")
    assert read_manifest(path, require_audio=False) == [
        Utterance(id="a", path=tmp_path / "a.wav", seconds=1.5, text="hello you")
    ]


def test_unicode_line_separators_are_part_of_a_field(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.tsv", "id\tpath\ttext", "a\ta.wav\tone\u2028two\x85three")
    assert read_manifest(path, require_audio=False)[0].text == "one two three"


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    write_manifest(path, [Utterance(id="a", path=tmp_path / "a.wav")])
    before = path.read_bytes()
    bad = {"speaker": "b\nc", "id": "a b", "path": tmp_path / "a\tb.wav"}
    for field, value in bad.items():
        utterance = Utterance(**{"id": "b", "path": tmp_path / "b.wav", field: value})
        with pytest.raises(SparqError):
            write_manifest(path, [utterance])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- faults


def test_missing_manifest(tmp_path: Path) -> None:
    assert "no such manifest" in _fault(tmp_path / "none.tsv")
    assert "cannot read manifest" in _fault(tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    path.write_bytes("id\tpath\ttext\na\ta.wav\tnaïve\n".encode("latin-1"))
    assert "is not UTF-8: line 2 has the byte 0xef" in _fault(path)


@pytest.mark.parametrize("content", ["", "\n\n", "id\tpath\n", "id\tpath\n\n\n"])
def test_no_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.tsv"
    path.write_text(content)
    assert "has no rows" in _fault(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("id\tpath\tspeker", "unknown column 'speker': did you mean 'speaker'?"),
        ("id\tfile\ttext", "unknown column 'file': valid: id, path, speaker, split, start, seconds, corpus, text"),
        ("id\tpath\tid", "column 'id' occurs 2 times"),
        ("id\ttext\tspeaker", "no column 'path'"),
        ("path\ttext\tspeaker", "no column 'id'"),
        ("id,path,text", "single column: separate the columns"),
    ],
)
def test_header(tmp_path: Path, header: str, message: str) -> None:
    assert message in _fault(_write(tmp_path / "m.tsv", header, "a\tb\tc"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a\ta.wav\t\t1\thi", "b\tb.wav\t\t1"], "line 3 has 4 fields, the header has 5"),
        (["a\ta.wav\t\t1\thi\tthere"], "line 2 has 6 fields"),
        (["a\ta.wav\t\t1\thi", "", "b\tb.wav\t\t1\thi"], "line 3 has 1 fields"),
        (
            ["a\ta.wav\t\t1\thi", "b\tb.wav\t\t1\thi", "a\tc.wav\t\t1\thi"],
            "duplicate id 'a' in lines 2 and 4",
        ),
        (["\ta.wav\t\t1\thi"], "line 2: id is empty"),
        (["x/a\ta.wav\t\t1\thi"], "id 'x/a' contains '/'"),
        (["x\\a\ta.wav\t\t1\thi"], r"contains '\\'"),
        (["x a\ta.wav\t\t1\thi"], "id 'x a' contains ' '"),
        (["x\u2003a\ta.wav\t\t1\thi"], "contains '\\u2003'"),
        (["a\t\t\t1\thi"], "utterance 'a': empty path"),
        (["a\ta.wav\tdev\t1\thi"], "unknown split 'dev'"),
        (["a\ta.wav\ttrian\t1\thi"], "unknown split 'trian': did you mean 'train'?"),
        (["a\ta.wav\ttest/x\t1\thi"], "unknown split 'test/x'"),
        (["a\ta.wav\t\tlong\thi"], "utterance 'a': seconds 'long' is not a number"),
        (["a\ta.wav\t\t-1\thi"], "utterance 'a': seconds '-1' is not a length"),
        (["a\ta.wav\t\tnan\thi"], "seconds 'nan' is not a length"),
        (["a\ta.wav\t\tinf\thi"], "seconds 'inf' is not a length"),
        (["a\ta.wav\t\t1\t..."], "utterance 'a': text '...' has no letter or digit"),
        (["a\ta.wav\t\t1\t'"], "has no letter or digit"),
        (["a\ta.wav\t\t1\tok 世"], "utterance 'a': text has '世' (CJK UNIFIED IDEOGRAPH-4E16)"),
    ],
)
def test_rows(tmp_path: Path, rows: list[str], message: str) -> None:
    path = _write(tmp_path / "m.tsv", "id\tpath\tsplit\tseconds\ttext", *rows)
    assert message in _fault(path)
    assert str(path) in _fault(path)


@pytest.mark.parametrize(
    ("start", "seconds", "message"),
    [
        ("soon", "1", "start 'soon' is not a number"),
        ("-1", "1", "start '-1' is not a time"),
        ("2", "", "start 2 without seconds: write how long the part is"),
        ("0", "0", "start 0 without seconds"),
    ],
)
def test_starts(tmp_path: Path, start: str, seconds: str, message: str) -> None:
    path = _write(tmp_path / "m.tsv", "id\tpath\tstart\tseconds", f"a\ta.wav\t{start}\t{seconds}")
    assert message in _fault(path)


def test_a_start_makes_a_segment(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.tsv", "id\tpath\tstart\tseconds", "a\ta.wav\t0\t2", "b\ta.wav\t\t2")
    first, second = read_manifest(path, require_audio=False)
    assert (first.segment, second.segment) == (Segment(start=0.0, seconds=2.0), None)


def test_missing_audio_only_where_it_is_required(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.tsv", "id\tpath", "a\ta.wav")
    assert len(read_manifest(path, require_audio=False)) == 1
    assert "utterance 'a': no such audio file" in _fault(path, require_audio=True)
