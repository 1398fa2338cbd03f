"""The outliers of any models, side by side: what `sparq outliers` prints and draws."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparq.adaptation import load_speechlm
from sparq.audio.text import normalize_text
from sparq.devices import compute_device
from sparq.errors import SparqError
from sparq.evaluation import MassiveActivations, find_massive_activations, measure_outliers
from sparq.evaluation.token_groups import GroupOutliers
from sparq.files import read_text
from sparq.models import load_model, saved_attention
from sparq.recipes.apply import encode_recordings
from sparq.recipes.outlier_sequences import TASK_LABELS, alone, measure_tasks, task_sequences
from sparq.recipes.pictures import Pictures, outlier_figures
from sparq.recipes.prose import load_tokenizer, prose_pieces, read_prose
from sparq.report import FULL, Results, Row, collect_provenance, utc_now
from sparq.report.numbers import show_number
from sparq.tokens import JointVocabulary
from sparq.tokens.special import text_to_units

PICTURE_TOKENS = 40
"""Tokens of the heat maps: more are not legible in print."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What a model is measured on.

    Attributes:
        tasks: token sequences by task, at least one.
        sample: the sequence to draw.
        labels: what its tokens are.
        piece: what a token id is.
        groups: tokens to be measured apart.
    """

    tasks: dict[str, list[Tensor]]
    sample: Tensor
    labels: tuple[str, ...]
    piece: Callable[[int], str]
    groups: dict[str, Tensor] = field(default_factory=dict)


def inspect_outliers(
    models: Sequence[str],
    *,
    attentions: Sequence[str] = (),
    text: Path | None = None,
    audio: Sequence[Path] = (),
    transcripts: Path | None = None,
    tokens: int = 2048,
    context: int = 512,
) -> Results:
    """Measure the outliers of models on the same text, or the same recordings.

    A SpeechLM is measured on each task that there is data for, and on all of them together: text as TextLM, a
    paragraph a sequence; recordings as SpeechLM; recordings with what was said as ASR.

    Args:
        models: folders, hub names or `pretrained:NAME` of causal LMs, or folders of trained SpeechLMs.
        attentions: run every causal LM under each of these; under the one that its config names if empty.
        text: a text file; the demo's page of prose by default, if there are no recordings.
        audio: recordings, which only SpeechLMs hear.
        transcripts: a text file with one line for each recording.
        tokens: most tokens of a task.
        context: most tokens of one sequence of running text.

    Raises:
        SparqError: a model or file is missing or does not fit, or a model or attention is named twice.
    """
    labels = _labels(models)
    if len(set(attentions)) < len(attentions):
        raise SparqError(f"an attention is named twice in {' '.join(attentions)}: name each once")
    said = _transcripts(transcripts, audio)
    rows: list[Row] = []
    notes: list[str] = []
    pictures = Pictures()
    for reference, label in zip(models, labels, strict=True):
        speechlm_folder = Path(reference) if (Path(reference) / "speechlm.json").exists() else None
        if speechlm_folder is not None and attentions:
            raise SparqError(f"{reference} is a trained SpeechLM, which has one attention: leave --attention out")
        if speechlm_folder is None and audio:
            raise SparqError(f"{reference} is no trained SpeechLM: only those hear --audio")
        for attention in attentions or (None,):
            if speechlm_folder is not None:
                model, sequences = _speechlm(speechlm_folder, text, audio, said, tokens)
            else:
                model, sequences = _causal_lm(reference, attention, text, tokens, context)
            spec = saved_attention(model)
            assert spec is not None, "every way of loading converts"
            name = _column(label, spec.name)
            together = alone(ids for task in sequences.tasks.values() for ids in task)
            report = measure_outliers(model, together, groups=sequences.groups)
            apart = measure_tasks(model, sequences.tasks) if len(sequences.tasks) > 1 else {}
            notes += [_group_note(name, group, found) for group, found in report.groups.items() if found.num_tokens]
            for task, ids in sequences.tasks.items():
                notes.append(f"{name}, {task}: {_massive_note(find_massive_activations(model, alone(ids)), sequences)}")
            rows.append(Row(framework=name, precision=FULL, outliers=outlier_figures(report, apart)))
            pictures.add(name, model, sequences.sample, sequences.labels)
    return Results(
        name="Outliers of " + ", ".join(models),
        created=utc_now(),
        provenance=collect_provenance(),
        seed=0,
        settings={
            "models": list(models),
            "text": str(text or ("none" if audio else "prose.txt")),
            "audio": [str(file) for file in audio],
            "transcripts": str(transcripts or "none"),
            "tokens": tokens,
        },
        corpus={},
        rows=tuple(rows),
        attention_maps=tuple(pictures.attention),
        hidden_maps=tuple(pictures.hidden),
        notes=tuple(notes),
    )


def _labels(models: Sequence[str]) -> list[str]:
    """Return what tells models apart: the ends of their paths, as long as that takes; of a single model nothing."""
    if len(models) == 1:
        return [""]
    parts = [Path(reference).parts for reference in models]
    if len(set(parts)) < len(parts):
        raise SparqError(f"a model is named twice in {' '.join(models)}: name each once")
    count = 1
    while len({end[-count:] for end in parts}) < len(parts):
        count += 1
    return [str(Path(*end[-count:])) for end in parts]


def _column(label: str, attention: str) -> str:
    if not label:
        return attention
    return label if Path(label).name == attention else f"{label}: {attention}"


def _transcripts(file: Path | None, audio: Sequence[Path]) -> list[str]:
    """Return what is said in each recording, or empty texts."""
    if file is None:
        return [""] * len(audio)
    lines = [normalize_text(line) for line in read_text(file).splitlines() if line.strip()]
    if len(lines) != len(audio):
        raise SparqError(f"{file} has {len(lines)} lines and there are {len(audio)} recordings: give one line for each")
    return lines


def _group_note(name: str, group: str, found: GroupOutliers) -> str:
    return (
        f"{name}, {group}: {found.num_tokens:,} tokens, max inf norm {show_number(found.max_inf_norm)}, mean kurtosis"
        f" {show_number(found.mean_kurtosis)}, {100 * found.attention_share:.1f} % of the attention"
    )


def _massive_note(massive: MassiveActivations, sequences: Sequences) -> str:
    if not massive.found:
        return f"no massive activations in {massive.num_sequences:,} sequences"
    tokens = ", ".join(f"{sequences.piece(token)!r} {count:,} times" for token, count in massive.tokens.most_common(3))
    ((module, channel), count), *_ = massive.writers.most_common(1)
    largest = max(massive.found, key=lambda one: abs(one.value))
    return (
        f"massive activations in {massive.num_with:,} of {massive.num_sequences:,} sequences, in"
        f" {massive.num_at_first:,} at the first token; most often at {tokens}; {count:,} of {len(massive.found):,}"
        f" written by {module} in channel {channel}; the largest, {show_number(largest.value)}, is there in the blocks"
        f" {largest.blocks[0]} to {largest.blocks[1]}"
    )


def _causal_lm(
    reference: str, attention: str | None, text: Path | None, tokens: int, context: int
) -> tuple[PreTrainedModel, Sequences]:
    model = load_model(reference, attention).to(compute_device())
    tokenizer = load_tokenizer(reference)
    pieces = prose_pieces(model, tokenizer, text, tokens=tokens, context=context)
    sample = pieces[0][:PICTURE_TOKENS]

    def piece(token: int) -> str:
        return str(tokenizer.decode([token]))

    labels = tuple(piece(int(i)) for i in sample)
    return model, Sequences(tasks={"text": list(pieces)}, sample=sample, labels=labels, piece=piece)


def _speechlm(
    folder: Path, text: Path | None, audio: Sequence[Path], said: Sequence[str], tokens: int
) -> tuple[PreTrainedModel, Sequences]:
    speechlm = load_speechlm(folder)
    vocabulary = speechlm.vocabulary
    spoken = list(zip(said, encode_recordings(speechlm, audio), strict=True))
    read: list[tuple[str, list[int]]] = []
    if text is not None or not audio:
        paragraphs = [" ".join(part.split()) for part in read_prose(text).split("\n\n")]
        read = [(normalize_text(paragraph), []) for paragraph in paragraphs if paragraph]
    tasks = {}
    for task, label in TASK_LABELS.items():
        sequences = _first(task_sequences(vocabulary, task, [*read, *spoken]), tokens)
        if sequences:
            tasks[label] = sequences
    if not tasks:
        raise SparqError(f"{text or 'the text'} gives no sequence within {tokens} tokens: outliers need 2 or more")
    # The last task shows most; of its sequences the one that comes nearest to filling the picture.
    sample = min([*tasks.values()][-1], key=lambda ids: abs(len(ids) - PICTURE_TOKENS))[:PICTURE_TOKENS]
    piece = vocabulary.pieces.__getitem__
    labels = tuple(piece(int(i)) for i in sample)
    model = speechlm.model.to(compute_device())
    return model, Sequences(tasks=tasks, sample=sample, labels=labels, piece=piece, groups=_modalities(vocabulary))


def _first(sequences: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """Return the sequences up to a number of tokens, the last one cut; one token alone is none."""
    taken, left = [], tokens
    for ids in sequences:
        if len(ids[:left]) > 1:
            taken.append(ids[:left])
            left -= len(ids[:left])
    return taken


def _modalities(vocabulary: JointVocabulary) -> dict[str, Tensor]:
    """Return which pieces are speech, which text, and which stand between them."""
    boundary = torch.tensor([piece.startswith("<") and piece.endswith(">") for piece in vocabulary.pieces])
    speech = torch.tensor([bool(text_to_units(piece)) for piece in vocabulary.pieces]) & ~boundary
    return {"text": ~speech & ~boundary, "speech": speech, "boundary": boundary}
