"""The joint vocabulary: one SentencePiece model over speech units and text (SpARQ section 3.1)."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from sparq.errors import SparqError
from sparq.files import atomic_path, fingerprint, read_json, write_json
from sparq.tokens.special import END, PAD, TASK_TOKENS, UNKNOWN, text_to_units, units_to_text

MODEL_FILE = "joint.model"
DESCRIPTION_FILE = "vocabulary.json"
FORMAT = 1

MAX_LINE_BYTES = 1 << 20
"""SentencePiece drops longer lines without a word (4192 bytes by default, and a unit takes 3); we refuse them."""


@dataclass(frozen=True, kw_only=True)
class JointVocabulary:
    """Token ids for text, speech units and the task tokens.

    Attributes:
        model: the bytes of the SentencePiece model.
        num_units: the size k of the unit alphabet.
        units_fingerprint: the fingerprint of the k-means that the units come from.
    """

    model: bytes
    num_units: int
    units_fingerprint: str

    def __post_init__(self) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        object.__setattr__(self, "_processor", processor)
        object.__setattr__(self, "_ids", {processor.id_to_piece(i): i for i in range(processor.get_piece_size())})

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def pieces(self) -> list[str]:
        """Every piece, in the order of its id."""
        return list(self._ids)  # type: ignore[attr-defined]

    @property
    def fingerprint(self) -> str:
        """Name of this vocabulary together with the units it is bound to."""
        return fingerprint(self.model.hex(), self.num_units, self.units_fingerprint)

    def token_id(self, piece: str) -> int:
        """Return the id of a piece that is known to be there."""
        return int(self._ids[piece])  # type: ignore[attr-defined]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of normalized text."""
        return list(self._processor.encode(as_line(text)))  # type: ignore[attr-defined]

    def encode_units(self, units: Sequence[int]) -> list[int]:
        """Return the ids of a unit sequence; pieces may span several units.

        Raises:
            SparqError: a unit is outside of the alphabet.
        """
        if units and max(units) >= self.num_units:
            raise SparqError(f"unit {max(units)} is outside of this vocabulary's {self.num_units} units")
        return list(self._processor.encode(units_to_text(units)))  # type: ignore[attr-defined]

    def decode_text(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and unit pieces are left out."""
        text = self._processor.decode([i for i in ids if i not in self._special_ids])  # type: ignore[attr-defined]
        return " ".join("".join(c for c in text if not text_to_units(c)).split())

    def decode_units(self, ids: Sequence[int]) -> list[int]:
        """Return the units of ids; special tokens and text pieces are left out."""
        return text_to_units(self._processor.decode([i for i in ids if i not in self._special_ids]))  # type: ignore[attr-defined]

    @property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.token_id(piece) for piece in (PAD, UNKNOWN, END, *TASK_TOKENS))

    def save(self, folder: Path) -> None:
        """Write `joint.model` and `vocabulary.json`."""
        with atomic_path(folder / MODEL_FILE) as temporary:
            temporary.write_bytes(self.model)
        write_json(
            folder / DESCRIPTION_FILE,
            {
                "format": FORMAT,
                "size": len(self),
                "num_units": self.num_units,
                "units_fingerprint": self.units_fingerprint,
                "fingerprint": self.fingerprint,
            },
        )

    @classmethod
    def load(cls, folder: Path, units_fingerprint: str | None = None) -> "JointVocabulary":
        """Read a saved vocabulary.

        Args:
            folder: where `save` wrote it.
            units_fingerprint: if given, the k-means that it has to belong to.

        Raises:
            SparqError: a file is missing or changed, or the vocabulary belongs to other units.
        """
        description = read_json(folder / DESCRIPTION_FILE)
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise SparqError(f"{folder / DESCRIPTION_FILE} is not a vocabulary of format {FORMAT}")
        path = folder / MODEL_FILE
        if not path.exists():
            raise SparqError(f"no such file: {path}")
        try:
            vocabulary = cls(
                model=path.read_bytes(),
                num_units=description["num_units"],
                units_fingerprint=description["units_fingerprint"],
            )
        except RuntimeError as error:
            raise SparqError(f"{path} is not a SentencePiece model") from error
        if vocabulary.fingerprint != description["fingerprint"]:
            raise SparqError(
                f"{path} has fingerprint {vocabulary.fingerprint}, {DESCRIPTION_FILE} says"
                f" {description['fingerprint']}: the two files do not belong together"
            )
        if units_fingerprint is not None and vocabulary.units_fingerprint != units_fingerprint:
            raise SparqError(
                f"the vocabulary in {folder} was made for units {vocabulary.units_fingerprint}, but these units are"
                f" {units_fingerprint}: make the vocabulary again from these units, or use the units it was made for"
            )
        return vocabulary


def as_line(text: str) -> str:
    """Return text as the subword model reads it: every word, the first one too, opens with a space.

    SentencePiece's own dummy prefix would open unit sequences with a space as well and give each unit piece a twin.
    """
    return f" {text}" if text else ""


def fit_vocabulary(
    lines: Iterable[str], *, size: int, num_units: int, units_fingerprint: str, model_type: str = "unigram"
) -> JointVocabulary:
    """Fit the subword model on unit lines and text lines together.

    Every unit of the alphabet gets a piece, whether it occurs or not. Coverage is 1.0 and scripts stay split, so that
    no piece mixes units and letters.

    Args:
        lines: units written by `units_to_text`, and normalized text written by `as_line`.
        size: number of pieces, special tokens included (paper: 5000 for k = 200).
        num_units: size of the unit alphabet.
        units_fingerprint: fingerprint of the k-means.
        model_type: `unigram` (the papers') or `bpe`. Unigram takes its seed pieces from distinct words, counting each
            word once, so a small closed vocabulary yields few whole-word pieces; BPE counts every occurrence.

    Raises:
        SparqError: the size does not fit the lines.
    """
    lines = list(lines)
    longest = max((len(line.encode()) for line in lines), default=0)
    if longest > MAX_LINE_BYTES:
        raise SparqError(f"a line of {longest} bytes is over SentencePiece's limit of {MAX_LINE_BYTES}: split it")
    if not lines:
        raise SparqError("no lines to fit a vocabulary on: the training split is empty")
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            vocab_size=size,
            model_type=model_type,
            character_coverage=1.0,
            user_defined_symbols=list(TASK_TOKENS),
            required_chars=units_to_text(range(num_units)),
            pad_id=0,
            pad_piece=PAD,
            unk_id=1,
            unk_piece=UNKNOWN,
            bos_id=-1,
            eos_id=2,
            eos_piece=END,
            max_sentence_length=MAX_LINE_BYTES,
            # The default normalizer (NFKC) would fold compatibility characters among the units.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition("] ")[2] or str(error)
        raise SparqError(f"cannot fit a vocabulary of {size} pieces: {reason}") from error
    return JointVocabulary(model=buffer.getvalue(), num_units=num_units, units_fingerprint=units_fingerprint)
