"""What lies in a watched directory: candidates, each with all of its files. No link is followed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

from ckptmgr.restore.adopted import check_path
from ckptmgr.types import STEP_MAX

FILES_MAX = 100_000
"""Files of one candidate; a directory that has more is no checkpoint that anybody writes."""

DEPTH_MAX = 16

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Single files that are candidates; what they hold says whether they are whole (whole.py)."""

METADATA = ".metadata"
TRAINER_STATE = "trainer_state.json"

_TRAINER = re.compile(r"checkpoint-(\d{1,12})")
_SHARD = re.compile(r"-\d+-of-\d+\.")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Kind(str, Enum):
    """Who writes a candidate, and so how its end is told."""

    TRAINER = "trainer"
    DCP = "dcp"
    FILE = "file"


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A file or directory of a candidate; `path` is relative to the watched directory."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str, found: os.stat_result) -> Entry:
        """The entry of a path that was looked at."""
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that may be a whole checkpoint. With a `refusal` it can not be adopted at all."""

    name: str
    kind: Kind
    files: tuple[Entry, ...] = ()
    directories: tuple[Entry, ...] = ()
    refusal: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(one.size for one in self.files)

    @property
    def newest_ns(self) -> int:
        """When its newest file was last written, in nanoseconds of Unix time."""
        return max((one.mtime_ns for one in self.files), default=0)

    @property
    def number(self) -> int | None:
        """The step in its name: the last number in it."""
        numbers = re.findall(r"\d+", self.name.rpartition(".")[0] or self.name)
        number = int(numbers[-1]) if numbers else None
        return number if number is not None and number <= STEP_MAX else None

    @property
    def digest(self) -> str:
        """Of the names, lengths and times of its files."""
        state = blake2b(digest_size=16)
        for one in self.files:
            state.update(f"{one.path}\0{one.size}\0{one.mtime_ns}\0".encode())
        return state.hexdigest()


class RefusedError(Exception):
    """A candidate holds what can not be adopted."""


@contextmanager
def opened_root(root: Path) -> Iterator[int]:
    """The watched directory, whose own path may lead over links."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened_file(root: int, path: str) -> Iterator[int]:
    """A regular file below a directory, opened without following any link on the way.

    Raises:
        OSError: it is not there, or not a regular file.
    """
    *parents, name = check_path(path)
    at, held = root, -1
    try:
        for parent in parents:
            below = os.open(parent, _DIRECTORY, dir_fd=at)
            if held >= 0:
                os.close(held)
            at = held = below
        descriptor = os.open(name, _FILE, dir_fd=at)
    finally:
        if held >= 0:
            os.close(held)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(f"{path} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def scan(root: Path, patterns: Collection[str] = ()) -> list[Candidate]:
    """Everything in `root` that may be a checkpoint, now.

    Args:
        root: the watched directory; one that is gone holds nothing.
        patterns: globs of names; only those are looked at, then also without a number in them.
    """
    found = []
    try:
        with opened_root(root) as descriptor:
            names = sorted(os.listdir(descriptor))
            for name in names:
                one = _candidate(descriptor, name, patterns)
                if one is not None:
                    found.append(one)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found


def scan_one(root: Path, name: str) -> Candidate | None:
    """The candidate of that name, as it is now."""
    try:
        with opened_root(root) as descriptor:
            return _candidate(descriptor, name, (name,))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _candidate(root: int, name: str, patterns: Collection[str]) -> Candidate | None:
    if name.startswith(".") or (patterns and not _matches(name, patterns)):
        return None
    try:
        looked_at = os.stat(name, dir_fd=root, follow_symlinks=False)
        if stat.S_ISDIR(looked_at.st_mode):
            return _directory(root, name)
    except (FileNotFoundError, NotADirectoryError):
        return None  # it is being deleted, or replaced
    except OSError as error:
        refusal = f"can not be read: {error.strerror}"
        return Candidate(name, Kind.TRAINER, refusal=refusal) if _TRAINER.fullmatch(name) else None
    if not name.endswith(SUFFIXES) or _SHARD.search(name):
        return None
    one = Candidate(name, Kind.FILE, (Entry.of(name, looked_at),), refusal=_odd(name))
    if not patterns and one.number is None:
        return None
    if not stat.S_ISREG(looked_at.st_mode):
        return Candidate(name, Kind.FILE, refusal="is a link or a special file")
    return one


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(name == one or fnmatchcase(name, one) for one in patterns)


def _odd(path: str) -> str:
    """Why no file can have this path where it is restored, if so."""
    try:
        check_path(path)
    except UnicodeError:
        return "has a name that is not UTF-8"
    except ValueError as error:
        return str(error)
    return ""


@dataclass(slots=True)
class _Walk:
    files: list[Entry] = field(default_factory=list)
    directories: list[Entry] = field(default_factory=list)

    def down(self, at: int, name: str, path: str, depth: int) -> None:
        descriptor = os.open(name, _DIRECTORY, dir_fd=at)
        try:
            # Before its entries: what changes meanwhile shows in what was looked at first.
            self.directories.append(Entry.of(path, os.fstat(descriptor)))
            for child in sorted(os.listdir(descriptor)):
                self._take(descriptor, child, f"{path}/{child}", depth)
        finally:
            os.close(descriptor)

    def _take(self, at: int, name: str, path: str, depth: int) -> None:
        why = _odd(path)
        if why:
            raise RefusedError(why)
        found = os.stat(name, dir_fd=at, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            if depth == DEPTH_MAX:
                raise RefusedError(f"is nested more than {DEPTH_MAX} deep")
            self.down(at, name, path, depth + 1)
        elif stat.S_ISREG(found.st_mode):
            if len(self.files) == FILES_MAX:
                raise RefusedError(f"has more than {FILES_MAX} files")
            self.files.append(Entry.of(path, found))
        else:
            raise RefusedError(f"holds a link or a special file: {path}")


def _directory(root: int, name: str) -> Candidate | None:
    trainer = _TRAINER.fullmatch(name)
    walk, refusal = _Walk(), _odd(name)
    try:
        if not refusal:
            walk.down(root, name, name, 1)
    except RefusedError as error:
        refusal = str(error)
    names = {one.path for one in walk.files}
    is_dcp = any(path.endswith(".distcp") for path in names) or f"{name}/{METADATA}" in names
    if not is_dcp and not trainer:
        return None
    # A Trainer's directory may hold those of DCP, and is whole only when its own end is there.
    of_dcp = is_dcp and (not trainer or f"{name}/{METADATA}" in names)
    kind = Kind.DCP if of_dcp and f"{name}/{TRAINER_STATE}" not in names else Kind.TRAINER
    return Candidate(name, kind, tuple(sorted(walk.files)), tuple(walk.directories), refusal)
