"""When a training's outliers have gone for good, read from its log."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparq.papers.experiments import Cell
from sparq.papers.measures import measure_trajectory
from sparq.recipes.run_folder import RunFolder
from sparq.recipes.train_step import training_folder
from sparq.training import Update
from sparq.training.outlier_watch import ValidOutliers


def trained(folder: Path, norms: list[float | None]) -> Any:
    run = RunFolder(folder)
    log = training_folder(run, "softmax1") / "train.jsonl"
    log.parent.mkdir(parents=True)
    updates = [
        Update(
            update=number, tokens=10 * number, seconds=1.0, loss=1.0, nll=1.0, learning_rate=0.1, gradient_norm=1.0,
            valid_outliers=None if norm is None else {"asr": ValidOutliers(norm, 3.0, 11)},
        )
        for number, norm in enumerate(norms, start=1)
    ]  # fmt: skip
    log.write_text("".join(update.to_line() for update in updates))
    return SimpleNamespace(run=run)


@pytest.mark.parametrize(
    ("norms", "tokens"),
    [
        ([9000.0, 800.0, 700.0], 20.0),
        ([9000.0, 800.0, None, 20000.0, 1999.0, None, 700.0], 50.0),  # it had come back, larger
        ([800.0, 9000.0], None),
        ([9000.0, 900.0], None),  # a tenth is not below a tenth
    ],
)
def test_tokens_are_those_after_which_the_norm_stays_low(
    tmp_path: Path, norms: list[float | None], tokens: float | None
) -> None:
    logged = [norm for norm in norms if norm is not None]
    assert measure_trajectory(trained(tmp_path, norms), Cell(framework="softmax1")) == {
        "ASR first": logged[0], "ASR largest": max(logged), "ASR last": logged[-1], "ASR tokens": tokens,
    }  # fmt: skip


def test_a_log_without_outliers_has_no_trajectory(tmp_path: Path) -> None:
    assert measure_trajectory(trained(tmp_path, [None, None]), Cell(framework="softmax1")) == {}
