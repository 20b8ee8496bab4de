"""Training on a GPU that the kill test starts again and again: `training_process.py URL STEPS`."""

from __future__ import annotations

import json
import sys

import torch

import ckptmgr
from gpu.loop import Loop


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    url, steps = sys.argv[1], int(sys.argv[2])
    torch.use_deterministic_algorithms(True)
    loop = Loop()
    with ckptmgr.Checkpointer(url, loop.state, every=3) as ckpt:
        start = ckpt.restore()
        say(source=ckpt.restored.source if ckpt.restored else "")
        for step in range(start + 1, steps + 1):
            loop.step()
            ckpt.step(step)
            torch.cuda.synchronize()
            say(step=step)
    say(digest=loop.digest())


if __name__ == "__main__":
    main()
