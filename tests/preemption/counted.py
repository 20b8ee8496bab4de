"""The counters of preemption, as the daemon of a runtime directory shows them."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.launch import connect


def counted(runtime: Path) -> dict[str, float]:
    """Signals and saves, over all jobs."""
    with connect(runtime) as client:
        port = client.ask(Status(), Stated).state["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    found = {"signals": 0.0, "saves": 0.0}
    for line in lines:
        for name in found:
            if line.startswith(f"ckptmgr_preemption_{name}_total{{"):
                found[name] += float(line.rpartition(" ")[2])
    return found
