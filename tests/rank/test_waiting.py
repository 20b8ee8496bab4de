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

from ckptmgr.rank import overlap
from ckptmgr.rank.capture import Capture, Copy
from ckptmgr.rank.overlap import Job, Turn

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
        while (sleep := overlap._sleep(task)) is None or not (
            idle.wait(overlap.LOOK_SECONDS_MAX) or sleep == overlap._sleep(task)
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
    assert overlap._sleep(threading.get_native_id()) is None
    with copied_by_an_idle_thread(monkeypatch, []) as (_, copy):
        with monkeypatch.context() as awake:
            awake.setattr(overlap, "_sleep", lambda task: None)
            assert not copy.wait(4 * overlap.LOOK_SECONDS_MAX)
        assert copy.wait(WAIT_SECONDS_MAX)


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
