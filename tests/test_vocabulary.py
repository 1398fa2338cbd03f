"""The joint vocabulary and the templates."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sparq.errors import SparqError
from sparq.tokens import JointVocabulary, fit_vocabulary, make_example, prompt_ids
from sparq.tokens.special import END, TASK_TOKENS, text_to_units, units_to_text
from sparq.tokens.vocabulary import as_line

TEXTS = ["turn on the red lamp", "close the door", "the lamp on the door", "turn the red door"]
UNITS = [[1, 2, 3, 1, 2], [4, 1, 2, 3], [0, 5, 1, 2, 3, 4]]


def build(model_type: str = "bpe", size: int = 60) -> JointVocabulary:
    lines = [as_line(t) for t in TEXTS] * 3 + [units_to_text(u) for u in UNITS] * 3
    return fit_vocabulary(lines, size=size, num_units=8, units_fingerprint="units", model_type=model_type)


@pytest.fixture(scope="module")
def vocabulary() -> JointVocabulary:
    return build()


@given(st.lists(st.integers(0, 7), max_size=40))
def test_units_survive(units: list[int]) -> None:
    vocabulary = _SHARED
    ids = vocabulary.encode_units(units)
    assert vocabulary.decode_units(ids) == units
    assert vocabulary.decode_text(ids) == ""


_SHARED = build()


@given(st.lists(st.sampled_from(sorted(set(" ".join(TEXTS).split()))), max_size=8))
def test_text_survives(words: list[str]) -> None:
    text = " ".join(words)
    assert _SHARED.decode_text(_SHARED.encode_text(text)) == text
    assert _SHARED.decode_units(_SHARED.encode_text(text)) == []


@given(st.lists(st.integers(0, 20991), max_size=20))
def test_unit_alphabet(units: list[int]) -> None:
    assert text_to_units(units_to_text(units)) == units


def test_no_piece_mixes_units_and_letters(vocabulary: JointVocabulary) -> None:
    for piece in vocabulary.pieces:
        if piece.startswith("<"):
            continue
        assert len(text_to_units(piece)) in (0, len(piece))


def test_every_unit_has_a_piece_even_unseen(vocabulary: JointVocabulary) -> None:
    assert vocabulary.decode_units(vocabulary.encode_units([6, 7])) == [6, 7]
    with pytest.raises(SparqError, match="unit 8 is outside of this vocabulary's 8 units"):
        vocabulary.encode_units([8])


def test_templates_are_voxtlms(vocabulary: JointVocabulary) -> None:
    text, units = "close the door", [1, 2, 3]
    spelled = {
        task: [vocabulary.pieces[i] for i in (*example.prompt, *example.target)]
        for task in ("textlm", "speechlm", "asr", "tts")
        for example in [make_example(vocabulary, task, text=text, units=units)]
    }
    words = [vocabulary.pieces[i] for i in vocabulary.encode_text(text)]
    sounds = [vocabulary.pieces[i] for i in vocabulary.encode_units(units)]
    assert spelled["textlm"] == ["<generatetext>", *words, "<end>"]
    assert spelled["speechlm"] == ["<generatespeech>", *sounds, "<end>"]
    assert spelled["asr"] == ["<startofspeech>", *sounds, "<generatetext>", *words, "<end>"]
    assert spelled["tts"] == ["<startoftext>", *words, "<generatespeech>", *sounds, "<end>"]
    asr = make_example(vocabulary, "asr", text=text, units=units)
    assert asr.prompt == prompt_ids(vocabulary, "asr", units=units)
    assert vocabulary.pieces[asr.target[-1]] == END


def test_task_tokens_cannot_be_spelled_by_text(vocabulary: JointVocabulary) -> None:
    ids = {vocabulary.token_id(token) for token in TASK_TOKENS}
    assert not ids & set(vocabulary.encode_text("generatetext startofspeech"))


def test_saved_and_loaded(vocabulary: JointVocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path)
    loaded = JointVocabulary.load(tmp_path, units_fingerprint="units")
    assert loaded == vocabulary
    assert loaded.fingerprint == vocabulary.fingerprint
    with pytest.raises(SparqError, match="made for units units, but these units are others"):
        JointVocabulary.load(tmp_path, units_fingerprint="others")


def test_fitting_is_reproducible() -> None:
    assert build().model == build().model


def test_parts_that_do_not_belong_together(vocabulary: JointVocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path)
    (tmp_path / "joint.model").write_bytes(build(size=50).model)
    with pytest.raises(SparqError, match="do not belong together"):
        JointVocabulary.load(tmp_path)
    (tmp_path / "joint.model").write_bytes(b"no model")
    with pytest.raises(SparqError, match="is not a SentencePiece model"):
        JointVocabulary.load(tmp_path)
    with pytest.raises(SparqError, match="no such file"):
        JointVocabulary.load(tmp_path / "nowhere")


def test_a_size_that_does_not_fit() -> None:
    with pytest.raises(SparqError, match="cannot fit a vocabulary of 5000 pieces: Vocabulary size"):
        build(size=5000)
    with pytest.raises(SparqError, match="cannot fit a vocabulary of 9 pieces: "):
        build(size=9)
    with pytest.raises(SparqError, match="training split is empty"):
        fit_vocabulary([], size=10, num_units=2, units_fingerprint="x")
