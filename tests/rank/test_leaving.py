"""The way out of the block is bounded, whatever the daemon does."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from training import CrashError, command, committed

import ckptmgr
from ckptmgr.errors import DaemonUnreachableError, UsageError
from ckptmgr.rank import checkpointer, link
from ckptmgr.staging.control import Client, Message, Wait
from driven import PATIENCE_SECONDS, Daemon, Rank, until

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS)
"""Less than a single question may take that is not bounded, to attach again."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[type[Message]]:
    """What is asked from here on, with two seconds to leave in."""
    found: list[type[Message]] = []
    ask = Client.ask

    def told(client: Client, request: Message, *arguments: object) -> object:
        found.append(type(request))
        return ask(client, request, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "ask", told)
    monkeypatch.setattr(checkpointer, "CONTROL_TIMEOUT_SECONDS", 2.0)
    return found


def test_an_exception_is_not_held_up_by_a_daemon_that_hangs(
    runtime: Path, store_url: str, asked: list[type[Message]]
) -> None:
    state = {"x": torch.ones(3)}
    with Daemon(runtime) as daemon:
        ckpt = ckptmgr.Checkpointer(store_url, state, every=None)
        ckpt.__enter__()
        handles = [ckpt.save(1)]
        for step in range(2, 7):
            assert handles[-1].committed(PATIENCE_SECONDS)
            handles.append(ckpt.save(step))
        assert handles[-1].committed(PATIENCE_SECONDS)
        asked.clear()
        with daemon.stopped():
            ckpt.__exit__(CrashError, CrashError(), None)
        assert asked in ([Wait], []), "after the first failure nobody is asked again"
        assert handles[-1].committed(), "that stands in host memory"
        assert not handles[0].committed(), "nobody could tell"
        daemon.await_event("trainer_died")


def test_leaving_cleanly_past_a_daemon_that_hangs_loses_nothing(
    runtime: Path, store_url: str, asked: list[type[Message]]
) -> None:
    state = {"x": torch.ones(3)}
    with Daemon(runtime) as daemon:
        ckpt = ckptmgr.Checkpointer(store_url, state, every=None, drain_timeout=0.5)
        ckpt.__enter__()
        assert ckpt.save(1).committed(PATIENCE_SECONDS)
        asked.clear()
        with daemon.stopped(), pytest.warns(RuntimeWarning, match="goes on trying"):
            second = ckpt.save(2)
            ckpt.__exit__(None, None, None)
        assert asked in ([Wait], []), "after the first failure nobody is asked again"
        assert not second.committed(), "it was not when the block was left"
        command("drain", "--timeout", "60")
    assert committed(store_url) == ["1.2", "1.1"]


def test_a_question_of_another_thread_does_not_hold_up_the_end(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(runtime) as daemon:
        rank = Rank(runtime, store_url)
        failures: list[BaseException] = []

        def wait() -> None:
            try:
                rank.wait(1)
            except DaemonUnreachableError as error:
                failures.append(error)

        with daemon.stopped():
            rank.save(1)
            asker = threading.Thread(target=wait)
            asker.start()
            until(lambda: rank.link.is_asked, "it asks")
            monkeypatch.setattr(link, "CONTROL_TIMEOUT_SECONDS", 0.2)
            rank.close(clean=True)
            asker.join(PATIENCE_SECONDS)
        assert len(failures) == 1
        daemon.await_event("committed")


def test_a_forked_child_that_falls_out_of_the_block_says_nothing(
    runtime: Path, store_url: str, asked: list[type[Message]], tmp_path: Path
) -> None:
    """It would be on its parent's connection, and each would hear what the other has asked."""
    told = tmp_path / "told"
    with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}, every=None) as ckpt:
        first = ckpt.save(1)
        assert first.committed(PATIENCE_SECONDS)
        second = ckpt.save(2)
        pid = os.fork()
        if not pid:
            try:
                asked.clear()
                for use in (lambda: ckpt.save(3), lambda: ckpt.step(3), ckpt.restore):
                    with pytest.raises(UsageError, match="forked child"):
                        use()
                ckpt.__exit__(None, None, None)
                told.write_text(f"{asked}")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert told.read_text() == "[]"
        assert second.committed(PATIENCE_SECONDS)
        assert ckpt.save(3).committed(PATIENCE_SECONDS)
        assert ckpt._link is not None
        assert ckpt._link.rejoined == 0
    assert committed(store_url) == ["1.3", "1.2", "1.1"]
