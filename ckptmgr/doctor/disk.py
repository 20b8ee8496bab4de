"""What a file system below a store must be able to do, tried with files of our own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import unquote, urlsplit

from ckptmgr.config import DEFAULT_KEEP
from ckptmgr.doctor.load import Load
from ckptmgr.doctor.promises import PLACE
from ckptmgr.present import size
from ckptmgr.store.finding import Finding, Health
from ckptmgr.store.local import TEMPORARIES
from ckptmgr.store.mounts import mount_of
from ckptmgr.store.registry import OF_PATHS

FREE_RATIO_MIN = 0.05
"""Below this file systems get slow, and other users of the disk come first."""

_MEMORY = {"tmpfs", "ramfs"}
_OF_A_CONTAINER = {"overlay"}


def path_of(url: str) -> str | None:
    """The directory that a store is in; None where it is none of this host's."""
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme in OF_PATHS else None


def existing(path: str) -> str:
    """The path, or the nearest directory above it that is there."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


@contextmanager
def leaving_no_directory(path: str | None) -> Iterator[None]:
    """Remove the directories that a look into a new store makes, if nobody else uses them."""
    was_there = path is None or os.path.isdir(path)
    yield
    if path is not None:
        ours = [os.path.join(path, PLACE)]
        ours += [] if was_there else [os.path.join(path, TEMPORARIES), path]
        for directory in ours:
            with suppress(OSError):  # somebody uses it
                os.rmdir(directory)


def links(root: str) -> Finding:
    """Try link(2) onto a name that exists, and fsync of files and directories."""
    name = f"link and fsync on {mount_of(root).kind}"
    try:
        refused = _second_link_is_refused(os.path.join(root, TEMPORARIES))
    except OSError as error:
        return Finding(
            "link and fsync",
            Health.FAILURE,
            "the file system does not link or sync as a commit needs it",
            f"{name}: {error.strerror}",
            "Put the store on a POSIX file system (ext4, xfs, NFS, CephFS, MooseFS, 3FS).",
        )
    if not refused:
        return Finding(
            "link and fsync",
            Health.FAILURE,
            "link() replaces a name that exists, so nothing can be decided once",
            name,
            "Put the store on another file system.",
        )
    return Finding("link and fsync", Health.OK, "links are exclusive, files can be synced", name)


def _second_link_is_refused(directory: str) -> bool:
    one, two = (os.path.join(directory, secrets.token_hex(16)) for _ in range(2))
    fd = os.open(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b"ckptmgr doctor")
        os.fsync(fd)
        os.link(one, two)
        try:
            os.link(one, two)
        except FileExistsError:
            return True
        finally:
            os.unlink(two)
        return False
    finally:
        os.close(fd)
        os.unlink(one)
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def space(root: str, load: Load) -> Finding:
    """Compare what is free with the steps that retention keeps, and one more."""
    found = os.statvfs(existing(root))
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    needed = (DEFAULT_KEEP + 1) * load.state_bytes
    evidence = f"{size(free)} of {size(total)} free"
    if needed:
        evidence += f"; {DEFAULT_KEEP + 1} steps of {size(load.state_bytes)} are {size(needed)}"
    if needed > free:
        return Finding(
            "free space",
            Health.FAILURE,
            "the store has no room for the steps that are kept and one more",
            evidence,
            "Free space, take a larger disk, or collect old steps with `ckptmgr gc`.",
        )
    if free < FREE_RATIO_MIN * total:
        return Finding(
            "free space",
            Health.WARNING,
            f"less than {FREE_RATIO_MIN:.0%} of the store is free",
            evidence,
            "Free space: a full store stops commits, and then snapshots are spaced out.",
        )
    what = "there is room" if needed else "there is room for now; --state-gib says for how much"
    return Finding("free space", Health.OK, what, evidence)


def place(root: str) -> Finding:
    """Whether the file system is one that outlives what checkpoints are for."""
    mount = mount_of(root)
    evidence = f"{mount.kind} at {mount.point}"
    fix = "Give a URL on a disk or a network store; see docs/stores.md."
    if mount.kind in _MEMORY:
        what = "the store is in this host's memory: a reboot loses it"
        return Finding("durable place", Health.WARNING, what, evidence, fix)
    if mount.kind in _OF_A_CONTAINER:
        what = "the store is in the layer of a container: it goes when the container is removed"
        return Finding("durable place", Health.WARNING, what, evidence, fix)
    return Finding("durable place", Health.OK, "the store is on a file system of its own", evidence)
