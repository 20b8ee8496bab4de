"""Who tells of a preemption: signals that are heard wherever the main thread is, and nobody else's
handlers are lost.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.preemption import (
    SIGNALS,
    VARIABLE,
    Announced,
    Notice,
    Signals,
    Source,
    default_signals,
    open_sources,
)

SECONDS_MAX = 60.0


class Ear:
    """Hears a source."""

    def __init__(self) -> None:
        self.heard: queue.Queue[Notice] = queue.Queue()

    def notice(self) -> Notice:
        return self.heard.get(timeout=SECONDS_MAX)


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every handler, and the pipe of whoever had it, is as it was."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_notice(ear: Ear, number: signal.Signals) -> None:
    source = Signals(seconds=30)
    source.listen(ear.heard.put, 0)
    os.kill(os.getpid(), number)
    assert ear.notice() == Notice(number.name, 30)
    source.close()
    source.close()


def test_handlers_that_were_there_are_called_and_come_back(ear: Ear) -> None:
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))
    try:
        source = Signals()
        source.listen(ear.heard.put, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ear.notice().why == "SIGTERM"
        source.close()
        os.kill(os.getpid(), signal.SIGTERM)
        assert called == [signal.SIGTERM] * 2
        assert ear.heard.empty(), "it was closed"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_was_put_above_stays(ear: Ear) -> None:
    before = signal.getsignal(signal.SIGTERM)
    source = Signals()
    source.listen(ear.heard.put, 0)
    below = signal.getsignal(signal.SIGTERM)
    called: list[int] = []

    def above(number: int, frame: object) -> None:
        called.append(number)
        below(number, None)  # type: ignore[operator, misc, arg-type]

    try:
        signal.signal(signal.SIGTERM, above)
        source.close()
        assert signal.getsignal(signal.SIGTERM) is above
        os.kill(os.getpid(), signal.SIGTERM)
        assert called == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_is_heard_while_the_main_thread_is_in_c(ear: Ear) -> None:
    """No Python runs there: `sleep` of the C library, as in a collective or a compiler."""
    source = Signals()
    heard_at: list[bool] = []
    out_of_c = threading.Event()

    def told(notice: Notice) -> None:
        heard_at.append(out_of_c.is_set())
        ear.heard.put(notice)

    source.listen(told, 0)
    kill = f"sleep 0.3; kill -USR1 {os.getpid()}"
    with subprocess.Popen(["/bin/sh", "-c", kill]):
        libc = ctypes.CDLL(None)
        while ear.heard.empty():
            libc.usleep(900_000)  # a signal interrupts it, and no handler runs in between
            libc.usleep(900_000)
    out_of_c.set()
    assert ear.notice().why == "SIGUSR1"
    assert heard_at == [False]
    source.close()


def test_a_signal_is_heard_though_the_pipe_is_somebody_elses(ear: Ear) -> None:
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    assert signal.set_wakeup_fd(write) == -1
    try:
        source = Signals()
        source.listen(ear.heard.put, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ear.notice().why == "SIGUSR1"
        assert os.read(read, 8) == bytes([signal.SIGUSR1]), "its owner hears it as before"
        source.close()
    finally:
        assert signal.set_wakeup_fd(-1) == write
        os.close(read)
        os.close(write)


def test_a_signal_is_heard_after_asyncio_has_had_the_pipe(ear: Ear) -> None:
    """It takes it for handlers of its own, and leaves it to nobody."""

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, lambda: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.to_thread(lambda: noticed.append(ear.notice().why))

    noticed: list[str] = []
    source = Signals()
    source.listen(ear.heard.put, 0)
    try:
        asyncio.run(serve())
        assert noticed == ["SIGUSR1"], "while it has it"
        assert signal.set_wakeup_fd(-1) == -1, "it gave it to nobody"
        os.kill(os.getpid(), signal.SIGTERM)
        assert ear.notice().why == "SIGTERM"
        assert ear.heard.empty()
    finally:
        source.close()


def close_in_the_order_of_entering() -> None:
    first, second = Signals(), Signals()
    for source in (first, second):
        source.listen(lambda _: None, 0)
    first.close()
    second.close()


def close_under_a_handler_that_is_taken_away() -> None:
    source = Signals()
    source.listen(lambda _: None, 0)
    ours = signal.signal(signal.SIGTERM, lambda *_: None)
    source.close()
    signal.signal(signal.SIGTERM, ours)


def end_of_a_child(begin: Callable[[], None]) -> int:
    """How a forked child ends that has begun so, and is sent SIGTERM."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(int(SECONDS_MAX) // 4)  # ends what swallows SIGTERM
        begin()
        os.write(tell, b"!")
        while True:
            signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(ready)
    os.close(tell)
    return status


@pytest.mark.parametrize(
    "close", [close_in_the_order_of_entering, close_under_a_handler_that_is_taken_away]
)
def test_sigterm_ends_a_process_in_which_nobody_listens_any_more(
    close: Callable[[], None],
) -> None:
    assert end_of_a_child(close) == -signal.SIGTERM


def test_a_forked_child_dies_of_sigterm_and_its_parent_hears_nothing(ear: Ear) -> None:
    source = Signals()
    source.listen(ear.heard.put, 0)
    assert end_of_a_child(lambda: None) == -signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ear.notice().why == "SIGUSR1", "and it goes on hearing its own"
    source.close()


def test_other_signals_are_not_ours(ear: Ear) -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        source = Signals([signal.SIGUSR1])
        source.listen(ear.heard.put, 0)
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ear.notice().why == "SIGUSR1"
        source.close()
        assert ear.heard.empty()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_signals_outside_the_main_thread_are_refused() -> None:
    refused: list[str] = []

    def listen() -> None:
        try:
            Signals().listen(lambda _: None, 0)
        except UsageError as error:
            refused.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert "main thread" in refused[0]


def test_what_is_announced_is_told_within_the_block_only(ear: Ear) -> None:
    source = Announced()
    assert not source.announce("spot")
    source.listen(ear.heard.put, 0)
    assert source.announce("spot", 120)
    assert ear.notice() == Notice("spot", 120)
    source.close()
    assert not source.announce("spot")


def test_sources_by_name_by_object_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Announced()
    monkeypatch.delenv(VARIABLE, raising=False)
    assert open_sources(None) == []
    assert open_sources(mine) == [mine]
    both = open_sources(["signals", mine])
    assert both[1] is mine
    assert isinstance(both[0], Signals)
    monkeypatch.setenv(VARIABLE, " signals ,")
    assert [one.name for one in open_sources(None)] == ["signals"]
    assert open_sources(()) == []


@pytest.mark.parametrize("wrong", ["cloud", 3, [3], ["signals", None]], ids=str)
def test_no_source_is_a_usage_error(wrong: object) -> None:
    with pytest.raises(UsageError):
        open_sources(wrong)  # type: ignore[arg-type]


def test_below_torchrun_the_window_is_its_shutdown_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert default_signals().seconds_left(signal.SIGTERM) == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    assert default_signals().seconds_left(signal.SIGTERM) == 30
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    assert default_signals().seconds_left(signal.SIGTERM) == 90


def test_a_source_needs_only_two_methods(ear: Ear) -> None:
    class Smallest(Source):
        name = "smallest"

        def listen(self, told: object, rank: int) -> None:
            pass

        def close(self) -> None:
            pass

    (found,) = open_sources(Smallest())
    found.sealed(3)
    found.committed(3)
