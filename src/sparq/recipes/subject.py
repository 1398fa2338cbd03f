"""A model outside of a recipe: loaded, with what it is calibrated on and what it is measured on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparq.adaptation import load_speechlm
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.evaluation import prose_perplexity, sum_errors, task_perplexity
from sparq.models import load_model
from sparq.quantization.sensitivity import Measure
from sparq.quantization.storage import is_quantized
from sparq.recipes.calibration import padded_batches, task_examples
from sparq.recipes.evaluate_step import recognize
from sparq.recipes.model_sections import EvaluateConfig
from sparq.recipes.prose import load_tokenizer, prose_pieces
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.train_step import load_split
from sparq.types import TASKS, Task

_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which data a model is calibrated and measured on.

    Attributes:
        calibration: a text for causal LMs; SpeechLMs take training sequences of their run.
        tokens: tokens of calibration.
        context: most tokens of a sequence of text.
        tasks: tasks of a SpeechLM, in equal parts by their tokens.
        text: a text to measure causal LMs on, the demo's page of prose by default; SpeechLMs take the split `valid`.
        text_tokens: most tokens of it, or of the tasks together.
        utterances: most utterances of `valid` to count a SpeechLM's word errors on.
        seed: of the choice of sequences.
    """

    calibration: Path | None = None
    tokens: int = 16384
    context: int = 1024
    tasks: Sequence[Task] = TASKS
    text: Path | None = None
    text_tokens: int = 2048
    utterances: int = 100
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded model.

    Attributes:
        model: a causal LM in floating point.
        calibration: its calibration data; none if none was asked for.
        measure: its losses by text or task; asking for it reads the data.
        error_rates: the word error rate of a SpeechLM's transcripts, in percent, likewise.
        save_tokenizer: writes its tokenizer into a folder; a SpeechLM's vocabulary stays with its own folder.
    """

    model: PreTrainedModel
    calibration: list[Mapping[str, Tensor]]
    measure: Callable[[], Measure]
    error_rates: Callable[[], Measure]
    save_tokenizer: Callable[[Path], None]


def is_speechlm(reference: str) -> bool:
    """Tell whether a folder is a trained SpeechLM."""
    return (Path(reference) / "speechlm.json").is_file()


def load_subject(reference: str, data: Data, *, calibrates: bool, attention: str | None = None) -> Subject:
    """Load a causal LM or a trained SpeechLM.

    Args:
        reference: a folder, a hub name or `pretrained:NAME`; or RUN/models/FRAMEWORK, whose run has to be there.
        data: what it is calibrated and measured on.
        calibrates: whether calibration data is wanted.
        attention: the attention to run a causal LM with; that of its config by default.

    Raises:
        SparqError: the model is quantized, the data is too little, or something is given that this model has not.
    """
    if is_quantized(Path(reference)):
        raise SparqError(f"{reference} is quantized already: start from the model in floating point")
    load = _speechlm if is_speechlm(reference) else _causal_lm
    return load(reference, data, calibrates=calibrates, attention=attention)


def _causal_lm(reference: str, data: Data, *, calibrates: bool, attention: str | None) -> Subject:
    if tuple(data.tasks) != TASKS:
        raise SparqError(f"{reference} is no trained SpeechLM: leave --tasks out")
    model = load_model(reference, attention).to(compute_device())
    tokenizer = load_tokenizer(reference)
    batches: list[Mapping[str, Tensor]] = []
    if calibrates:
        assert data.calibration is not None
        pieces = prose_pieces(model, tokenizer, data.calibration, tokens=data.tokens, context=data.context)
        found = sum(len(piece) for piece in pieces)
        if found < data.tokens - 1:  # a last piece of one token is left out
            raise SparqError(
                f"{data.calibration} has {found} tokens, fewer than the {data.tokens} of --tokens: give a longer text,"
                " or fewer"
            )
        batches = [{"input_ids": piece[None]} for piece in pieces]

    def measure_text() -> Measure:
        context = min(data.context, model.config.max_position_embeddings)
        pieces = prose_pieces(model, tokenizer, data.text, tokens=data.text_tokens, context=context)
        ids = torch.cat(pieces)
        return lambda other: {"text": math.log(prose_perplexity(other, ids, context=context).value)}

    def no_error_rates() -> Measure:
        raise SparqError(f"{reference} is no trained SpeechLM: it has no word error rate to keep a budget of")

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)

    return Subject(
        model=model, calibration=batches, measure=measure_text, error_rates=no_error_rates, save_tokenizer=save
    )


def _speechlm(reference: str, data: Data, *, calibrates: bool, attention: str | None) -> Subject:
    for option, given in (
        ("--attention", attention is not None),
        ("--calibration", data.calibration is not None),
        ("--text", data.text is not None),
    ):
        if given:
            raise SparqError(
                f"{reference} is a trained SpeechLM, with its run's data and one attention: leave {option} out"
            )
    # RUN/models/FRAMEWORK
    run = RunFolder(Path(reference).absolute().parent.parent)
    if not run.units.is_dir():
        raise SparqError(f"{reference} is not in a run folder, whose units are needed: name RUN/models/FRAMEWORK")
    speechlm = load_speechlm(Path(reference))
    speechlm.model.to(compute_device())
    vocabulary = speechlm.vocabulary
    batches: list[Mapping[str, Tensor]] = []
    if calibrates:
        utterances = load_split(run, "train", vocabulary)
        found = task_examples(utterances, vocabulary, tasks=data.tasks, tokens=data.tokens, seed=data.seed)
        batches = list(padded_batches(found, vocabulary))

    def measure_tasks() -> Measure:
        held_out = load_split(run, "valid", vocabulary)
        examples = task_examples(
            held_out, vocabulary, tasks=data.tasks, tokens=data.text_tokens, fewer=True, seed=data.seed
        )

        def measure(other: PreTrainedModel) -> dict[str, float]:
            return {
                task: math.log(task_perplexity(other, of_task, batch_size=_BATCH_SIZE).value)
                for task, of_task in examples.items()
            }

        return measure

    def measure_words() -> Measure:
        spoken = [u for u in load_split(run, "valid", vocabulary) if u.text]
        if not spoken:
            raise SparqError(f"{run.path} has no transcribed utterances in its split valid: there are no word errors")
        order = torch.randperm(len(spoken), generator=torch.Generator().manual_seed(data.seed)).tolist()
        chosen = [spoken[index] for index in order[: data.utterances]]

        def measure(other: PreTrainedModel) -> dict[str, float]:
            transcripts = recognize(other, vocabulary, "valid", chosen, EvaluateConfig(), "valid")
            return {"asr": sum_errors(transcripts, "words").rate}

        return measure

    return Subject(
        model=speechlm.model, calibration=batches, measure=measure_tasks, error_rates=measure_words,
        save_tokenizer=lambda _: None,
    )  # fmt: skip
