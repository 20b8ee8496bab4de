"""Which rule of a policy wants which commit: a pure function, and the words it gives people.

No clock is read. Hours and days are those in which steps were sealed, as their ranks said: a clock
that jumps changes which steps stand for an hour, and never what is safe.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence

from ckptmgr.keep import Best, Keep
from ckptmgr.repository.commit import Decision
from ckptmgr.types import StepId, Tags

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS

NEWER_MIN = 2
"""A step is given up only behind this many newer commits, whatever a policy says."""

Reason = tuple[StepId, str]


def reasons(
    commits: Collection[Decision],
    keep: Keep,
    holds: Mapping[StepId, Collection[str]],
    sources: Mapping[StepId, str],
    locked: Collection[StepId] = (),
) -> dict[StepId, list[str]]:
    """Why each commit that stays does; whatever is not in the result is wanted by no rule.

    What stays would stay again if the others were gone, so that collecting twice gives up no more.

    Args:
        commits: those that stand, in any order.
        keep: the policy.
        holds: the ids of the holds of each step that is held.
        sources: what running attempts resumed from, and who did.
        locked: those whose tags can not be read, for want of a key. Any may be among the best.
    """
    newest_first = sorted(commits, key=lambda one: one.id, reverse=True)
    found: dict[StepId, list[str]] = {}
    for rule in (
        _newest(newest_first, keep.last),
        _every(newest_first, keep.every),
        _latest_of(newest_first, "hour", HOUR_SECONDS, keep.hourly),
        _latest_of(newest_first, "day", DAY_SECONDS, keep.daily),
        *(_best(newest_first, one) for one in keep.best),
        *((_locked(newest_first, locked),) if keep.best else ()),
        _held(newest_first, holds),
        _resumed(newest_first, sources),
    ):
        for step, why in rule:
            found.setdefault(step, []).append(why)
    return found


def _newest(newest_first: Sequence[Decision], count: int) -> Iterator[Reason]:
    for one in newest_first[: max(count, NEWER_MIN)]:
        yield one.id, f"one of the newest {max(count, NEWER_MIN)}"


def _every(newest_first: Sequence[Decision], every: int) -> Iterator[Reason]:
    """The lowest step of each run of `every`; where two attempts have it, that of the newer."""
    firsts: dict[int, StepId] = {}
    for step in (one.id for one in newest_first):
        first = firsts.get(step.step // every) if every else step
        if first is None or step.step < first.step:
            firsts[step.step // every] = step
    for run, step in firsts.items():
        yield step, f"the first from {run * every} on, with every={every}"


def _latest_of(
    newest_first: Sequence[Decision], unit: str, seconds: int, count: int
) -> Iterator[Reason]:
    seen: set[Hashable] = set()
    for one in newest_first:
        if len(seen) == count:
            return
        if not math.isfinite(one.sealed_at):
            continue
        bucket = one.sealed_at // seconds
        if bucket not in seen:
            seen.add(bucket)
            yield one.id, f"the newest of its {unit}, one of the last {count} with a step"


def value_of(tags: Tags, tag: str) -> float | None:
    """The number that a step has under a tag; None where it has none, or one that is not finite."""
    value = tags.get(tag)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _best(newest_first: Sequence[Decision], rule: Best) -> Iterator[Reason]:
    sign = 1 if rule.order == "min" else -1
    valued = [(value_of(one.tags, rule.tag), one.id) for one in newest_first]
    ranked = sorted(
        ((value, step) for value, step in valued if value is not None),
        key=lambda pair: sign * pair[0],  # stable: of equal ones the newer is first
    )
    which = {"min": "lowest", "max": "highest"}[rule.order]
    for value, step in ranked[: rule.count]:
        yield step, f"{rule.tag}={value:g} is one of the {rule.count} {which}"


def _locked(newest_first: Sequence[Decision], locked: Collection[StepId]) -> Iterator[Reason]:
    for one in newest_first:
        if one.id in locked:
            yield one.id, "its tags can not be read without its key, and it may be among the best"


def _held(
    newest_first: Sequence[Decision], holds: Mapping[StepId, Collection[str]]
) -> Iterator[Reason]:
    for one in newest_first:
        if one.id in holds:
            yield one.id, f"held by {', '.join(sorted(holds[one.id])) or 'somebody'}"


def _resumed(newest_first: Sequence[Decision], sources: Mapping[StepId, str]) -> Iterator[Reason]:
    for one in newest_first:
        if one.id in sources:
            yield one.id, f"{sources[one.id]} resumed from it"
