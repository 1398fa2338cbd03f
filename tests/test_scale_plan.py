"""The simulated plan of scripts/scale_plan.py against closed forms."""

import runpy
from pathlib import Path

import pytest

PLAN = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "scale_plan.py"))
simulate = PLAN["simulate"]


def test_without_failures_it_is_division() -> None:
    plan = {"speed": 10.0, "shard_hours": 1.0, "failures_a_day": 0.0, "restart": 1.0, "seed": 0}
    found = simulate(hours=100, workers=8, **plan)
    # 13 rounds of eight workers, a tenth of an hour each
    assert (found.wall_hours, found.worker_hours) == pytest.approx((1.3, 10.4))
    assert (found.failures, found.lost_hours) == (0, 0)
    assert simulate(hours=100, workers=1, **plan).wall_hours == pytest.approx(10)


def test_a_failure_costs_what_it_interrupts() -> None:
    """One worker: all hours are work or loss, and a death loses the restart and on average half a shard."""
    found = simulate(hours=20_000, workers=1, speed=10, shard_hours=1, failures_a_day=4.8, restart=0.25, seed=1)
    assert found.wall_hours == pytest.approx(2000 + found.lost_hours)
    # 0.2 deaths in an hour at work, none while it is away
    assert found.failures == pytest.approx(0.2 * (found.wall_hours - 0.25 * found.failures), rel=0.15)
    assert found.lost_hours / found.failures == pytest.approx(0.25 + 0.05, rel=0.02)
