"""One of several processes of a tiny training: `torchrun --nproc-per-node 2 tests/train_workers.py FOLDER KIND`.

KIND is one of `KINDS`; with KILL_AT=n in the environment the last process dies once, ahead of update n.
"""

import os
import sys
from pathlib import Path

import torch

from sparq.recipes.train_together import leave
from test_processes import training_of


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    training = training_of(kind, folder)
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
    leave()


if __name__ == "__main__":
    main()
