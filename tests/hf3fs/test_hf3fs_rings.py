"""The ring client against the daemon's side of the protocol, and what carries transfers over it."""

from __future__ import annotations

import errno
import os
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.config import MIB
from ckptmgr_hf3fs.carry import Carrier, RingsLostError
from ckptmgr_hf3fs.client import Registered, Transfer
from ckptmgr_hf3fs.mount import hold
from ckptmgr_hf3fs.own import OwnClient, OwnRing, _semaphore_name
from ckptmgr_hf3fs.regions import ROOMS_BYTES, Rooms, piece_bytes
from ckptmgr_hf3fs.semaphore import NamedSemaphore
from ckptmgr_hf3fs.shm import SHM, sweep_shm
from ckptmgr_hf3fs.wire import Layout, ring_name
from hf3fs.mounted import Mounted

PIECE = 4096


@pytest.fixture
def client(shared_mount: Mounted) -> OwnClient:
    virtual = f"{shared_mount.point}/3fs-virt"
    hold(virtual)
    return OwnClient(virtual)


@pytest.fixture
def rooms(client: OwnClient) -> Iterator[Rooms]:
    made = Rooms(client, MIB)
    yield made
    made.memory.close()


def file_of(mount: Mounted, content: bytes = b"") -> tuple[int, Path]:
    """A new file, open, and its path behind the mount, where no kernel remembers its size."""
    path = mount.point / str(uuid.uuid4())
    path.write_bytes(content)
    return os.open(path, os.O_RDWR), mount.backing / path.name


def drain(ring: OwnRing, count: int) -> dict[int, int]:
    found: dict[int, int] = {}
    while len(found) < count:
        for token, result in ring.finished(1.0):
            assert token not in found
            found[token] = result
    return found


def test_the_layout_is_the_described_one() -> None:
    for entries in (1, 7, 64):
        assert Layout(entries).nbytes == 96 * (entries + 1) + 4144
    layout = Layout(64)
    assert (layout.arguments, layout.completions) == (16, 16 + 56 * 65)
    assert layout.submissions == layout.completions + 24 * 65
    identity = uuid.UUID(int=7)
    assert ring_name(identity, for_read=True, flags=2) == f"{identity}.r0.t0.f10"
    assert ring_name(identity, for_read=False) == f"{identity}.w0.t0"


def test_a_ring_wraps_around_many_times(
    shared_mount: Mounted, client: OwnClient, rooms: Rooms
) -> None:
    """Batches of every size through 5 slots: positions meet every place, results keep theirs."""
    content = os.urandom(200 * PIECE)
    descriptor, behind = file_of(shared_mount)
    ring = client.ring(4, for_read=False)
    done = 0
    while done < 200:
        count = min(random.randint(1, 4), 200 - done)
        for number in range(done, done + count):
            at = number * PIECE
            rooms.view[at : at + PIECE] = content[at : at + PIECE]
            ring.prepare(Transfer(rooms.memory, at, descriptor, at, PIECE, ""), number)
        ring.submit()
        assert drain(ring, count) == dict.fromkeys(range(done, done + count), PIECE)
        done += count
    assert behind.read_bytes() == content
    ring.close()
    os.close(descriptor)


def test_a_full_ring_says_so_and_takes_more_when_something_is_done(
    shared_mount: Mounted, client: OwnClient, rooms: Rooms
) -> None:
    descriptor, _ = file_of(shared_mount, bytes(16))
    ring = client.ring(3, for_read=True)
    for turn in range(10):
        for token in range(3):
            ring.prepare(Transfer(rooms.memory, token, descriptor, 0, 1, ""), token)
        with pytest.raises(BlockingIOError):
            ring.prepare(Transfer(rooms.memory, 3, descriptor, 0, 1, ""), 3)
        ring.submit()
        assert drain(ring, 3) == {0: 1, 1: 1, 2: 1}, turn
    ring.close()
    os.close(descriptor)


def test_a_name_that_is_no_semaphore_is_refused() -> None:
    assert _semaphore_name("/dev/shm/sem.x") == "/x"
    for target in ("/etc/passwd", "/dev/shm/x", "/dev/shm/../sem.x", "sem.x"):
        with pytest.raises(OSError, match="names no semaphore"):
            _semaphore_name(target)
    with pytest.raises(FileNotFoundError):
        NamedSemaphore("/ckptmgr-no-such-semaphore")


def test_names_of_killed_processes_are_swept_and_no_others() -> None:
    suffix = str(uuid.uuid4())
    dead = Path(SHM, f"ckptmgr-hf3fs-999999999-{suffix}")
    alive = Path(SHM, f"ckptmgr-hf3fs-{os.getpid()}-{suffix}")
    other = Path(SHM, f"ckptmgr-hf3fs-{suffix}")
    for path in (dead, alive, other):
        path.touch()
    try:
        sweep_shm()
        assert [path.exists() for path in (dead, alive, other)] == [False, True, True]
    finally:
        for path in (alive, other):
            path.unlink()


