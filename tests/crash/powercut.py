"""Cut the power of a real file system at any instant, as often as you like.

    log = record("ext4", place, workload)       run a workload on a disk that logs what it is told
    for image in images(log, seed, count):      the disk as a power cut could have left it
        with mounted(image) as directory:       repaired by the file system's own journal
            check(directory, image.marks)       what was acknowledged before the cut

A disk may lose or keep, in any combination and in units of 4 KiB, everything that it was told
after its last flush, and nothing from before. Needs root, FUSE and loop devices.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from servers.filesystems import FileSystem, make_file, mounted_file, needs_file_system, run

BLOCK_BYTES = 4096
DISK = Path(__file__).with_name("powercut_disk.py")

Mark = Callable[[str], None]
Workload = Callable[[Path, Mark], None]
"""Works in a directory and says what the world has been told so far."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the log: W(rite), F(lush) or M(ark); `start` is where its bytes begin."""

    kind: str
    offset: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Log:
    """What a disk was told, from the moment after mkfs to the end of the workload."""

    system: FileSystem
    formatted: Path
    path: Path
    entries: Sequence[Entry]

    def content(self, entry: Entry) -> bytes:
        """The bytes of a write or a mark."""
        with open(self.path, "rb") as log:
            log.seek(entry.start)
            return log.read(entry.length)


@dataclass(frozen=True, slots=True)
class Image:
    """A disk after a power cut, and the marks set before it; replaced by the next image."""

    system: FileSystem
    path: Path
    marks: tuple[str, ...]
    position: int


def needs_powercut(name: str) -> FileSystem:
    """The file system, or a skip that says what is missing."""
    return needs_file_system(name, "/dev/fuse", what="POWER CUTS")


def record(system: FileSystem, place: Path, workload: Workload) -> Log:
    """Run `workload` on a new file system in `place` and return what its disk was told."""
    image, formatted = place / "disk.img", place / "formatted.img"
    make_file(system, formatted)
    _copy(formatted, image)
    with (
        _logging_disk(image, place) as fuse,
        open(fuse / "mark", "wb", buffering=0) as marks,
        mounted_file(system, fuse / "disk", place / "mnt") as directory,
    ):
        workload(directory, lambda text: _mark(marks.fileno(), text))
        _mark(marks.fileno(), _END)
    return Log(system, formatted, place / "log", list(_entries(place / "log")))


_END = "end of the workload"


def _mark(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode())


def images(log: Log, seed: int, count: int) -> Iterator[Image]:
    """`count` disks as power cuts at random instants could have left them.

    Every other cut is right behind a mark, where a promise that is not yet durable is caught.
    Each image is a file of its own: a loop device of the one before may be slow to go.
    """
    chance = random.Random(seed)
    behind_marks = [index + 1 for index, entry in enumerate(log.entries) if entry.kind == "M"] or [
        len(log.entries)
    ]
    positions = [
        chance.choice(behind_marks) if turn % 2 else chance.randint(0, len(log.entries))
        for turn in range(count)
    ]
    base = log.path.with_name("base.img")
    _copy(log.formatted, base)
    done = 0
    for turn, position in enumerate(sorted(positions)):
        image = log.path.with_name(f"cut{turn}.img")
        flushed = _last_flush(log, position)
        _apply(base, _writes(log, done, flushed))
        done = max(done, flushed)
        _copy(base, image)
        kept = chance.choice((0.0, 0.5, 0.9, 1.0))
        volatile = [
            block
            for write in _writes(log, flushed, position)
            for block in _blocks(*write)
            if chance.random() < kept
        ]
        _apply(image, volatile)
        yield Image(log.system, image, tuple(_marks(log, position)), position)
        image.unlink()


@contextmanager
def mounted(image: Image) -> Iterator[Path]:
    """The image as a directory, after the file system has recovered."""
    with mounted_file(image.system, image.path, image.path.with_name("cut.mnt")) as directory:
        yield directory


def _last_flush(log: Log, position: int) -> int:
    """Entries before the returned index are on stable storage at `position`."""
    for index in range(position, 0, -1):
        if log.entries[index - 1].kind == "F":
            return index
    return 0


def _marks(log: Log, position: int) -> Iterator[str]:
    for entry in log.entries[:position]:
        if entry.kind == "M":
            yield log.content(entry).decode()


def _writes(log: Log, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    for entry in log.entries[start:end]:
        if entry.kind == "W":
            yield entry.offset, log.content(entry)


def _blocks(offset: int, content: bytes) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(content), BLOCK_BYTES):
        yield offset + start, content[start : start + BLOCK_BYTES]


def _apply(path: Path, writes: Iterator[tuple[int, bytes]] | Sequence[tuple[int, bytes]]) -> None:
    with open(path, "r+b") as file:
        for offset, content in writes:
            file.seek(offset)
            file.write(content)


def _entries(path: Path) -> Iterator[Entry]:
    with open(path, "rb") as log:
        while header := log.read(13):
            kind, offset, length = struct.unpack("<cQI", header)
            entry = Entry(kind.decode(), offset, log.tell(), length)
            if kind == b"M" and log.read(length) == _END.encode():
                return
            log.seek(entry.start + length)
            yield entry
    raise AssertionError("the log has no end: the disk did not outlive the workload")


@contextmanager
def _logging_disk(image: Path, place: Path) -> Iterator[Path]:
    mount_point = place / "fuse"
    mount_point.mkdir()
    command = [sys.executable, DISK, image, place / "log", mount_point]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as disk:
        assert disk.stdout is not None
        try:
            assert disk.stdout.readline() == "ready\n", "the disk did not come up"
            try:
                yield mount_point
            finally:
                # Lazily: the kernel may still be letting go of the loop device that was on it.
                # The disk ends, with its log complete, when nothing holds it any more.
                run("umount", "--lazy", mount_point)
            assert disk.wait(60) == 0
        finally:
            disk.kill()  # one that is still mounted would keep it, and us, waiting for ever


def _copy(source: Path, target: Path) -> None:
    run("cp", "--sparse=always", "--reflink=auto", source, target)
