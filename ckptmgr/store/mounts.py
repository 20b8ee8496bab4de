"""Which file system a path lies on, without touching one that may hang."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

MOUNTINFO = "/proc/self/mountinfo"

LINKS_MAX = 40
"""Links followed on the way to a file system, as many as the kernel follows."""

_ANSWER_AT_ONCE = {
    *("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "rootfs", "tmpfs", "xfs", "zfs")
}
"""File systems on which a link can be read by a caller that must not wait for a network."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo: where, what kind, and 'major:minor' of its device."""

    point: str
    kind: str
    device: str


def read_mounts(path: str = MOUNTINFO) -> Iterator[Mount]:
    """All mounts of this process; of two at one point the later one is seen."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            _, _, device, _, point, *_ = fields.split(" ")
            yield Mount(_unescaped(point), rest.split(" ")[0], device)


def mount_of(path: str, mountinfo: str = MOUNTINFO) -> Mount:
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
