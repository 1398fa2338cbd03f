"""Names for the quantities that cross module boundaries."""

from typing import Literal, get_args

Seconds = float
"""A length of time in seconds."""

Task = Literal["textlm", "speechlm", "asr", "tts"]
"""One of the four tasks of a SpeechLM (SpARQ section 3.1)."""

TASKS: tuple[Task, ...] = get_args(Task)

SAMPLE_RATE = 16_000
"""The only sample rate inside the package, in Hz."""
