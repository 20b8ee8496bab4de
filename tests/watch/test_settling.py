"""When a candidate is quiet, and which step it becomes: decided purely."""

from __future__ import annotations

import pytest

from ckptmgr.types import StepId
from ckptmgr.watch.found import Candidate, Entry, Kind
from ckptmgr.watch.settling import Newest, next_look, quiet, seen_now, step_for


def candidate(name: str, size: int = 1, written: float = 0.0) -> Candidate:
    nanoseconds = int(written * 1e9)
    return Candidate(name, Kind.FILE, (Entry(name, size, nanoseconds, nanoseconds, 1),))


def test_quiet_is_what_has_looked_the_same_for_so_long() -> None:
    seen = seen_now({}, [candidate("a-1.pt")], 0.0)
    seen = seen_now(seen, [candidate("a-1.pt", 2), candidate("b-2.pt")], 3.0)
    assert quiet(seen, 5.0, 7.9) == []
    assert next_look(seen, 5.0, 7.0) == 1.0
    assert [one.name for one in quiet(seen, 5.0, 8.0)] == ["a-1.pt", "b-2.pt"]
    assert next_look(seen, 5.0, 8.0) is None
    seen = seen_now(seen, [candidate("b-2.pt")], 9.0)
    assert [one.name for one in quiet(seen, 5.0, 9.0)] == ["b-2.pt"]


def test_they_go_in_the_order_in_which_they_were_written() -> None:
    found = [
        candidate("a-30.pt", 1, 5.0),
        candidate("a-20.pt", 1, 9.0),
        candidate("a-9.pt", 1, 5.0),
    ]
    seen = seen_now({}, found, 0.0)
    assert [one.name for one in quiet(seen, 0.0, 0.0)] == ["a-9.pt", "a-30.pt", "a-20.pt"]


NEWEST = Newest(StepId(3, 200), 50.0)


@pytest.mark.parametrize(
    ("name", "written", "attempt", "expected"),
    [
        ("a-300.pt", 60.0, 3, StepId(3, 300)),
        ("a-300.pt", 60.0, 0, StepId(0, 300)),
        ("a-300.pt", 10.0, 4, StepId(4, 300)),
        ("a-100.pt", 60.0, 3, StepId(0, 100)),
        ("a-200.pt", 60.0, 3, StepId(0, 200)),
        ("a-100.pt", 60.0, 4, StepId(4, 100)),
        ("a-100.pt", 50.0, 3, None),
        ("a.pt", 60.0, 3, StepId(3, 201)),
    ],
)
def test_a_step_is_greater_within_its_attempt_or_gets_another_one(
    name: str, written: float, attempt: int, expected: StepId | None
) -> None:
    assert step_for(candidate(name, 1, written), NEWEST, attempt) == expected


def test_the_first_one() -> None:
    assert step_for(candidate("a-0.pt"), None, 0) == StepId(0, 0)
    assert step_for(candidate("a.pt"), None, 2) == StepId(2, 1)
