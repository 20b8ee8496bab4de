"""A training process that the kill test starts again and again: prints each step as it ends.

`python trainer_process.py URL STEPS`: resumes, trains to STEPS, prints its digest and losses.
"""

from __future__ import annotations

import json
import sys

import torch
from training import Training

import ckptmgr


def main() -> None:
    """Train to the end, however often it takes."""
    torch.set_num_threads(1)
    url, steps = sys.argv[1], int(sys.argv[2])
    training = Training()
    with ckptmgr.Checkpointer(url, training.state, every=3, keep=3) as ckpt:
        start = ckpt.restore()
        say({"resumed": start, "source": ckpt.restored.source if ckpt.restored else ""})
        for step in range(start + 1, steps + 1):
            training.train_one_step(step)
            ckpt.step(step)
            say({"step": step, "loss": training.losses[step]})
    say({"digest": training.digest()})


def say(what: dict[str, object]) -> None:
    """One line to the oracle; it is in the pipe before a kill can land behind it."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
