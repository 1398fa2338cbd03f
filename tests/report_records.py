"""Results to draw: every field filled, hostile texts in all of them."""

from pathlib import Path

import numpy as np

from sparq.report import (
    FRAMEWORKS,
    PRECISIONS,
    AsrSplit,
    AttentionMap,
    AudioSample,
    CurvePoint,
    ErrorRate,
    Example,
    HiddenMap,
    LayerOutliers,
    LiveSlice,
    Outliers,
    Perplexity,
    Provenance,
    Results,
    Row,
    SpeechReference,
    SplitSummary,
    TaskOutliers,
    TrainingCurve,
    matrix,
)

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \"quoted\""
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(28)
CHANNELS = np.linspace(0, 3.3, 6 * 16).reshape(6, 16)
TOKENS = ("<startofspeech>", "\u4e11\u4e22", "▁six", "$x_1$", "\u0627\ue000\n", "</svg><script>")


def row(index: int, framework: str, precision: str, **changes: object) -> Row:
    """A row whose numbers differ from those of every other row."""
    value = 10 + index + index / 100
    examples = (Example(id="an4-1", reference="go to six", hypothesis=HOSTILE if index % 2 else "go six"),)
    split = AsrSplit(
        wer=value + 2, words=773, utterances=130, errors=90 + index, low=value, high=value + 5, examples=examples
    )
    metrics = {
        "textlm_ppl": Perplexity(value=value, tokens=1234, utterances=19, split="test"),
        "speechlm_ppl": Perplexity(value=value + 1000, tokens=5678, utterances=19, split="test"),
        "asr_wer": ErrorRate(value=value + 2, errors=90, length=773, utterances=130, split="test"),
        "tts_uer": ErrorRate(value=value + 30, errors=900, length=7730, utterances=130, split="test"),
        "tts_cer": ErrorRate(
            value=value + 3, errors=90, length=3210, utterances=24, split="test", low=value + 1, high=value + 9
        ),
        "tts_wer": ErrorRate(
            value=value + 6, errors=90, length=777, utterances=24, split="test", low=value + 2, high=value + 12
        ),
        "asr": {"test": split, "test-unseen-voice": split},
        "prose_ppl": Perplexity(value=value * 40, tokens=4092, utterances=4, split="prose"),
        "outliers": outliers(24_600 / (1 + index)),
        "seconds": 61.0,
    }
    return Row(framework=framework, precision=precision, **{**metrics, **changes})


def outliers(norm: float) -> Outliers:
    layers = tuple(LayerOutliers(layer=i, max_inf_norm=norm / (3 - i), kurtosis=norm * 5) for i in range(3))
    return Outliers(
        max_inf_norm=norm, mean_kurtosis=norm * 5, attention_mass=0.9, first_token_share=0.25, sink_rate=0.375,
        attention_entropy=1.5, max_logit=23.25, first_value_norm=0.75, sink_value_norm=None, other_value_norm=6.75,
        tokens=999, final_norm_max_inf_norm=88.0, per_layer=layers,
        by_task={
            name: TaskOutliers(max_inf_norm=norm / part, mean_kurtosis=norm / part / 7, tokens=111 * part)
            for part, name in enumerate(("TextLM", "SpeechLM", "ASR"), 2)
        },
    )  # fmt: skip


def full_results(folder: Path, **changes: object) -> Results:
    (folder / "clip.wav").write_bytes(WAV)
    (folder / "secret.txt").write_text("not audio")
    (folder / "long.wav").write_bytes(WAV + bytes(200_000))
    points = tuple(
        CurvePoint(
            update=u, tokens=u * 10, seconds=u / 2, loss=3 / (1 + u), lr=1e-4,
            valid_accuracy=u / 100 if u % 10 == 0 else None,
        )
        for u in range(1, 41)
    )  # fmt: skip
    causal = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    values = {
        "name": HOSTILE,
        "created": "2026-01-01T00:00:00+00:00",
        "provenance": Provenance(
            git_hash="0123456789abcdef", git_dirty=True, packages={"python": "3.11.9", "torch": "2.13.0"},
            platform="Linux", cpu="EPYC", num_cpus=2, num_threads=1, memory_bytes=2**33,
            command=("sparq", HOSTILE),
        ),
        "seed": 7,
        "settings": {"lora": {"rank": 128}, "note": HOSTILE},
        "corpus": {"train": SplitSummary(hours=2.41, utterances=2310, speakers=74)},
        "rows": tuple(
            row(i * len(PRECISIONS) + j, framework, precision)
            for i, framework in enumerate(FRAMEWORKS)
            for j, precision in enumerate(PRECISIONS)
        ),
        "wall_seconds": {"units": 41.2, "train": 7321.0},
        "peak_memory_bytes": {"units": 2**30},
        "curves": {
            f: TrainingCurve(points=points, live=LiveSlice(points=points[:8], max_abs_difference=3.1e-7))
            for f in FRAMEWORKS
        },
        "attention_maps": tuple(
            AttentionMap(
                framework=f, layer=1, head=2, weights=matrix(causal), values=matrix(CHANNELS), outputs=matrix(CHANNELS),
                labels=TOKENS,
            )
            for f in FRAMEWORKS
        ),
        "hidden_maps": tuple(
            HiddenMap(framework=f, norms=matrix(np.arange(18.0).reshape(6, 3)), labels=TOKENS)
            for f in FRAMEWORKS
        ),
        "audio": tuple(
            AudioSample(
                id=path, path=path, reference="go to six", hypotheses={"vanilla-full": HOSTILE, "other": "go"}
            )
            for path in ("clip.wav", "secret.txt", "long.wav", "gone.wav")
        ),
        "speech_references": (
            SpeechReference(
                name="recordings",
                cer=ErrorRate(value=6.5, errors=6, length=3210, utterances=24, split="test", low=4.25, high=9.75),
                wer=ErrorRate(value=14.5, errors=6, length=777, utterances=24, split="test", low=11.25, high=19.75),
            ),
        ),
        "notes": (HOSTILE, "TTS audio was not measured."),
    }  # fmt: skip
    return Results(**{**values, **changes})


def bare(rows: tuple[Row, ...]) -> Results:
    return Results(
        name="n", created="c", seed=0, settings={}, corpus={}, rows=rows,
        provenance=Provenance(
            git_hash="unknown", git_dirty=None, packages={}, platform="p", cpu="c", num_cpus=1, num_threads=1,
            memory_bytes=1, command=(),
        ),
    )  # fmt: skip
