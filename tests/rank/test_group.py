"""Agreements of ranks: one verdict for all, named ranks, and errors of their own type."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from registers import MemoryRegisters

from ckptmgr.errors import (
    ChunkDamagedError,
    CkptmgrError,
    ControlProtocolError,
    RankFailedError,
    RanksError,
    RanksMissingError,
    RendezvousError,
    StateMismatchError,
    UsageError,
)
from ckptmgr.rank.group import (
    ANNOUNCEMENT_BYTES,
    Alone,
    Claimed,
    Group,
    Verdict,
    _closed,
    _opened,
    ranks_of,
    together,
)
from ckptmgr.rank.registers import Registers, StoreRegisters

WORLD = 4


def group(rank: int, registers: Registers, world: int = WORLD) -> Group:
    """A rank that has entered, without a process group."""
    made = Group.__new__(Group)
    made.rank, made.world = rank, world
    made._registers, made._agreements = registers, 0
    return made


def on_all(act: Callable[[int], Any], ranks: int = WORLD) -> list[Any]:
    """What each rank got, or the error that it met."""
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            results[rank] = act(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.fixture(params=["memory", "tcp", "file"])
def registers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registers]:
    if request.param == "memory":
        yield MemoryRegisters()
        return
    store: Any
    if request.param == "file":
        store = dist.FileStore(str(tmp_path / "rendezvous"), -1)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=30))
    yield StoreRegisters.under("0" * 32, store)  # the server lives as long as its first store


def test_registers_are_decided_once_and_counts_add_up(registers: Registers) -> None:
    assert registers.read("a") is None
    assert registers.decide("a", "one") == b"one"
    assert registers.twin().decide("a", "two") == b"one"
    assert registers.twin().read("a") == b"one"
    assert [registers.count("n"), registers.count("n", 3), registers.twin().count("n")] == [0, 3, 3]
    registers.forget("a")


def test_registers_of_another_nonce_are_other_registers() -> None:
    store = dist.HashStore()
    StoreRegisters.under("a" * 32, store).decide("k", "old")
    assert StoreRegisters.under("b" * 32, store).read("k") is None


def test_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    server = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=5))
    client = dist.TCPStore("127.0.0.1", server.port, 1, False, timedelta(seconds=5))
    registers = StoreRegisters(client)
    assert registers.read("a") is None
    del server
    with pytest.raises(RendezvousError):
        registers.decide("a", "x")


def test_all_are_content(registers: Registers) -> None:
    groups = [group(rank, registers.twin()) for rank in range(WORLD)]
    assert on_all(lambda r: together(groups[r], "x", 30, lambda: r)) == [0, 1, 2, 3]
    assert on_all(lambda r: together(groups[r], "y", 30, lambda: -r)) == [0, -1, -2, -3]


class Unreached(MemoryRegisters):
    """Registers that one rank can not reach at its first count; `others` are all that there are."""

    def __init__(self, others: MemoryRegisters) -> None:
        super().__init__()
        self.records, self.counts, self._lock = others.records, others.counts, others._lock
        self.fails = True

    def count(self, key: str, more: int = 0) -> int:
        if self.fails:
            self.fails = False
            raise RendezvousError("does not answer", subject=key)
        return super().count(key, more)


def test_after_a_count_that_failed_on_one_rank_all_agree_on_the_next() -> None:
    there = MemoryRegisters()
    groups = [group(rank, Unreached(there) if rank == 1 else there) for rank in range(WORLD)]
    failed = on_all(lambda r: groups[r].common("untaken", ["a"], 30))
    assert [type(one) for one in failed] == [RendezvousError] * WORLD
    assert on_all(lambda r: groups[r].common("untaken", ["b"], 30)) == [["b"]] * WORLD


def test_an_error_of_one_is_raised_on_all_of_its_type(registers: Registers) -> None:
    groups = [group(rank, registers.twin()) for rank in range(WORLD)]

    def act(rank: int) -> None:
        if rank == 2:
            raise ChunkDamagedError("bad hash", subject="pack", hint="Look.")

    errors = on_all(lambda r: together(groups[r], "x", 30, lambda: act(r)))
    assert {type(error) for error in errors} == {ChunkDamagedError}
    assert str(errors[0]) == "rank 2: pack: bad hash\nhint: Look."
    assert str(errors[2]).startswith("pack"), "its own error, with its traceback"
    assert on_all(lambda r: together(groups[r], "again", 30, lambda: r)) == [0, 1, 2, 3]


def test_one_of_two_errors_is_raised_on_all() -> None:
    registers = MemoryRegisters()
    groups = [group(rank, registers) for rank in range(WORLD)]
    first = threading.Event()

    def act(rank: int) -> None:
        if rank == 1:
            raise ChunkDamagedError("bad hash")
        if rank == 2:
            first.wait(30)
            raise StateMismatchError("other shapes")

    def run(rank: int) -> None:
        try:
            together(groups[rank], "x", 30, lambda: act(rank))
        finally:
            first.set()

    assert {type(error) for error in on_all(run)} == {ChunkDamagedError}


def test_an_error_that_is_not_ours_is_named_on_the_others() -> None:
    registers = MemoryRegisters()
    groups = [group(rank, registers) for rank in range(2)]

    def act(rank: int) -> None:
        if rank == 1:
            raise KeyboardInterrupt

    errors = on_all(lambda r: together(groups[r], "x", 30, lambda: act(r)), 2)
    assert isinstance(errors[1], KeyboardInterrupt)
    assert isinstance(errors[0], RankFailedError)
    assert "rank 1: KeyboardInterrupt" in str(errors[0])


def test_ranks_that_do_not_come_are_named() -> None:
    registers = MemoryRegisters()
    groups = [group(rank, registers, 30) for rank in range(2)]
    errors = on_all(lambda r: together(groups[r], "restore", 0.3, lambda: r), 2)
    assert {type(error) for error in errors} == {RanksMissingError}
    assert "ranks 2, 3, 4" in str(errors[0])
    assert "and 8 more" in str(errors[0])
    assert "'restore'" in str(errors[0])


def test_a_silent_store_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptmgr.rank.group._GRACE_SECONDS", 0.1)
    registers = MemoryRegisters()
    registers.answering.clear()
    with pytest.raises(RendezvousError, match="no answer"):
        together(group(0, registers), "x", 0.2, lambda: 1)
    registers.answering.set()


def test_an_interrupted_wait_is_told_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    registers = MemoryRegisters()
    waiting = group(0, registers, 2)
    join, calls = threading.Thread.join, []

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        calls.append(timeout)
        if len(calls) == 2:
            raise KeyboardInterrupt
        join(thread, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            together(waiting, "x", 60, lambda: 1)
    with pytest.raises(RankFailedError, match="rank 0: KeyboardInterrupt"):
        together(group(1, registers, 2), "x", 60, lambda: 1)


def test_one_rank_agrees_with_itself() -> None:
    alone = Alone()
    assert alone.share(lambda: Claimed(3, "ab")) == Claimed(3, "ab")
    assert together(alone, "x", 1, lambda: 5) == 5
    with pytest.raises(UsageError, match="mine"):
        together(alone, "x", 1, lambda: _raise(UsageError("mine")))
    with pytest.raises(RendezvousError):
        alone.registers()


def _raise(error: CkptmgrError) -> None:
    raise error


@pytest.mark.parametrize(
    "letter",
    [
        Claimed(7, "ab" * 16, "every=5m"),
        Verdict.of(3, UsageError("m" * 900, subject="\x01" * 900, hint="h" * 900)),
        Verdict.of(0, RuntimeError("\x01" * 5000)),
    ],
    ids=["claimed", "long", "other"],
)
def test_what_is_broadcast_fits(letter: Claimed | Verdict) -> None:
    sheet = _closed(letter).ljust(ANNOUNCEMENT_BYTES)
    assert len(sheet) == ANNOUNCEMENT_BYTES
    assert _opened(sheet) == letter


@pytest.mark.parametrize("sheet", [b"", b"{}", b"null", b'{"Claimed":{}}', b'{"Verdict":[1]}'])
def test_what_is_no_announcement_is_refused(sheet: bytes) -> None:
    with pytest.raises(ControlProtocolError):
        _opened(sheet.ljust(ANNOUNCEMENT_BYTES))


@pytest.mark.parametrize("name", ["EXIT_OK", "ClassVar", "nonsense"])
def test_an_error_of_unknown_name_is_a_failed_rank(name: str) -> None:
    assert isinstance(Verdict(1, name, "boom").failure(), RankFailedError)


def test_many_processes_need_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UsageError, match="is 8, but there is no process group"):
        ranks_of(None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert isinstance(ranks_of(None), Alone)


def test_waits_are_bounded_by_their_deadline() -> None:
    begun = time.monotonic()
    with pytest.raises(RanksError) as caught:
        together(group(0, MemoryRegisters(), 2), "x", 0.1, lambda: 1)
    assert caught.value.exit_status == 1
    assert time.monotonic() - begun < 30
