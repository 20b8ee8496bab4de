"""Questions that a daemon that hangs, or another thread, holds up: they end in their time."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ckptmgr
from ckptmgr.errors import DaemonUnreachableError
from ckptmgr.rank import handle, link, saving
from ckptmgr.staging.control import Client, Stated, Status, Wait, Waited
from ckptmgr.staging.launch import connect_or_start
from ckptmgr.types import Outcome
from driven import PATIENCE_SECONDS, Daemon, Rank, until
from processes import many_descriptors
from rigged import Rig

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS)
"""Less than a single question may take that is not bounded, to attach again."""


def test_a_commit_is_waited_for_no_longer_than_asked(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "ANSWER_SECONDS_MAX", 0.5)
    rig = Rig(tmp_path)
    state: dict[str, Any] = {"x": torch.ones(3)}
    with (
        Daemon(runtime, environment=rig.environment()) as daemon,
        ckptmgr.Checkpointer(rig.url, state, every=None) as ckpt,
    ):
        assert ckpt.save(1).committed(PATIENCE_SECONDS)
        with daemon.stopped():
            second = ckpt.save(2)
            assert not second.committed(0.2), "the question is cut short"
            assert not second.committed(0.2), "nobody attaches us again"
        assert second.committed(PATIENCE_SECONDS)
        rig.obey(("put_new", "data/00000001/000000000003/", "hold"))
        third = ckpt.save(3)
        assert not third.committed(0.2), "no late answer of another question is taken for this one"
        rig.obey()
        assert third.committed(PATIENCE_SECONDS)


def test_a_question_of_another_thread_is_waited_for_no_longer_either(
    runtime: Path, store_url: str
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        answers: list[Waited] = []
        with daemon.stopped():
            rank.save(1)
            asker = threading.Thread(target=lambda: answers.append(rank.wait(1)))
            asker.start()
            until(lambda: rank.link.is_asked, "it asks")
            with pytest.raises(DaemonUnreachableError, match="another thread, which asked before"):
                rank.link.ask(Wait(1, 0.0), Waited, seconds_max=0.1)
        asker.join(PATIENCE_SECONDS)
        assert [one.outcome for one in answers] == [Outcome.COMMITTED]
        assert rank.link.rejoined == 0, "the connection of the other was left alone"


def test_one_death_of_the_daemon_is_met_once(runtime: Path, store_url: str) -> None:
    """A question meets it while the thread that heard of it waits for its turn."""
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        link = rank.link

        def meet() -> None:
            daemon.end(signal.SIGKILL)
            until(lambda: len(link._turns._line) == 2, "the other thread has heard of it")
            link._again(lambda: link._client.ask(Status(), Stated))

        link._turns.take(meet, 0.0)
        link.ask(Status(), Stated)  # after the other thread's turn
        assert link.rejoined == 1


def test_a_death_of_the_daemon_is_heard_past_descriptor_1024(runtime: Path, store_url: str) -> None:
    with many_descriptors(), Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        daemon.end(signal.SIGKILL)
        until(lambda: rank.link.rejoined, "another daemon is started, without a question")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "error", [DaemonUnreachableError("could not be started"), ZeroDivisionError("by a fault")]
)
def test_a_daemon_is_started_after_one_try_has_failed_and_warnings_are_errors(
    runtime: Path,
    store_url: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tries = []

    def start(*given: Any) -> Client:
        tries.append(given)
        if len(tries) == 1:
            raise error
        return connect_or_start(*given)

    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        monkeypatch.setattr(link, "connect_or_start", start)
        daemon.end(signal.SIGKILL)
        until(lambda: rank.link.rejoined, "another daemon is started, without a question")
    assert "ckptmgr: no daemon yet: " in capsys.readouterr().err


def test_a_slot_of_an_attempt_before_is_waited_for_and_not_looked_at_without_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody can be asked about its snapshot."""
    paused: list[float] = []
    event = SimpleNamespace(wait=paused.append)
    monkeypatch.setattr(saving, "threading", SimpleNamespace(Event=lambda: event))
    one, before = saving.Saving.__new__(saving.Saving), SimpleNamespace(attempt=1, step=5)
    one._link = SimpleNamespace(is_asked=False, attempt=2)  # type: ignore[assignment]
    one._wait_for(before)  # type: ignore[arg-type]
    assert paused == [saving._WAIT_SECONDS]


def test_no_slot_is_written_that_a_daemon_that_hangs_may_be_filling(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not dead: it goes on amid the fetch that it began for a restore."""
    rig = Rig(tmp_path)
    state: dict[str, Any] = {"x": torch.ones(1 << 20)}
    with Daemon(runtime, environment=rig.environment()) as daemon:
        with ckptmgr.Checkpointer(rig.url, state, every=None, codec="none") as ckpt:
            assert ckpt.save(1).committed(PATIENCE_SECONDS)
        daemon.await_event("freed")
        rig.obey(("get", "data/", "hold"))
        with ckptmgr.Checkpointer(rig.url, state, every=1, codec="none") as ckpt:
            until(lambda: rig.asked("get", "data/"), "it fetches")
            state["x"].fill_(5)
            with daemon.stopped(), monkeypatch.context() as patch:
                patch.setattr(link, "STEP_SECONDS_MAX", 0.2)
                patch.setattr(saving, "CONTROL_TIMEOUT_SECONDS", 0.2)
                with pytest.warns(RuntimeWarning, match="has not answered in time"):
                    assert ckpt.step(5) is None
                with pytest.warns(RuntimeWarning, match="asked in vain"):
                    assert ckpt.step(6) is None
                with pytest.raises(DaemonUnreachableError):
                    ckpt.save(7)
                assert ckpt.stats.failures == 2
                rig.obey()
            assert ckpt.save(8).committed(PATIENCE_SECONDS)
            until(lambda: ckpt.step(ckpt._last_step + 1), "steps are snapshotted again")
    assert ckptmgr.load(rig.file_url, step=8)["x"].unique().tolist() == [5]


def test_no_step_waits_for_a_larger_buffer_of_a_daemon_that_hangs(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, Any] = {"x": torch.ones(3)}
    with Daemon(runtime) as daemon, ckptmgr.Checkpointer(store_url, state, every=1) as ckpt:
        assert ckpt.save(1).committed(PATIENCE_SECONDS)
        state["x"] = torch.ones(1 << 20)
        with daemon.stopped(), monkeypatch.context() as patch:
            patch.setattr(link, "STEP_SECONDS_MAX", 0.2)
            with pytest.warns(RuntimeWarning, match="does not answer|in time"):
                assert ckpt.step(2) is None
            with pytest.warns(RuntimeWarning, match="asked in vain"):
                assert ckpt.step(3) is None
            assert ckpt.stats.failures == 2
        assert ckpt.save(4).committed(PATIENCE_SECONDS)
    assert ckptmgr.load(store_url)["x"].numel() == 1 << 20
