"""A snapshot is one instant of the state, whatever is done to the state afterwards."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.errors import CkptmgrError, TornSnapshotError, UnsupportedLeafError, UsageError
from ckptmgr.rank import overlap, pieces
from ckptmgr.rank.capture import Capture, Copy
from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.types import PAGE_BYTES
from rank.loop import WAIT_SECONDS_MAX, Loop, copied, reference, sealed_differs
from rank.shape import difference
from rank.slot import buffer_for
from scale import scaled

TORN_SNAPSHOTS = scaled(1_000, 10_000)
OVERLAPPED_SNAPSHOTS = scaled(300, 3_000)


# -- torn state -------------------------------------------------------------------------------


def test_no_snapshot_is_torn_by_what_happens_after_the_call() -> None:
    loop = Loop()
    capture = Capture(loop.state, rng=False, overlap=False)
    torn: list[tuple[int, list[str]]] = []
    sealed = 0
    changes: list[Callable[[], None]] = [loop.step, loop.forward, loop.change_all_by_hand]
    with buffer_for(capture.prepare()) as buffer:
        for step in range(1, TORN_SNAPSHOTS + 1):
            slot = step % 2
            writer = buffer.begin(slot)
            prepared, expected = capture.prepare(), reference(loop.state)
            heard: list[BaseException | None] = []
            capture.copy(prepared, writer.data, heard.append)
            changes[step % 3]()
            assert heard == [None]
            sealed += 1
            wrong = sealed_differs(buffer, slot, prepared, expected)
            if wrong:
                torn.append((step, wrong))
        capture.close()
    assert torn == []
    assert sealed == TORN_SNAPSHOTS


def test_overlapped_snapshots_are_whole_while_training_goes_on() -> None:
    loop = Loop(width=300)
    capture = Capture(loop.state, rng=False, overlap=True)
    with buffer_for(capture.prepare()) as buffer:
        for step in range(1, OVERLAPPED_SNAPSHOTS + 1):
            slot = step % 2
            prepared, expected = capture.prepare(), reference(loop.state)
            heard: list[BaseException | None] = []
            copy = capture.copy(prepared, buffer.data(slot), heard.append)
            loop.step()
            assert copy.wait(WAIT_SECONDS_MAX)
            assert heard == [None]
            assert sealed_differs(buffer, slot, prepared, expected) == []
        capture.close()


def test_a_change_by_hand_under_an_overlapped_copy_is_found_and_then_avoided() -> None:
    loop = Loop(width=300)
    capture = Capture(loop.state, rng=False, overlap=True)
    outcomes = []
    with buffer_for(capture.prepare()) as buffer:
        for _ in range(1, 40):
            prepared, expected = capture.prepare(), reference(loop.state)
            heard: list[BaseException | None] = []
            copy = capture.copy(prepared, buffer.data(0), heard.append)
            loop.change_all_by_hand()
            assert copy.wait(WAIT_SECONDS_MAX)
            outcomes.append(heard[0])
            if heard[0] is None:
                assert sealed_differs(buffer, 0, prepared, expected) == []
        capture.close()
    torn = [error for error in outcomes if error is not None]
    assert isinstance(torn[0], TornSnapshotError)
    assert "model/0.weight" in torn[0].subject
    # Leaves that were changed after the copy was judged may be met the next time.
    assert len(torn) < 5
    assert outcomes[5:] == [None] * 34, "changed by hand, they are copied at once from then on"


def test_a_child_that_is_forked_in_between_can_train_and_capture() -> None:
    loop = Loop(width=300)
    capture = Capture(loop.state, rng=False, overlap=True)
    prepared, expected = capture.prepare(), reference(loop.state)
    with buffer_for(prepared) as buffer:
        heard: list[BaseException | None] = []
        copy = capture.copy(prepared, buffer.data(0), heard.append)
        child = os.fork()
        if child == 0:
            good = False
            try:
                loop.step()
                own = memoryview(bytearray(prepared.data_bytes))
                good = copied(capture, capture.prepare(), own) == [None]
                capture.close()
            finally:
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert copy.wait(WAIT_SECONDS_MAX)
        assert heard == [None]
        assert sealed_differs(buffer, 0, prepared, expected) == []
        capture.close()


def test_copying_on_one_core_leaves_the_threads_of_training_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        capture = Capture({"x": torch.ones(9)})
        prepared = capture.prepare()
        assert copied(capture, prepared, memoryview(bytearray(prepared.data_bytes))) == [None]
        capture.close()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 3
        assert seen == [3]
    finally:
        torch.set_num_threads(before)


def copying_threads() -> int:
    return sum(thread.name == "ckptmgr-copy" for thread in threading.enumerate())


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves of some bytes are worth to be shared out to three threads, and to be cut."""
    monkeypatch.setattr(overlap, "SHARE_BYTES_MIN", 200)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("shapes", [[(at * 7,) for at in range(30)], [(40, 9), (0,)], [(3,)]])
