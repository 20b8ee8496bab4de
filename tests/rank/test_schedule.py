from __future__ import annotations

from typing import Any

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.rank.schedule import Cadence, Every, Patience, parse_every


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
