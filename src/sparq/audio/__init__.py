"""Recordings: files to waveforms, manifests, held-out splits; `sparq.audio.prepare` is a run's first step."""

from sparq.audio.manifest import Utterance, read_manifest, write_manifest
from sparq.audio.splits import HeldOut, assign_splits
from sparq.audio.text import normalize_text
from sparq.audio.waveform import AudioInfo, measure_waveform, probe, read_waveform

__all__ = [
    "AudioInfo",
    "HeldOut",
    "Utterance",
    "assign_splits",
    "measure_waveform",
    "normalize_text",
    "probe",
    "read_manifest",
    "read_waveform",
    "write_manifest",
]
