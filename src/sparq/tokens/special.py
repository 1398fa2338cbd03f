"""The special tokens of the four tasks (VoxtLM's, which SpARQ section 3.1 follows) and the unit alphabet."""

from collections.abc import Sequence

PAD = "<pad>"
UNKNOWN = "<unk>"
END = "<end>"
START_OF_SPEECH = "<startofspeech>"
START_OF_TEXT = "<startoftext>"
GENERATE_SPEECH = "<generatespeech>"
GENERATE_TEXT = "<generatetext>"

TASK_TOKENS = (START_OF_SPEECH, START_OF_TEXT, GENERATE_SPEECH, GENERATE_TEXT)

FIRST_UNIT = 0x4E00
"""Unit u is written as the character chr(FIRST_UNIT + u), a CJK ideograph, as VoxtLM does."""

MAX_UNITS = 0x9FFF - FIRST_UNIT + 1


def units_to_text(units: Sequence[int]) -> str:
    """Write units as characters, one a unit.

    >>> units_to_text([0, 1, 2])
    '一丁丂'
    """
    assert all(0 <= unit < MAX_UNITS for unit in units), f"unit outside [0, {MAX_UNITS})"
    return "".join(chr(FIRST_UNIT + unit) for unit in units)


def text_to_units(text: str) -> list[int]:
    """Read the units out of a string; characters outside of the unit alphabet are passed over.

    A model may generate text pieces where speech was asked for: they are no units and count as deletions.
    """
    return [ord(character) - FIRST_UNIT for character in text if 0 <= ord(character) - FIRST_UNIT < MAX_UNITS]
