"""Where the time of a job went: training that counts, training that was lost, stalls, the rest.

Definitions are in docs/knowing.md. Pure: from what is known of the attempts to numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptmgr.repository.history import Attempt
from ckptmgr.types import Reach, StepId


@dataclass(frozen=True, slots=True)
class Restart:
    """An attempt that went on from an older one, and what that cost.

    `lost_steps` were trained, and are not in what it resumed from. Where `exact` is False no host
    could tell how far training had come: then it is at least so many, and the seconds that were
    lost lie between `lost_seconds` and `lost_seconds_max`.
    """

    attempt: int
    at: float
    resumed_from: StepId
    reached: StepId
    lost_steps: int
    lost_seconds: float
    lost_seconds_max: float
    exact: bool

    def document(self) -> dict[str, Any]:
        """How JSON documents show it (docs/cli-json.md)."""
        return {
            "attempt": self.attempt,
            "at": self.at,
            "resumed_from": str(self.resumed_from),
            "reached": str(self.reached),
            "lost_steps": self.lost_steps,
            "lost_seconds": self.lost_seconds,
            "lost_seconds_max": self.lost_seconds_max,
            "exact": self.exact,
        }


@dataclass(frozen=True, slots=True)
class Goodput:
    """The time from the first claim of a job on, in seconds, and its restarts, oldest first.

    `productive_seconds` + `stall_seconds` + `lost_seconds` + `down_seconds` are `wall_seconds`.
    """

    wall_seconds: float
    productive_seconds: float
    stall_seconds: float
    lost_seconds: float
    restarts: tuple[Restart, ...]

    @property
    def down_seconds(self) -> float:
        """Start-up, restoring, waiting for machines, and whatever nobody could tell."""
        used = self.productive_seconds + self.stall_seconds + self.lost_seconds
        return self.wall_seconds - used

    @property
    def lost_steps(self) -> int:
        """Steps that were trained in vain; at least so many where not `exact`."""
        return sum(restart.lost_steps for restart in self.restarts)

    @property
    def lost_seconds_max(self) -> float:
        """The same as `lost_seconds` where everything is known."""
        return sum((restart.lost_seconds_max for restart in self.restarts), 0.0)

    @property
    def exact(self) -> bool:
        """Whether it is known of every restart how far training had come."""
        return all(restart.exact for restart in self.restarts)

    @property
    def ettr(self) -> float:
        """Effective training time ratio: the part of the time that was training that counts."""
        return self.productive_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def document(self) -> dict[str, Any]:
        """How JSON documents show it (docs/cli-json.md)."""
        return {
            "ettr": self.ettr,
            "wall_seconds": self.wall_seconds,
            "productive_seconds": self.productive_seconds,
            "stall_seconds": self.stall_seconds,
            "lost_seconds": self.lost_seconds,
            "lost_seconds_max": self.lost_seconds_max,
            "down_seconds": self.down_seconds,
            "lost_steps": self.lost_steps,
            "exact": self.exact,
            "restarts": [restart.document() for restart in self.restarts],
        }


@dataclass(frozen=True, slots=True)
class _Span:
    """Steps of one attempt that count so far, and the time that they took."""

    attempt: int
    last_step: int
    steps: int
    seconds: float

    def cut(self, step: StepId) -> tuple[_Span, int, float]:
        """What of it comes before or at `step`, and the steps and seconds that do not."""
        if self.attempt < step.attempt:
            return self, 0, 0.0
        keeps = step.step if self.attempt == step.attempt else self.last_step - self.steps - 1
        lost = min(max(self.last_step - keeps, 0), self.steps)
        # Its first step began before anything was told: the time is that of the steps after it.
        seconds = self.seconds * min(lost / (self.steps - 1), 1.0) if self.steps > 1 else 0.0
        kept = replace(
            self,
            last_step=self.last_step - lost,
            steps=self.steps - lost,
            seconds=self.seconds - seconds,
        )
        return kept, lost, seconds


def account(
    attempts: Sequence[Attempt],
    sealed: Mapping[int, Reach],
    stall_seconds: float,
    now: float,
) -> Goodput:
    """Account for a job's time up to `now` (Unix seconds).

    `attempts` are oldest first; `sealed` tells of those that no host told of how far they came at
    least. `stall_seconds` is what training waited for snapshots, all together.
    """
    spans: list[_Span] = []
    restarts: list[Restart] = []
    last: tuple[StepId, float] | None = None
    exact = True
    for attempt in attempts:
        source = attempt.resumed_from
        if source is not None and last is not None:
            cuts = [span.cut(source) for span in spans]
            spans = [kept for kept, _, _ in cuts if kept.steps]
            lost_seconds = sum((seconds for _, _, seconds in cuts), 0.0)
            unknown = 0.0 if exact else max(attempt.claimed_at - last[1], 0.0)
            restart = Restart(
                attempt=attempt.number,
                at=attempt.claimed_at,
                resumed_from=source,
                reached=last[0],
                lost_steps=sum(lost for _, lost, _ in cuts),
                lost_seconds=lost_seconds,
                lost_seconds_max=lost_seconds + unknown,
                exact=exact,
            )
            restarts.append(restart)
            exact = True
        reach = attempt.reached or sealed.get(attempt.number)
        exact = exact and attempt.reached is not None
        if reach is not None:
            spans.append(_span(reach))
            last = StepId(attempt.number, reach.last_step), reach.last_at
    return _sum(attempts, spans, restarts, stall_seconds, now)


def _span(reach: Reach) -> _Span:
    steps = max(reach.last_step - reach.first_step, 0) + 1
    return _Span(reach.attempt, reach.last_step, steps, max(reach.last_at - reach.first_at, 0.0))


def _sum(
    attempts: Sequence[Attempt],
    spans: Iterable[_Span],
    restarts: Sequence[Restart],
    stall_seconds: float,
    now: float,
) -> Goodput:
    wall = max(now - attempts[0].claimed_at, 0.0) if attempts else 0.0
    # Clocks of several hosts tell these times: no part is longer than the whole.
    lost = min(sum((restart.lost_seconds for restart in restarts), 0.0), wall)
    trained = min(sum((span.seconds for span in spans), 0.0), wall - lost)
    stall = min(stall_seconds, trained)
    return Goodput(wall, trained - stall, stall, lost, tuple(restarts))


def observed_failures(goodput: Goodput) -> int:
    """Restarts that went on from before where training had come: nobody stops like that by will."""
    return sum(restart.lost_steps > 0 or not restart.exact for restart in goodput.restarts)
