"""What goes wrong on a 3FS mount, one fault at a time: typed, in bounded time, and harmless."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import MIB
from ckptmgr.errors import (
    MediumError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
)
from ckptmgr.store import local
from ckptmgr.store.base import PutResult, Wanted
from ckptmgr.store.retry import RetryingStore
from ckptmgr_hf3fs.carry import RingsLostError
from ckptmgr_hf3fs.client import Client
from ckptmgr_hf3fs.own import OwnClient, OwnRing
from ckptmgr_hf3fs.store import Hf3fsStore
from hf3fs.mounted import Mounted

HANG_SECONDS = 60.0
"""Bound of whatever must end; met only by a hang."""

CONTENT = os.urandom(3 * MIB + 5)
BOTH = pytest.mark.parametrize("io", [None, OwnClient], ids=["posix", "rings"])


def store_on(
    mount: Mounted, io: Callable[[str], Client] | None = OwnClient, **more: Any
) -> Hf3fsStore:
    root = mount.point / "run7"
    return Hf3fsStore(str(root), f"hf3fs://{root}", io, **{"ring_bytes_min": 0, **more})


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await main()

    asyncio.run(bounded())


def views(content: bytes = CONTENT) -> list[memoryview]:
    return [memoryview(content)]


def leftovers(mount: Mounted) -> list[str]:
    return os.listdir(mount.backing / "run7" / local.TEMPORARIES)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when something has been given to the daemon."""
    event, submit = threading.Event(), OwnRing.submit

    def seen(ring: OwnRing) -> None:
        submit(ring)
        event.set()

    monkeypatch.setattr(OwnRing, "submit", seen)
    return event


# ---- answers ---------------------------------------------------------------------


def test_short_answers_are_carried_on_from(shared_mount: Mounted) -> None:
    async def main() -> None:
        store = store_on(shared_mount)
        for turn, length in enumerate((1, 4095, MIB - 1)):
            shared_mount.fault("ring-short", length)
            await store.put_new(f"short/{turn}", views())
            assert (shared_mount.backing / f"run7/short/{turn}").read_bytes() == CONTENT
            shared_mount.fault("ring-short", length)
            assert await store.get(f"short/{turn}") == CONTENT
        await store.aclose()

    run(main)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EREMOTEIO, StoreUnreachableError),
        (errno.ENOLCK, StoreUnreachableError),
        (errno.EIO, MediumError),
        (errno.ENOSPC, StoreFullError),
        (errno.EACCES, RingsLostError),
        (errno.EBADF, RingsLostError),
        (0, StoreError),
    ],
)
def test_an_error_answer_is_typed_and_leaves_nothing_behind(
    shared_mount: Mounted, number: int, kind: type[StoreError]
) -> None:
    """The other transfers of the object are waited for, and their rooms are used again."""

    async def main() -> None:
        store = store_on(shared_mount)
        key = f"error/{number}"
        for _ in range(20):  # more often than a ring has rooms
            shared_mount.fault("ring-error", number)
            with pytest.raises(kind) as caught:
                await store.put_new(key, views())
            assert (type(caught.value), caught.value.subject) == (kind, key)
        with pytest.raises(ObjectNotFoundError):
            await store.get(key)
        assert leftovers(shared_mount) == []
        assert await store.put_new(key, views()) is PutResult.OK
        shared_mount.fault("ring-error", number)
        with pytest.raises(kind):
            await store.get(key)
        assert await store.get(key) == CONTENT
        await store.aclose()

    run(main)


def test_a_hole_is_an_error_and_never_zeros(shared_mount: Mounted) -> None:
    async def main() -> None:
        store = store_on(shared_mount)
        await store.put_new("hole/a", views())
        await store.put_new("hole/b", views())
        path = shared_mount.backing / "run7/hole/a"
        with path.open("r+b") as file:
            file.truncate(MIB)
            file.truncate(len(CONTENT))
        into = memoryview(bytearray(len(CONTENT)))
        for call in (
            store.get("hole/a", into=into),
            store.get_many([Wanted("hole/b", 0, into[:9]), Wanted("hole/a", 2 * MIB, into[9:20])]),
        ):
            with pytest.raises(StoreError, match="has a hole") as caught:
                await call
            assert not isinstance(caught.value, StoreUnreachableError), "no retry brings it back"
            assert caught.value.subject == "hole/a"
        assert await store.get("hole/a", 0, MIB) == CONTENT[:MIB]
        assert await store.get("hole/b") == CONTENT
        await store.aclose()

    run(main)