@pytest.mark.parametrize(
    ("chunk_bytes", "expected"),
    [(64 << 10, MIB), (MIB, MIB), (2 * MIB, 2 * MIB), (4 * MIB, 4 * MIB), (64 * MIB, 4 * MIB)],
)
def test_pieces_are_whole_chunks_or_lie_within_one(chunk_bytes: int, expected: int) -> None:
    assert piece_bytes(chunk_bytes) == expected
    assert expected % chunk_bytes == 0 or chunk_bytes % expected == 0
    assert ROOMS_BYTES % expected == 0


# ---- carrying, with a ring that does what a test says -----------------------------


class Memory:
    def close(self) -> None:
        pass


class ScriptedRing:
    """Answers each transfer by the next line of the script, last prepared first."""

    def __init__(self, script: list[int], entries: int = 4, takes: int = 99) -> None:
        self.entries = entries
        self.takes = takes
        self.script = script
        self.prepared: list[tuple[Transfer, int]] = []
        self.seen: list[tuple[int, int]] = []
        self.submits = 0

    def prepare(self, transfer: Transfer, token: int) -> None:
        if len(self.prepared) >= self.takes:
            raise BlockingIOError(errno.EAGAIN, "full")
        self.prepared.append((transfer, token))
        self.seen.append((transfer.file_offset, transfer.nbytes))

    def submit(self) -> None:
        self.submits += 1

    def finished(self, seconds: float) -> list[tuple[int, int]]:
        if not self.prepared or not self.script:
            return []
        transfer, token = self.prepared.pop()
        answer = self.script.pop(0)
        return [(token, transfer.nbytes if answer == ALL else answer)]

    def close(self) -> None:
        pass


ALL = 1 << 40
MEMORY: Registered = Memory()


def transfers(count: int, nbytes: int = 10) -> list[Transfer]:
    return [Transfer(MEMORY, 0, 0, at * nbytes, nbytes, f"key {at}") for at in range(count)]


def carry(
    ring: ScriptedRing, work: list[Transfer | None], lost: str = "", **more: float
) -> tuple[Carrier, list[Transfer]]:
    done: list[Transfer] = []
    carrier = Carrier(ring, iter(work), done.append, lambda: lost, lambda: None, **more)
    return carrier, done


def test_every_transfer_is_finished_once_in_whatever_order() -> None:
    ring = ScriptedRing([3, ALL, 1, ALL, ALL, 2, ALL, ALL], entries=2)
    carrier, done = carry(ring, [*transfers(4)])
    carrier.run()
    assert sorted(one.file_offset for one in done) == [0, 10, 20, 30]
    assert all(one.nbytes == 10 for one in done), "it is told of the whole, not of the rest"
    assert carrier.idle
    parts = sorted(ring.seen)
    assert {(at, length) for at, length in parts if length == 10} == {
        (at, 10) for at in (0, 10, 20, 30)
    }
    assert {at + length for at, length in parts if length < 10} <= {10, 20, 30, 40}


def test_a_ring_that_is_full_earlier_than_it_said_is_waited_for() -> None:
    ring = ScriptedRing([ALL] * 5, entries=4, takes=1)
    carrier, done = carry(ring, [*transfers(5)])
    carrier.run()
    assert len(done) == 5
    with pytest.raises(RingsLostError, match="says that it is full"):
        carry(ScriptedRing([], takes=0), [*transfers(1)])[0].run()


def test_after_a_failure_what_is_under_way_is_waited_for_and_no_more_begun() -> None:
    ring = ScriptedRing([-errno.EIO, ALL, -errno.ENOSPC, ALL], entries=4)
    carrier, done = carry(ring, [*transfers(9)])
    with pytest.raises(Exception, match="EIO") as caught:
        carrier.run()
    assert caught.value.subject == "key 3"  # type: ignore[attr-defined]
    assert carrier.idle
    assert (len(ring.seen), len(done)) == (4, 2)


@pytest.mark.parametrize(
    ("script", "lost", "expected"),
    [
        ([], "it is gone", "it is gone"),
        ([], "", "nothing came back in 0.01 s"),
        ([11], "", "11 bytes moved, 10 were asked for"),
    ],
)
def test_what_makes_a_ring_lost(script: list[int], lost: str, expected: str) -> None:
    carrier, done = carry(ScriptedRing(script), [*transfers(2)], lost, patience_seconds=0.01)
    with pytest.raises(RingsLostError, match=expected):
        carrier.run()
    assert not carrier.idle
    assert done == []


def test_an_answer_to_nothing_is_not_taken_for_another() -> None:
    ring = ScriptedRing([ALL, ALL])
    carrier, done = carry(ring, [*transfers(1)])
    finished = ring.finished

    def answers(seconds: float) -> list[tuple[int, int]]:
        return [(12345678, 10), *finished(seconds)]

    ring.finished = answers  # type: ignore[method-assign]
    with pytest.raises(RingsLostError, match="answers what was not asked"):
        carrier.run()
    assert done == []


def test_a_caller_that_gives_up_is_heard_amid_the_work() -> None:
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise InterruptedError

    def finished(_: Transfer) -> None:
        stop.set()

    ring = ScriptedRing([ALL] * 9, entries=2)
    carrier = Carrier(ring, iter(transfers(9)), finished, lambda: "", check)
    with pytest.raises(InterruptedError):
        carrier.run()
    assert carrier.idle
    assert len(ring.seen) == 2
