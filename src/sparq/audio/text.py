"""One spelling of text for all four tasks."""

import unicodedata

from sparq.errors import SparqError

# Typographic apostrophe and the modifier letter of that shape; U+FF07 becomes "'" by NFKC.
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'"})


def normalize_text(text: str) -> str:
    """Return text in the form that all tasks train on and are scored on; doing it twice changes nothing.

    NFKC, lower case; Latin letters (accented ones too), the digits 0-9 and apostrophes stay, accents that do
    not combine with their letter are dropped, everything else becomes a space; spaces are collapsed, and an
    apostrophe that belongs to no letter or digit goes. Speech unit u is the character chr(0x4E00 + u), which
    is why text in other scripts cannot pass: a Chinese character would read as a unit.

    >>> normalize_text("  It’s ｆｉｎｅ -- Über 50% ...")
    "it's fine über 50"

    Raises:
        SparqError: a letter or digit of another script, by character and Unicode name.
    """
    if text.isascii():
        # The same, several times as fast: text files have millions of such lines.
        kept = text.translate(_ASCII)
    else:
        # Lower case can undo the composition (İ becomes i and a dot above), so it is composed again.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).translate(_APOSTROPHES)
        kept = "".join(_keep(character) for character in text)
    return " ".join(word for word in kept.split() if word.strip("'"))


def _keep(character: str) -> str:
    if character == "'" or (character.isascii() and character.isalnum()):
        return character
    category = unicodedata.category(character)
    if category[0] == "M":
        return ""
    if category[0] in "LN":
        name = unicodedata.name(character, f"U+{ord(character):04X}")
        if category[0] == "N" or not name.startswith("LATIN "):
            raise SparqError(
                f"text has {character!r} ({name}): only Latin letters and the digits 0-9 can be told from"
                " speech units; transliterate it"
            )
        return character
    return " "


_ASCII = {code: _keep(chr(code).lower()) for code in range(128)}
