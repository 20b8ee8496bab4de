"""The daemon that a trainer starts where none runs: `python -m ckptmgr.daemon`.

`ckptmgr daemon` is for people; to import what reads its options takes as long as the daemon itself,
and a first restore waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from ckptmgr.config import DaemonSettings
from ckptmgr.daemon import log
from ckptmgr.daemon.notify import Supervisor
from ckptmgr.daemon.service import Service
from ckptmgr.errors import CkptmgrError, DaemonError
from ckptmgr.heap import keep_freed_memory

NICE = 5
"""As in the units of systemd/: where cores are short, training has three quarters of one that it
shares with the daemon."""


def give_way() -> None:
    """Let training come first."""
    os.nice(NICE)
    # Where the kernel groups processes by their sessions, only this counts between two of them.
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICE))


if __name__ == "__main__":
    try:
        settings = DaemonSettings.from_env(auto=True)
        log.configure()
        give_way()
        keep_freed_memory()
        with contextlib.suppress(DaemonError):  # two ranks may start one at a time: one is enough
            asyncio.run(Service(settings, Supervisor.from_env()).run())
    except CkptmgrError as error:
        sys.exit(f"ckptmgr: {error}")
