"""Quantize SmolLM2-135M by every method and measure what it costs: a row of JSON for each.

python scripts/quantization_table.py EVALUATION.txt CALIBRATION.txt rows.jsonl [NAME ...]

NAME is a scheme such as w4a4-rotation or w4a16g64-gptq; with an attention before it, softmax1:w4a4-rotation, and with
settings after it, w4a4-best@epochs=1,seed=2,tokens=40960, where tokens are those to calibrate on. All of `NAMES` if
none is given. Rows that the file has already are not measured again. WINDOWS=4 in the environment measures on fewer.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from sparq.evaluation import prose_perplexity
from sparq.models import load_model
from sparq.pretrained import resolve_model
from sparq.quantization import quantize
from sparq.quantization.names import settings_of_name

CONTEXT = 2048
WINDOWS = int(os.environ.get("WINDOWS", "64"))
CALIBRATION_CONTEXT = 1024

METHODS = ("rtn", "smoothquant", "omniquant", "affinequant", "gptq", "rotation", "best")
NAMES = (
    "full",
    *(f"w8a8-{method}" for method in METHODS),
    *(f"w4a16g64-{method}" for method in METHODS),  # 128 does not divide SmolLM2's 576 channels
    *(f"w4a4-{method}" for method in METHODS),
    *(f"w4a4g64-{method}" for method in ("rotation", "best")),
    *(f"softmax1:{name}" for name in ("full", "w8a8-rtn", "w4a4-rtn", "w4a4-rotation")),
)


def measure(name: str, tokens: torch.Tensor, calibration: torch.Tensor, windows: int) -> dict[str, object]:
    """Return one row: perplexity, and the seconds that quantization took."""
    attention, _, scheme = name.rpartition(":")
    model = load_model(resolve_model("pretrained:smollm2-135m"), attention=attention or None)
    precision, _, given = scheme.partition("@")
    settings = {key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in given.split(",") if s)}
    used = settings.pop("tokens", 16 * CALIBRATION_CONTEXT)
    seconds = 0.0
    if precision != "full":
        start = time.perf_counter()
        batches = calibration[:used].view(-1, CALIBRATION_CONTEXT).split(1)
        model = quantize(model, batches, **{**settings_of_name(precision), **settings})
        seconds = time.perf_counter() - start
    perplexity = prose_perplexity(model, tokens[: windows * CONTEXT], context=CONTEXT)
    return {
        "name": name, "perplexity": perplexity.value, "tokens": perplexity.num_tokens, "seconds": round(seconds, 1),
        "calibration_tokens": used, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    text, calibration_text, out = (Path(argument) for argument in sys.argv[1:4])
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("pretrained:smollm2-135m"))

    def ids(path: Path) -> torch.Tensor:
        found: torch.Tensor = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
        return found

    tokens = ids(text)
    calibration = ids(calibration_text)
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    done = {json.loads(line)["name"] for line in out.read_text().splitlines()} if out.exists() else set()
    for name in sys.argv[4:] or NAMES:
        if name not in done:
            row = {**measure(name, tokens, calibration, WINDOWS), "text_sha256": digest}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
