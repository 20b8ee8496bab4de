"""One of several ranks that trains by the clock, without collectives, until it is killed.

`python clocked_process.py URL EPOCH`: step n is due STEP_SECONDS * n after EPOCH (CLOCK_MONOTONIC),
so that a rank that was stopped catches up. It prints a JSON line every few steps: where it is, and
the longest that any `step` has taken.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from ranks_process import RANK, WORLD, say

import ckptmgr

STEP_SECONDS = 0.02
EVERY = 25
TELL_EVERY = 10


def train(ckpt: ckptmgr.Checkpointer, weights: torch.Tensor, epoch: float) -> None:
    """Step by step, for ever."""
    longest, step = 0.0, ckpt.restore()
    say(start=step)
    first = step
    while True:
        step += 1
        weights.fill_(step)
        before = time.monotonic()
        ckpt.step(step)
        longest = max(longest, time.monotonic() - before)
        if step % TELL_EVERY == 0:
            say(step=step, longest=longest)
        time.sleep(max(0.0, epoch + STEP_SECONDS * (step - first) - time.monotonic()))


def main() -> None:
    """Join, train, and say why it ends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=RANK, world_size=WORLD)
    weights = torch.zeros(1 << 16)
    try:
        with ckptmgr.Checkpointer(sys.argv[1], {"weights": weights}, every=EVERY) as ckpt:
            train(ckpt, weights, float(sys.argv[2]))
    except ckptmgr.CkptmgrError as error:
        say(error=type(error).__name__, message=str(error))


if __name__ == "__main__":
    main()
