"""What W4A4 SmoothQuant leaves of SpeechLMs when its scales are measured on some of the tasks only.

python scripts/calibration_tasks.py RUN NAME SEED   # some 3 minutes; SEED draws the sequences

Scales are measured on 128 training sequences, losses on text and speech alone and speech with its text, of the first
60 utterances of the test split.
"""

import sys
from pathlib import Path

from four_bit_inputs import losses
from torch import Tensor

from sparq.adaptation import load_speechlm
from sparq.data.batching import Spoken
from sparq.quantization import quantize
from sparq.recipes.calibration import padded_batches, task_examples
from sparq.recipes.outlier_sequences import task_sequences
from sparq.recipes.quantize_step import scheme_of_name
from sparq.recipes.train_step import as_spoken
from sparq.types import TASKS, Task
from sparq.units import read_units

UTTERANCES = 60
SEQUENCES = 128


def main(run: Path, name: str, seed: int) -> None:
    speechlm = load_speechlm(run / "models" / name)
    model, vocabulary = speechlm.model, speechlm.vocabulary

    def split(part: str) -> list[Spoken]:
        rows = read_units(run / "units", part, expect_fingerprint=vocabulary.units_fingerprint)
        return [as_spoken(row) for row in rows]

    train, pairs = split("train"), [(u.text, u.units) for u in split("test")[:UTTERANCES]]
    sequences: dict[str, list[Tensor]] = {
        task: task_sequences(vocabulary, task, pairs) for task in ("textlm", "speechlm", "asr")
    }
    print(f"full precision: {losses(model, sequences)}", flush=True)
    nearest = quantize(model, [], scheme_of_name("w4a4-rtn", 0.5))
    print(f"rounded to nearest: {losses(nearest, sequences)}", flush=True)
    without: tuple[Task, ...] = tuple(task for task in TASKS if task != "asr")
    for tasks in (TASKS, ("textlm",), without, ("asr",)):
        examples = task_examples(train, vocabulary, tasks=tasks, count=SEQUENCES, seed=seed)
        low = quantize(model, padded_batches(examples, vocabulary), scheme_of_name("w4a4-smoothquant", 0.5))
        print(f"scales from {', '.join(tasks)}: {losses(low, sequences)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
