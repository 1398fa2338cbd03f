"""Recordings: files to waveforms, manifests, held-out splits; `sparq.audio.prepare` is a run's first step."""

from sparq.audio.manifest import Utterance, read_manifest, write_manifest
from sparq.audio.splits import HeldOut, assign_splits
from sparq.audio.text import normalize_text
from sparq.audio.waveform import AudioInfo, measure_waveform, probe, read_waveform
from sparq.audio.writing import check_new_wav, write_wav

__all__ = [
    "AudioInfo",
    "HeldOut",
    "Utterance",
    "assign_splits",
    "check_new_wav",
    "measure_waveform",
    "normalize_text",
    "probe",
    "read_manifest",
    "read_waveform",
    "write_manifest",
    "write_wav",
]
