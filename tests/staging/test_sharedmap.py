"""Populating: in pieces, stopped when asked, and by other means on an older kernel."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.errors import HostMemoryError
from ckptmgr.staging import sharedmap
from ckptmgr.staging.sharedmap import SharedMap, memory_barrier
from processes import needs_root
from servers.filesystems import mounted_tmpfs

LENGTH = 1 << 20


@pytest.fixture
def file(runtime: Path) -> Iterator[int]:
    fd = os.open(runtime / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, LENGTH)
    yield fd
    os.close(fd)


def present(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_only_the_range_that_was_asked_for_becomes_present(file: int) -> None:
    mapped = SharedMap(file, LENGTH)
    assert present(file) == 0
    mapped.populate(0, LENGTH // 2)
    assert present(file) == LENGTH // 2
    mapped.populate(LENGTH // 2, LENGTH)
    assert present(file) == LENGTH
    mapped.close()


def test_a_stop_is_heard_between_pieces(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharedmap, "POPULATE_PIECE_BYTES", LENGTH // 4)
    stop = threading.Event()
    stop.set()
    mapped = SharedMap(file, LENGTH)
    mapped.populate(0, LENGTH, stop)
    assert present(file) == 0
    mapped.close()


HUGE = 2 << 20
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@pytest.fixture
def huge_tmpfs(tmp_path: Path) -> Iterator[Path]:
    needs_root()
    if not SHMEM_ENABLED.exists() or "[deny]" in SHMEM_ENABLED.read_text():
        pytest.skip("NEEDS A KERNEL WITH HUGE PAGES ON TMPFS: they are not checked in this run")
    with mounted_tmpfs(tmp_path / "huge", "64m", "huge=advise") as place:
        yield place


def mapped_huge(path: Path) -> int:
    """Bytes of a file that this process has mapped by huge pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.endswith(str(path)))
    line = next(line for line in lines if line.startswith("ShmemPmdMapped:"))
    return int(re.findall(r"\d+", line)[0]) * 1024


@pytest.mark.root
def test_pages_are_huge_where_the_mount_allows_it(huge_tmpfs: Path) -> None:
    path = huge_tmpfs / "file"
    with path.open("w+b") as file:
        os.ftruncate(file.fileno(), 8 * HUGE)
        mapped = SharedMap(file.fileno(), 8 * HUGE)
        mapped.populate(0, 6 * HUGE)
        assert mapped_huge(path) == 6 * HUGE
        mapped.close()


class OldKernel:
    """A kernel that does not know MADV_POPULATE_WRITE."""

    def madvise(self, *_: object) -> int:
        return -1


def test_an_older_kernel_reserves_the_pages(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = SharedMap(file, LENGTH)
    monkeypatch.setattr(sharedmap, "_libc", OldKernel())
    monkeypatch.setattr(sharedmap.ctypes, "get_errno", lambda: errno.EINVAL)
    mapped.populate(0, LENGTH)
    assert present(file) == LENGTH
    mapped.close()


def test_a_refusal_is_an_error_with_a_hint(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = SharedMap(file, LENGTH)
    monkeypatch.setattr(sharedmap, "_libc", OldKernel())
    monkeypatch.setattr(sharedmap.ctypes, "get_errno", lambda: errno.EFAULT)
    with pytest.raises(HostMemoryError, match="can not be populated") as caught:
        mapped.populate(0, LENGTH)
    assert "/dev/shm" in caught.value.hint
    mapped.close()


def test_two_maps_of_a_file_are_the_same_memory(file: int) -> None:
    one, other = SharedMap(file, LENGTH), SharedMap(file, LENGTH)
    one.view[5] = 7
    memory_barrier()
    assert other.view[5] == 7
    one.close()
    other.close()


def test_a_view_in_use_keeps_its_memory_alive(file: int) -> None:
    mapped = SharedMap(file, LENGTH)
    kept = mapped.view[:10]
    mapped.close()
    kept[0] = 1
    assert kept[0] == 1
