"""What a training tells about itself: speed, profile, and experiment trackers."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType

import fake_modules
from sparq.errors import SparqError
from sparq.training import TrainingRun, read_log
from sparq.training.flops import ModelFlops
from sparq.training.trackers import scalars
from test_training import SETTINGS, fresh, run, stream


def heard(skip: int = 0) -> Any:
    """Every micro-batch has three seconds of speech."""
    for batch in stream(skip):
        yield dataclasses.replace(batch, seconds=3.0)


def test_speed_is_work_by_time(tmp_path: Path) -> None:
    model = fresh()
    flops = ModelFlops.of(model)
    training = TrainingRun(model, tmp_path, settings=SETTINGS, key="key", batches=heard, validation={})
    training.train("test")
    batches = list(itertools.islice(stream(), 2))
    for update in training.log[:1]:
        assert update.speed is not None
        # All three are of the same time, so their ratios are of the work alone.
        tokens = sum(batch.num_tokens for batch in batches)
        assert update.speed.speech / update.speed.tokens == pytest.approx(6.0 / tokens)
        work = sum(flops.of_batch(batch) for batch in batches)
        assert update.speed.mfu * training.peak / update.speed.tokens == pytest.approx(work / tokens)
        assert update.tokens / update.seconds == pytest.approx(update.speed.tokens, rel=0.2)
    assert read_log(training.log_file) == training.log


def test_a_profile_of_a_few_updates(tmp_path: Path) -> None:
    training = run(fresh(), tmp_path / "with", dataclasses.replace(SETTINGS, profile=2))
    training.train("test")
    table = (tmp_path / "with" / "profile.txt").read_text()
    assert table.startswith("2 updates\n")
    assert "aten::mm" in table
    assert "Self CPU" in table
    run(fresh(), tmp_path / "without").train("test")
    assert not (tmp_path / "without" / "profile.txt").exists()


class Told:
    """What wandb or trackio is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, project: str, **_: Any) -> "Told":
        assert project == "sparq"
        return self

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_every_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    told = Told()
    fake_modules.insert(monkeypatch, name, init=told.init)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(name)])
    training = run(fresh(), tmp_path, dataclasses.replace(SETTINGS, loggers=(name,)))
    training.train("test")
    assert [step for step, _ in told.logged] == [1, 2, 3, 4, 5, 6]
    assert [values for _, values in told.logged] == [scalars(update) for update in training.log]
    assert {"loss", "learning_rate", "speed/mfu"} <= told.logged[0][1].keys()
    assert "valid_tasks/asr/accuracy" in told.logged[2][1]
    assert told.finished == 1


def test_a_tracker_is_closed_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    fake_modules.insert(monkeypatch, "wandb", init=told.init)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType("wandb")])
    settings = dataclasses.replace(SETTINGS, loggers=("wandb",), warmup_updates=0, learning_rate=math.inf)
    training = run(fresh(), tmp_path, settings)
    with pytest.raises(SparqError, match="the loss is nan at update 2"):
        training.train("test")
    assert [step for step, _ in told.logged] == [1]
    assert told.finished == 1


def test_tensorboard_has_the_log(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    training = run(fresh(), tmp_path, dataclasses.replace(SETTINGS, loggers=("tensorboard",)))
    training.train("test")
    events = accumulator.EventAccumulator(str(tmp_path / "sparq"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx([update.loss for update in training.log], rel=1e-6)
    assert len(events.Scalars("valid_tasks/asr/nll")) == 3
    assert len(events.Scalars("valid_outliers/asr/max_norm")) == 3


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(SparqError, match="train.loggers names trackio, which is not installed: pip install trackio"):
        run(fresh(), tmp_path, dataclasses.replace(SETTINGS, loggers=("trackio",)))
