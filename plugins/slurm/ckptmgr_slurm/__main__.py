"""`python -m ckptmgr_slurm COMMAND...` prints a batch script for a training command."""

from __future__ import annotations

import argparse
import shlex
import sys

from ckptmgr_slurm import batch_script


def main() -> None:
    """Print the script that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m ckptmgr_slurm", description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=1, help="tasks on each node")
    parser.add_argument("--seconds", type=int, default=120, help="warning before the time limit")
    parser.add_argument("--by-shell", action="store_true", help="--signal=B:, to the shell only")
    parser.add_argument("command", nargs="+", help="as in: -- python train.py")
    given = parser.parse_args()
    script = batch_script(
        shlex.join(given.command),
        nodes=given.nodes,
        tasks=given.tasks,
        seconds=given.seconds,
        by_shell=given.by_shell,
    )
    sys.stdout.write(script)


if __name__ == "__main__":
    main()
