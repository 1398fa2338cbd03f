"""An independent listener: Whisper writes down what a waveform says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from transformers import AutoTokenizer, GenerationMixin, WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_normalizer.english import EnglishTextNormalizer

from sparq.bfloat16 import is_native
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.pretrained import resolve_model
from sparq.pretrained.quiet import quiet_transformers
from sparq.types import SAMPLE_RATE

WHISPER = "pretrained:whisper-base"
"""The default: another model than the one whose features make the demo's units, so that it does not flatter them."""

_LONGEST_SECONDS = 30.0
_PROMPT = ("<|startoftranscript|>", "<|notimestamps|>")
_MULTILINGUAL_PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
# One token more than the English models have; OpenAI's code tells them apart in the same way.
_MULTILINGUAL_TOKENS = 51865
_BATCH = 8
# More than anybody says; a bound for loops, into which greedy decoding falls on noise.
_TOKENS_A_SECOND = 8
_TOKENS_AT_LEAST = 16


class Recognizer:
    """Whisper (Radford et al. 2022), decoding English greedily without timestamps.

    It computes in bfloat16 where the processor has products of it, else in float32.

    Args:
        model: folder, hub name or `pretrained:` name of a Whisper, an English or a multilingual one.

    Raises:
        SparqError: it cannot be loaded or is no Whisper.
    """

    def __init__(self, model: str = WHISPER) -> None:
        folder, device = resolve_model(model), compute_device()
        with quiet_transformers():
            try:
                network = WhisperForConditionalGeneration.from_pretrained(
                    folder, use_safetensors=True, dtype=torch.bfloat16 if is_native(device) else torch.float32
                )
                self._network: Any = network.eval().to(device)
                self._features: Any = WhisperFeatureExtractor.from_pretrained(folder)
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise SparqError(f"cannot load the recognizer {model!r}: {str(error).splitlines()[0]}") from error
        multilingual = self._network.config.vocab_size >= _MULTILINGUAL_TOKENS
        self._prompt = self._tokenizer.convert_tokens_to_ids(list(_MULTILINGUAL_PROMPT if multilingual else _PROMPT))
        self._normalize = EnglishTextNormalizer()

    def normalize(self, text: str) -> str:
        """Return text in the form that is scored: Whisper's English normalizer, so that "5" equals "five"."""
        return str(self._normalize(text))

    @torch.inference_mode()
    def transcribe(
        self,
        waveforms: Sequence[Float32[np.ndarray, "_samples"]],
        *,
        on_done: Callable[[int], object] = int,
    ) -> list[str]:
        """Return the normalized text of each clip of at most 30 s.

        Raises:
            SparqError: a clip is longer.
        """
        texts = []
        for first in range(0, len(waveforms), _BATCH):
            clips = list(waveforms[first : first + _BATCH])
            longest = max(len(clip) for clip in clips) / SAMPLE_RATE
            if longest > _LONGEST_SECONDS:
                raise SparqError(f"a clip of {longest:.1f} s is too long for Whisper: give at most 30 s")
            inputs = self._features(clips, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
            prompt = torch.tensor([self._prompt] * len(clips), device=self._network.device)
            inputs = inputs.to(self._network.device, self._network.dtype)
            # Whisper's own generate() is for long files and many languages.
            ids = GenerationMixin.generate(
                self._network,
                input_features=inputs,
                # Its encoder reads every frame; without this, transformers warns that it cannot guess which are real.
                attention_mask=prompt.new_ones(inputs.shape[0], inputs.shape[2]),
                decoder_input_ids=prompt,
                decoder_attention_mask=torch.ones_like(prompt),
                max_new_tokens=_TOKENS_AT_LEAST + int(longest * _TOKENS_A_SECOND),
                do_sample=False,
                num_beams=1,
            )
            said = self._tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
            texts += [self.normalize(text) for text in said]
            on_done(len(clips))
        return texts
