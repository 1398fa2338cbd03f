"""Lhotse cut manifests, JSON lines, gzipped or not (Żelasko et al. 2021).

    cuts_train.jsonl.gz     a line each: {"id": ..., "start": 2.5, "duration": 4.0, "channel": 0,
                            "recording": {"sources": [{"type": "file", "channels": [0], "source": "a.flac"}], ...},
                            "supervisions": [{"text": ..., "speaker": ...}], "type": "MonoCut"}

Only cuts of one channel of a single sound file are read. Others (mixed, padded, of several channels, perturbed, from
commands, URLs or memory) are faults that name their kind; commands are never run. A relative path starts at the
folder of the manifest.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparq.audio.corpora.folders import file_names, split_of
from sparq.audio.manifest import Fault, Row, make_row
from sparq.audio.waveform import Segment
from sparq.errors import SparqError, near_matches
from sparq.files import read_lines

_SUFFIXES = (".jsonl", ".jsonl.gz")


def lhotse_lists(folder: Path, subsets: Sequence[str]) -> list[Path]:
    """Return the manifests to read: `SUBSET.jsonl.gz` or `SUBSET.jsonl`, or all of them whose name has `cuts`.

    Raises:
        SparqError: one is not there.
    """
    names = [name for suffix in _SUFFIXES for name in file_names(folder, suffix)] if folder.is_dir() else []
    files = {name.removesuffix(".gz").removesuffix(".jsonl"): folder / name for name in sorted(names)}
    chosen = list(subsets) or [name for name in files if "cuts" in name]
    if not chosen:
        raise SparqError(f"{folder} holds no cuts: expected Lhotse's cuts_train.jsonl.gz")
    for name in chosen:
        if name not in files:
            raise SparqError(f"{folder} has no {name}.jsonl.gz: {near_matches(name, files)}")
    return [files[name] for name in chosen]


def read_lhotse(folder: Path, subsets: Sequence[str]) -> Iterator[Row]:
    """Stream the cuts; a name with `train`, `dev`, `valid` or `test` gives them a split.

    Raises:
        SparqError: a manifest is missing or damaged, or a line is no cut.
    """
    for file in lhotse_lists(folder, subsets):
        split = next(filter(None, map(split_of, file.name.partition(".")[0].split("_"))), "")
        for number, line in enumerate(read_lines(file, "Lhotse manifest"), start=1):
            where = f"{file}, line {number}"
            try:
                cut = json.loads(line)
            except json.JSONDecodeError as error:
                raise SparqError(f"{where} is not JSON: {error.msg}: expected a cut") from error
            if not isinstance(cut, dict) or not isinstance(cut.get("id"), str):
                raise SparqError(f"{where} is no cut: expected an object with an `id`")
            try:
                yield _row(where, cut, folder, split)
            except SparqError as error:
                yield Fault(id=cut["id"], path=file, reason=f"{where}, utterance {cut['id']!r}: {error}")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise SparqError(f"{where} is no cut that Lhotse writes ({type(error).__name__}: {error})") from error


def _row(where: str, cut: Mapping[str, Any], folder: Path, split: str) -> Row:
    path = folder / _source(cut)
    start, seconds = float(cut["start"]), float(cut["duration"])
    if not (0 <= start < math.inf and 0 < seconds < math.inf):
        raise SparqError(f"start {start} and duration {seconds} are no times: expected seconds")
    whole = start == 0 and abs(seconds - float(cut["recording"]["duration"])) < 1e-6
    supervisions = cut.get("supervisions") or []
    speakers = {str(supervision.get("speaker") or "") for supervision in supervisions}
    return make_row(
        where, id=cut["id"], path=path, speaker=speakers.pop() if len(speakers) == 1 else "", split=split,
        segment=None if whole else Segment(start=start, seconds=seconds), seconds=seconds,
        text=" ".join(str(supervision.get("text") or "") for supervision in supervisions),
    )  # fmt: skip


def _source(cut: Mapping[str, Any]) -> str:
    """Return the path of the one sound file that a cut is a part of."""
    if cut.get("type") != "MonoCut":
        raise SparqError(f"a cut of type {cut.get('type')!r}: save MonoCuts")
    recording = cut.get("recording")
    if recording is None:
        raise SparqError("a cut of features without a recording: save cuts with recordings")
    if recording.get("transforms"):
        raise SparqError("a recording with transforms: save its audio, or the cuts before they were perturbed")
    sources = recording["sources"]
    if len(sources) != 1 or len(sources[0]["channels"]) != 1:
        raise SparqError(f"a recording of {sum(len(s['channels']) for s in sources)} channels: save each as a file")
    if sources[0]["type"] != "file":
        raise SparqError(f"a source of type {sources[0]['type']!r}, which is not read: save it as a file")
    return str(sources[0]["source"])
