"""Zero-resource scores of a trained SpeechLM: minimal pairs, and the perplexity of what it says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparq.adaptation import SpeechLM
from sparq.audio import read_waveform
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.evaluation import (
    MinimalPair,
    PairAccuracy,
    generate_targets,
    log_likelihoods,
    pair_accuracies,
    read_pairs,
    read_sblimp,
    read_swuggy,
)
from sparq.models import load_backbone
from sparq.pretrained import resolve_model
from sparq.progress import progress
from sparq.recipes.apply import MAX_SECONDS, encode_recordings, encode_samples, load_model
from sparq.recipes.listening import HEARD_SECONDS
from sparq.recipes.prose import load_tokenizer
from sparq.recipes.speech_out import is_deduplicated, speech, units_of, vocoder_for
from sparq.tokens import JointVocabulary, make_example, prompt_ids
from sparq.types import SAMPLE_RATE, Seconds
from sparq.vocoder.recognizer import WHISPER, Recognizer

Benchmark = Literal["swuggy", "sblimp", "pairs"]

READERS = {"swuggy": read_swuggy, "sblimp": read_sblimp, "pairs": read_pairs}
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class GenerativePerplexity:
    """How likely a text LM finds what a model says after prompts.

    Attributes:
        value: exp of the mean negative log-likelihood per token of the text LM; each text's first token is not counted.
        tokens: that are counted.
        texts: what was heard of each prompt's continuation.
        left_out: continuations of fewer than two tokens, which are not counted.
    """

    value: float
    tokens: int
    texts: tuple[str, ...]
    left_out: int


def score_pairs(
    benchmark: Benchmark, source: Path, *, model: Path, precision: str = "full", mean: bool = True
) -> dict[str, PairAccuracy]:
    """Return how often a SpeechLM finds the right recording of a pair likelier, over all and by group.

    The likelihood is that of `<generatespeech> units <end>`. Recordings are encoded in batches; only their units stay.

    Args:
        benchmark: what `source` holds.
        source: a folder with `gold.csv` and recordings (`swuggy`, `sblimp`), or a TSV (`pairs`).
        model: a model folder, `RUN/models/FRAMEWORK`.
        precision: `full`, or a scheme for which the run holds a quantized model.
        mean: divide by the number of pieces, as is the custom for speech, so that length does not decide.

    Raises:
        SparqError: the benchmark, a recording or the model is not fit for it.
    """
    pairs = READERS[benchmark](source)
    speechlm, network = load_model(model, precision)
    scores = _likelihoods(speechlm, network, pairs, mean=mean)
    return pair_accuracies(pairs, scores)


def _likelihoods(
    speechlm: SpeechLM, network: PreTrainedModel, pairs: Sequence[MinimalPair], *, mean: bool
) -> dict[Path, float]:
    files = list(dict.fromkeys(file for pair in pairs for file in (pair.correct, pair.incorrect)))
    scores: dict[Path, float] = {}
    with progress("score", total=len(files), unit="file") as bar:
        for start in range(0, len(files), 8 * BATCH):
            part = files[start : start + 8 * BATCH]
            encoded = encode_recordings(speechlm, part)
            examples = [make_example(speechlm.vocabulary, "speechlm", text="", units=units) for units in encoded]
            sums = log_likelihoods(network, examples, batch_size=BATCH, on_done=bar.update)
            for file, example, value in zip(part, examples, sums, strict=True):
                scores[file] = value / len(example.target) if mean else value
    return scores


def generative_perplexity(
    files: Sequence[Path],
    *,
    model: Path,
    vocoder: Path | None = None,
    precision: str = "full",
    prompt_seconds: Seconds = 3.0,
    max_new: int = 150,
    temperature: float = 0.8,
    seed: int = 0,
    recognizer: str = WHISPER,
    text_lm: str = "pretrained:smollm2-135m",
) -> GenerativePerplexity:
    """Let a model go on after the beginning of recordings, listen to it, and score the text by a text LM.

    GenPPL (Lakhotia et al. 2021). A model that repeats itself scores well, so the texts are returned to be read.

    Args:
        files: recordings, of which the first `prompt_seconds` are the prompts.
        model: a model folder, `RUN/models/FRAMEWORK`.
        vocoder: of the model's units; None takes the one that the package carries.
        precision: `full`, or a scheme for which the run holds a quantized model.
        prompt_seconds: length of the prompts.
        max_new: most pieces that the model writes.
        temperature: of its draws.
        seed: of its draws.
        recognizer: a Whisper.
        text_lm: a causal LM with its tokenizer.

    Raises:
        SparqError: a recording or a model is not fit for it, or nothing that was heard can be scored.
    """
    speechlm, network = load_model(model, precision)
    voice_out = vocoder_for(speechlm, vocoder)
    length = int(prompt_seconds * SAMPLE_RATE)
    beginnings = [read_waveform(file, max_seconds=MAX_SECONDS)[:length] for file in files]
    vocabulary = speechlm.vocabulary
    prompts = [_prompt(vocabulary, units) for units in encode_samples(speechlm, beginnings)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generated = generate_targets(
            network, vocabulary, prompts, max_new_tokens=max_new, batch_size=BATCH, temperature=temperature
        )
    dedup = is_deduplicated(speechlm)
    waveforms = []
    for ids in generated:
        pieces = list(speech(voice_out, units_of(vocabulary, ids, dedup=dedup), voice_out.voice(), dedup=dedup))
        waveforms.append(np.concatenate(pieces)[: int(HEARD_SECONDS * SAMPLE_RATE)] if pieces else np.zeros(0))
    sounding = [i for i, waveform in enumerate(waveforms) if len(waveform)]
    heard = dict(zip(sounding, Recognizer(recognizer).transcribe([waveforms[i] for i in sounding]), strict=True))
    texts = tuple(heard.get(i, "") for i in range(len(files)))
    judge = load_backbone(resolve_model(text_lm)).model.to(compute_device())
    return text_perplexity(texts, judge, load_tokenizer(text_lm))


def _prompt(vocabulary: JointVocabulary, units: Sequence[int]) -> tuple[int, ...]:
    return (*prompt_ids(vocabulary, "speechlm"), *vocabulary.encode_units(units))


@torch.inference_mode()
def text_perplexity(
    texts: Sequence[str], text_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerativePerplexity:
    """Return the perplexity of texts, each by itself, under a text LM.

    Raises:
        SparqError: no text has two tokens.
    """
    nll, tokens, left_out = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.long()
        if ids.shape[1] < 2:
            left_out += 1
            continue
        logits = text_lm(input_ids=ids, use_cache=False).logits[0, :-1].double()
        nll += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    if not tokens:
        raise SparqError(f"none of {len(texts)} continuations has two words: there is nothing to score")
    return GenerativePerplexity(value=float(np.exp(nll / tokens)), tokens=tokens, texts=tuple(texts), left_out=left_out)
