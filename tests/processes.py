"""Who runs on a directory, and ending them by pid; what a test needs of the machine."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

SELECT_DESCRIPTORS_MAX = 1024

SPARED: set[int] = set()
"""Pids of helpers of the tests that may hold a file of a test for a moment: they pass it on."""


def needs_root() -> None:
    """Skip the calling test, with the reason in the summary, where it is not run by root."""
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: not checked in this run; run the suite as root to check it")


@contextlib.contextmanager
def many_descriptors() -> Iterator[list[int]]:
    """So many open ones that the next has a number that select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * SELECT_DESCRIPTORS_MAX:
        pytest.skip("NEEDS DESCRIPTORS: the hard limit of open files is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * SELECT_DESCRIPTORS_MAX), hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while opened[-1] < SELECT_DESCRIPTORS_MAX:
            opened.append(os.dup(opened[0]))
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def holds(pid: int, directory: Path) -> bool:
    """Whether a process holds a file of `directory` open or mapped; False if it has ended."""
    prefix, proc = f"{directory}/", Path(f"/proc/{pid}")
    links: list[str] = []
    try:
        for link in (proc / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed while we looked
                links.append(os.readlink(link))
        return (
            any(link.startswith(prefix) for link in links) or prefix in (proc / "maps").read_text()
        )
    except OSError:
        return False  # it ended while we looked, or it is not ours


def owners_of(directory: Path) -> set[int]:
    """Pids of the processes that hold a file of `directory` open or mapped, without our own and
    the spared, whose maps of torch are long.
    """
    pids = {int(proc.name) for proc in Path("/proc").glob("[0-9]*")} - SPARED - {os.getpid()}
    return {pid for pid in pids if holds(pid, directory)}


def end_processes_of(directory: Path) -> None:
    """SIGKILL, by pid, whatever still runs on the runtime directory of a test, and wait for its
    end: what it holds, as the lock of a daemon, goes only then.
    """
    while owners := owners_of(directory):
        for pid in owners:
            with contextlib.suppress(ProcessLookupError):
                end(pid)


def end(pid: int) -> None:
    """SIGKILL a process, which need not be our child, and wait until it is no more.

    Raises:
        ProcessLookupError: there is none.
    """
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert select.select([handle], [], [], 60)[0], f"SIGKILL did not end {pid}"
    finally:
        os.close(handle)
