"""Optimizers wait at their gates; and which are overlapped."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ckptmgr.rank.capture import Capture
from ckptmgr.rank.overlap import Job, Turn
from ckptmgr.rank.place import place
from ckptmgr.types import PAGE_BYTES
from rank.loop import WAIT_SECONDS_MAX, Loop, copied, reference, sealed_differs
from rank.shape import difference
from rank.slot import buffer_for, read, seal


class Unhooked(torch.optim.SGD):
    """As some libraries wrap an optimizer, or a graph replays one: its steps run no hooks."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.data.add_(1)  # counted nowhere


Unhooked.step.hooked = True  # type: ignore[attr-defined] # torch wraps no step that says so


@pytest.mark.parametrize("hooked", [True, False])
def test_by_default_only_optimizers_that_come_to_their_gate_are_overlapped(
    monkeypatch: pytest.MonkeyPatch, hooked: bool
) -> None:
    model = nn.Linear(300, 300)
    kind = torch.optim.SGD if hooked else Unhooked
    optimizer = kind(model.parameters(), lr=0.1)
    capture = Capture({"model": model, "optimizer": optimizer}, rng=False)
    monkeypatch.setattr(capture, "_overlaps", lambda sources: True)  # as on a GPU
    capture.predict()
    with buffer_for(capture.prepare()) as buffer:
        overlapped = []
        for step in range(4):
            if step:  # none before the first snapshot
                model(torch.ones(4, 300)).sum().backward()
                optimizer.step()
            prepared, expected = capture.prepare(), reference(capture._state)
            heard: list[BaseException | None] = []
            copy = capture.copy(prepared, buffer.data(0), heard.append)
            overlapped.append(copy.turn is not None)
            optimizer.step()
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
            assert sealed_differs(buffer, 0, prepared, expected) == []
        capture.close()
    assert overlapped == [False, hooked, hooked, hooked]
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_in_no_state_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares parameters with one that is; torch counts nothing that its fused step writes."""
    model = nn.Linear(30, 30)
    known = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    capture = Capture({"model": model, "known": known}, rng=False, overlap=True)
    model(torch.ones(4, 30)).sum().backward()
    now = Job._copy

    def later(job: Job, turn: Turn) -> None:
        turn.wait_for_rest(0.2)
        now(job, turn)

    monkeypatch.setattr(Job, "_copy", later)
    prepared, expected = capture.prepare(), reference(capture._state)
    with buffer_for(prepared) as buffer:
        heard: list[BaseException | None] = []
        copy = capture.copy(prepared, buffer.data(0), heard.append)
        other.step()
        assert copy.wait(WAIT_SECONDS_MAX)
        assert heard == [None]
        assert sealed_differs(buffer, 0, prepared, expected) == []
    capture.close()
    assert not _global_optimizer_pre_hooks


def test_overlap_by_default_is_off_without_a_gpu() -> None:
    loop = Loop()
    capture = Capture(loop.state)
    prepared = capture.prepare()
    data = memoryview(bytearray(prepared.data_bytes))
    heard: list[BaseException | None] = []
    capture.copy(prepared, data, heard.append)
    assert heard == [None]
    assert not loop.optimizer._optimizer_step_pre_hooks
    capture.close()


def test_hooks_and_thread_end_with_close() -> None:
    loop = Loop()
    capture = Capture(loop.state, overlap=True)
    prepared = capture.prepare()
    data = memoryview(bytearray(prepared.data_bytes))
    before = set(threading.enumerate())
    assert copied(capture, prepared, data) == [None]
    assert len(loop.optimizer._optimizer_step_pre_hooks) == 1
    assert [t.name for t in set(threading.enumerate()) - before] == ["ckptmgr-copy"]
    capture.close()
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert set(threading.enumerate()) <= before
    loop.step()


def test_hooks_follow_the_optimizers_in_the_state() -> None:
    loop = Loop()
    capture = Capture(loop.state, overlap=True)
    data = memoryview(bytearray(capture.prepare().data_bytes + PAGE_BYTES))
    assert copied(capture, capture.prepare(), data) == [None]
    other = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    loop.state["optimizer"] = other
    assert copied(capture, capture.prepare(), data) == [None]
    assert not loop.optimizer._optimizer_step_pre_hooks
    assert len(other._optimizer_step_pre_hooks) == 1
    capture.close()


class Wrapper(torch.optim.Optimizer):
    """As torch's PostLocalSGDOptimizer wraps another: it is no initialised optimizer itself."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.count = 0

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.inner.load_state_dict(state)

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.inner.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_optimizer_without_hooks_is_not_overlapped_and_comes_back(overlap: bool) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 3)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": Wrapper(inner)}

    state, live = make(1), make(2)
    state["model"](torch.ones(4, 3)).sum().backward()
    state["optimizer"].step()
    capture = Capture(state, rng=False, overlap=overlap)
    heard: list[BaseException | None] = []
    with buffer_for(capture.prepare()) as buffer:
        prepared = capture.prepare()
        copy = capture.copy(prepared, buffer.data(0), heard.append)
        assert copy.turn is None
        assert heard == [None]
        capture.close()
        seal(buffer, 0, prepared)
        saved = read(buffer, 0)
        place(live, saved)
        saved.data.release()
    assert difference(state, live) == ""
    assert live["optimizer"].count == 1
