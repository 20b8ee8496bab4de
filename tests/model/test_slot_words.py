"""A rank and a daemon on one buffer, word by word: every interleaving holds, every bug is found."""

from __future__ import annotations

import pytest

from model.explore import explore
from model.slots import BENCHES, BENCHES_FULL, SLOT_BUGS, SlotRules, slots_of
from scale import FULL

pytestmark = pytest.mark.reliability

STATES_MIN = 100_000
STATES_MAX = 3_000_000


def test_every_interleaving_holds() -> None:
    states = 0
    for name, bench in (BENCHES_FULL if FULL else BENCHES).items():
        found = explore(slots_of(bench, SlotRules()), STATES_MAX)
        print(f"{name}: {found}")
        assert not found.violation, f"{name}: {found}"
        assert found.complete or FULL, name
        states += found.states
    print(f"slots: {states:,} states")
    assert states >= STATES_MIN


@pytest.mark.parametrize("name", SLOT_BUGS)
def test_a_seeded_bug_is_found(name: str) -> None:
    every = (explore(slots_of(bench, SLOT_BUGS[name])) for bench in BENCHES.values())
    found = next((one for one in every if one.violation), None)
    print(f"{name}: {found}")
    assert found is not None, "survives"
