"""A real gateway behind a connection that fails: every operation gives the right result or a typed
error that names the object, whatever fails and however often.
"""

from __future__ import annotations

import asyncio
import os

import pytest

from ckptmgr.config import MIB
from ckptmgr.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)
from ckptmgr.store.base import PutResult, Wanted
from ckptmgr.store.retry import RetryingStore
from ckptmgr_objectstore import store as objectstore
from ckptmgr_objectstore.clients import open_store
from ckptmgr_objectstore.store import ObjectStore
from scale import scaled
from servers.buckets import Bucket
from servers.faultproxy import Fault, FaultProxy, Kind

pytestmark = [pytest.mark.reliability, pytest.mark.stores(place="s3:// on Ceph RGW")]

STATUSES = (403, 409, 412, 429, 500, 503)
FAULTS = {
    **{kind.name.lower(): Fault(kind) for kind in Kind if kind is not Kind.STATUS},
    **{str(status): Fault(Kind.STATUS, status=status) for status in STATUSES if status != 403},
}
del FAULTS["flip_down"]
"""A flipped byte of an answer is found by the hash of its chunk: test_daemon.py."""

TRY_SECONDS = 0.5
"""Of a try; long enough for a busy gateway, short enough to wait for in every operation."""


def again(fault: Fault, times: int) -> Fault:
    """The same fault for so many requests; bodies are cut in answers to GET only where it says."""
    method = "GET" if fault.kind in (Kind.CUT, Kind.SHRUNK) else ""
    return Fault(fault.kind, method, "run/", times, status=fault.status)


@pytest.mark.parametrize("name", FAULTS)
async def test_whatever_fails_the_result_is_right(
    name: str, bucket: Bucket, proxy: FaultProxy
) -> None:
    await meet(name, f"s3://{bucket.name}/run", bucket, proxy)


async def meet(name: str, url: str, bucket: Bucket, proxy: FaultProxy) -> None:
    """Each operation meets the fault once, and then again and again with every third request."""
    store = RetryingStore(open_store(url), timeout_seconds=TRY_SECONDS, deadline_seconds=60)
    for number in range(scaled(1, 10)):
        proxy.plan(again(FAULTS[name], 1))
        await operate(store, bucket, f"once/{number}", lambda: proxy.plan(again(FAULTS[name], 1)))
        fault = again(FAULTS[name], 1 << 30)
        proxy.plan(Fault(fault.kind, fault.method, "run/", chance=0.3, status=fault.status))
        await operate(store, bucket, f"often/{number}", lambda: None)
    assert proxy.struck[FAULTS[name].kind] >= 1


async def operate(store: RetryingStore, bucket: Bucket, top: str, before_each: object) -> None:
    """Every operation, compared with what a client of no fault sees."""
    assert callable(before_each)
    content = os.urandom(300_000)
    views = [memoryview(content)[:4096], memoryview(content)[4096:]]
    key = f"{top}/pack"
    assert await store.put_new(key, views) is PutResult.OK
    assert bucket.read(f"run/{key}") == content
    before_each()
    assert await store.put_new(key, [memoryview(b"other")]) is PutResult.CONFLICT
    assert bucket.read(f"run/{key}") == content
    before_each()
    assert bytes(await store.get(key)) == content
    before_each()
    room = memoryview(bytearray(len(content)))
    half = len(content) // 2
    await store.get_many([Wanted(key, 0, room[:half]), Wanted(key, half, room[half:])])
    assert room == content
    before_each()
    assert await store.list(f"{top}/") == [key]
    before_each()
    await store.make_durable(key)
    before_each()
    await store.delete(key)
    assert bucket.keys(f"run/{top}") == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, StorePermissionError),
        (501, StoreError),
        (507, StoreFullError),
        (500, StoreUnreachableError),
        (503, StoreUnreachableError),
    ],
)
async def test_an_answer_has_its_type_and_names_the_object(
    status: int, kind: type[StoreError], bucket: Bucket, proxy: FaultProxy
) -> None:
    store = open_store(f"s3://{bucket.name}/run")
    proxy.plan(Fault(Kind.STATUS, status=status))
    for call in (
        store.put_new("a/b", [memoryview(b"x")]),
        store.get("a/b"),
        store.get("a/b", 1, 5),
        store.delete("a/b"),
        store.make_durable("a/b"),
    ):
        with pytest.raises(kind) as caught:
            await call
        assert type(caught.value) is kind
        assert caught.value.subject == "a/b"
        assert str(status) in str(caught.value)
    with pytest.raises(kind, match=str(status)):
        await store.list("a/")


