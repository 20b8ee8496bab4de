"""Each rule of a policy keeps what it says, more rules keep more, and collecting twice no less."""

from __future__ import annotations

import itertools
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.daemon.retain import victims
from ckptmgr.keep import Keep
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.keeping import NEWER_MIN, reasons
from ckptmgr.types import StepId
from test_keep import policies

HOUR = 3600.0


def commit(attempt: int, step: int, sealed_at: float = 0.0, **tags: Any) -> Decision:
    return Decision("COMMIT", attempt, step, sealed_at=sealed_at, tags=tags)


values = st.one_of(st.floats(-9, 9), st.integers(-9, 9), st.sampled_from(["nan", True, math.nan]))
commits_of = st.lists(
    st.builds(
        lambda attempt, step, at, loss: commit(attempt, step, at, loss=loss),
        st.integers(1, 3),
        st.integers(0, 40),
        st.floats(0, 100 * HOUR) | st.just(math.inf),
        values,
    ),
    max_size=14,
    unique_by=lambda one: one.id,
)
best = st.sampled_from([(), "loss:min:2", ("loss", "max", 1)])
small = st.builds(
    Keep, st.integers(1, 5), st.integers(0, 12), st.integers(0, 5), st.integers(0, 3), best
)


def stays(commits: list[Decision], keep: Keep, **more: Any) -> set[StepId]:
    held, sources = more.get("held", {}), more.get("sources", {})
    kept = reasons(commits, keep, held, sources)
    ids = [one.id for one in commits]
    gone = victims(ids, frozenset(kept), keep.last)
    assert set(kept) | set(gone) == set(ids), "a step without a reason stays, or goes unasked"
    assert not set(kept) & set(gone)
    assert all(why for why in kept.values())
    return set(kept)


@given(commits=commits_of, keep=small, data=st.data())
def test_what_stays_is_safe_and_stays(
    commits: list[Decision], keep: Keep, data: st.DataObject
) -> None:
    ids = [one.id for one in commits]
    chosen = st.lists(st.sampled_from(ids or [StepId(9, 9)]), max_size=2)
    held = dict.fromkeys(data.draw(chosen), ("a hold",))
    sources = dict.fromkeys(data.draw(chosen), "attempt 9")
    kept = stays(commits, keep, held=held, sources=sources)
    newest = set(sorted(ids, reverse=True)[: max(keep.last, NEWER_MIN)])
    assert newest <= kept
    assert set(ids) & (set(held) | set(sources)) <= kept
    again = [one for one in commits if one.id in kept]
    assert stays(again, keep, held=held, sources=sources) == kept, "the next collection takes more"
    assert stays(commits, Keep(keep.last)) <= kept, "another rule made it keep less"


@given(commits=commits_of, keep=policies)
def test_a_policy_of_any_numbers_is_carried_out(commits: list[Decision], keep: Keep) -> None:
    stays(commits, keep)


@given(commits=commits_of, count=st.integers(1, 4))
def test_the_best_are_the_best(commits: list[Decision], count: int) -> None:
    kept = reasons(commits, Keep(1, best=("loss", "min", count)), {}, {})
    good = {s for s, why in kept.items() if any("lowest" in one for one in why)}
    numbers = {
        one.id: float(one.tags["loss"])
        for one in commits
        if type(one.tags["loss"]) in (int, float) and math.isfinite(float(one.tags["loss"]))
    }
    assert len(good) == min(count, len(numbers))
    assert all(numbers[a] <= numbers[b] for a in good for b in numbers.keys() - good)


def test_one_of_each_hour_and_day() -> None:
    commits = [commit(1, n, n * HOUR / 4) for n in range(400)]
    kept = reasons(commits, Keep(1, hourly=3, daily=2), {}, {})
    assert sorted(step.step for step in kept) == [383, 391, 395, 398, 399]
    assert kept[StepId(1, 391)] == ["the newest of its hour, one of the last 3 with a step"]
    gap = [*commits[:8], commit(1, 4000, 1e9)]
    found = reasons(gap, Keep(1, hourly=3), {}, {})
    assert sorted(step.step for step in found) == [3, 7, 4000], "an hour without steps counted"


def test_the_first_from_each_multiple_on() -> None:
    numbers = (90, 100, 110, 190, 205, 210, 320)
    kept = reasons([commit(1, n) for n in numbers], Keep(1, every=100), {}, {})
    assert sorted(step.step for step in kept) == [90, 100, 205, 210, 320]
    assert kept[StepId(1, 205)] == ["the first from 200 on, with every=100"]
    twice = [commit(a, n) for a, n in itertools.product((1, 2), (100, 150, 300, 400))]
    found = reasons(twice, Keep(1, every=100), {}, {})
    assert set(found) == {StepId(2, n) for n in (100, 300, 400)}, "an attempt that was left counts"


def test_why_is_told_in_words() -> None:
    commits = [commit(1, n, loss=10.0 - n) for n in range(1, 6)]
    kept = reasons(
        commits,
        Keep(2, best=("loss", "max", 1)),
        {StepId(1, 2): ("paper",)},
        {StepId(1, 3): "attempt 2"},
    )
    assert kept == {
        StepId(1, 5): ["one of the newest 2"],
        StepId(1, 4): ["one of the newest 2"],
        StepId(1, 3): ["attempt 2 resumed from it"],
        StepId(1, 2): ["held by paper"],
        StepId(1, 1): ["loss=9 is one of the 1 highest"],
    }
