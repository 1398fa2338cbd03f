"""The page of a vocoder's training: its scores on the way, and held-out recordings beside what it makes of them."""

import json
from collections.abc import Sequence
from pathlib import Path

from sparq.report.listening_page import SideBySide, sound, write_listening_page
from sparq.report.numbers import show_number
from sparq.report.tables import Line, Table
from sparq.vocoder.analysis import Recording
from sparq.vocoder.validation import mel_distance, resynthesize
from sparq.vocoder.voice import VocoderNetworks

NUM_SOUNDS = 8
"""How many recordings are heard."""


def write_vocoder_page(path: Path, networks: VocoderNetworks, recordings: Sequence[Recording], log_file: Path) -> None:
    """Write the page atomically.

    Args:
        path: the HTML file.
        networks: the averaged weights.
        recordings: the validation split, of which `NUM_SOUNDS` are shown, evenly chosen.
        log_file: `train.jsonl`, which has the scores.
    """
    shown = recordings[:: max(1, len(recordings) // NUM_SOUNDS)][:NUM_SOUNDS]
    write_listening_page(
        path,
        title="Vocoder",
        table=_scores(log_file),
        utterances=[_beside(networks, recording) for recording in shown],
    )


def _scores(log_file: Path) -> Table:
    updates = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    lines = [
        Line(
            cells=(
                f"{update['update']:,}",
                show_number(update["seconds"] / 60),
                *(show_number(update.get(name)) for name in ("mel", "valid_mel", "valid_wer")),
            )
        )
        for update in updates
        if "valid_mel" in update
    ]
    return Table(
        caption="Training",
        columns=("Update", "Minutes", "Log-mel distance, training", "held out", "WER % held out"),
        groups=(tuple(lines),),
        num_headings=1,
        notes=("In training, distances are means over four resolutions; held out, of one.",),
    )


def _beside(networks: VocoderNetworks, recording: Recording) -> SideBySide:
    real, made = recording.waveform(), resynthesize(networks, recording)
    distance = f"log-mel distance {show_number(mel_distance(made, real))}"
    return SideBySide(
        id=recording.id,
        text=recording.text,
        sounds=(sound("recording", real), sound("from its units", made, note=distance)),
    )
