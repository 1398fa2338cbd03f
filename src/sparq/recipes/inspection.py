"""The outliers of any models, side by side: what `sparq outliers` prints and draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from sparq.adaptation import load_speechlm
from sparq.audio.text import normalize_text
from sparq.errors import SparqError
from sparq.evaluation import measure_outliers
from sparq.evaluation.token_groups import GroupOutliers
from sparq.files import read_text
from sparq.models import load_model, saved_attention
from sparq.pretrained import resolve_model
from sparq.pretrained.quiet import quiet_transformers
from sparq.recipes.apply import encode_recordings
from sparq.recipes.pictures import Pictures, outlier_figures
from sparq.report import FULL, Results, Row, collect_provenance, utc_now
from sparq.report.numbers import show_number
from sparq.tokens import JointVocabulary, make_example
from sparq.tokens.special import text_to_units

PICTURE_TOKENS = 40
"""Tokens of the heat maps: more are not legible in print."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What a model is measured on.

    Attributes:
        ids: token sequences.
        labels: what the tokens of the first one are.
        groups: tokens to be measured apart.
    """

    ids: tuple[Tensor, ...]
    labels: tuple[str, ...]
    groups: dict[str, Tensor] = field(default_factory=dict)


def inspect_outliers(
    models: Sequence[str],
    *,
    attentions: Sequence[str] = (),
    text: Path | None = None,
    audio: Sequence[Path] = (),
    tokens: int = 2048,
    context: int = 512,
) -> Results:
    """Measure the outliers of models on the same text, or the same recordings.

    Args:
        models: folders, hub names or `pretrained:NAME` of causal LMs, or folders of trained SpeechLMs.
        attentions: run every causal LM under each of these; under the one that its config names if empty.
        text: a text file; the demo's page of prose by default. A SpeechLM reads each paragraph as a text sequence.
        audio: recordings, which only SpeechLMs hear.
        tokens: most tokens of text.
        context: tokens of one sequence of text.

    Raises:
        SparqError: a model or file is missing or does not fit, or two columns would have one name.
    """
    rows: list[Row] = []
    notes: list[str] = []
    pictures = Pictures()
    for reference in models:
        speechlm_folder = Path(reference) if (Path(reference) / "speechlm.json").exists() else None
        if speechlm_folder is not None and attentions:
            raise SparqError(f"{reference} is a trained SpeechLM, which has one attention: leave --attention out")
        if speechlm_folder is None and audio:
            raise SparqError(f"{reference} is no trained SpeechLM: only those hear --audio")
        for attention in attentions or (None,):
            if speechlm_folder is not None:
                model, sequences = _speechlm(speechlm_folder, text, audio, tokens)
            else:
                model, sequences = _causal_lm(reference, attention, text, tokens, context)
            spec = saved_attention(model)
            assert spec is not None, "every way of loading converts"
            name = spec.name if len(models) == 1 or speechlm_folder else f"{Path(reference).name}: {spec.name}"
            if any(row.framework == name for row in rows):
                raise SparqError(f"two models would be called {name!r}: measure them in two runs")
            batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in sequences.ids]
            report = measure_outliers(model, batches, groups=sequences.groups)
            notes += [_group_note(name, group, found) for group, found in report.groups.items() if found.num_tokens]
            rows.append(Row(framework=name, precision=FULL, outliers=outlier_figures(report)))
            pictures.add(name, model, sequences.ids[0][: len(sequences.labels)], sequences.labels)
    return Results(
        name="Outliers of " + ", ".join(models),
        created=utc_now(),
        provenance=collect_provenance(),
        seed=0,
        settings={"models": list(models), "text": str(text or "prose.txt"), "audio": [str(file) for file in audio]},
        corpus={},
        rows=tuple(rows),
        attention_maps=tuple(pictures.attention),
        hidden_maps=tuple(pictures.hidden),
        notes=tuple(notes),
    )


def _group_note(name: str, group: str, found: GroupOutliers) -> str:
    return (
        f"{name}, {group}: {found.num_tokens:,} tokens, max inf norm {show_number(found.max_inf_norm)}, mean kurtosis"
        f" {show_number(found.mean_kurtosis)}, {100 * found.attention_share:.1f} % of the attention"
    )


def _prose(text: Path | None) -> str:
    return read_text(text) if text else (files("sparq") / "demo" / "prose.txt").read_text(encoding="utf-8")


def _causal_lm(
    reference: str, attention: str | None, text: Path | None, tokens: int, context: int
) -> tuple[PreTrainedModel, Sequences]:
    model = load_model(reference, attention)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(reference))
    ids = tokenizer(" ".join(_prose(text).split()), return_tensors="pt").input_ids[0, :tokens]
    if len(ids) < 2:
        raise SparqError(f"{text} has {len(ids)} tokens: outliers need 2 or more")
    pieces = [piece for piece in ids.split(min(context, model.config.max_position_embeddings)) if len(piece) > 1]
    labels = tuple(tokenizer.decode([int(i)]) for i in pieces[0][:PICTURE_TOKENS])
    return model, Sequences(ids=tuple(pieces), labels=labels)


def _speechlm(folder: Path, text: Path | None, audio: Sequence[Path], tokens: int) -> tuple[PreTrainedModel, Sequences]:
    speechlm = load_speechlm(folder)
    vocabulary = speechlm.vocabulary
    examples = [
        make_example(vocabulary, "speechlm", text="", units=units) for units in encode_recordings(speechlm, audio)
    ]
    if text is not None or not audio:
        lines = [normalize_text(" ".join(part.split())) for part in _prose(text).split("\n\n") if part.strip()]
        examples += [make_example(vocabulary, "textlm", text=line, units=()) for line in lines]
    sequences, left = [], tokens
    for example in examples:
        ids = torch.tensor((*example.prompt, *example.target))[:left]
        if len(ids) > 1:
            sequences.append(ids)
            left -= len(ids)
    labels = tuple(vocabulary.pieces[int(i)] for i in sequences[0][:PICTURE_TOKENS])
    return speechlm.model, Sequences(ids=tuple(sequences), labels=labels, groups=_modalities(vocabulary))


def _modalities(vocabulary: JointVocabulary) -> dict[str, Tensor]:
    """Return which pieces are speech, which text, and which stand between them."""
    boundary = torch.tensor([piece.startswith("<") and piece.endswith(">") for piece in vocabulary.pieces])
    speech = torch.tensor([bool(text_to_units(piece)) for piece in vocabulary.pieces]) & ~boundary
    return {"text": ~speech & ~boundary, "speech": speech, "boundary": boundary}
