"""Measure every attention on SmolLM2-135M without training: docs/attention.json, and the table and figure made of it.

python scripts/attention_table.py measure [TEXT]   # an hour; writes docs/attention.json
python scripts/attention_table.py draw             # writes docs/attention-pareto.svg, prints the table

Without TEXT the demo's page of prose is read, which has 3,833 tokens.

"""

import json
import math
import sys
from importlib.resources import files
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from sparq.attention import AttentionSpec, Clip, SinkSchedule
from sparq.errors import SparqError
from sparq.evaluation import measure_outliers, prose_perplexity
from sparq.models import convert, load_model
from sparq.pretrained import resolve_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONTEXT, TOKENS = 512, 8192

SPECS: dict[str, AttentionSpec] = {
    name: AttentionSpec.parse(name)
    for name in (
        "vanilla", "vanilla_max_shift", "softmax1", "none", "mean", "l1", "max_shift", "clipped", "softmax1+clipped",
        "gated", "softmax1+gated",
    )
}  # fmt: skip
SPECS |= {f"clipped, T = {length}": AttentionSpec(clip=Clip(length=length)) for length in (2048, 8192)}
WEIGHTS = (1 / 16, 1 / 4, 1 / 2, 2.0, 4.0, 16.0)
"""Weights of a sink between `vanilla` (0) and `softmax1` (1), and beyond."""


FIGURES = (
    "attention_mass", "max_inf_norm", "mean_kurtosis", "first_token_share", "sink_rate", "attention_entropy",
    "max_logit", "first_value_norm", "sink_value_norm", "other_value_norm",
)  # fmt: skip


def measure(text: Path | None) -> None:
    folder = resolve_model("pretrained:smollm2-135m")
    words = (text or files("sparq") / "demo" / "prose.txt").read_text(encoding="utf-8").split()
    ids = AutoTokenizer.from_pretrained(folder)(" ".join(words), return_tensors="pt").input_ids[0, :TOKENS]
    batches = [
        {"input_ids": piece[None], "attention_mask": torch.ones_like(piece[None])} for piece in ids.split(CONTEXT)
    ]
    rows = []
    cases = [*SPECS, *(f"sink of weight {weight:g}" for weight in WEIGHTS)]
    for number, name in enumerate(cases):
        model = load_model(folder)
        if name in SPECS:
            convert(model, SPECS[name])
        else:
            weight = WEIGHTS[number - len(SPECS)]
            convert(model, "softmax1")
            SinkSchedule(model, updates=1).set(0)
            for layer in model.modules():
                if getattr(layer, "sink", None) is not None:
                    layer.sink = torch.full_like(layer.sink, math.log(weight))
        row = {"attention": name, "perplexity": prose_perplexity(model, ids, context=CONTEXT).value}
        try:
            found = measure_outliers(model, batches)
            row |= {name: getattr(found, name) for name in FIGURES}
        except SparqError as error:
            row["fault"] = str(error)
        rows.append(row)
        print(row, flush=True)
    (DOCS / "attention.json").write_text(
        json.dumps({"tokens": len(ids), "context": CONTEXT, "rows": rows}, indent=2) + "\n"
    )


def draw() -> None:
    data = json.loads((DOCS / "attention.json").read_text())
    rows = [row for row in data["rows"] if "fault" not in row and math.isfinite(row["perplexity"])]
    names = ("attention", "PPL", "mass", "max inf norm", "mean kurtosis", "sink rate", "max logit", "v sinks", "v rest")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for row in data["rows"]:
        if row.get("fault") or not math.isfinite(row["perplexity"]):
            print(f"| {row['attention']} | not a number: {row.get('fault', '')} |{' |' * (len(names) - 2)}")
        else:
            print(
                f"| {row['attention']} | {row['perplexity']:,.2f} | {row['attention_mass']:.4f} | "
                f"{row['max_inf_norm']:,.0f} | {row['mean_kurtosis']:,.0f} | {row['sink_rate']:.3f} | "
                f"{row['max_logit']:.1f} | {_shown(row['sink_value_norm'])} | {row['other_value_norm']:.2f} |"
            )
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    whole, near = figure.subplots(1, 2)
    sinks = {"vanilla": "w = 0, vanilla", "softmax1": "w = 1, softmax1"}
    sinks |= {f"sink of weight {weight:g}": f"w = {weight:g}" for weight in WEIGHTS}
    curve = sorted((row for row in rows if row["attention"] in sinks), key=_removed)
    same = {"vanilla_max_shift", "none", "gated", "softmax1+gated"}  # functions that are drawn under another name
    others = [row for row in rows if row["attention"] not in {*sinks, *same}]
    for axes in (whole, near):
        axes.plot(
            [_removed(row) for row in curve], [row["perplexity"] for row in curve],
            "o-", color="#0072B2", label="a sink of weight w: 0 is vanilla, 1 is softmax1",
        )  # fmt: skip
        for row, marker in zip(others, "s^Dv*Pph", strict=False):
            axes.plot(_removed(row), row["perplexity"], marker, color="#D55E00", markersize=8, label=row["attention"])
        axes.set(xlabel="attention mass removed, % of the softmax's", ylabel="perplexity of prose, no training")
        axes.grid(alpha=0.3)
    whole.set(yscale="log", title="SmolLM2-135M, every variant (log scale)")
    whole.legend(fontsize=8)
    near.set(xlim=(-1, 28), ylim=(44, 72), title="the lower left corner of it")
    places = {"vanilla": (-4, -16), "softmax1": (6, -14), "sink of weight 4": (-10, 12), "sink of weight 16": (8, -8)}
    for row in curve:
        if row["attention"] in places:
            place = places[row["attention"]]
            point = (_removed(row), row["perplexity"])
            near.annotate(sinks[row["attention"]], point, place, textcoords="offset points", fontsize=8)
    figure.savefig(DOCS / "attention-pareto.svg", metadata={"Date": None})


def _shown(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.2f}"


def _removed(row: dict[str, float]) -> float:
    return 100 * (1 - row["attention_mass"])


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw()
    else:
        measure(Path(sys.argv[2]) if len(sys.argv) > 2 else None)
