"""Which file system a path lies on, and how late it may show what other hosts did, without touching
one that may hang.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MOUNTINFO = "/proc/self/mountinfo"

LINKS_MAX = 40
"""Links followed on the way to a file system, as many as the kernel follows."""

_ANSWER_AT_ONCE = {
    *("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "rootfs", "tmpfs", "xfs", "zfs")
}
"""File systems on which a link can be read by a caller that must not wait for a network."""

NFS_LAG_SECONDS = 60.0
"""How long an NFS client may believe what it knows of a directory, where the mount does not say
(acdirmax)."""

FUSE_LAG_SECONDS = 1.0
"""Entries that libfuse lets the kernel keep by default. Mounts do not tell; none was seen to be
late (MooseFS, docs/stores.md)."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo: where, what kind, 'major:minor' of its device, and how."""

    point: str
    kind: str
    device: str
    options: Mapping[str, str] = field(default_factory=dict)

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


def read_mounts(path: str | None = None) -> Iterator[Mount]:
    """All mounts of this process; of two at one point the later one is seen. None without /proc."""
    try:
        with open(path or MOUNTINFO, encoding="utf-8", errors="surrogateescape") as lines:
            yield from map(_mount, lines)
    except FileNotFoundError:
        return


def _mount(line: str) -> Mount:
    place, _, source = line.rstrip("\n").partition(" - ")
    (_, _, device, _, point, given, *_), (kind, _, more) = place.split(" "), source.split(" ", 2)
    pairs = (option.partition("=") for option in f"{given},{more}".split(","))
    return Mount(_unescaped(point), kind, device, {name: text for name, _, text in pairs})


def mount_of(path: str, mountinfo: str | None = None) -> Mount:
    """The mount that an absolute path lies on, whether the path exists or not.

    Links are followed on file systems that answer at once, and no further: what lies below a
    network's mount belongs to it, or to a mount on it.
    """
    table = {"/": Mount("/", "rootfs", "")}  # in a chroot "/" need not be a mount
    table |= {mount.point: mount for mount in read_mounts(mountinfo)}
    for _ in range(LINKS_MAX):
        found = _first_link_or_mount(os.path.normpath(path), table)
        if isinstance(found, Mount):
            return found
        path = found
    return table["/"]


def _first_link_or_mount(path: str, table: dict[str, Mount]) -> str | Mount:
    """The mount of `path`, or the path with its first link replaced by what it names."""
    here, walked = table["/"], ""
    names = [name for name in path.split("/") if name]
    for depth, name in enumerate(names):
        walked = f"{walked}/{name}"
        if walked in table:  # no link: nothing can be mounted on one
            here = table[walked]
        elif here.kind in _ANSWER_AT_ONCE:
            try:
                target = os.readlink(walked)
            except OSError:
                continue
            return os.path.join(os.path.dirname(walked), target, *names[depth + 1 :])
    return here


def _unescaped(point: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
