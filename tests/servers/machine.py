"""A machine of its own with a real systemd as PID 1, booted in namespaces over this one's root.

    with machine() as found:
        found.install("--write-path=/srv")
        found.systemctl("start", "ckptmgr@4001.socket")

It boots in half a second and leaves nothing behind. Needs root, systemd and cgroup2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from driven import TREE, until
from processes import needs_root

BOOT = Path(__file__).with_name("boot_systemd.sh")
SYSTEMD = "/lib/systemd/systemd"
TOOLS = ("bash", "unshare", "nsenter", "pivot_root", "setpriv", "systemctl", "systemd-analyze")

HERE = "/opt/ckptmgr"
PYTHON = f"{HERE}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
ENVIRONMENT = {
    # Home directories are hidden from the units, and an interpreter may live in one.
    "LD_LIBRARY_PATH": f"{HERE}/python/lib",
    "PYTHONPATH": f"{HERE}/tree:{HERE}/tree/tests:{HERE}/site",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class Machine:
    """The booted machine; `root` is its tree as this one sees it, `pid` its PID 1."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    def path(self, inside: str | Path) -> Path:
        """Where a path of the machine is on this one."""
        return self.root / str(inside).lstrip("/")

    def command(self, *command: str | Path, uid: int = 0) -> list[str]:
        """A command line that runs `command` in the machine, as one of its users."""
        enter = ["nsenter", f"--target={self.pid}", "--all", "--"]
        # nsenter stays as the parent: what it has started must end with it.
        user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        user += ["--pdeathsig=KILL", "--"]
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *variables]
        return [*enter, *(user if uid else []), *clean, *map(str, command)]

    def run(self, *command: str | Path, uid: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        line = self.command(*command, uid=uid)
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)

    def ckptmgr(self, *arguments: str, uid: int = 0) -> subprocess.CompletedProcess[str]:
        """Run our command line."""
        return self.run(PYTHON, "-m", "ckptmgr.cli", *arguments, uid=uid)

    def systemctl(self, *arguments: str) -> str:
        """Ask systemd; AssertionError if it refuses."""
        ran = self.run("systemctl", *arguments)
        assert ran.returncode == 0, f"systemctl {arguments}: {ran.stderr}{self.told(arguments[-1])}"
        return ran.stdout

    def told(self, unit: str) -> str:
        """What systemd knows of a unit, for a message."""
        return self.run("systemctl", "status", "--no-pager", "--lines=50", unit).stdout

    def property(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", f"--property={name}", "--value", unit).strip()

    def await_property(self, unit: str, name: str, value: str) -> None:
        """Wait until a property of a unit has this value."""
        what = f"{name} of {unit} becomes {value!r}"
        try:
            until(lambda: self.property(unit, name) == value, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told(unit)}") from None

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        """Put a file into the machine."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def drop_in(self, unit: str, section: str, *lines: str, name: str = "50-test") -> None:
        """Change a unit as an administrator would; takes effect with `daemon-reload`."""
        text = "\n".join([f"[{section}]", *lines, ""])
        self.write(f"/etc/systemd/system/{unit}.d/{name}.conf", text)

    def add_user(self, uid: int) -> None:
        """Let there be a user of this number."""
        for file, line in (
            ("passwd", f"u{uid}:x:{uid}:{uid}::/nonexistent:/bin/false\n"),
            ("group", f"u{uid}:x:{uid}:\n"),
        ):
            with self.path(f"/etc/{file}").open("a") as table:
                table.write(line)


def _cgroup_root() -> Path | None:
    """Where cgroup2 is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split()[4])
    return None


def needs_systemd() -> Path:
    """Where a cgroup can be made, or a skip that says what is missing."""
    needs_root()
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    missing += [] if os.path.exists(SYSTEMD) else [SYSTEMD]
    missing += [] if "\toverlay\n" in Path("/proc/filesystems").read_text() else ["overlay"]
    try_it = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if not missing and subprocess.run(try_it, capture_output=True, check=False).returncode:
        missing = ["right to mount"]
    root = _cgroup_root()
    if root is None or not os.access(root, os.W_OK):
        missing.append("cgroup2")
    if missing:
        pytest.skip(f"SYSTEMD UNITS NOT CHECKED: there is no {', '.join(missing)}")
    assert root is not None
    return root


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """A booted machine with this tree, this interpreter and its packages in /opt/ckptmgr."""
    cgroup = needs_systemd() / f"ckptmgr-test-{os.getpid()}"
    cgroup.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_cgroup, cgroup)
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckptmgr-machine-")))
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        shown = {
            TREE: "tree",
            Path(sys.base_prefix): "python",
            Path(sysconfig.get_path("purelib")): "site",
        }
        # It must not outlive us, however we end.
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", str(BOOT), str(cgroup), str(base)),
                *(f"{path}={HERE}/{name}" for path, name in shown.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        stack.callback(_end, process)

        def booted() -> Machine | None:
            log.seek(0)
            assert process.poll() is None, f"it does not boot:\n{log.read()}"
            for pid in _children(process.pid):
                found = Machine(pid)
                if found.run("systemctl", "is-active", "test.target").stdout == "active\n":
                    return found
            return None

        yield until(booted, "the machine boots")


def _children(pid: int) -> Sequence[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _end(process: subprocess.Popen[bytes]) -> None:
    """The kernel ends everything in a pid namespace with its PID 1."""
    children = _children(process.pid)
    process.kill()  # with --kill-child, PID 1 as well
    process.wait()
    for pid in children:
        until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "PID 1 is gone")


def _remove_cgroup(cgroup: Path) -> None:
    def emptied() -> bool:
        try:
            for path, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(path)
        except OSError:
            return False  # the last of its processes is not gone yet
        return True

    until(emptied, "the machine's cgroups are empty")