async def test_taken_is_not_believed_of_an_object_that_does_not_exist(
    bucket: Bucket, proxy: FaultProxy
) -> None:
    """S3 answers 409 while another's put is under way; that one may still fail."""
    store = open_store(f"s3://{bucket.name}/run")
    for status in (409, 412):
        proxy.plan(Fault(Kind.STATUS, "PUT", status=status))
        with pytest.raises(StoreUnreachableError, match="does not exist"):
            await store.put_new("a/b", [memoryview(b"x")])
    proxy.plan()
    assert await store.put_new("a/b", [memoryview(b"x")]) is PutResult.OK


@pytest.mark.parametrize("kind", [Kind.CUT, Kind.SHRUNK])
async def test_a_part_of_a_body_is_never_given_out(
    kind: Kind, bucket: Bucket, proxy: FaultProxy
) -> None:
    """Nor is the object called too short, which the caller takes for damage."""
    bucket.write("run/a", os.urandom(3 * MIB))
    store = open_store(f"s3://{bucket.name}/run")
    proxy.plan(Fault(kind, "GET"))
    for offset, length in ((0, None), (0, 3 * MIB), (100, 2 * MIB), (5, None)):
        with pytest.raises(StoreUnreachableError):
            await store.get("a", offset, length)


async def test_a_body_that_stops_coming_is_given_up(bucket: Bucket, proxy: FaultProxy) -> None:
    bucket.write("run/a", bytes(3 * MIB))
    client = open_store(f"s3://{bucket.name}/run")._client
    store = ObjectStore("s3://x/run", client, exclusive=None, stall_seconds=0.3)
    for fault in (Fault(Kind.STALL), Fault(Kind.SLOW, bytes_per_second=1)):
        proxy.plan(fault)
        with pytest.raises(StoreUnreachableError, match=r"a: nothing came for 0\.3 s"):
            await store.get("a")


async def test_a_stalled_put_is_left_at_once_and_leaves_its_buffer(
    bucket: Bucket, proxy: FaultProxy
) -> None:
    """Its bytes may change as soon as the call has ended; the object, if any, has the old ones."""
    store = open_store(f"s3://{bucket.name}/run")
    for kind in (Kind.STALL, Kind.SLOW):
        proxy.plan(Fault(kind, "PUT", bytes_per_second=1 * MIB))
        buffer = bytearray(b"a" * 8 * MIB)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await store.put_new(f"b/{kind.name}", [memoryview(buffer)])
        buffer[:] = b"b" * len(buffer)
        buffer.append(0)  # BufferError if anyone still had a view
        proxy.plan()
    for key in bucket.keys("run/b"):
        assert set(bucket.read(key)) == {ord("a")}


async def test_an_upload_of_which_a_byte_is_another_is_refused(
    bucket: Bucket, proxy: FaultProxy
) -> None:
    store = open_store(f"s3://{bucket.name}/run")
    proxy.plan(Fault(Kind.FLIP_UP, "PUT"))
    with pytest.raises(StoreUnreachableError, match="a/b: the server answered 400"):
        await store.put_new("a/b", [memoryview(os.urandom(2 * MIB))])
    assert bucket.keys() == []


async def test_parts_that_fail_leave_nothing(
    bucket: Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "PARTS_IN_FLIGHT", 2)
    client = open_store(f"s3://{bucket.name}/run")._client
    store = ObjectStore(
        "s3://x/run", client, exclusive=None, single_put_bytes_max=MIB, part_bytes=5 * MIB
    )
    content = os.urandom(16 * MIB)
    for fault in (Fault(Kind.RESET, "PUT", times=1), Fault(Kind.FLIP_UP, "PUT", times=1)):
        proxy.plan(fault)
        with pytest.raises(StoreUnreachableError):
            await store.put_new("big", [memoryview(content)])
        with pytest.raises(ObjectNotFoundError):
            await store.get("big")
    assert await store.put_new("big", [memoryview(content)]) is PutResult.OK
    assert bucket.read("run/big") == content
    assert await store.put_new("big", [memoryview(content)]) is PutResult.CONFLICT
