"""On a GPU: a snapshot is one instant of the state, and training does not wait for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import ckptmgr
from ckptmgr.errors import TornSnapshotError
from ckptmgr.rank import gpuclones
from ckptmgr.rank.capture import Capture, Copy
from ckptmgr.rank.pagelocks import PageLocks
from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.staging.hostbuffer import HostBuffer
from gpu.loop import SLEEP_CYCLES, Loop, reference
from rank.shape import difference, tensors
from rank.slot import buffer_for, read, seal

SNAPSHOTS = 20
WAIT_SECONDS_MAX = 60.0


@contextmanager
def capturing(state: dict[str, Any], **options: Any) -> Iterator[tuple[Capture, HostBuffer]]:
    """A capture as the face uses it, and locked slots for it."""
    capture = Capture(state, rng=False, **options)
    capture.predict()
    with buffer_for(capture.prepare()) as buffer:
        locks = PageLocks()
        for slot in range(2):
            with buffer.data(slot) as data:
                locks.lock(data)
        try:
            yield capture, buffer
        finally:
            capture.close()
            locks.release()


def begun(
    capture: Capture, buffer: HostBuffer, slot: int
) -> tuple[Copy, dict[str, Tensor], list[Any], Any]:
    """A copy that was started, what it must hold, what was heard of it, and what was prepared."""
    heard: list[BaseException | None] = []
    prepared = capture.prepare()
    expected = reference(capture._state)
    copy = capture.copy(prepared, buffer.begin(slot).data, heard.append)
    return copy, expected, heard, prepared


def wrong_in(
    buffer: HostBuffer, slot: int, prepared: Any, expected: dict[str, Tensor]
) -> list[str]:
    seal(buffer, slot, prepared)
    saved = read(buffer, slot)
    try:
        return differs(saved, expected)
    finally:
        saved.data.release()


def differs(saved: Saved, expected: dict[str, Tensor]) -> list[str]:
    found = dict(tensors(rebuild(saved)))
    return [path for path in expected if difference(expected[path].cpu(), found[path].detach())]


def is_whole_behind_a_step(loop: Loop, capture: Capture, buffer: HostBuffer, slot: int) -> None:
    """A snapshot beside a step has the values of before it."""
    copy, expected, heard, prepared = begun(capture, buffer, slot)
    loop.step()
    assert copy.wait(WAIT_SECONDS_MAX)
    assert heard == [None]
    assert wrong_in(buffer, slot, prepared, expected) == []


def test_overlapped_snapshots_are_whole_while_training_goes_on(loop: Loop) -> None:
    loop.step()
    with capturing(loop.state) as (capture, buffer):
        for number in range(SNAPSHOTS):
            loop.step()
            copy, expected, heard, prepared = begun(capture, buffer, number % 2)
            assert copy.turn is not None, "it was not overlapped"
            loop.step()
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
            assert wrong_in(buffer, number % 2, prepared, expected) == []


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
def test_a_snapshot_does_not_wait_for_the_gpu(options: dict[str, Any]) -> None:
    loop = Loop(**options)
    with capturing(loop.state) as (capture, buffer):
        for number in range(4):
            loop.step()
            reached = torch.cuda.Event()
            if number:  # with the first one CUDA loads kernels, and may wait
                torch.cuda._sleep(SLEEP_CYCLES)
            reached.record()
            expected, heard = reference(loop.state), list[Any]()
            prepared = capture.prepare()
            assert not (number and reached.query()), "to look at the state waited for the GPU"
            copy = capture.copy(prepared, buffer.begin(number % 2).data, heard.append)
            assert not (number and reached.query()), "the copy was waited for"
            loop.forward()
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
            assert wrong_in(buffer, number % 2, prepared, expected) == []


def test_training_on_a_stream_of_its_own(loop: Loop) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), capturing(loop.state) as (capture, buffer):
        for number in range(SNAPSHOTS):
            loop.step()
            torch.cuda._sleep(SLEEP_CYCLES // 64)
            is_whole_behind_a_step(loop, capture, buffer, number % 2)


def test_a_change_by_hand_under_an_overlapped_copy_is_found_and_then_avoided(loop: Loop) -> None:
    weight = loop.model[0].weight
    with capturing(loop.state) as (capture, buffer):
        loop.step()
        torch.cuda._sleep(SLEEP_CYCLES // 8)  # the copy has not begun yet
        copy, _, heard, _ = begun(capture, buffer, 0)
        with torch.no_grad():
            weight.add_(1)
        assert copy.wait(WAIT_SECONDS_MAX)
        assert [type(one) for one in heard] == [TornSnapshotError]
        assert "0.weight" in str(heard[0])
        loop.step()
        copy, expected, heard, prepared = begun(capture, buffer, 1)
        with torch.no_grad():
            weight.add_(1)
        assert copy.wait(WAIT_SECONDS_MAX)
        assert heard == [None]
        assert wrong_in(buffer, 1, prepared, expected) == []


@pytest.mark.parametrize("recorded", ["before", "within"])
def test_steps_in_a_cuda_graph_tear_nothing(recorded: str) -> None:
    """Nothing counts what a graph writes, and it runs no hooks."""
    loop = Loop(capturable=True)
    batch = torch.randn(64, 1024, device="cuda")

    def whole_step() -> None:
        loop.optimizer.zero_grad(set_to_none=False)
        loop.model(batch).square().sum().backward()
        loop.optimizer.step()

    def record() -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                whole_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            whole_step()
        return graph

    graph = record() if recorded == "before" else None
    with capturing(loop.state) as (capture, buffer):
        graph = graph or record()
        for number in range(5):
            graph.replay()
            copy, expected, heard, prepared = begun(capture, buffer, number % 2)
            graph.replay()
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
            assert wrong_in(buffer, number % 2, prepared, expected) == []


class Wrapped(Optimizer):
    """As some libraries wrap one: an Optimizer by its class, whose step runs no hooks."""

    def __init__(self, inside: Optimizer) -> None:
        self.inside = inside
        self._optimizer_step_pre_hooks = {}
        self._optimizer_step_post_hooks = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inside"], name)

    def state_dict(self) -> Any:
        return self.inside.state_dict()

    def register_step_pre_hook(self, hook: Any) -> Any:
        class Handle:
            def remove(self) -> None:
                pass

        return Handle()

    def step(self) -> None:
        with torch.no_grad():
            for group in self.inside.param_groups:
                for param in group["params"]:
                    param.data.add_(1)  # counted nowhere


def test_an_optimizer_whose_steps_run_no_hooks_tears_nothing(loop: Loop) -> None:
    loop.step()
    wrapped = Wrapped(loop.optimizer)
    with capturing({"model": loop.model, "optimizer": wrapped}) as (capture, buffer):
        for number in range(3):
            wrapped.step()
            torch.cuda._sleep(SLEEP_CYCLES // 8)
            copy, expected, heard, prepared = begun(capture, buffer, number % 2)
            wrapped.step()
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
            assert wrong_in(buffer, number % 2, prepared, expected) == []


def until_full() -> Iterator[Tensor]:
    """All the memory that this process may still take of the GPU."""
    with suppress(torch.cuda.OutOfMemoryError):
        while True:
            yield torch.empty(1 << 18, device="cuda")


@pytest.mark.parametrize("room", ["none by rule", "none on the GPU"])
def test_without_room_for_clones_it_waits(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    with capturing(loop.state) as (capture, buffer):
        loop.step()
        if room == "none by rule":
            monkeypatch.setattr(gpuclones, "CLONED_BYTES_MAX", 0)
            copy, expected, heard, prepared = begun(capture, buffer, 0)
        else:
            expected, heard = reference(loop.state), []
            prepared = capture.prepare()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
            try:
                big = {at: torch.empty(0, device="cuda") for at in range(2)} | {
                    9: loop.model[0].weight.detach()
                }
                filled = list(until_full())
                assert gpuclones.cloned(big) == {}
                copy = capture.copy(prepared, buffer.begin(0).data, heard.append)
                del filled
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        loop.step()
        assert copy.wait(WAIT_SECONDS_MAX)
        assert heard == [None]
        assert wrong_in(buffer, 0, prepared, expected) == []


def test_snapshots_leave_no_memory_of_the_gpu_behind(loop: Loop) -> None:
    loop.step()
    loop.optimizer.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with capturing(loop.state) as (capture, buffer):
        for number in range(4):
            loop.step()
            copy, _, heard, _ = begun(capture, buffer, number % 2)
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
        loop.optimizer.zero_grad()
        del copy
        assert torch.cuda.memory_allocated() == before


def test_a_limited_copy_is_whole_too(loop: Loop) -> None:
    with capturing(loop.state, max_d2h_gbps=20.0) as (capture, buffer):
        for number in range(3):
            loop.step()
            is_whole_behind_a_step(loop, capture, buffer, number % 2)


# -- page locks -------------------------------------------------------------------------------


def is_locked(data: memoryview) -> bool:
    return torch.frombuffer(data, dtype=torch.uint8).is_pinned()


def test_slots_are_locked_before_the_first_snapshot_and_unlocked_at_the_end(
    runtime: Path, store_url: str, loop: Loop
) -> None:
    loop.step()
    with ckptmgr.Checkpointer(store_url, loop.state, every=1) as ckpt:
        link = ckpt._link
        assert link is not None
        buffer, locks = link.buffer, link.locks
        link.wait_populated(0)
        assert is_locked(buffer.data(0))
        loop.step()
        handle = ckpt.step(1)
        assert handle is not None
        assert handle.committed(WAIT_SECONDS_MAX)
        assert len(locks._places) == 2
    assert not locks._places


def test_a_state_that_grows_gets_a_larger_locked_buffer(
    runtime: Path, store_url: str, loop: Loop
) -> None:
    with ckptmgr.Checkpointer(store_url, loop.state, every=1) as ckpt:
        for number in range(1, 4):
            loop.step()
            loop.state[f"more{number}"] = torch.randn(1 << 22, device="cuda")
            handle = ckpt.save(number)
            assert handle.committed(WAIT_SECONDS_MAX)
        assert ckpt._link is not None
        assert is_locked(ckpt._link.buffer.data(0))
        assert ckpt.stats.failures == 0


def test_memory_that_can_not_be_locked_is_told_once_and_hurts_nothing(loop: Loop) -> None:
    capture = Capture(loop.state, rng=False)
    with buffer_for(capture.prepare()) as buffer:
        other = PageLocks()
        with buffer.data(0) as data:
            other.lock(data)  # CUDA refuses memory that it knows already
            locks = PageLocks()
            with pytest.warns(RuntimeWarning, match="page-locked"):
                locks.lock(data)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                locks.lock(data)
            loop.step()  # the next kernel is not told of it
            torch.cuda.synchronize()
            locks.release()
            assert is_locked(data)
            other.release()
            assert not is_locked(data)
        copy, expected, heard, prepared = begun(capture, buffer, 0)
        assert copy.wait(WAIT_SECONDS_MAX)
        assert heard == [None]
        assert wrong_in(buffer, 0, prepared, expected) == []
        capture.close()