def test_while_training_waits_leaves_are_shared_out_to_its_cores(
    shapes: list[tuple[int, ...]],
) -> None:
    state = {f"x{at}": torch.randn(shape) for at, shape in enumerate(shapes)}
    state["turned"] = torch.randn(5, 6).t()
    capture = Capture(state, rng=False)
    prepared = capture.prepare()
    nbytes = prepared.data_bytes
    for _ in range(2):
        data = memoryview(bytearray(nbytes))
        assert copied(capture, prepared, data) == [None]
        found = rebuild(Saved(prepared.layout, prepared.values, data))
        assert difference(state, found) == ""
    leaves = sum(leaf.nbytes for leaf in prepared.layout.leaves)
    assert copying_threads() == max(1, min(3, leaves // 200))
    assert torch.get_num_threads() == 3
    capture.close()
    assert copying_threads() == 0


@pytest.mark.usefixtures("three_cores")
def test_a_copy_that_gets_no_more_threads_is_made_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    start = overlap.Lane.start

    def refuse(lane: overlap.Lane) -> None:
        if threading.current_thread().name == "ckptmgr-copy":
            raise RuntimeError("can't start new thread")
        start(lane)

    monkeypatch.setattr(overlap.Lane, "start", refuse)
    state = {f"x{at}": torch.randn(at * 7) for at in range(30)}
    capture = Capture(state, rng=False)
    prepared = capture.prepare()
    data = memoryview(bytearray(prepared.data_bytes))
    assert copied(capture, prepared, data) == [None]
    assert difference(state, rebuild(Saved(prepared.layout, prepared.values, data))) == ""
    assert copying_threads() == 1
    capture.close()


@pytest.mark.usefixtures("three_cores")
def test_what_one_thread_can_not_copy_fails_the_whole_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy, threads = overlap.copy_tensors, []

    def fail(*both: Any) -> None:
        threads.append(threading.get_ident())
        if len(threads) == 2:
            raise CkptmgrError("no", subject="x")
        copy(*both)

    monkeypatch.setattr(overlap, "copy_tensors", fail)
    capture = Capture({f"x{at}": torch.randn(100) for at in range(9)}, rng=False)
    prepared = capture.prepare()
    told: list[BaseException | None] = []
    capture.copy(prepared, memoryview(bytearray(prepared.data_bytes)), told.append)
    assert [str(error) for error in told] == ["x: no"]
    capture.close()


def test_an_overlapped_copy_is_done_without_the_hook_when_training_moves_on() -> None:
    loop = Loop()
    capture = Capture(loop.state, overlap=True)
    prepared = capture.prepare()
    done = threading.Event()
    capture.copy(prepared, memoryview(bytearray(prepared.data_bytes)), lambda error: done.set())
    while not done.is_set():  # this thread moves from instruction to instruction
        assert done.wait(0.01) or True
    capture.close()


def test_a_step_in_another_thread_waits_too_and_does_not_hang() -> None:
    loop = Loop()
    capture = Capture(loop.state, rng=False, overlap=True)
    prepared, expected = capture.prepare(), reference(loop.state)
    with buffer_for(prepared) as buffer:
        heard: list[BaseException | None] = []
        copy = capture.copy(prepared, buffer.data(0), heard.append)
        thread = threading.Thread(target=loop.step)
        thread.start()
        thread.join(WAIT_SECONDS_MAX)
        assert not thread.is_alive()
        assert copy.wait(WAIT_SECONDS_MAX)
        assert heard == [None]
        assert sealed_differs(buffer, 0, prepared, expected) == []
        capture.close()


@pytest.mark.parametrize("behind", [False, True])
def test_what_done_raises_reaches_the_trainer_and_the_next_copy_works(behind: bool) -> None:
    loop = Loop()
    capture = Capture(loop.state, overlap=behind)
    prepared = capture.prepare()
    data = memoryview(bytearray(prepared.data_bytes))

    def fail(_: BaseException | None) -> None:
        raise LookupError("seal")

    with pytest.raises(LookupError, match="seal"):
        capture.copy(prepared, data, fail).wait(WAIT_SECONDS_MAX)
    assert copied(capture, prepared, data) == [None]
    capture.close()


@pytest.mark.parametrize("behind", [False, True])
def test_a_failing_copy_is_told_to_done(behind: bool) -> None:
    loop = Loop()
    capture = Capture(loop.state, overlap=behind)
    prepared = capture.prepare()
    short = memoryview(bytearray(PAGE_BYTES))
    (error,) = copied(capture, prepared, short)
    assert error is not None
    assert copied(capture, prepared, memoryview(bytearray(prepared.data_bytes))) == [None]
    capture.close()


def test_copy_returns_a_handle_that_times_out() -> None:
    copy = Copy(lambda error: None, lambda seconds: None)
    assert copy.wait(0.0) is False
    copy.finish(None)
    assert copy.wait(0.0) is True


# -- the rest ---------------------------------------------------------------------------------


def test_generators_are_captured_under_a_reserved_name() -> None:
    with pytest.raises(UsageError):
        Capture({"rng": 1})
    assert Capture({"rng": torch.ones(1)}, rng=False).prepare().layout.leaves[0].path == "rng"
    random.seed(5)
    capture = Capture({})
    first = capture.prepare()
    random.random()
    assert capture.prepare().values != first.values


def test_the_name_of_the_generators_is_theirs_also_later() -> None:
    state: dict[str, Any] = {"x": torch.ones(1)}
    capture = Capture(state)
    capture.prepare()
    state["rng"] = {"seed": 1}
    with pytest.raises(UsageError, match="rng: is reserved") as caught:
        capture.prepare()
    assert "another name" in caught.value.hint
    with pytest.raises(UsageError):
        capture.predict()
    del state["rng"]
    capture.prepare()


def test_a_refused_leaf_is_named_also_when_it_comes_later() -> None:
    state: dict[str, Any] = {"x": {"y": 1}}
    capture = Capture(state)
    capture.prepare()
    state["x"]["y"] = [len]
    with pytest.raises(UnsupportedLeafError) as caught:
        capture.prepare()
    assert caught.value.subject == "x/y/0"
    state["x"]["y"] = 2
    capture.prepare()


def test_an_object_that_comes_into_the_state_of_another_later_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu")

    class Trainer:
        held: Any = scaler.state_dict()

        def state_dict(self) -> dict[str, Any]:
            return {"held": self.held}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.held = state["held"]

    trainer = Trainer()
    capture = Capture({"trainer": trainer})
    capture.prepare()
    trainer.held = [scaler]
    with pytest.raises(
        UnsupportedLeafError, match=r"GradScaler within the .* of trainer"
    ) as caught:
        capture.prepare()
    assert caught.value.subject == "trainer/held/0"
    assert "Return its own state_dict() there" in caught.value.hint


def test_collection_is_on_again_after_prepare() -> None:
    assert gc.isenabled()
    Capture({"a": 1}).prepare()
    assert gc.isenabled()
    with pytest.raises(UnsupportedLeafError):
        Capture({"a": len}).prepare()
    assert gc.isenabled()


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    torch.optim.AdamW,
    lambda p: torch.optim.Adam(p, amsgrad=True, foreach=False),
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adafactor,
    torch.optim.Rprop,
]


@pytest.mark.parametrize("build", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_holds_the_first_step(
    build: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(dtype)
    optimizer = build(model.parameters())
    capture = Capture({"model": model, "optimizer": optimizer})
    before = capture.prepare()
    table_bytes, data_bytes = capture.predict()
    assert capture.prepare().layout is before.layout, "predict must not touch the state"
    assert not optimizer.state or isinstance(optimizer, torch.optim.Adagrad)
    model(torch.ones(2, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    after = capture.prepare()
    assert after.data_bytes <= data_bytes
    assert after.table_bytes <= table_bytes
    if not isinstance(optimizer, torch.optim.Adafactor):  # its factors are small, not its bound
        assert data_bytes <= after.data_bytes + 2 * PAGE_BYTES


def test_prediction_finds_hidden_optimizers_and_adds_nothing_where_there_is_none() -> None:
    model = nn.Linear(100, 100)
    plain = Capture({"model": model}, rng=False)
    assert plain.predict()[1] == plain.prepare().data_bytes
    hidden = {"model": model, "of": [{"it": torch.optim.AdamW(model.parameters())}]}
    assert Capture(hidden, rng=False).predict()[1] >= 3 * sum(p.nbytes for p in model.parameters())


def test_prediction_falls_back_for_an_optimizer_that_can_not_be_twinned() -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, params: Any, *, secret: object) -> None:
            super().__init__(params, lr=0.1)

    model = nn.Linear(100, 100)
    _, data_bytes = Capture({"o": Odd(model.parameters(), secret=1)}, rng=False).predict()
    assert data_bytes >= 2 * sum(p.numel() * 4 for p in model.parameters())


def test_slots_can_be_unmapped_after_forget_slots() -> None:
    loop = Loop()
    capture = Capture(loop.state, overlap=True)
    prepared = capture.prepare()
    with buffer_for(prepared) as buffer:
        with buffer.data(0) as data:
            assert copied(capture, prepared, data) == [None]
            capture.forget_slots()
        assert copied(capture, prepared, buffer.data(1)) == [None]
        capture.close()
