"""Which slot is written next: properties over every state that a buffer can be in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.staging.slots import Sealed, free_slot, superseded_slot
from ckptmgr.types import Outcome, Snapshot


def snapshot(slot: int, generation: int) -> Snapshot:
    return Snapshot(slot, generation, 1, "00" * 16, 0, 1, generation, 0, 0, 0, 0.0, 0.0)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[int, Sealed]:
    """Two or three slots, some sealed, with generations and outcomes in any combination."""
    slots = draw(st.integers(2, 3))
    taken = draw(st.sets(st.integers(0, slots - 1)))
    generations = draw(st.permutations(range(1, slots + 1)))
    outcomes = draw(st.lists(st.sampled_from(Outcome), min_size=slots, max_size=slots))
    sealed = [(snapshot(k, generations[k]), outcomes[k]) for k in sorted(taken)]
    return slots, sealed


@given(buffers())
def test_a_free_slot_is_one_that_nobody_needs(state: tuple[int, Sealed]) -> None:
    slots, sealed = state
    found = free_slot(slots, sealed)
    if found is None:
        return
    assert 0 <= found < slots
    held = {s.slot: (s, outcome) for s, outcome in sealed}
    if found in held:
        one, outcome = held[found]
        assert outcome is not Outcome.UNDECIDED
        assert one.generation < max(s.generation for s, _ in sealed)


@given(buffers())
def test_a_slot_is_found_whenever_there_is_one(state: tuple[int, Sealed]) -> None:
    slots, sealed = state
    newest = max((s.generation for s, _ in sealed), default=0)
    spare = [s for s, o in sealed if o is not Outcome.UNDECIDED and s.generation < newest]
    assert (free_slot(slots, sealed) is not None) == (len(sealed) < slots or bool(spare))


@given(buffers())
def test_the_oldest_decided_one_goes_first(state: tuple[int, Sealed]) -> None:
    slots, sealed = state
    found = free_slot(slots, sealed)
    by_slot = {s.slot: s for s, _ in sealed}
    if found in by_slot:
        decided = [s for s, o in sealed if o is not Outcome.UNDECIDED]
        assert by_slot[found] == min(decided, key=lambda s: s.generation)


@given(buffers())
def test_what_is_given_up_is_never_the_newest(state: tuple[int, Sealed]) -> None:
    _, sealed = state
    found = superseded_slot(sealed)
    assert (found is None) == (len(sealed) < 2)
    if found is not None:
        generations = [s.generation for s, _ in sealed]
        assert found.generation == min(generations) < max(generations)
