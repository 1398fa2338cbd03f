"""The outliers that a training logs are those that `measure_outliers` finds."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from model_families import FAMILIES, tiny_model
from sparq.data import Batch, collate, pack
from sparq.evaluation import measure_outliers
from sparq.models import convert
from sparq.tokens import Example
from sparq.training import LanguageModelLoss, read_log
from sparq.training.outlier_watch import OutlierWatch, ValidOutliers
from test_outlier_penalty import examples
from test_training import fresh, run, stream


def by_measuring(model: PreTrainedModel, sequences: list[list[int]]) -> ValidOutliers:
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in sequences]
    report = measure_outliers(model.eval(), batches, reduction="token")
    norms = [layer.max_inf_norm for layer in report.layers]
    return ValidOutliers(report.max_inf_norm, report.mean_kurtosis, norms.index(max(norms)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [pack, lambda rows: collate(rows, pad_id=0)], ids=["packed", "padded"])
def test_they_are_those_of_the_sequences(family: str, make: Callable[[list[Example]], Batch]) -> None:
    model = convert(tiny_model(family), "softmax1").eval()
    watch, loss = OutlierWatch(model), LanguageModelLoss(model).eval()
    parts = [examples()[:1], examples()[1:]]
    for _ in range(2):  # nothing of the first round is left in the second
        for part in parts:
            with watch.watching(make(part)):
                loss(make(part))
        found = watch.take()
        expected = by_measuring(model, [[*e.prompt, *e.target] for e in examples()])
        assert found.max_norm == pytest.approx(expected.max_norm, rel=1e-5)
        assert found.kurtosis == pytest.approx(expected.kurtosis, rel=1e-4)
        assert found.block == expected.block
    loss(make(examples()))
    with pytest.raises(AssertionError):  # not watched
        watch.take()


def test_a_training_logs_them_where_it_is_validated(tmp_path: Path) -> None:
    training = run(fresh(), tmp_path)
    training.train("test")
    assert [u.update for u in training.log if u.valid_outliers is not None] == [1, 3, 6]
    assert read_log(training.log_file) == training.log
    logged = training.log[training.progress.best_update - 1].valid_outliers  # of the weights that it ends with
    assert logged is not None
    for task, start, count in (("asr", 1000, 2), ("tts", 2000, 1)):
        rows = [
            batch.input_ids[row, :length].tolist()
            for batch in itertools.islice(stream(start), count)
            for row, length in enumerate(batch.lengths)
        ]
        expected = by_measuring(training.model.get_base_model(), rows)  # type: ignore[union-attr]
        assert logged[task] == pytest.approx(expected, rel=1e-4)
