"""Real file systems in files: made, mounted over a loop device, and gone when the test ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from processes import needs_root

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class FileSystem:
    """How to make and mount one kind; sizes are close to the smallest that mkfs takes."""

    name: str
    size_mib: int
    make: tuple[str, ...]
    options: str = "noatime"


FILE_SYSTEMS = {
    system.name: system
    for system in (
        FileSystem("ext4", 96, ("mkfs.ext4", "-q", "-F", "-E", "nodiscard")),
        FileSystem("xfs", 320, ("mkfs.xfs", "-q", "-f", "-K"), "noatime,nouuid"),
        FileSystem("btrfs", 160, ("mkfs.btrfs", "-q", "-f", "-K")),
    )
}

LOOP = "/dev/loop-control"


def needs_file_system(name: str, *devices: str, what: str = "FILE SYSTEM") -> FileSystem:
    """The file system, or a skip that says what is missing for it or `devices`."""
    needs_root()
    system = FILE_SYSTEMS[name]
    tools = (system.make[0], "losetup", "mount", "umount")
    missing = [tool for tool in tools if not shutil.which(tool)]
    missing += [path for path in (LOOP, *devices) if not os.path.exists(path)]
    if missing:
        pytest.skip(f"{what} ON {name} NOT CHECKED: there is no {', '.join(missing)}")
    return system


def make_file(system: FileSystem, file: Path, size_mib: int = 0) -> None:
    """Make a file that holds an empty file system."""
    with file.open("wb") as image:
        image.truncate((size_mib or system.size_mib) * MIB)
    run(*system.make, file)


@contextmanager
def mounted_file(system: FileSystem, file: Path, mount_point: Path) -> Iterator[Path]:
    """The file system in `file`, mounted."""
    mount_point.mkdir(exist_ok=True)
    with ExitStack() as stack:
        device = run("losetup", "--find", "--show", file).strip()
        stack.callback(run, "losetup", "--detach", device)
        # What the kernel remembers of an image that had this device before must not show.
        run("blockdev", "--flushbufs", device)
        run("mount", "-t", system.name, "-o", system.options, device, mount_point)
        stack.callback(run, "umount", mount_point)
        yield mount_point


@contextmanager
def mounted_tmpfs(mount_point: Path, size: str, *options: str) -> Iterator[Path]:
    """A tmpfs of this size, mounted; size and options are as mount takes them."""
    mount_point.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", mount_point)
    try:
        yield mount_point
    finally:
        run("umount", mount_point)


def run(*command: str | Path) -> str:
    """Run a command to its end; what it printed. AssertionError with its stderr if it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}: {ran.stderr}"
    return ran.stdout
