"""Groups of tokens against the whole, and against numbers made by hand."""

import math

import pytest
import torch

from model_families import tiny_model
from sparq.evaluation import measure_outliers
from sparq.evaluation.token_groups import GroupSums

IDS = torch.tensor([[7, 50, 8, 51, 52, 0, 0], [9, 53, 10, 11, 54, 55, 12]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
LOW = torch.arange(96) < 40


def test_groups_make_up_the_whole() -> None:
    model = tiny_model("llama")
    report = measure_outliers(
        model, [BATCH], reduction="tensor", groups={"all": torch.ones(96, dtype=torch.bool), "low": LOW, "high": ~LOW}
    )
    whole, low, high = (report.groups[name] for name in ("all", "low", "high"))
    assert whole.num_tokens == report.num_tokens == 12
    assert (low.num_tokens, high.num_tokens) == (6, 6)
    assert whole.max_inf_norm == report.max_inf_norm == max(low.max_inf_norm, high.max_inf_norm)
    assert whole.mean_kurtosis == pytest.approx(report.mean_kurtosis)
    assert whole.attention_share == pytest.approx(1)
    assert low.attention_share + high.attention_share == pytest.approx(1)
    assert measure_outliers(model, [BATCH]).groups == {}


def test_a_group_sees_its_own_tokens_only() -> None:
    sums = GroupSums({"low": LOW, "high": ~LOW, "none": torch.zeros(96, dtype=torch.bool)}, 1)
    hidden = torch.tensor([[1.0, -9.0], [100.0, 3.0], [2.0, 4.0]])
    ids = torch.tensor([7, 50, 8])
    sums.add_hidden(0, ids, hidden)
    attention = torch.tensor([[[1.0, 0.0, 0.0], [0.25, 0.5, 0.0], [0.125, 0.0, 0.125]]])
    sums.add_attention(ids, attention)
    found = sums.report()
    assert (found["low"].max_inf_norm, found["high"].max_inf_norm) == (9, 100)
    # The first row has no choice: 0.25 + 0.125 + 0.125 of the rest goes to low ids, 0.5 to the high one.
    assert found["low"].attention_share == found["high"].attention_share == 0.5
    assert found["high"].mean_kurtosis == 1  # two numbers
    assert math.isnan(found["none"].mean_kurtosis)
    assert found["none"].num_tokens == 0
