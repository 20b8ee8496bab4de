"""Files of a checkpoint: made durable, and pushed out of memory."""

from __future__ import annotations

import os
from pathlib import Path


def files(directory: Path) -> list[Path]:
    """Every file below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


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
