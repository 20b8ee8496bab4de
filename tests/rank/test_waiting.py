"""A copy behind the back of training ends for whoever waits for it, in whatever thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ckptmgr.rank import quiet
from ckptmgr.rank.capture import Capture, Copy
from ckptmgr.rank.overlap import Job, Turn
from driven import until

WAIT_SECONDS_MAX = 60.0


def trained() -> dict[str, Any]:
    net = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(8)).sum().backward()
    optimizer.step()
    return {"net": net, "optimizer": optimizer}


@contextmanager
def copied_by_an_idle_thread(
    monkeypatch: pytest.MonkeyPatch, heard: list[BaseException | None]
) -> Iterator[tuple[Capture, Copy]]:
    """A copy that ends when the thread that has started it sleeps, and will for good."""
    idle = threading.Event()
    now = Job._copy

    def later(job: Job, turn: Turn) -> None:
        idle.wait(WAIT_SECONDS_MAX)
        now(job, turn)

    monkeypatch.setattr(Job, "_copy", later)
    capture = Capture(trained(), rng=False, overlap=True)
    prepared = capture.prepare()
    data = memoryview(bytearray(prepared.data_bytes))
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(threading.get_native_id).result()
        copy = pool.submit(capture.copy, prepared, data, heard.append).result()
        while (sleep := quiet._sleep(task)) is None or not (
            idle.wait(quiet.LOOK_SECONDS_MAX) or sleep == quiet._sleep(task)
        ):
            pass
        idle.set()
        yield capture, copy
    capture.close()


@pytest.mark.parametrize("last", ["wait", "prepare", "close"])
def test_a_copy_of_a_thread_that_idles_goes_on_for_whoever_waits(
    monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    heard: list[BaseException | None] = []
    with copied_by_an_idle_thread(monkeypatch, heard) as (capture, copy):
        assert not copy.wait(0.0)
        if last == "wait":
            assert copy.wait(WAIT_SECONDS_MAX)
        else:
            getattr(capture, last)()
        assert heard == [None]


def test_a_wait_in_another_thread_takes_no_one_who_is_awake_for_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be amid a write: whoever waits does not know."""
    assert quiet._sleep(threading.get_native_id()) is None
    with copied_by_an_idle_thread(monkeypatch, []) as (_, copy):
        with monkeypatch.context() as awake:
            awake.setattr(quiet, "_sleep", lambda task: None)
            assert not copy.wait(4 * quiet.LOOK_SECONDS_MAX)
        assert copy.wait(WAIT_SECONDS_MAX)


def test_a_thread_that_sleeps_may_wait_for_one_of_torch_that_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with copied_by_an_idle_thread(monkeypatch, []) as (_, copy), monkeypatch.context() as busy:
        busy.setattr(quiet, "_workers_awake", lambda: True)
        assert not copy.wait(4 * quiet.LOOK_SECONDS_MAX)
        busy.setattr(quiet, "SPINNING_SECONDS", 0.0)  # one that always spins ends it, too
        assert copy.wait(WAIT_SECONDS_MAX)


def test_the_threads_of_an_operation_are_seen_and_those_of_python_are_not() -> None:
    threads, stop = torch.get_num_threads(), threading.Event()
    numbers = torch.randn(700, 700)

    def busy() -> None:
        torch.set_num_threads(2)
        while not stop.is_set():
            numbers.mm(numbers)

    operating = threading.Thread(target=busy)
    operating.start()
    until(quiet._workers_awake, "a thread of torch works")
    stop.set()
    operating.join()
    torch.set_num_threads(threads)
    spinning = threading.Thread(target=lambda: until(lambda: not quiet._workers_awake(), "rest"))
    spinning.start()  # this one is awake until none but Python's is
    spinning.join()


def test_what_runs_below_a_dispatch_belongs_to_the_operation_that_called_it() -> None:
    """Torch counts a write when the Python of the dispatch has returned, too."""
    here = threading.get_ident()
    places: list[Any] = []

    class Looked(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            places.append(quiet._place(here))
            found = func(*args, **(kwargs or {}))
            places.append(quiet._place(here))
            return found

    number = torch.zeros(1)
    with torch.no_grad(), Looked():
        number.add_(1)
    assert len(places) == 2
    assert places[0] == places[1] != quiet._place(here)


def test_a_wait_ends_with_its_time_also_in_the_thread_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = threading.Event()
    monkeypatch.setattr(Job, "_copy", lambda job, turn: held.wait(WAIT_SECONDS_MAX))
    capture = Capture(trained(), rng=False, overlap=True)
    prepared = capture.prepare()
    copy = capture.copy(prepared, memoryview(bytearray(prepared.data_bytes)), lambda error: None)
    assert copy.wait(0.01) is False
    held.set()
    assert copy.wait(WAIT_SECONDS_MAX)
    capture.close()
