"""ckptmgr in Kubernetes: the manifest of a job with its sidecar, and the end of a pod."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from ckptmgr.errors import UsageError
from ckptmgr.preemption import Signals

GRACE_VARIABLE = "CKPTMGR_GRACE_SECONDS"
GRACE_SECONDS = 30.0
"""Kubernetes' own terminationGracePeriodSeconds."""

DRAIN_SHARE = 0.5
"""How much of the grace the sidecar's preStop may take; what is left is for the trainer before it,
and for the drain that SIGTERM means to the daemon."""

METRICS_PORT = 9464


class PodSource(Signals):
    """SIGTERM, and so many seconds as the pod's manifest leaves (CKPTMGR_GRACE_SECONDS).

    A trainer that is process 1 of its container needs it: the kernel drops a SIGTERM that process 1
    has no handler for, and the whole grace would pass.
    """

    name = "kubernetes"

    def __init__(self) -> None:
        text = os.environ.get(GRACE_VARIABLE, "")
        try:
            seconds = float(text) if text else GRACE_SECONDS
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise UsageError(f"{text!r} is not a number of seconds", subject=GRACE_VARIABLE)
        super().__init__((signal.SIGTERM,), seconds)


def manifest(
    image: str,
    command: Sequence[str],
    *,
    name: str = "training",
    grace_seconds: int = 120,
    memory: str = "64Gi",
    uid: int = 1000,
) -> str:
    """The YAML of a Job: the trainer, the daemon as a native sidecar, and the memory they share.

    Args:
        image: of both containers; it has ckptmgr and this plugin.
        command: of the trainer.
        name: of the Job.
        grace_seconds: from SIGTERM to SIGKILL; spot nodes leave 30 to 120.
        memory: of the volume for snapshots: slots x what a pod's ranks save.
        uid: the user that both containers run as; the daemon serves no other.
    """
    if grace_seconds < 2 or not command:
        raise UsageError("needs a command and 2 seconds of grace", subject="manifest")
    text = files("ckptmgr_kubernetes").joinpath("job.yaml").read_text()
    values = {
        "image": image,
        "command": list(command),
        "name": name,
        "grace": grace_seconds,
        "grace_text": str(grace_seconds),
        "drain_text": str(max(1, int(grace_seconds * DRAIN_SHARE))),
        "memory": memory,
        "uid": uid,
        "port_text": str(METRICS_PORT),
        "port": METRICS_PORT,
    }
    # JSON is YAML: whatever a value holds, it stays one value.
    return Template(text).substitute({key: json.dumps(value) for key, value in values.items()})
