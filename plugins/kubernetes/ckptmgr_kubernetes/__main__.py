"""`python -m ckptmgr_kubernetes --image IMAGE COMMAND...` prints a Job for `kubectl apply -f -`."""

from __future__ import annotations

import argparse
import sys

from ckptmgr_kubernetes import manifest


def main() -> None:
    """Print the manifest that the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m ckptmgr_kubernetes", description=__doc__)
    parser.add_argument("--image", required=True, help="has ckptmgr and ckptmgr-kubernetes")
    parser.add_argument("--name", default="training")
    parser.add_argument("--grace-seconds", type=int, default=120, help="from SIGTERM to SIGKILL")
    parser.add_argument("--memory", default="64Gi", help="for snapshots, as in 64Gi")
    parser.add_argument("--uid", type=int, default=1000, help="user of both containers")
    parser.add_argument("command", nargs="+", help="as in: -- python train.py")
    given = parser.parse_args()
    text = manifest(
        given.image,
        given.command,
        name=given.name,
        grace_seconds=given.grace_seconds,
        memory=given.memory,
        uid=given.uid,
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
