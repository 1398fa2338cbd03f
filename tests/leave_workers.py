"""One of two processes that gather and leave, again and again.

`torchrun --nproc-per-node 2 tests/leave_workers.py FOLDER`

With nothing between the two, this stopped for good within 20 rounds.
"""

import faulthandler
import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn

from sparq.recipes.train_together import leave

ROUNDS = 20


def main() -> None:
    faulthandler.dump_traceback_later(180, exit=True)
    torch.set_num_threads(1)
    for number in range(ROUNDS):
        meeting = Path(sys.argv[1]) / str(number)
        distributed.init_process_group(
            "gloo", init_method=meeting.as_uri(), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
        )
        # As at the end of a training, the shared model outlives the call, and the group with it.
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        model(torch.randn(2, 4)).sum().backward()
        own = torch.randn(1, 5000)
        distributed.all_gather([torch.empty_like(own) for _ in range(2)], own)
        leave()
        del model


if __name__ == "__main__":
    main()
