"""A restore amid training: it claims another attempt, so that no step has two contents."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import environment, free_port, told_in

import ckptmgr
from ckptmgr.errors import CkptmgrError
from ckptmgr.preemption import Announced
from driven import PATIENCE_SECONDS, Daemon, events_of, until
from nursery import torch_nursery

PROGRAM = Path(__file__).with_name("going_back_process.py")


def loaded(url: str, step: int | str) -> list[float]:
    found: Any = ckptmgr.load(url, step=step)
    return [float(value) for value in found["x"].unique()]


def test_steps_that_are_saved_again_are_what_was_saved_last(runtime: Path, store_url: str) -> None:
    state = {"x": torch.zeros(1000)}
    with ckptmgr.Checkpointer(store_url, state, every=None, keep=10) as ckpt:
        assert ckpt.restore() == 0
        for step in (1, 2, 3):
            state["x"].fill_(step)
            handle = ckpt.save(step)
            assert handle.committed(60)
        assert ckpt.attempt == 1
        assert ckpt.restore(1) == 1
        assert state["x"].unique().tolist() == [1.0]
        assert ckpt.attempt == 2
        for step in (2, 3, 4):
            state["x"].fill_(100 + step)
            assert ckpt.save(step).committed(60)
        assert handle.committed(0), "what was known of step 3 of the attempt before"
    assert [loaded(store_url, one) for one in ("1.3", "2.3", 3)] == [[3.0], [103.0], [103.0]]


def test_a_restore_before_the_first_step_stays_in_its_attempt(
    runtime: Path, store_url: str
) -> None:
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=1) as ckpt:
        ckpt.step(1)
    with ckptmgr.Checkpointer(store_url, state, every=1) as ckpt:
        assert ckpt.restore() == ckpt.restore() == 1
        assert ckpt.attempt == 2


def test_where_nothing_was_committed_the_loop_begins_anew_and_is_warned(
    runtime: Path, store_url: str
) -> None:
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        for step in range(ckpt.restore() + 1, 6):
            state["x"].fill_(step)
            ckpt.step(step)
        with pytest.warns(RuntimeWarning, match=r"nothing was put back.* that of step 5") as caught:
            assert ckpt.restore() == 0
        assert [one.filename for one in caught] == [__file__]
        assert ckpt.attempt == 2
        assert ckpt.save(1).committed(PATIENCE_SECONDS)
        assert ckpt.restore() == 1
    assert loaded(store_url, "2.1") == [5.0]


def test_a_copy_that_goes_on_ends_before_anything_is_fetched(runtime: Path, store_url: str) -> None:
    """The copy is slowed to about half a second; a fetch into its slot would come in between."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1 << 19)) for _ in range(16)])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def fill(value: float) -> None:
        with torch.no_grad():
            for one in module:
                one.fill_(value)

    state = {"m": module, "o": optimizer}
    with ckptmgr.Checkpointer(
        store_url, state, every=None, overlap=True, max_d2h_gbps=0.5, keep=10
    ) as ckpt:
        for step in (1, 2):
            fill(step)
            assert ckpt.save(step).committed(60)
        fill(3)
        handle = ckpt.save(3)
        assert ckpt.restore(1) == 1
        assert {float(value) for one in module for value in one.detach().unique()} == {1.0}
        assert handle.snapshot is not None or handle.failure is not None
    try:
        found: Any = ckptmgr.load(store_url, step=3)
    except CkptmgrError:
        return  # the attempt after it was active before it was stored
    assert {float(value) for one in found["m"].values() for value in one.unique()} == {3.0}


def test_a_store_that_does_not_answer_leaves_the_attempt_as_it_is(
    runtime: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(str(store), state, every=None) as ckpt:
        assert ckpt.save(1).committed(60)
        os.rename(store, tmp_path / "away")
        store.touch()
        with pytest.raises(CkptmgrError):
            ckpt.restore(1)
        store.unlink()
        os.rename(tmp_path / "away", store)
        assert ckpt.attempt == 1
        assert ckpt.save(2).committed(60)
    assert loaded(str(store), "1.2") == [0.0]


def test_a_preemption_that_was_told_before_holds_after_it(runtime: Path, store_url: str) -> None:
    source = Announced()
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=None, preemption=source) as ckpt:
        ckpt.save(1).committed(60)
        source.announce("maintenance", 600)
        log = runtime / "daemon.log"
        until(lambda: any(e["event"] == "preempted" for e in events_of(log)), "it is told")
        assert ckpt.restore(1) == 1
        ckpt.step(2)
        assert ckpt.preempted
    assert loaded(store_url, "2.2") == [0.0]


@pytest.mark.timeout(300)
def test_ranks_that_go_back_are_never_mixed_with_what_they_were(
    hosts: list[Path], store_url: str
) -> None:
    """The steps of both attempts have the same numbers; one host is lost, so that its part comes
    from the store and the other's from memory.
    """
    first = two_ranks(store_url, hosts[:2], "go-back")
    assert [one["attempt"] for one in first] == [2, 2]
    shutil.rmtree(hosts[0])
    hosts[0].mkdir(mode=0o700)
    found = two_ranks(store_url, hosts[:2], "resume")
    assert [(one["step"], one["value"]) for one in found] == [(3, 103.0), (3, 103.0)]
    assert found[1]["source"] == "memory"


def two_ranks(url: str, hosts: list[Path], do: str) -> list[dict[str, Any]]:
    """Run both, each with a daemon of its own; what each has said."""
    port = str(free_port())
    with ExitStack() as stack:
        started = []
        for rank, host in enumerate(hosts):
            stack.enter_context(Daemon(host))
            told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            told |= {"MASTER_PORT": port, "CKPTMGR_RUNTIME_DIR": str(host)}
            with (host / "trainer.out").open("wb") as log:
                started.append(
                    torch_nursery().start(
                        [str(PROGRAM), url, do], env=environment(**told), stdout=log, stderr=log
                    )
                )
            stack.callback(started[-1].kill)
        for process in started:
            process.wait(PATIENCE_SECONDS)
    return [told_in((host / "trainer.out").read_text())[0] for host in hosts]
