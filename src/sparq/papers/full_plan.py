"""What the papers' own size takes: the exact commands, and an estimate of hours and disk. Nothing is run."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparq.papers.experiments import Experiment
from sparq.papers.published import load_published
from sparq.recipes.model_sections import TrainConfig

GPUS = 4
PEAK_FLOPS = 312e12
"""Of an A100 in bfloat16; the papers had four."""
UTILIZATION = 0.3
"""Share of the peak that training is taken to reach: an assumption."""

UPDATES = 100_000
"""Those of `recipes/paper`; the papers do not say how many."""

SPEECH_HOURS = {"Libri-Light": 60_000, "MLS English": 44_000, "LibriTTS": 585, "VCTK": 44}
"""The papers' speech; textLM has the 40 million lines of LibriSpeech's text."""
BYTES_PER_HOUR = 3600 * 16_000 * 2
FLAC_SHARE = 0.55
"""Size of FLAC by that of 16-bit samples: an assumption."""

PARAMETERS = {"opt-125m": 125e6, "opt-350m": 331e6, "opt-1.3b": 1.316e9}

_BYTES_PER_PARAMETER = 4 + 16
"""A saved model in float32, and the resumable state: weights, master weights and Adam's two moments."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the training of an experiment's models takes on one backbone and with one seed.

    Attributes:
        trainings: number of models to train.
        gpu_hours: hours of one A100, by 6 FLOPs a parameter and token.
        disk_gb: gigabytes of models and states, without the corpora.
    """

    trainings: int
    gpu_hours: float
    disk_gb: float


def estimate(experiment: Experiment, model: str) -> Estimate:
    """Return the estimate of an experiment on a backbone; evaluation is not in it."""
    train = TrainConfig(updates=UPDATES)
    tokens = train.updates * train.batch_tokens * train.accumulate
    trainings = len({(cell.framework, cell.adaptation, cell.rank) for cell in experiment.all_cells})
    seconds = 6 * PARAMETERS[model] * tokens / (PEAK_FLOPS * UTILIZATION)
    return Estimate(
        trainings=trainings,
        gpu_hours=trainings * seconds / 3600,
        disk_gb=trainings * PARAMETERS[model] * _BYTES_PER_PARAMETER / 1e9,
    )


def models_of(experiment: Experiment) -> list[str]:
    """Return the backbones that the papers ran an experiment on; OPT-125m where they do not say."""
    if not experiment.is_printed:
        return ["opt-125m"]
    table = load_published().table(experiment.name)
    named = dict.fromkeys(str(row.labels["model"]) for row in table.rows if "model" in row.labels)
    return list(named) or ["opt-125m"]


def full_plan(experiment: Experiment, seeds: Sequence[int] = (0, 1, 2)) -> str:
    """Return the commands of an experiment at the papers' size, with what they are expected to take."""
    lines = [f"# {experiment.name}: {experiment.title}"]
    if not experiment.measures:
        return "\n".join([*lines, "# a drawing: nothing to run"])
    if experiment.measures == ("parameters",):
        return "\n".join([*lines, f"sparq paper run {experiment.name} --profile smoke  # counted from shapes: seconds"])
    for model in models_of(experiment):
        found = estimate(experiment, model)
        size = model.removeprefix("opt-")
        lines.append(
            f"# {model}: {found.trainings} trainings a seed, {found.gpu_hours:,.0f} hours of an A100"
            f" ({found.gpu_hours / GPUS:,.0f} on {GPUS}), {found.disk_gb:,.0f} GB"
        )
        lines += [
            f"sparq paper run {experiment.name} --recipe recipes/paper/opt{size}-full.yaml --out runs/paper/opt{size}"
            f" --results experiments/results.jsonl --seed {seed}"
            for seed in seeds
        ]
    return "\n".join(lines)


def full_preamble() -> str:
    """Return what comes before the first command, and what the estimates are made of."""
    audio = sum(SPEECH_HOURS.values()) * BYTES_PER_HOUR * FLAC_SHARE / 1e12
    hours = ", ".join(f"{name} {hours:,} h" for name, hours in SPEECH_HOURS.items())
    return "\n".join(
        [
            "# Nothing of this is run by the command that prints it, and nothing of it has been run.",
            f"# Speech: {hours}; about {audio:.1f} TB of FLAC (estimate: {FLAC_SHARE:g} of the samples' bytes).",
            "# Put all of it into one manifest (docs/corpora.md). OPT and HuBERT come from the model hub.",
            f"# Hours are 6 FLOPs a parameter and token at {UTILIZATION:g} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s, for"
            f" {UPDATES:,} updates of 200,000 tokens: an estimate.",
            "# They are those of training alone; models that two experiments share are trained once in one --out.",
            "export SPARQ_CORPUS=...  # the folder of manifest.tsv",
        ]
    )
