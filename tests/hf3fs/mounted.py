"""A mounted emulator for a test: start it, break it, kill it, start it again."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

import pytest

from ckptmgr.store.mounts import read_mounts

EMULATOR = Path(__file__).parent / "emulator.py"
START_SECONDS = 60.0
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def needs_fuse() -> None:
    """Skip the calling test, with the reason in the summary, where nothing can be mounted."""
    if os.getuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("NEEDS ROOT AND /dev/fuse: 3FS is not checked in this run")
    if find_library("fuse3") is None or find_spec("mfusepy") is None:
        pytest.skip(
            "NEEDS libfuse3 (apt install fuse3) and mfusepy: 3FS is not checked in this run"
        )


class Mounted:
    """An emulated mount at `point`; `backing` holds its files, as another node sees them."""

    def __init__(self, directory: Path, chunk_bytes: int = 1 << 20) -> None:
        self.point = directory / "mnt"
        self.backing = directory / "backing"
        self._faults = directory / "faults"
        self._chunk_bytes = chunk_bytes
        self._log = directory / "emulator.log"
        for path in (self.point, self.backing, self._faults):
            path.mkdir(parents=True)
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, str(EMULATOR)),
                    *(str(self.backing), str(self.point), str(self._faults)),
                    *("--chunk-bytes", str(self._chunk_bytes)),
                ],
                env={**os.environ, "FUSE_LIBRARY_NAME": "fuse3"},  # where libfuse 2 is there, too
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS
        while str(self.point) not in {mount.point for mount in read_mounts()}:
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "the emulator did not mount"
            time.sleep(0.01)
        self._semaphores = list(self._semaphore_files())

    def _semaphore_files(self) -> Iterator[Path]:
        for link in ("submit-ios", "submit-ios.ph", "submit-ios.pl"):
            yield Path(os.readlink(self.point / "3fs-virt/iovs" / link))

    def fault(self, name: str, number: int = 0) -> Path:
        """Let something go wrong (see emulator.Faults); returns the file that says so."""
        path = self._faults / name
        temporary = self._faults / f".{name}"
        temporary.write_text(str(number))
        temporary.rename(path)
        return path

    def registered(self) -> list[str]:
        """Names of memory that is registered now. Listed by another process: who closes this
        directory gives up all that it has registered.
        """
        listed = subprocess.check_output(["ls", str(self.point / "3fs-virt/iovs")], text=True)
        names = listed.split()
        return [name for name in names if not name.startswith("submit-ios")]

    def kill(self) -> None:
        """SIGKILL the daemon of the mount; the mount stays, and answers ENOTCONN."""
        self.process.kill()
        self.process.wait()
        for path in self._semaphores:
            path.unlink(missing_ok=True)

    def unmount(self) -> None:
        _libc.umount2(str(self.point).encode(), _MNT_DETACH)

    def restart(self) -> None:
        """As an operator does after a crash: unmount what is dead, and mount again."""
        self.unmount()
        self.start()

    def end(self) -> None:
        self.unmount()
        self.kill()


@contextmanager
def mounted(directory: Path, chunk_bytes: int = 1 << 20) -> Iterator[Mounted]:
    """An emulated mount for the block; in `directory`, best on tmpfs."""
    mount = Mounted(directory, chunk_bytes)
    try:
        yield mount
    finally:
        mount.end()
