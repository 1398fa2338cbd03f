"""The benchmark's arithmetic on a clock of its own, its memory on known allocations, and its table."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sparq.bench import (
    AttentionCase,
    bench_attention,
    bench_quantization,
    default_cases,
    interleave,
    scheme_named,
)
from sparq.cli.main import main
from sparq.errors import SparqError
from sparq.process_memory import peak_bytes


def test_ratios_are_within_rounds() -> None:
    """The machine slows down threefold in the middle; the ratio does not change."""
    now, order = 0.0, []
    slow = itertools.chain(itertools.repeat(1.0, 12), itertools.repeat(3.0))

    def work(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds * next(slow)

    found = interleave(
        {"base": lambda: work("base", 1.0), "other": lambda: work("other", 1.5)},
        baseline="base", rounds=7, clock=lambda: now,
    )  # fmt: skip
    assert found["base"].median == 1.0
    assert found["other"].median == 1.5
    assert found["other"].low == found["other"].high == 1.5
    assert found["other"].seconds == 4.5
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == 8
    assert {round[0] for round in rounds} == {"base", "other"}
    assert all(sorted(round) == ["base", "base", "other"] for round in rounds)


def test_short_runs_are_repeated_within_their_turn() -> None:
    now, calls = 0.0, []

    def work(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds

    found = interleave(
        {"base": lambda: work("base", 0.5), "other": lambda: work("other", 1.0)},
        baseline="base", rounds=3, least_seconds=2.0, clock=lambda: now,
    )  # fmt: skip
    assert found["other"].seconds == 1.0
    assert found["other"].median == 2.0
    assert calls.count("other") == 1 + 3 * 4


def test_peak_memory_of_a_call() -> None:
    size = 64 << 20

    def hungry() -> None:
        torch.ones(size, dtype=torch.uint8)

    peak = peak_bytes(hungry, torch.device("cpu"))
    if peak is None:
        pytest.skip("only Linux can reset the peak")
    assert 0.9 * size < peak < 1.5 * size


@pytest.fixture
def tiny_cases() -> list[AttentionCase]:
    return [
        AttentionCase(kind=kind, length=300, dtype=torch.float32) for kind in ("forward", "forward+backward", "decode")
    ]


def test_every_variant_is_measured(tiny_cases: list[AttentionCase]) -> None:
    rows = list(bench_attention(tiny_cases, rounds=3, device=torch.device("cpu")))
    names = {kind: {row.variant for row in rows if row.case.kind == kind} for kind in ("forward", "decode")}
    assert names["forward"] == {"sdpa", "softmax1", "learned_sink", "max_shift"}
    assert names["decode"] > names["forward"]
    assert all(row.time.median > 0 for row in rows)
    assert {case.length for case in default_cases([torch.float32], [512, 2048]) if case.kind == "decode"} == {2048}


def test_fused_attention_has_no_square() -> None:
    """At 4096 keys a square of probabilities of nine heads takes 600 MB, all that is linear 30 MB."""
    case = AttentionCase(kind="forward+backward", length=4096, dtype=torch.float32)
    rows = bench_attention([case], rounds=3, device=torch.device("cpu"), variants=["softmax1", "max_shift"])
    memory = {row.variant: row.memory for row in rows}
    if memory["sdpa"] is None:
        pytest.skip("only Linux can reset the peak")
    assert max(value for value in memory.values() if value is not None) < 3


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--lengths", "512", "--dtypes", "float32", "--rounds", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| dtype | pass | length | attention |")
    assert len([line for line in lines if "`softmax1`" in line]) == 2
    for wrong, message in (
        (["--rounds", "2"], "--rounds is 2: quartiles need at least 3"),
        (["--dtypes", "float8"], "unknown dtype 'float8'"),
        (["--variants", "softmax2"], "unknown attention 'softmax2'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ):
        assert main(["bench", "attention", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_precisions_against_bfloat16(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    rows = list(bench_quantization(str(tmp_path), ["float32", "w8a8", "w8a16-e8"], length=20, rounds=3))
    assert [row.work for row in rows] == ["decode"] * 4 + ["prefill"] * 4
    assert [row.precision for row in rows[:4]] == ["bfloat16", "float32", "w8a8", "w8a16-e8"]
    assert all(row.time.median > 0 for row in rows)
    weights = {row.precision: row.weights for row in rows}
    assert weights["w8a16-e8"] < weights["w8a8"] < weights["bfloat16"] < weights["float32"]
    assert weights["float32"] == 4 * sum(p.numel() for p in tiny_llama.parameters()) + 2 * 4 * 4  # rotary frequencies


def test_every_compiled_model_is_compiled(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch compiles one function only so often, and runs the models after that uncompiled."""
    tiny_llama.save_pretrained(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the limit is of what goes before
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = list(bench_quantization(str(tmp_path), ["w8a8"], length=20, rounds=3, compiled=True, work=["prefill"]))
    assert len(rows) == 2
    assert "recompile_limit" not in caplog.text


def test_names_of_precisions() -> None:
    scheme = scheme_named("w4a16-g64-e8")
    assert (scheme.weight_bits, scheme.activation_bits, scheme.group_size, scheme.embedding_bits) == (4, 16, 64, 8)
    assert scheme_named("w8a8").embedding_bits == 16
    for name in ("w8", "w8a8-g", "w8a8e8", "float16"):
        with pytest.raises(SparqError, match=f"'{name}' is not a precision: expected bfloat16 or float32, or for"):
            scheme_named(name)
    with pytest.raises(SparqError, match="weight_bits is 9"):
        scheme_named("w9a8")
    assert main(["bench", "quantization", "--rounds", "2"]) == 2
    assert main(["bench", "quantization", "--work", "train"]) == 2
    assert main(["bench", "quantisation"]) == 2
