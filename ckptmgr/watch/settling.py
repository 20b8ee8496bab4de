"""Which candidates were left alone for a while, and where the next one goes: decided purely."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptmgr.types import StepId
from ckptmgr.watch.found import Candidate


@dataclass(frozen=True, slots=True)
class Seen:
    """A candidate as it was found, and since when it has looked like that."""

    candidate: Candidate
    since: float


def seen_now(before: Mapping[str, Seen], found: Iterable[Candidate], now: float) -> dict[str, Seen]:
    """What is known of each candidate after another look; one that changed begins anew."""
    seen = {}
    for one in found:
        old = before.get(one.name)
        seen[one.name] = old if old is not None and old.candidate == one else Seen(one, now)
    return seen


def quiet(seen: Mapping[str, Seen], quiet_seconds: float, now: float) -> list[Candidate]:
    """Candidates that have not changed for so long, in the order in which they were written."""
    ripe = [one.candidate for one in seen.values() if now - one.since >= quiet_seconds]
    return sorted(ripe, key=lambda one: (one.newest_ns, one.number or 0, one.name))


def next_look(seen: Mapping[str, Seen], quiet_seconds: float, now: float) -> float | None:
    """Seconds until the next candidate may be quiet; None where none can become so."""
    left = [one.since + quiet_seconds - now for one in seen.values()]
    return min((seconds for seconds in left if seconds > 0), default=None)


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest adopted step, and when its newest file was written (Unix seconds)."""

    id: StepId
    written_at: float


def step_for(candidate: Candidate, newest: Newest | None, attempt: int) -> StepId | None:
    """The step that a candidate becomes, under `attempt` or, where its number is not greater than
    the newest one of that, under the next (told by the attempt 0); None where it is older than what
    was adopted already, which must stay the newest.

    Args:
        candidate: what is to be adopted.
        newest: the newest adopted step, of any attempt.
        attempt: the one of this process, or 0 before it has claimed any.
    """
    if newest is None:
        return StepId(attempt, 1 if candidate.number is None else candidate.number)
    number = newest.id.step + 1 if candidate.number is None else candidate.number
    own = newest.id.attempt == attempt
    if number > newest.id.step:
        return StepId(attempt, number)
    if candidate.newest_ns / 1e9 <= newest.written_at:
        return None
    return StepId(0 if own else attempt, number)
