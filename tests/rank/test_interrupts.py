"""An exception out of a signal handler, wherever it lands, neither hangs a trainer nor tears."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.errors import CkptmgrError
from ckptmgr.rank import overlap
from ckptmgr.rank.capture import Capture, Copy
from ckptmgr.rank.overlap import CopyThread, Job, Turn
from nursery import torch_nursery
from scale import scaled

TESTS = Path(__file__).parents[1]
STRIDE = scaled(5, 1)
SIGNALLED_TRIES = scaled(250, 3_000)
STORY_SECONDS_MAX = scaled(250, 2_000)


def story(*arguments: str) -> dict[str, Any]:
    """Run the tries in a process of their own; each of them ends it if it hangs."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    program = [str(TESTS / "rank" / "interrupted_process.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": paths}
    with tempfile.TemporaryFile("w+") as log:
        process = torch_nursery().start(program, env=environment, stdout=log, stderr=log)
        try:
            status = process.wait(STORY_SECONDS_MAX)
        finally:
            process.kill()
        log.seek(0)
        said = log.read()
    assert status == 0, said
    told: dict[str, Any] = json.loads(said.splitlines()[-1])
    return told


@pytest.mark.timeout(STORY_SECONDS_MAX + 10)
@pytest.mark.parametrize("first", [1, 3])
def test_an_interrupt_at_any_instruction_neither_hangs_nor_tears(first: int) -> None:
    told = story("traced", str(first), str(2 * STRIDE))
    assert told["faults"] == []
    assert told["interrupted"] == told["tries"] - 1, "the last instant is after the end"
    assert told["tries"] * 2 * STRIDE > 1_000, "the code that hands over was traced"
    assert told["sealed"] >= told["tries"], "there is a snapshot after each interrupt"


@pytest.mark.timeout(STORY_SECONDS_MAX + 10)
def test_signals_that_end_the_process_again_and_again_neither_hang_nor_tear() -> None:
    told = story("signals", str(SIGNALLED_TRIES))
    assert told["faults"] == []
    assert told["tries"] == SIGNALLED_TRIES
    assert told["interrupted"] > SIGNALLED_TRIES // 10
    assert told["sealed"] >= told["tries"]


dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


# -- one of them at a time --------------------------------------------------------------------


def started() -> tuple[Capture, list[BaseException | None], Any]:
    """A capture, what its `done` heard, and a call that starts an overlapped copy."""
    net = nn.Linear(4, 4)
    state = {"net": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}
    capture = Capture(state, rng=False, overlap=True)
    prepared = capture.prepare()
    heard: list[BaseException | None] = []
    data = memoryview(bytearray(prepared.data_bytes))
    return capture, heard, lambda: capture.copy(prepared, data, heard.append)


def test_a_job_that_was_published_but_not_queued_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture, heard, start = started()

    class Interrupted:
        def put(self, _: Any) -> None:
            raise KeyboardInterrupt

    capture._thread.copy([torch.zeros(1)], [torch.ones(1)])
    with monkeypatch.context() as patch:
        patch.setattr(capture._thread._lane, "jobs", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            start()
    capture.close()
    assert heard == []
    assert start().wait(60)
    capture.close()
    assert heard == [None]


def test_an_interrupt_before_the_thread_is_started_is_not_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture, heard, start = started()

    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start()
        capture.close()
    assert start().wait(60)
    capture.close()
    assert heard == [None]


@dies
def test_a_copying_thread_that_can_not_begin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, heard, start = started()

    def broken() -> None:
        raise SystemExit  # ends a thread without a word

    with monkeypatch.context() as patch:
        patch.setattr(overlap, "_use_one_core", broken)
        copy = start()
        assert copy.wait()
        capture.prepare()
    (error,) = heard
    assert isinstance(error, CkptmgrError)
    assert "copying thread" in str(error)
    assert start().wait()
    assert heard == [error, None]
    capture.close()


@dies
def test_a_thread_that_dies_over_a_job_lets_everyone_go(monkeypatch: pytest.MonkeyPatch) -> None:
    capture, heard, start = started()

    def die(self: Job, turn: Turn) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Job, "run", die)
        assert start().wait()
    (error,) = heard
    assert isinstance(error, CkptmgrError)
    capture.close()


@dies
def test_a_small_copy_without_a_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise SystemExit

    monkeypatch.setattr(overlap, "_use_one_core", broken)
    thread = CopyThread()
    with pytest.raises(CkptmgrError, match="has ended before the copy"):
        thread.copy([torch.zeros(3)], [torch.ones(3)])
    thread.close()


def test_a_forked_child_is_told_that_its_copy_is_not_coming() -> None:
    thread = CopyThread()
    thread.copy([torch.zeros(3)], [torch.ones(3)])
    heard: list[BaseException | None] = []
    copy = Copy(heard.append, thread.settle)
    held = threading.Event()
    ones = [torch.ones(1)]
    job = Job([torch.zeros(1)], ones, ones, ["x"], lambda _: held.wait(60), lambda _: None)
    copy.turn = thread.start(job)
    child = os.fork()
    if child == 0:
        try:
            copy.wait()
            thread.close()
            os._exit(0 if isinstance(heard[0], CkptmgrError) else 1)
        finally:
            os._exit(2)
    held.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.close()


def test_the_owner_hears_one_verdict_when_a_signal_handler_raises_a_plain_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture, heard, start = started()
    begin = CopyThread.start

    def begun(self: CopyThread, job: Job) -> Turn:
        begin(self, job)
        self.drain()
        raise TimeoutError("out of a handler")

    with monkeypatch.context() as patch:
        patch.setattr(CopyThread, "start", begun)
        with pytest.raises(TimeoutError, match="out of a handler"):
            start()
    capture.close()
    assert heard == [None]