@BOTH
@pytest.mark.parametrize("fault", ["fsync", "flush"])
def test_after_a_failed_fsync_or_close_the_object_is_written_again(
    shared_mount: Mounted, io: Any, fault: str
) -> None:
    """The mount loses the bytes and tells once: a second fsync of the file says all is well."""

    async def main() -> None:
        store = store_on(shared_mount, io)
        key = f"{fault}/{io is None}"
        shared_mount.fault(fault, errno.EIO)
        with pytest.raises(MediumError):
            await store.put_new(key, views())
        assert leftovers(shared_mount) == []
        with pytest.raises(ObjectNotFoundError):
            await store.get(key)
        shared_mount.fault(fault, errno.EREMOTEIO)
        retrying = RetryingStore(store, jitter=lambda: 0.0)
        assert await retrying.put_new(key, views()) is PutResult.OK
        assert await retrying.get(key) == CONTENT
        await retrying.aclose()

    run(main)


@BOTH
def test_writes_that_the_mount_only_pretends_are_found_out(shared_mount: Mounted, io: Any) -> None:
    async def main() -> None:
        store = store_on(shared_mount, io)
        dryrun = shared_mount.fault("dryrun")
        try:
            with pytest.raises(StoreUnreachableError, match="keeps 0"):
                await store.put_new(f"dry/{io is None}", views())
        finally:
            dryrun.unlink()
        assert await store.put_new(f"dry/{io is None}", views()) is PutResult.OK
        await store.aclose()

    run(main)


# ---- a daemon that dies or hangs ---------------------------------------------------


@pytest.mark.parametrize("operation", ["put", "get", "get_many"])
def test_a_daemon_killed_with_requests_in_flight_is_an_error_and_its_successor_is_used(
    mount: Mounted, submitted: threading.Event, operation: str
) -> None:
    async def main() -> None:
        store = store_on(mount)
        await store.put_new("there", views())
        into = memoryview(bytearray(len(CONTENT)))
        call = {
            "put": lambda: store.put_new("new", views()),
            "get": lambda: store.get("there", into=into),
            "get_many": lambda: store.get_many([Wanted("there", 0, into)]),
        }[operation]
        held = mount.fault("ring-hold")
        submitted.clear()
        calling = asyncio.ensure_future(call())
        assert await asyncio.to_thread(submitted.wait, HANG_SECONDS)
        mount.kill()
        with pytest.raises(StoreUnreachableError):
            await calling
        for dead in (store.get("there"), store.list(""), store.put_new("x", views()), call()):
            with pytest.raises(StoreUnreachableError):
                await dead
        held.unlink()
        mount.restart()
        assert await store.get("there") == CONTENT
        await call()
        assert await store.get("there") == CONTENT
        assert leftovers(mount) == [] or operation == "put", "the dead daemon deleted nothing"
        await store.aclose()

    run(main)


def test_a_daemon_that_hangs_is_given_up_and_writes_into_nobody_s_memory(
    shared_mount: Mounted,
) -> None:
    """It comes back later and carries out what nobody waits for any more."""

    async def main() -> None:
        store = store_on(shared_mount, patience_seconds=0.5)
        await store.put_new("hang/a", views())
        held = shared_mount.fault("ring-hold")
        into = bytearray(len(CONTENT))
        with pytest.raises(RingsLostError, match="transfers are lost"):
            await store.get("hang/a", into=memoryview(into))
        with pytest.raises(RingsLostError):
            await store.put_new("hang/b", views())
        held.unlink()
        assert await store.get("hang/a") == CONTENT, "a new session"
        assert await store.put_new("hang/b", views()) is PutResult.OK
        assert not any(into)
        await store.aclose()

    run(main)


def test_a_stopped_daemon_is_given_up_too(mount: Mounted) -> None:
    """To close a file is to wait for it in the kernel: the thread is left there, the caller not."""

    async def main() -> None:
        store = store_on(mount, patience_seconds=0.5)
        await store.put_new("a", views())
        mount.process.send_signal(signal.SIGSTOP)
        retrying = RetryingStore(store, timeout_seconds=1.0, deadline_seconds=1.0)
        for call in (retrying.get("a"), retrying.put_new("b", views()), retrying.list("")):
            with pytest.raises(StoreUnreachableError):
                await call
        mount.process.send_signal(signal.SIGCONT)
        assert await store.get("a") == CONTENT
        await store.aclose()

    run(main)


