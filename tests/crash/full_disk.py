"""A disk that is really full, and a trainer that goes on whatever the store does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckptmgr.staging.slots import free_slot, superseded_slot
from driven import Rank


@contextmanager
def mounted(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own; needs root."""
    path.mkdir(exist_ok=True)
    options = f"size={size},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError("the disk has no end")


def train(rank: Rank, step: int) -> None:
    """Snapshot as the trainer does: into a free slot, else over the oldest that is undecided."""
    sealed = [(s, rank.buffer.outcome(s)) for s in rank.buffer.snapshots()]
    slot = free_slot(rank.buffer.capacity.slots, sealed)
    if slot is None:
        oldest = superseded_slot(sealed)
        assert oldest is not None
        slot = oldest.slot
    rank.save(step, slot)
