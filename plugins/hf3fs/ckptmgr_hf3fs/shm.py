"""Files in /dev/shm: what a mount's daemon can map. They have a name only while it does so."""

from __future__ import annotations

import mmap
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SHM = "/dev/shm"  # noqa: S108 - where shm_open looks; files are made with O_EXCL and mode 0600

_NAME = re.compile(r"ckptmgr-hf3fs-(\d+)-[0-9a-f-]{36}")


def _fresh_name() -> str:
    """A name directly in /dev/shm: the daemon opens it by shm_open, which takes no other."""
    return f"ckptmgr-hf3fs-{os.getpid()}-{uuid.uuid4()}"


def sweep_shm() -> None:
    """Remove the names that processes of this user left when they were killed: each would keep
    its memory for ever. One that is robbed of a name it still needs goes on without rings.
    """
    for name in os.listdir(SHM):
        match = _NAME.fullmatch(name)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            with suppress(OSError):  # another user's, or another sweep was faster
                os.unlink(os.path.join(SHM, name))


@contextmanager
def fresh_shm(nbytes: int) -> Iterator[tuple[str, mmap.mmap]]:
    """Name and mapping of a new file of zeros; at the end of the block the name goes.

    Its pages are there from the start: on a full tmpfs this fails with ENOSPC, and no store
    into the mapping kills the process later.
    """
    name = _fresh_name()
    path = os.path.join(SHM, name)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        yield name, mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
        os.unlink(path)


@contextmanager
def linked_shm(path: str) -> Iterator[str]:
    """A second name, directly in /dev/shm, of a file that lies deeper; for the block only.

    Raises:
        OSError: the file is not on the file system of /dev/shm, or has no name.
    """
    name = _fresh_name()
    link = os.path.join(SHM, name)
    os.link(path, link, follow_symlinks=False)
    try:
        yield name
    finally:
        os.unlink(link)
