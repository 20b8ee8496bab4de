"""The line of a step goes back through what attempts resumed from."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.repository.breakout import Breakout
from ckptmgr.repository.commit import FROM_SCRATCH, Decision
from ckptmgr.repository.line import line_of, steps_before
from ckptmgr.types import StepId

steps_of = st.frozensets(st.builds(StepId, st.integers(1, 4), st.integers(0, 12)), min_size=1)
sources_of = st.dictionaries(
    st.integers(1, 4), st.builds(StepId, st.integers(0, 5), st.integers(0, 12))
)


def ids(*texts: str) -> list[StepId]:
    return [StepId(*map(int, text.split("."))) for text in texts]


FIRST = ids("1.10", "1.20", "1.30", "1.40")


def commits(steps: list[StepId], **spikes: float) -> list[Decision]:
    found = []
    for one in steps:
        tags: dict[str, Any] = {"loss": spikes.get(f"s{one.attempt}_{one.step}", 1.0)}
        found.append(Decision("COMMIT", one.attempt, one.step, tags=tags))
    return found


def test_an_attempt_goes_on_from_what_it_resumed_from() -> None:
    steps = [*FIRST, *ids("2.30", "2.40")]
    newest = steps[-1]
    assert line_of(newest, steps, {2: StepId(1, 20)}) == ids("1.10", "1.20", "2.30", "2.40")
    assert line_of(newest, steps, {2: FROM_SCRATCH}) == ids("2.30", "2.40")
    assert line_of(newest, steps, {}) == ids("1.10", "1.20", "2.30", "2.40")


def test_a_run_that_went_back_once_is_not_sent_back_again() -> None:
    spoiled = {"s1_30": 9.0, "s1_40": 8.0}
    breakout = Breakout.parse("loss > 4")
    before, broke = steps_before(breakout, commits(FIRST, **spoiled), line_of(FIRST[-1], FIRST, {}))
    assert (before, broke) == (ids("1.20", "1.10"), StepId(1, 30))
    steps = [*FIRST, *ids("2.30", "2.40")]
    line = line_of(steps[-1], steps, {2: StepId(1, 20)})
    before, broke = steps_before(breakout, commits(steps, **spoiled), line)
    assert (before, broke) == (ids("2.40", "2.30", "1.20", "1.10"), None)


def test_where_the_first_step_breaks_out_there_is_nothing_before() -> None:
    found = steps_before(Breakout.parse("loss > 0"), commits(FIRST), FIRST)
    assert found == ([], StepId(1, 10))


@given(steps=steps_of, sources=sources_of)
def test_a_line_ends_and_is_of_older_steps_only(
    steps: frozenset[StepId], sources: dict[int, StepId]
) -> None:
    newest = max(steps)
    line = line_of(newest, steps, sources)
    assert line[-1] == newest
    assert line == sorted(set(line))
    assert set(line) <= steps
