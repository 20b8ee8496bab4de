"""Memory and processor time of all processes that carry a token in their environment.

A library's helpers leave the process tree (daemons) or are children of children; the environment
goes with all of them. `python -m bench.beside.gauge TOKEN` says when it begins, samples until a
line comes in, and prints the peak.
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path

TOKEN = "CKPTMGR_BENCH_VISIT"
PERIOD_SECONDS = 0.01
TICKS = os.sysconf("SC_CLK_TCK")


def members(token: str) -> list[int]:
    """Processes of a visit that run now."""
    mark = f"{TOKEN}={token}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Processor time of processes and of their children that ended."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def pss_bytes(pids: list[int]) -> int:
    """Memory of processes, what they share counted once. Without files: those are page cache, and
    how much of a library's code counts depends on who else runs it.
    """
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for kind in ("Pss_Anon:", "Pss_Shmem:"):
                total += int(text.partition(kind)[2].split()[0]) << 10
    return total


def main() -> None:
    """Print the largest sum of all samples."""
    peak, ended = pss_bytes(members(sys.argv[1])), False
    print("ready", flush=True)
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], PERIOD_SECONDS)[0])
        peak = max(peak, pss_bytes(members(sys.argv[1])))
    print(peak)


if __name__ == "__main__":
    main()
