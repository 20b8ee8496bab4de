"""All ranks follow one plan, whoever is late, blind or out of patience; every bug is found."""

from __future__ import annotations

import pytest

from model.explore import explore
from model.windows import COURSES, COURSES_FULL, PLAN_BUGS, PlanRules, windows_of
from scale import FULL

pytestmark = pytest.mark.reliability

STATES_MIN = 1_000_000
STATES_MAX = 5_000_000


def test_every_interleaving_holds() -> None:
    states = 0
    for name, course in (COURSES_FULL if FULL else COURSES).items():
        found = explore(windows_of(course, PlanRules()), STATES_MAX)
        print(f"{name}: {found}", flush=True)
        assert not found.violation, f"{name}: {found}"
        assert found.complete or FULL, name
        states += found.states
    print(f"windows: {states:,} states")
    assert states >= STATES_MIN


@pytest.mark.parametrize("name", PLAN_BUGS)
def test_a_seeded_bug_is_found(name: str) -> None:
    every = (explore(windows_of(course, PLAN_BUGS[name])) for course in COURSES.values())
    found = next((one for one in every if one.violation), None)
    print(f"{name}: {found}")
    assert found is not None, "survives"
