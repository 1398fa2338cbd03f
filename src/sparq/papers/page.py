"""The page of a figure: curves, outliers and maps of its models, drawn by the report."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from sparq.configuration import to_mapping
from sparq.files import write_text
from sparq.papers.experiments import FULL, Experiment
from sparq.papers.trained import TrainedCell
from sparq.recipes.outlier_sequences import task_sequences
from sparq.recipes.pictures import Pictures
from sparq.recipes.report_step import training_curve
from sparq.report import Results, collect_provenance, utc_now, write_html
from sparq.report.heatmaps import attention_maps, hidden_maps
from sparq.report.plots import learning_curves, outlier_bars
from sparq.report.svg import svg_file


def write_page(path: Path, experiment: Experiment, models: Sequence[TrainedCell]) -> None:
    """Write the page of an experiment, and its figures as SVG files beside it.

    All models are drawn on one sequence: the shortest transcribed utterance of the test splits, as ASR. The head is the
    one that looks most at the first token in the experiment's first model.

    Args:
        path: where.
        experiment: whose page.
        models: its models in full precision, one a column, in the experiment's order.
    """
    models = sorted(models, key=lambda model: experiment.cells.index(model.cell))
    first = models[0]
    pairs = [(u.text, u.units) for utterances in first.splits.values() for u in utterances if u.text]
    shortest = min(pairs, key=lambda pair: len(pair[1]))
    rows, curves, pictures = [], {}, Pictures()
    for model in models:
        name = f"{model.cell.framework} {model.cell.adaptation}"
        rows.append(dataclasses.replace(model.row(FULL), framework=name, asr={}))
        curves[name] = training_curve(model.run, model.cell.framework)
        (ids,) = task_sequences(model.speechlm.vocabulary, "asr", [shortest])
        labels = tuple(model.speechlm.vocabulary.pieces[token] for token in ids.tolist())
        pictures.add(name, model.speechlm.model, ids, labels)
        model.forget_model()
    results = Results(
        name=f"{experiment.name}: {experiment.title}",
        created=utc_now(),
        provenance=collect_provenance(),
        seed=first.seed,
        settings=to_mapping(first.recipe),
        corpus={},
        rows=tuple(rows),
        curves=curves,
        attention_maps=tuple(pictures.attention),
        hidden_maps=tuple(pictures.hidden),
    )
    write_html(path, results, folder=path.parent)
    figures = {
        "curves": learning_curves(results),
        "outliers": outlier_bars(results),
        "head": attention_maps(results),
        "activations": hidden_maps(results),
    }
    for name, figure in figures.items():
        if figure is not None:
            write_text(path.with_name(f"{path.stem}-{name}.svg"), svg_file(figure))
