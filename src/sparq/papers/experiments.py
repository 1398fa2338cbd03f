"""The papers' tables and figures as data: which models each compares, and what is measured of them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from sparq.errors import unknown
from sparq.papers.published import Labels

Measure = Literal["tasks", "accuracy", "training", "latency", "outliers", "trajectory", "attention", "parameters"]
"""What is measured of a model; `measures.py` says which numbers each gives."""

Adaptation = Literal["full", "lora", "qlora", "qlora-4bit"]
"""How the backbone is adapted: all weights, or LoRA on it in floating point, in 8-bit integers, or in NF4."""

CellKey = Literal["framework", "adaptation", "precision"]
"""By what the models of an experiment are chosen."""

FULL = "full"
"""The precision of a model that is not quantized, and the adaptation of all weights."""

TUNED = "-tuned"
"""What a precision ends in that takes the profile's own settings: more calibration, smaller groups, a correction."""

GROUPED = "-grouped"
"""What a precision ends in whose weights and inputs share scales in groups of the profile's size, 64 channels."""

BEYOND = "beyond"
"""In place of a paper, of experiments that ask what the papers do not."""

OURS = ("softmax1", "max_shift")
"""What the papers' framework may be: both call theirs Softmax_1, and these are the two readings."""


@dataclass(frozen=True, kw_only=True, order=True)
class Cell:
    """One model of an experiment.

    Attributes:
        framework: its attention.
        adaptation: how it was adapted.
        rank: rank and alpha of LoRA, 0 for those of the profile.
        precision: `full`, or a scheme such as `w4a4-smoothquant`; `-clip5` leaves out 5 % of the weights' tails,
            `-tuned` takes the profile's settings, `-grouped` groups of weights and inputs.
    """

    framework: str
    adaptation: Adaptation = "full"
    rank: int = 0
    precision: str = FULL

    def is_of(self, labels: Labels) -> bool:
        """Tell whether a published row is about this cell, of whatever model."""
        framework = labels.get("framework", "vanilla")
        same = self.framework in OURS if framework == "ours" else self.framework == framework
        own = (self.adaptation, self.rank, self.precision)
        return same and own == (
            labels.get("adaptation", "full"),
            labels.get("rank", 0),
            labels.get("precision", "full"),
        )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or a figure.

    Attributes:
        name: that of the published table, or of the figure.
        paper: which paper, or `beyond` for what neither has.
        element: its printed number.
        title: what it shows.
        measures: what is measured of each cell; nothing for a drawing.
        cells: the models.
        figure: whether it is a figure, whose numbers are not printed.
        claim: what the papers say of it; empty where they compare nothing.
        better: the attentions that should be better by the claim.
        worse: the attentions that they should be better than.
        beside: models that the table has to compare with, which the claim is not about.
    """

    name: str
    paper: str
    element: str
    title: str
    measures: tuple[Measure, ...]
    cells: tuple[Cell, ...]
    figure: bool = False
    claim: str = ""
    better: tuple[str, ...] = OURS
    worse: tuple[str, ...] = ("vanilla",)
    beside: tuple[Cell, ...] = ()

    @property
    def is_printed(self) -> bool:
        """Whether a paper has its numbers."""
        return not self.figure and self.paper != BEYOND

    @property
    def has_drops(self) -> bool:
        """Whether its models are judged by their average performance drop."""
        return "tasks" in self.measures

    def base(self, cell: Cell) -> Cell:
        """Return what a cell's average performance drop refers to.

        In the papers that is full fine-tuning with its attention, in full precision; beyond them, its own row in full
        precision, so that what quantization costs is told apart from what the adaptation costs.
        """
        return replace(cell, precision=FULL) if self.paper == BEYOND else Cell(framework=cell.framework)

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """The cells, and those that their average drops refer to."""
        bases = [self.base(cell) for cell in self.cells] if self.has_drops else []
        return tuple(dict.fromkeys([*bases, *self.cells]))


def restricted(experiments: Iterable[Experiment], key: CellKey, names: Collection[str]) -> list[Experiment]:
    """Return the experiments with some of their models alone, without those that have none.

    Args:
        experiments: what is to be run.
        key: by what models are chosen.
        names: its values.

    Raises:
        SparqError: no experiment has a model of one of these names.
    """
    experiments = list(experiments)
    own = dict.fromkeys(getattr(cell, key) for experiment in experiments for cell in experiment.cells)
    for name in names:
        if name not in own:
            raise unknown(f"{key} of these experiments", name, own)
    parts = [replace(e, cells=tuple(cell for cell in e.cells if getattr(cell, key) in names)) for e in experiments]
    return [part for part in parts if part.cells]


def _cells(
    frameworks: Iterable[str],
    adaptations: Iterable[Adaptation] = ("full",),
    precisions: Iterable[str] = (FULL,),
    ranks: Iterable[int] = (0,),
) -> tuple[Cell, ...]:
    return tuple(
        Cell(framework=framework, adaptation=adaptation, rank=rank, precision=precision)
        for adaptation, rank, framework, precision in product(adaptations, ranks, frameworks, precisions)
    )


_BOTH = ("vanilla", *OURS)
_OTHERS = ("learned_sink", "clipped", "gated")
_METHODS = ("smoothquant", "affinequant", "omniquant")
_W8A8, _W4A4 = ([f"{bits}-{method}" for method in _METHODS] for bits in ("w8a8", "w4a4"))
_SMOOTH = (FULL, "w8a8-smoothquant", "w4a4-smoothquant")
_CLIPPED = [f"{bits}-smoothquant{clip}" for bits in ("w8a8", "w4a4") for clip in ("", "-clip1", "-clip5")]
_EVERY = [
    *(f"w8a8-{method}" for method in ("rtn", "smoothquant", "rotation")),
    *(f"w4a4-{method}" for method in ("rtn", *_METHODS, "gptq", "rotation", "best")),
]
_RANKS = (*_cells(_BOTH), *_cells(_BOTH, ["lora"], ranks=(512, 256, 128)))
_CASE, _SPARQ = "case-study", "sparq"

_LOSES_LESS = "Quantized, it loses less than vanilla attention"
_ADAPTS_BETTER = "Adapted by LoRA or QLoRA, it loses less over full fine-tuning"
_RANK_CLAIM = "With LoRA of several ranks it predicts at least as well"


def _experiment(
    name: str,
    element: str,
    title: str,
    measures: tuple[Measure, ...],
    cells: tuple[Cell, ...] = (),
    claim: str = "",
    beside: tuple[Cell, ...] = (),
    **compared: tuple[str, ...],
) -> Experiment:
    paper = next(paper for paper in (_CASE, _SPARQ, BEYOND) if name.startswith(paper))
    return Experiment(
        name=name, paper=paper, element=element, title=title, measures=measures, cells=cells, figure="figure" in name,
        claim=claim, beside=beside, **compared,
    )  # fmt: skip


EXPERIMENTS: tuple[Experiment, ...] = (
    _experiment(
        "case-study-1", "Table 1", "Quantization to W8A8 and W4A4", ("tasks",),
        _cells(_BOTH, precisions=[FULL, *_W8A8, *_W4A4]), _LOSES_LESS,
    ),
    _experiment(
        "case-study-2", "Table 2", "LoRA and QLoRA", ("tasks",), _cells(_BOTH, ["full", "lora", "qlora"]),
        _ADAPTS_BETTER,
    ),
    _experiment("case-study-3", "Table 3", "Ranks 128, 256 and 512", ("accuracy",), _RANKS, _RANK_CLAIM, _cells(_BOTH)),
    _experiment(
        "case-study-4", "Table 4", "Latency at batch size 1", ("latency",),
        _cells(_BOTH, precisions=[FULL, "w8a8-smoothquant"]), "It is a few percent slower, quantized or not",
    ),
    _experiment(
        "case-study-figure-1", "Figure 1", "Validation accuracy while training", ("accuracy",), _cells(_BOTH),
        "It learns better",
    ),
    _experiment("case-study-figure-2", "Figure 2", "A head under LoRA", ("attention",), _cells(_BOTH, ["lora"])),
    _experiment(
        "sparq-1", "Table 1", "Quantization to W4A4", ("tasks",), _cells(_BOTH, precisions=[FULL, *_W4A4]), _LOSES_LESS
    ),
    _experiment(
        "sparq-2", "Table 2", "LoRA and QLoRA", ("tasks",), _cells(_BOTH, ["full", "lora", "qlora"]),
        _ADAPTS_BETTER,
    ),
    _experiment("sparq-3", "Table 3", "Time of training", ("training",), _cells(_BOTH), "It trains in less time"),
    _experiment(
        "sparq-4", "Table 4", "Stabilizers of softmax_1", ("accuracy",), _cells(["none", "l1", "max_shift", "mean"]),
        "Training breaks without max-shift, or with another stabilizer",
        better=("max_shift",), worse=("none", "l1", "mean"),
    ),
    _experiment("sparq-5", "Table 5", "Ranks 128, 256 and 512", ("accuracy",), _RANKS, _RANK_CLAIM, _cells(_BOTH)),
    _experiment(
        "sparq-6", "Table 6", "Quantization to W8A8 and W4A4", ("tasks",),
        _cells(_BOTH, precisions=[FULL, *_W8A8, *_W4A4]), _LOSES_LESS,
    ),
    _experiment(
        "sparq-g1", "Appendix G.1", "Clipped softmax and gated attention", ("tasks",),
        _cells([*_BOTH, "clipped", "gated"], precisions=_SMOOTH),
        "Quantized, it loses less than clipped softmax and gated attention", worse=("clipped", "gated"),
    ),
    _experiment(
        "sparq-7", "Table 7", "Max-shift with the vanilla softmax", ("accuracy",),
        _cells(["vanilla", "vanilla_max_shift"]), "The stabilizer makes the vanilla softmax a little better",
        better=("vanilla_max_shift",),
    ),
    _experiment(
        "sparq-8", "Table 8", "LoRA, then quantization", ("tasks",), _cells(_BOTH, ["lora"], _SMOOTH),
        "Quantized after LoRA, it loses less",
    ),
    _experiment(
        "sparq-9", "Table 9", "Weight clipping", ("tasks",), _cells(_BOTH, precisions=_CLIPPED),
        "With the weights' tails clipped, it loses less", beside=_cells(_BOTH, precisions=_SMOOTH),
    ),
    _experiment(
        "sparq-10", "Table 10", "QLoRA on 8 and 4 bits", ("tasks",), _cells(_BOTH, ["qlora", "qlora-4bit"]),
        "Adapted on a base of 8 or 4 bits, it loses less",
    ),
    _experiment("sparq-11", "Table 11", "Parameters of LoRA", ("parameters",), _cells(["vanilla"], ["lora"])),
    _experiment("sparq-figure-1", "Figure 1", "The SpeechLM system, a drawing", ()),
    _experiment("sparq-figure-2", "Figure 2", "The framework, a drawing", ()),
    _experiment(
        "sparq-figure-3", "Figure 3", "Outliers by task and adaptation", ("outliers",),
        _cells(_BOTH, ["full", "lora", "qlora"]), "Its outliers are smaller, in every task",
    ),
    _experiment("sparq-figure-4", "Figure 4", "A head under LoRA", ("attention",), _cells(_BOTH, ["lora"])),
    _experiment(
        "beyond-methods", "-", "Outlier-free attention or a stronger method", ("tasks",),
        _cells(_BOTH, ["full", "lora"], [FULL, *_EVERY]), "Quantized by any method, it loses less",
    ),
    _experiment(
        "beyond-attention", "-", "Every outlier-free attention on a pretrained model", ("tasks",),
        _cells([*_BOTH, *_OTHERS], ["full", "lora", "qlora"], [*_SMOOTH, "w4a4-rotation", "w4a4-best"]),
        "Any of them loses less than vanilla attention", better=(*OURS, *_OTHERS),
    ),
    _experiment(
        "beyond-figure-1", "-", "Whether training takes the outliers away, and after how many tokens", ("trajectory",),
        _cells([*_BOTH, *_OTHERS], ["full", "lora"]),
    ),
    _experiment(
        "beyond-target", "-", "The papers' best figures, 18.5 % at W4A4 and 4 % by LoRA, on real outliers", ("tasks",),
        _cells(
            _BOTH, ["full", "lora"],
            [FULL, f"w4a4-best{TUNED}", f"w4a4-rotation{GROUPED}", f"w4a4-best{TUNED}{GROUPED}"],
        ),
        "It loses less under the strongest of ours, too",
    ),
)  # fmt: skip
"""Every table and figure of both papers, and what goes beyond them."""


def find_experiment(name: str) -> Experiment:
    """Return an experiment by name.

    Raises:
        SparqError: there is none of that name.
    """
    found = next((experiment for experiment in EXPERIMENTS if experiment.name == name), None)
    if found is None:
        raise unknown("experiment", name, [experiment.name for experiment in EXPERIMENTS])
    return found
