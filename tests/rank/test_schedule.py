from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import ControlProtocolError, UsageError
from ckptmgr.rank.schedule import (
    WINDOW_STEPS_MAX,
    Cadence,
    Every,
    Outlook,
    Patience,
    decode_window,
    empty_window,
    encode_window,
    next_window,
    parse_every,
    slot_for,
    still_undecided,
)
from ckptmgr.types import Outcome, Snapshot, StepId


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (100, Every(steps=100)),
        ("90s", Every(seconds=90)),
        ("5m", Every(seconds=300)),
        ("0.5h", Every(seconds=1800)),
        (None, Every()),
    ],
)
def test_cadences_are_read(every: Any, expected: Every) -> None:
    assert parse_every(every) == expected


@pytest.mark.parametrize("every", [0, -5, True, "5", "m", "0s", "5 days", 2.5, []])
def test_other_cadences_are_refused(every: Any) -> None:
    with pytest.raises(UsageError, match="not a cadence"):
        parse_every(every)


def test_a_cadence_in_steps_is_due_at_its_multiples_only() -> None:
    cadence = Cadence(Every(steps=10), 0.0)
    assert [step for step in range(1, 35) if cadence.due(step, 0.0)] == [10, 20, 30]


def test_a_cadence_in_seconds_stays_due_until_it_is_taken() -> None:
    cadence = Cadence(Every(seconds=5), 100.0)
    assert not cadence.due(1, 104.9)
    assert cadence.due(2, 105.0)
    assert cadence.due(3, 105.1)
    cadence.taken(105.1)
    assert not cadence.due(4, 110.0)
    assert cadence.due(5, 110.1)


def test_no_cadence_is_never_due() -> None:
    assert not Cadence(Every(), 0.0).due(100, 1e9)


def test_patience_ends_only_without_progress() -> None:
    patience = Patience(10.0)
    assert not patience.exhausted(0, 50.0)
    assert not patience.exhausted(0, 59.9)
    assert not patience.exhausted(1, 60.0), "bytes arrived"
    assert not patience.exhausted(1, 69.9)
    assert patience.exhausted(1, 70.0)


# -- windows ----------------------------------------------------------------------------------

EVERY = st.one_of(
    st.builds(Every, steps=st.integers(1, 50)),
    st.builds(Every, seconds=st.floats(0.1, 100)),
    st.just(Every()),
)
STEPS = st.lists(st.integers(1001, 2000), max_size=3, unique=True).map(sorted).map(tuple)
OTHERS = st.lists(st.integers(0, 1000), max_size=3, unique=True).map(sorted).map(tuple)
OUTLOOKS = st.builds(
    Outlook,
    start=st.integers(0, 10_000),
    step_seconds=st.floats(0, 100),
    since_seconds=st.floats(0, 1000),
    requested=st.booleans(),
    undecided=STEPS,
    free=OTHERS,
    stuck=st.booleans(),
)


@given(every=EVERY, slots=st.integers(2, 3), outlook=OUTLOOKS, late=st.booleans())
def test_what_rank_0_proposes_keeps_the_bounds(
    every: Every, slots: int, outlook: Outlook, late: bool
) -> None:
    window = next_window(every, slots, outlook, late=late)
    if window is None:
        assert not late
        later = next_window(every, slots, outlook, late=True)
        assert later is not None
        assert not later.snapshot
        return
    assert window.start == outlook.start
    assert 1 <= window.stop - window.start <= WINDOW_STEPS_MAX
    if every.steps:
        inside = range(window.start + 1, window.stop)
        assert not any(step % every.steps == 0 for step in inside), "due points only at the start"
    if window.snapshot:
        left = set(outlook.undecided) - set(window.free)
        assert len(left) <= slots - 2, "the new one included, slots - 1"
        assert not set(outlook.undecided) & set(window.free) or outlook.stuck
        assert every.steps or every.seconds or outlook.requested
    assert decode_window(encode_window(window).encode()) == window


@given(
    every=EVERY,
    stop=st.integers(0, 1000),
    ahead=st.integers(0, 1000),
    seconds=st.floats(0, 100),
    rank=st.integers(1, 10_000),
)
def test_an_empty_window_reaches_beyond_the_step_but_over_no_multiple(
    every: Every, stop: int, ahead: int, seconds: float, rank: int
) -> None:
    step = stop + ahead
    window = empty_window(every, stop, step, seconds, rank)
    assert window.start == stop
    assert window.stop > step
    assert (window.snapshot, window.by) == (False, rank)
    if every.steps:
        assert not any(one % every.steps == 0 for one in range(step + 1, window.stop))


def sealed_at(slot: int, generation: int, attempt: int, step: int) -> Snapshot:
    return Snapshot(slot, generation, attempt, "", 0, 2, step, 0, 0, 0, 0.0, 0.0)


@given(
    slots=st.integers(2, 3),
    numbers=st.permutations([1, 2, 3]),
    attempts=st.lists(st.integers(1, 2), min_size=3, max_size=3),
    outcomes=st.lists(st.sampled_from(Outcome), min_size=3, max_size=3),
    filled=st.integers(0, 3),
    free=st.sets(st.integers(1, 3)),
    resumed=st.sampled_from([None, StepId(1, 1), StepId(1, 3), StepId(1, 9)]),
)
def test_the_slot_that_is_written_is_one_that_nobody_needs(
    slots: int,
    numbers: list[int],
    attempts: list[int],
    outcomes: list[Outcome],
    filled: int,
    free: set[int],
    resumed: StepId | None,
) -> None:
    sealed = [
        (sealed_at(slot, numbers[slot], attempts[slot], numbers[slot]), outcomes[slot])
        for slot in range(min(filled, slots))
    ]
    chosen = slot_for(slots, sealed, 2, free, resumed)
    if filled < slots:
        assert chosen == filled, "an empty one comes first"
        return
    own = [one for one, _ in sealed if one.attempt == 2]
    kept = max(
        own or [one for one, _ in sealed if one.id == resumed] or [one for one, _ in sealed],
        key=lambda one: one.generation,
    )
    needed = {
        one.slot
        for one, outcome in sealed
        if one.attempt == 2 and not outcome.decided and one.step not in free
    } | {kept.slot}
    assert chosen not in needed
    assert (chosen is None) == (needed == set(range(slots)))


def test_only_what_may_still_be_committed_is_undecided() -> None:
    sealed = [
        (sealed_at(0, 1, 2, 10), Outcome.UNDECIDED),
        (sealed_at(1, 2, 2, 20), Outcome.COMMITTED),
        (sealed_at(2, 3, 1, 30), Outcome.UNDECIDED),
    ]
    assert still_undecided([10, 20, 30, 40, 50], sealed, attempt=2, copying=50) == (10, 50)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"null",
        b'{"start":1}',
        b'{"start":2,"stop":2,"snapshot":false}',
        b'{"start":-1,"stop":2,"snapshot":false}',
        b'{"start":1,"stop":2,"snapshot":false,"more":1}',
        b'{"start":1,"stop":2,"snapshot":1}',
        b'{"start":1,"stop":2,"snapshot":false,"free":[' + b",".join([b"1"] * 17) + b"]}",
        b'{"start":1,"stop":2,"snapshot":false}' + b" " * 2000,
    ],
)
def test_other_records_are_no_windows(record: bytes) -> None:
    with pytest.raises(ControlProtocolError, match="window"):
        decode_window(record)
