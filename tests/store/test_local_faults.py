"""Full disks, failing syncs, refused access and killed writers: exact errors, no torn object."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest
from killed_writer import content_of

from ckptmgr.config import MIB
from ckptmgr.errors import (
    MediumError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)
from ckptmgr.store import local
from ckptmgr.store.base import PutResult
from ckptmgr.store.local import LocalStore
from ckptmgr.store.posix import store_error
from processes import needs_root
from scale import scaled

WRITER = Path(__file__).with_name("killed_writer.py")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB."""
    needs_root()
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


# ---- which error ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EACCES, StorePermissionError),
        (errno.EPERM, StorePermissionError),
        (errno.EROFS, StorePermissionError),
        (errno.EIO, MediumError),
        (errno.ESTALE, StoreUnreachableError),
        (errno.ETIMEDOUT, StoreUnreachableError),
        (errno.ENOTCONN, StoreUnreachableError),
        (errno.EREMOTEIO, StoreUnreachableError),
        (errno.ENOLCK, StoreUnreachableError),
        (errno.EINTR, StoreUnreachableError),
        (errno.EAGAIN, StoreUnreachableError),
        (errno.EMFILE, StoreUnreachableError),
        (errno.EINVAL, StoreError),
        (errno.ELOOP, StoreError),
        (errno.EXDEV, StoreError),
        (None, StoreError),
    ],
)
def test_every_errno_has_its_error(number: int | None, kind: type[StoreError]) -> None:
    error = store_error(OSError(number, "words") if number else OSError("words"), "a/key")
    assert type(error) is kind
    assert error.subject == "a/key"
    assert "words" in str(error)
    assert number is None or errno.errorcode[number] in str(error)


@pytest.mark.root
async def test_a_full_disk(small_disk: Path) -> None:
    store = LocalStore(str(small_disk / "store"))
    await store.put_new("a/small", [memoryview(b"x" * MIB)])
    for _ in range(3):
        with pytest.raises(StoreFullError):
            await store.put_new("a/big", [memoryview(b"x" * 4 * MIB)])
    assert os.listdir(small_disk / "store" / local.TEMPORARIES) == []
    assert await store.list("") == ["a/small"]
    await store.delete("a/small")
    assert await store.put_new("a/big", [memoryview(b"x" * 3 * MIB)]) is PutResult.OK
    await store.aclose()


@pytest.mark.root
async def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    store = LocalStore(str(small_disk / "store"))
    await store.put_new("a/key", [memoryview(b"x")])
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for call in (store.put_new("a/new", []), store.put_new("b/new", []), store.delete("a/key")):
        with pytest.raises(StorePermissionError):
            await call
    assert bytes(await store.get("a/key")) == b"x"
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert await store.put_new("a/new", []) is PutResult.OK
    await store.aclose()


