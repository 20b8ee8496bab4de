"""Files of a checkpoint: made durable, and pushed out of memory."""

from __future__ import annotations

import os
from pathlib import Path

BLOCK_BYTES = 16 << 20


def files(directory: Path) -> list[Path]:
    """Every file below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


def write_file(path: str | Path, data: memoryview, *, direct: bool) -> None:
    """In big blocks, and fsync."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        for at in range(0, len(data), BLOCK_BYTES):
            os.write(descriptor, data[at : at + BLOCK_BYTES])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync(directory: Path) -> None:
    """Fsync every file and folder of a step, and the folder that it is in."""
    for each in [*directory.rglob("*"), directory, directory.parent]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def evict(directory: Path) -> None:
    """Push the files below `directory` out of the page cache; they must be synced."""
    for path in files(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
