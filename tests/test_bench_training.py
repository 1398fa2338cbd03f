"""The training benchmark at a tiny size."""

import threading
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from sparq.bench import bench_training
from sparq.bench.training import PRODUCTS, TRAINER, utterance_lengths
from sparq.cli.main import main


@pytest.mark.filterwarnings("ignore::UserWarning")  # the Trainer's own
def test_updates_against_the_trainer(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    threads = threading.active_count()
    rows = list(
        bench_training(
            ["lora"],
            attentions=["vanilla", "softmax1"],
            backbone=str(tmp_path),
            pieces=50,
            sequences=8,
            row=4,
            batch_tokens=400,
            rank=2,
            rounds=3,
        )
    )
    assert [row.contender for row in rows] == [TRAINER, "vanilla", "softmax1", PRODUCTS]
    assert all(row.time.median > 0 and row.tokens_per_second > 0 for row in rows)
    assert rows[-1].memory is None
    assert threading.active_count() == threads


def test_lengths_are_those_of_four_tasks() -> None:
    lengths = utterance_lengths(4000, random=np.random.default_rng(0))
    assert min(lengths) >= 8
    assert max(lengths) <= 195
    # 11.8 s on average: 37, 108, 145 and 145 pieces.
    assert 105 < np.mean(lengths) < 115


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--rounds", "2"], "--rounds is 2: quartiles need at least 3"),
        (["--cases", "qlora"], "unknown case 'qlora'"),
        (["--sequences", "12"], "--sequences is 12: the Trainer's batches have 8, so take a multiple of 8"),
        (["--attentions", "softmax2"], "unknown attention 'softmax2'"),
    ):
        assert main(["bench", "training", *wrong]) == 2
        assert message in capsys.readouterr().err