@pytest.mark.root
def test_another_user_is_refused(root: Path) -> None:
    needs_root()
    root.mkdir(mode=0o700)
    code = (
        "import asyncio, os, sys; from ckptmgr.store.local import LocalStore\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: asyncio.run(LocalStore(sys.argv[1]).put_new('key', []))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    command = [sys.executable, "-c", code, root]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "StorePermissionError\n", ran.stderr


# ---- failing system calls ------------------------------------------------------


class FailsOnce:
    """Stands for a function of `os`: fails at the n-th call, and remembers its file."""

    def __init__(self, name: str, number: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.number, self.left = getattr(os, name), number, at
        self.calls: list[str] = []
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        if isinstance(args[0], int):
            self.calls.append(os.readlink(f"/proc/self/fd/{args[0]}"))
        self.left -= 1
        if self.left == 0:
            if self.real.__name__ == "close":  # Linux frees the descriptor, come what may
                self.real(*args)
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize("name", ["open", "pwritev", "fsync", "link"])
async def test_every_system_call_that_fails_is_an_error_and_a_second_put_works(
    store: LocalStore, root: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call of its kind fails, for every n until a put gets through untouched."""
    await store.put_new("a/first", [])
    for at in range(1, 50):
        fault = FailsOnce(name, number, at, monkeypatch)
        key = f"a/{at}"
        error = await error_of(store.put_new(key, [memoryview(b"x" * 5000)]))
        monkeypatch.setattr(os, name, fault.real)
        if error is None:
            assert fault.left > 0, "an error was swallowed"
            break
        assert isinstance(error, StoreUnreachableError)
        assert isinstance(error, StoreFullError) == (number == errno.ENOSPC)
        assert os.listdir(root / local.TEMPORARIES) == []
        again = await store.put_new(key, [memoryview(b"x" * 5000)])
        assert again is (PutResult.CONFLICT if key in linked(name, at) else PutResult.OK)
        assert bytes(await store.get(key)) == b"x" * 5000
    else:
        pytest.fail("a put makes no fifty calls of a kind")


async def error_of(put: Awaitable[PutResult]) -> Exception | None:
    try:
        assert await put is PutResult.OK
    except StoreError as error:
        return error
    return None


def linked(name: str, at: int) -> list[str]:
    """The object is there already if only the second fsync, that of the directory, failed."""
    return [f"a/{at}"] if (name, at) == ("fsync", 2) else []


async def test_a_file_whose_sync_failed_is_never_synced_again(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("a/first", [])
    fault = FailsOnce("fsync", errno.EIO, 1, monkeypatch)
    with pytest.raises(StoreUnreachableError):
        await store.put_new("a/key", [memoryview(b"x")])
    failed = fault.calls[0]
    assert Path(failed).parent.name == local.TEMPORARIES
    assert await store.put_new("a/key", [memoryview(b"x")]) is PutResult.OK
    assert failed not in fault.calls[1:]
    assert bytes(await store.get("a/key")) == b"x"


async def test_a_failing_close_is_a_failing_write(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS reports what it could not write when the file is closed."""
    await store.put_new("first", [])
    fault = FailsOnce("close", errno.EDQUOT, 1, monkeypatch)
    with pytest.raises(StoreFullError):
        await store.put_new("key", [memoryview(b"x")])
    assert local.TEMPORARIES in fault.calls[0]
    assert await store.list("") == ["first"]
    assert os.listdir(root / local.TEMPORARIES) == []


async def test_short_writes_are_continued(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, random_bytes = os.pwritev, os.urandom(100_000)

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        return real(descriptor, [views[0][: 1 + offset % 977]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    whole = memoryview(random_bytes)
    await store.put_new("key", [whole[:1], whole[1:5000], whole[5000:]])
    assert await store.get("key") == random_bytes


async def test_a_write_that_writes_nothing_is_an_error(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_args: 0)
    with pytest.raises(StoreUnreachableError, match="wrote none"):
        await store.put_new("key", [memoryview(b"x")])


# ---- kill -9 -------------------------------------------------------------------


@pytest.mark.kill
@pytest.mark.reliability
def test_killed_writers_leave_no_torn_object(root: Path) -> None:
    """SIGKILL at random instants: every acknowledged object is there, every object is whole."""
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    acknowledged: set[str] = set()
    for turn in range(scaled(6, 500)):
        child = subprocess.Popen(
            [sys.executable, WRITER, root, str(turn)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(chance.uniform(0.0, 0.15))
        child.send_signal(signal.SIGKILL)
        lines = child.communicate(timeout=60)[0].splitlines(keepends=True)
        acknowledged |= {line.strip() for line in lines if line.endswith("\n")}
    found = asyncio.run(check_all(root))
    assert acknowledged, "the storm was too fast for the writers"
    assert acknowledged <= found, f"seed {seed}: lost {sorted(acknowledged - found)[:5]}"


async def check_all(root: Path) -> set[str]:
    store = LocalStore(str(root))
    keys = await store.list("")
    for key in keys:
        assert bytes(await store.get(key)) == content_of(key), f"{key} is torn"
    left = len(os.listdir(root / local.TEMPORARIES))
    assert await store.sweep_temporaries(0) == left
    await store.aclose()
    return set(keys)
