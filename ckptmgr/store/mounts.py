"""What a path is mounted from, and how late what other hosts did may be seen there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MOUNTS = "/proc/self/mountinfo"
LINKS_MAX = 40
"""Symbolic links followed in one path; Linux follows as many."""

NFS_LAG_SECONDS = 60.0
"""How long an NFS client may believe what it knows of a directory, where the mount does not say
(acdirmax)."""

FUSE_LAG_SECONDS = 1.0
"""Entries that libfuse lets the kernel keep by default. Mounts do not tell; none was seen to be
late (MooseFS, docs/stores.md)."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table of mounts."""

    point: str
    kind: str
    options: Mapping[str, str]

    @property
    def lag_seconds(self) -> float:
        """Longest time in which a name that another host has made may be unknown here."""
        if self.kind.startswith("nfs"):
            # With noac, every look asks the server.
            return 0.0 if "noac" in self.options else self._seconds("acdirmax", NFS_LAG_SECONDS)
        if self.kind.partition(".")[0] == "fuse":
            return FUSE_LAG_SECONDS
        return 0.0

    def _seconds(self, option: str, otherwise: float) -> float:
        try:
            return float(self.options[option])
        except (KeyError, ValueError):
            return otherwise


def lag_seconds(path: str) -> float:
    """The lag of the file system that holds an absolute path, whether or not it exists yet.

    Touches no file system that may hang: links are followed on those without a lag.
    """
    try:
        with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as table:
            mounts = parse(table.read())
    except FileNotFoundError:  # no /proc
        return 0.0
    return mount_of(path, mounts).lag_seconds


def parse(table: str) -> list[Mount]:
    """The mounts of a mountinfo file, in its order: a later one hides an earlier one."""
    found = []
    for line in table.splitlines():
        place, _, source = line.partition(" - ")
        fields, (kind, _, options) = place.split(" "), source.split(" ", 2)
        pairs = (option.partition("=") for option in f"{fields[5]},{options}".split(","))
        found.append(Mount(_unescaped(fields[4]), kind, {name: text for name, _, text in pairs}))
    return found


def mount_of(path: str, mounts: Sequence[Mount]) -> Mount:
    """The mount that an absolute path lies on."""
    here, left, links = "/", path.split("/")[::-1], 0
    while left:
        name = left.pop()
        if name == "..":
            here = os.path.dirname(here)
        if name in ("", ".", ".."):
            continue
        step = os.path.join(here, name)
        if _deepest(step, mounts).lag_seconds:
            return _deepest(step, mounts)
        try:
            target = os.readlink(step) if links < LINKS_MAX else None
        except OSError:  # no link, or not there yet
            target = None
        if target is None:
            here = step
            continue
        links += 1
        left += target.split("/")[::-1]
        here = "/" if target.startswith("/") else here
    return _deepest(here, mounts)


def _deepest(path: str, mounts: Sequence[Mount]) -> Mount:
    found = Mount("/", "", {})
    for mount in mounts:
        below = f"{mount.point.rstrip('/')}/"
        if f"{path}/".startswith(below) and len(mount.point) >= len(found.point):
            found = mount
    return found


def _unescaped(text: str) -> str:
    """Blanks and backslashes stand in the table as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
