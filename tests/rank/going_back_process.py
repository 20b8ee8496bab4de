"""One of two ranks that goes back amid training, saves the same steps again and is killed; or, with
`resume`, one that says what the job goes on from.

`python going_back_process.py URL DO`, DO being `go-back` or `resume`.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from ranks_process import RANK, WORLD, say

import ckptmgr


def main() -> None:
    """Join and do it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=RANK, world_size=WORLD)
    weights = torch.zeros(64)
    with ckptmgr.Checkpointer(sys.argv[1], {"weights": weights}, every=None) as ckpt:
        if sys.argv[2] == "resume":
            step = ckpt.restore()
            assert ckpt.restored is not None
            say(step=step, source=ckpt.restored.source, value=float(weights.unique()))
            return
        ckpt.restore()
        for step in (1, 2, 3):
            weights.fill_(step)
            ckpt.save(step).committed()
        assert ckpt.restore(1) == 1
        for step in (2, 3):
            weights.fill_(100 + step)
            assert ckpt.save(step).committed(60)
        say(attempt=ckpt.attempt)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
