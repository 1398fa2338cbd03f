#!/usr/bin/env python3
"""Make the embedded corpus of `sparq demo`: spoken commands, synthesized by Flite, as one zip of Ogg Opus files.

    apt-get install flite
    python scripts/make_demo_corpus.py src/sparq/demo/corpus.zip

The sentences come from the templates below. Voices are Flite's kal16, awb and slt, each also with pitch and formants
moved (synthesized slower or faster, then resampled back to the same length); rms is heard in the test only. No sentence
of valid or test is in train. Flite's voices are under its BSD-like license; the sentences are part of this project.
"""

import argparse
import io
import itertools
import random
import subprocess
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16_000
BITRATE = 16_000
TRAIN_VOICES = (("kal16", 1.0), ("awb", 1.0), ("slt", 1.0), ("kal16", 0.88), ("slt", 0.9), ("awb", 1.12))
UNSEEN_VOICE = ("rms", 1.0)
NUM_TRAIN, NUM_TWICE, NUM_VALID, NUM_TEST, NUM_UNSEEN = 1190, 760, 60, 120, 120

ROOMS = "kitchen bedroom garage garden office hallway"
DEVICES = "lamp heater radio fan"
OPENINGS = "window door curtain gate"
COLORS = "red green blue yellow white purple"
NAMES = "maria oliver henry sophie daniel clara"
DAYS = "monday tuesday wednesday thursday friday saturday sunday"
MONTHS = "january march april july october december"
ONES = "one two three four five six seven eight nine ten"
TENS = "twenty thirty forty fifty"
FOODS = "apples carrots lemons onions"
CITIES = "london paris boston madrid"
MUSIC = "jazz rock piano news"

TEMPLATES = (
    ("turn", "on off", "the", COLORS, DEVICES),
    ("open close", "the", ROOMS, OPENINGS),
    ("wake", NAMES, "at", ONES, TENS),
    ("buy", ONES, COLORS, FOODS),
    ("play", MUSIC, "in", "the", ROOMS),
    ("call", NAMES, "on", DAYS),
    ("train", "to", CITIES, "at", ONES, TENS),
    ("meet", NAMES, "and", NAMES, "in", MONTHS),
    ("rain", "in", CITIES, "on", DAYS),
    ("set", "the", DEVICES, "to", TENS, ONES),
    (NAMES, "wants", ONES, FOODS),
    ("is", "the", ROOMS, OPENINGS, "open closed"),
)


@dataclass(frozen=True)
class Line:
    id: str
    split: str
    text: str
    voice: str
    warp: float

    @property
    def speaker(self) -> str:
        return self.voice if self.warp == 1 else f"{self.voice}-{self.warp:g}"


def sentences() -> list[str]:
    """Every sentence of each template, shuffled, then templates in turn, so that none crowds out the others."""
    generator = random.Random(11)
    queues = []
    for template in TEMPLATES:
        queue = [" ".join(words) for words in itertools.product(*(slot.split() for slot in template))]
        generator.shuffle(queue)
        queues.append(queue)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    count = NUM_TRAIN + NUM_VALID + NUM_TEST + NUM_UNSEEN
    chosen = list(itertools.islice((s for s in turns if s is not None), count))
    assert len(set(chosen)) == count
    generator.shuffle(chosen)
    return chosen


def lines() -> list[Line]:
    remaining = iter(sentences())
    voices = len(TRAIN_VOICES)
    result = []
    for index in range(NUM_TRAIN):
        text = next(remaining)
        readings = (index % voices, (index + 1 + index // voices % (voices - 1)) % voices)
        for voice in readings[: 1 + (index < NUM_TWICE)]:
            result.append(Line(f"train-{index:04d}-{voice}", "train", text, *TRAIN_VOICES[voice]))
    for split, count in (("valid", NUM_VALID), ("test", NUM_TEST)):
        for index in range(count):
            result.append(Line(f"{split}-{index:04d}", split, next(remaining), *TRAIN_VOICES[index % voices]))
    for index in range(NUM_UNSEEN):
        result.append(Line(f"unseen-{index:04d}", "test-unseen-voice", next(remaining), *UNSEEN_VOICE))
    return result


def trim(samples: np.ndarray, *, keep: float = 0.06) -> np.ndarray:
    """Cut silence at both ends down to `keep` seconds."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    margin = int(keep * RATE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


def speak(line: Line, folder: Path) -> tuple[bytes, float]:
    """Return Ogg Opus bytes and the seconds."""
    wav = folder / f"{line.id}.wav"
    command = [
        "flite",
        "-voice",
        line.voice,
        "--setf",
        f"duration_stretch={line.warp}",
        "-t",
        line.text,
        "-o",
        str(wav),
    ]
    subprocess.run(command, check=True, timeout=60)
    samples, rate = soundfile.read(wav, dtype="float32")
    wav.unlink()
    # Read as if sampled faster by `warp`: pitch and formants rise by it, and the stretched length comes back to normal.
    samples = trim(soxr.resample(samples, rate * line.warp, RATE))
    buffer = io.BytesIO()
    # libsndfile maps compression levels 0..1 to 256..6 kbit/s.
    level = (256_000 - BITRATE) / 250_000
    soundfile.write(buffer, samples, RATE, format="OGG", subtype="OPUS", compression_level=level)
    return buffer.getvalue(), len(samples) / RATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    spoken = lines()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        clips = list(pool.map(lambda line: speak(line, Path(folder)), spoken))
    rows = ["id\tpath\tspeaker\tsplit\tseconds\ttext\n"]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for line, (data, seconds) in zip(spoken, clips, strict=True):
            name = f"audio/{line.id}.ogg"
            archive.writestr(zipfile.ZipInfo(name), data)
            rows.append(f"{line.id}\t{name}\t{line.speaker}\t{line.split}\t{seconds:.3f}\t{line.text}\n")
        archive.writestr(zipfile.ZipInfo("manifest.tsv"), "".join(rows), zipfile.ZIP_DEFLATED)
    print(f"{len(spoken)} clips, {sum(s for _, s in clips) / 60:.1f} minutes, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
