"""Text without speech, a sentence a line: files of any length, plain or in gzip, read as streams.

LibriSpeech's text for language models, librispeech-lm-norm.txt.gz of OpenSLR 11, is one: 40 million upper case lines.
"""

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparq.audio.text import normalize_text
from sparq.errors import SparqError
from sparq.files import read_lines


def read_texts(path: Path, *, most: int = 0, seed: int = 0) -> Iterator[str]:
    """Stream the lines of a file, normalized; lines without a letter or digit are left out.

    Args:
        path: UTF-8 text; gzip if its name ends with `.gz`.
        most: yield a uniform sample of so many lines, in their order, which alone is held in memory; 0 for all.
        seed: of the sample.

    Raises:
        SparqError: the file is missing or damaged, or a line that is to be returned is in another script.
    """
    numbered: Iterable[tuple[int, str]] = enumerate(read_lines(path, "text file"), start=1)
    if most:
        numbered = sample(numbered, most, seed=seed)
    for number, line in numbered:
        try:
            text = normalize_text(line)
        except SparqError as error:
            raise SparqError(f"{path}, line {number}: {error}") from error
        if text:
            yield text


def sample(items: Iterable[tuple[int, str]], most: int, *, seed: int) -> list[tuple[int, str]]:
    """Return `most` of the items, each set of so many as likely as any other, or all if there are fewer.

    One pass, memory for the sample only: reservoir sampling, "Algorithm L" of Li (1994), which draws how many items
    to skip until the next one that replaces a random one of the sample.

    Args:
        items: number and content, sorted by number; so is the result.
        most: size of the sample.
        seed: another seed is another sample.
    """
    draw = random.Random(seed)
    chosen: list[tuple[int, str]] = []
    weight, skip = 1.0, 0
    for item in items:
        if len(chosen) < most:
            chosen.append(item)
        elif skip:
            skip -= 1
            continue
        else:
            chosen[draw.randrange(most)] = item
        if len(chosen) == most:
            # 1 - random() is above 0, as a logarithm needs.
            weight *= math.exp(math.log(1 - draw.random()) / most)
            skip = math.floor(math.log(1 - draw.random()) / math.log1p(-weight))
    return sorted(chosen)
