"""One of several processes of a tiny training: `torchrun --nproc-per-node 2 tests/train_workers.py FOLDER KIND`.

KIND is lora or full; with KILL_AT=n in the environment the last process dies once, ahead of update n.
"""

import os
import sys
from pathlib import Path

import torch

from sparq.training import TrainingRun
from test_training import SETTINGS, fresh, full, packed_stream


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model = full() if kind == "full" else fresh()
    training = TrainingRun(
        model, folder, settings=SETTINGS, key="key", batches=packed_stream,
        validation={"asr": [next(packed_stream(1000))]},
    )  # fmt: skip
    mark = folder / "killed"
    if os.environ.get("KILL_AT") and training.workers.rank == training.workers.count - 1 and not mark.exists():
        update = training._update

        def dying() -> object:
            if training.progress.updates + 1 == int(os.environ["KILL_AT"]):
                mark.touch()
                os.kill(os.getpid(), 9)
            return update()

        training._update = dying  # type: ignore[assignment, method-assign]
    training.train("test")


if __name__ == "__main__":
    main()
