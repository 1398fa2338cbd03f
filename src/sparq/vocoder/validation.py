"""How good a vocoder is on recordings that it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
import torch
from jaxtyping import Float32

from sparq.vocoder.analysis import Recording
from sparq.vocoder.recognizer import Recognizer
from sparq.vocoder.spectra import log_mel
from sparq.vocoder.voice import VocoderNetworks


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a recognizer made of speech, against what was to be said.

    Attributes:
        errors: substitutions, deletions and insertions of words.
        words: in the references.
        character_errors: the same for characters.
        characters: in the references, spaces included.
        transcripts: what was heard, normalized.
    """

    errors: int
    words: int
    character_errors: int
    characters: int
    transcripts: tuple[str, ...]

    @property
    def wer(self) -> float:
        """Word error rate in percent: the sum of errors over the sum of words."""
        return 100 * self.errors / self.words

    @property
    def cer(self) -> float:
        """Character error rate in percent."""
        return 100 * self.character_errors / self.characters


def listen(recognizer: Recognizer, waveforms: Sequence[Float32[np.ndarray, "_samples"]], texts: Sequence[str]) -> Heard:
    """Let a recognizer write down waveforms and count its errors; texts go through its normalizer, too."""
    transcripts = recognizer.transcribe(waveforms)
    references = [recognizer.normalize(text) for text in texts]
    words = jiwer.process_words(references, transcripts)
    characters = jiwer.process_characters(references, transcripts)
    return Heard(
        errors=words.substitutions + words.deletions + words.insertions,
        words=words.substitutions + words.deletions + words.hits,
        character_errors=characters.substitutions + characters.deletions + characters.insertions,
        characters=characters.substitutions + characters.deletions + characters.hits,
        transcripts=tuple(transcripts),
    )


@torch.inference_mode()
def resynthesize(networks: VocoderNetworks, recording: Recording) -> Float32[np.ndarray, "samples"]:
    """Make a recording's samples from its units, as long as they lasted, and its speaker's vector."""
    device = next(networks.parameters()).device
    units = torch.from_numpy(recording.units.astype(np.int64))[None].to(device)
    made = networks.generator(units, torch.from_numpy(recording.vector)[None].to(device))[0]
    samples: np.ndarray = made.cpu().numpy()
    return samples


def mel_distance(made: Float32[np.ndarray, "samples"], real: Float32[np.ndarray, "samples"]) -> float:
    """Return the mean absolute difference of log-mel bands, in nepers (natural logarithm of magnitudes)."""
    ours, theirs = (log_mel(torch.from_numpy(x)[None]) for x in (made, real))
    return float((ours - theirs).abs().mean())


class Validation:
    """Scores on held-out recordings: `mel`, and with a recognizer `wer`, both of resynthesis from units.

    Args:
        recordings: those to score; for `wer` those with text count.
        recognizer: listens, if there is one.
    """

    def __init__(self, recordings: Sequence[Recording], recognizer: Recognizer | None = None) -> None:
        self._recordings, self._recognizer = recordings, recognizer
        self._real = [recording.waveform() for recording in recordings]

    def __call__(self, networks: VocoderNetworks) -> dict[str, float]:
        """Return the scores of networks."""
        made = [resynthesize(networks, recording) for recording in self._recordings]
        distances = [mel_distance(a, b) for a, b in zip(made, self._real, strict=True)]
        scores = {"valid_mel": float(np.mean(distances))}
        spoken = [i for i, recording in enumerate(self._recordings) if recording.text]
        if self._recognizer is not None and spoken:
            texts = [self._recordings[i].text for i in spoken]
            scores["valid_wer"] = listen(self._recognizer, [made[i] for i in spoken], texts).wer
        return scores