def test_what_is_cancelled_amid_a_ring_touches_nothing_afterwards(
    shared_mount: Mounted, submitted: threading.Event
) -> None:
    async def main() -> None:
        store = store_on(shared_mount)
        await store.put_new("cancel/a", views())
        into = bytearray(len(CONTENT))
        for call in (
            lambda: store.get("cancel/a", into=memoryview(into)),
            lambda: store.get_many([Wanted("cancel/a", 0, memoryview(into))]),
            lambda: store.put_new("cancel/b", views()),
        ):
            held = shared_mount.fault("ring-hold")
            submitted.clear()
            calling = asyncio.ensure_future(call())
            assert await asyncio.to_thread(submitted.wait, HANG_SECONDS)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            held.unlink()
            assert await store.get("cancel/a") == CONTENT
            assert not any(into)
        with pytest.raises(ObjectNotFoundError):
            await store.get("cancel/b")
        await store.aclose()

    run(main)


def test_a_mount_that_is_gone_is_not_written_below(mount: Mounted) -> None:
    async def main() -> None:
        store = store_on(mount)
        await store.put_new("a", views())
        mount.kill()
        mount.unmount()
        for call in (store.put_new("b", views()), store.list(""), store.get("a")):
            with pytest.raises(StoreUnreachableError):
                await call
        assert os.listdir(mount.point) == []
        mount.start()
        assert await store.list("") == ["a"]
        await store.aclose()

    run(main)


# ---- rings that can not be had -------------------------------------------------------


class RefusedClient(OwnClient):
    """Of a machine, or a mount, that gives no shared memory."""

    def register(self, name: str, view: memoryview) -> Any:
        raise OSError(errno.EINVAL, "refused by the test")


def test_where_rings_are_refused_the_mount_itself_is_used(
    shared_mount: Mounted, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        store = store_on(shared_mount, RefusedClient)
        into = memoryview(bytearray(9))
        assert await store.put_new("refused", views()) is PutResult.OK
        assert await store.get("refused") == CONTENT
        await store.get_many([Wanted("refused", 1, into)])
        assert into == CONTENT[1:10]
        assert store.ring_bytes == 0
        await store.aclose()

    run(main)
    told = [record for record in caplog.records if record.message == "rings_refused"]
    assert len(told) == 1, "once a minute, not with every object"
    assert "refused by the test" in vars(told[0])["fields"]["why"]


class FewRings(OwnClient):
    """Of a mount that gives two rings and no more, as one with no shared memory left."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.given = 0

    def ring(self, entries: int, *, for_read: bool) -> Any:
        self.given += 1
        if self.given > 2:
            raise OSError(errno.ENOSPC, "refused by the test")
        return super().ring(entries, for_read=for_read)


def test_where_no_more_rings_are_given_those_that_are_there_do(shared_mount: Mounted) -> None:
    made: list[FewRings] = []

    def client(where: str) -> FewRings:
        made.append(FewRings(where))
        return made[-1]

    async def main() -> None:
        store = store_on(shared_mount, client)
        names = [f"few-{at}" for at in range(12)]
        content = bytes(range(256)) * 8192
        done = await asyncio.gather(*(store.put_new(name, views(content)) for name in names))
        assert done == [PutResult.OK] * len(names)
        assert await asyncio.gather(*map(store.get, names)) == [content] * len(names)
        assert made[0].given > 2, "one was refused"
        await store.aclose()

    run(main)


def test_nothing_stays_registered_or_in_dev_shm(shared_mount: Mounted) -> None:
    def ours() -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name.startswith("ckptmgr-hf3fs-")]

    async def main() -> None:
        left = Path("/dev/shm/ckptmgr-hf3fs-999999999-00000000-0000-0000-0000-000000000000")
        left.write_bytes(b"of a process that was killed")
        store = store_on(shared_mount)
        await store.put_new("clean", views())
        assert len(shared_mount.registered()) == 4, "two rings, and the rooms of each"
        assert ours() == []
        await store.aclose()
        assert shared_mount.registered() == []

    run(main)
