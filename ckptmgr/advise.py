"""How often to snapshot, and what a failure of each class then costs: pure formulas.

C is the stall of a snapshot, U the time until it is in the store, M the mean time between failures,
R the time from a failure to the next step, T the interval; all in seconds. Sources and assumptions
are in docs/knowing.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ckptmgr.config import GIB, MIB
from ckptmgr.goodput import Goodput, observed_failures
from ckptmgr.repository.history import Attempt, History

RANK_MTBF_HOURS = 50_000.0
"""Llama 3: 419 unexpected interruptions in 54 days on 16,384 GPUs, one per 50,700 GPU hours."""

COPY_BYTES_PER_SECOND = 4 * GIB
"""Assumed stall where none was measured: a copy into warm host memory on one core or one PCIe
lane set (docs/performance.md has 7 to 9 GiB/s on a quiet machine)."""

STORE_BYTES_PER_SECOND = 200 * MIB
"""Assumed where no commit was seen: what one host gets from a common object store."""

RESTART_SECONDS = 300.0
"""Assumed where no restart was seen: scheduling, imports, compilation, restore."""

FAILURES_MIN = 3
"""Fewer observed failures say little about their rate."""

INTERVAL_SECONDS_MIN = 1.0


def young_daly(stall: float, mtbf: float) -> float:
    """The first-order optimum, sqrt(2 C M)."""
    return math.sqrt(2 * stall * mtbf)


def availability_optimal(stall: float, mtbf: float, restart: float) -> float:
    """The interval of highest availability, C + sqrt(2 (M + R) C + C^2) (arXiv 2410.18124)."""
    return stall + math.sqrt(2 * (mtbf + restart) * stall + stall * stall)


def overhead(interval: float, stall: float, mtbf: float, restart: float) -> float:
    """The part of the time that is lost: C/T to stalls, T/2M to lost work, R/M to restarts; at
    most 1.
    """
    return min(stall / interval + interval / (2 * mtbf) + restart / mtbf, 1.0)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a job, or assumed; `assumed` says of what that is, and why that number."""

    stall_seconds: float
    commit_seconds: float
    mtbf_seconds: float
    restart_seconds: float
    interval_seconds: float | None
    slots: int
    assumed: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """What the operator says; None where the history is to tell."""

    state_bytes: float | None = None
    world: int | None = None
    mtbf_seconds: float | None = None
    restart_seconds: float | None = None
    slots: int = 2


@dataclass(frozen=True, slots=True)
class Measured:
    """Means that a daemon tells; None where it does not."""

    stall_seconds: float | None = None
    commit_seconds: float | None = None


class _Notes:
    """Collects where each number comes from."""

    def __init__(self) -> None:
        self.assumed: list[str] = []
        self.measured: list[str] = []

    def take(self, name: str, choices: Sequence[tuple[float | None, str]], last: str) -> float:
        """The first choice that is known; the last one is an assumption, told as `last`."""
        for value, source in choices[:-1]:
            if value is not None:
                self.measured.append(f"{name}: {value:.3g} s, {source}")
                return value
        value = choices[-1][0]
        assert value is not None
        self.assumed.append(f"{name}: {value:.3g} s, {last}")
        return value


def facts_of(
    history: History, goodput: Goodput | None, given: Given, daemon: Measured | None = None
) -> Facts | None:
    """What is known, over what is assumed; None where not even the size of the state is known."""
    commits = [
        entry.decision
        for entry in history.entries
        if entry.decision is not None and entry.decision.committed
    ]
    world = given.world or max((c.world for c in commits), default=None) or _world(history.attempts)
    state = given.state_bytes or _mean([c.raw_bytes / c.world for c in commits])
    if state is None:
        return None
    notes, told = _Notes(), daemon or Measured()
    stall = _mean([c.stall_seconds for c in commits if c.stall_seconds > 0])
    commit = _mean([c.written_at - c.sealed_at for c in commits if c.written_at > c.sealed_at])
    restart = _mean_restart(history.attempts)
    return Facts(
        stall_seconds=notes.take(
            "stall C",
            [
                (stall, f"mean of {len(commits)} commits"),
                (told.stall_seconds, "mean that the daemon tells"),
                (state / COPY_BYTES_PER_SECOND, ""),
            ],
            f"{state / GIB:.3g} GiB of a rank at {COPY_BYTES_PER_SECOND / GIB:g} GiB/s",
        ),
        commit_seconds=notes.take(
            "time to the store U",
            [
                (commit, f"mean of {len(commits)} commits"),
                (told.commit_seconds, "mean that the daemon tells"),
                (state / STORE_BYTES_PER_SECOND, ""),
            ],
            f"{state / GIB:.3g} GiB of a rank at {STORE_BYTES_PER_SECOND / MIB:g} MiB/s",
        ),
        mtbf_seconds=_mtbf(notes, goodput, given, world),
        restart_seconds=notes.take(
            "restart R",
            [
                (given.restart_seconds, "as you say"),
                (restart, "mean from the last step told to the first one after a restart"),
                (RESTART_SECONDS, ""),
            ],
            "because no restart told how long it took",
        ),
        interval_seconds=_interval(commits),
        slots=given.slots,
        assumed=tuple(notes.assumed),
        measured=tuple(notes.measured),
    )


def _mtbf(notes: _Notes, goodput: Goodput | None, given: Given, world: int | None) -> float:
    failures = observed_failures(goodput) if goodput is not None else 0
    wall = goodput.wall_seconds if goodput is not None else 0.0
    seen = wall / failures if failures >= FAILURES_MIN and wall > 0 else None
    ranks = world or 1
    few = f"only {failures} failures were seen" if failures else "no failure was seen"
    return notes.take(
        "time between failures M",
        [
            (given.mtbf_seconds, "as you say"),
            (seen, f"{failures} failures in {wall / 3600:.3g} h"),
            (RANK_MTBF_HOURS * 3600 / ranks, ""),
        ],
        f"{RANK_MTBF_HOURS:g} h per rank (Llama 3) over {ranks} ranks, because {few}",
    )


def _world(attempts: Sequence[Attempt]) -> int | None:
    return attempts[-1].world if attempts else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_restart(attempts: Sequence[Attempt]) -> float | None:
    pauses = []
    for before, after in itertools.pairwise(attempts):
        if before.reached is not None and after.reached is not None:
            pauses.append(max(after.reached.first_at - before.reached.last_at, 0.0))
    return _mean(pauses)


def _interval(commits: Sequence[Any]) -> float | None:
    """The median time between commits of one attempt."""
    ordered = sorted(commits, key=lambda one: one.id)
    gaps = sorted(
        after.sealed_at - before.sealed_at
        for before, after in itertools.pairwise(ordered)
        if before.attempt == after.attempt and after.sealed_at > before.sealed_at
    )
    return float(gaps[len(gaps) // 2]) if gaps else None


def advice(facts: Facts) -> dict[str, Any]:
    """The document of `advise --json` (docs/cli-json.md)."""
    c, m, r = facts.stall_seconds, facts.mtbf_seconds, facts.restart_seconds
    optimal = availability_optimal(c, m, r)
    # A slot is always the newest sealed snapshot: the others can be on their way to the store.
    store_floor = facts.commit_seconds / max(facts.slots - 1, 1)
    best = max(optimal, store_floor, INTERVAL_SECONDS_MIN)
    limited = "store" if store_floor >= max(optimal, INTERVAL_SECONDS_MIN) else "failures"
    now = facts.interval_seconds
    return {
        "every": every_of(best),
        "interval_seconds": best,
        "limited_by": limited,
        "availability_optimal_seconds": optimal,
        "young_daly_seconds": young_daly(c, m),
        "overhead": overhead(best, c, m, r),
        "present_interval_seconds": now,
        "present_overhead": overhead(now, c, m, r) if now else None,
        "loss": losses(best, facts.commit_seconds),
        "facts": {
            "stall_seconds": c,
            "commit_seconds": facts.commit_seconds,
            "mtbf_seconds": m,
            "restart_seconds": r,
        },
        "measured": list(facts.measured),
        "assumed": list(facts.assumed),
    }


def losses(interval: float, commit: float) -> list[dict[str, Any]]:
    """The work that a failure of each class costs on average; None where it is all of the job."""
    return [
        {
            "failure": "process",
            "seconds": interval / 2,
            "why": "the last sealed snapshot is in host memory: half an interval",
        },
        {
            "failure": "host memory",
            "seconds": interval / 2 + commit,
            "why": "the last commit is in the store: half an interval and the way there",
        },
        {
            "failure": "store with a mirror",
            "seconds": interval / 2 + 2 * commit,
            "why": "the mirror follows the commits, and its way is taken to be as long",
        },
        {
            "failure": "store without a mirror",
            "seconds": None,
            "why": "everything that host memory does not hold",
        },
    ]


def every_of(seconds: float) -> str:
    """The value of `every=` nearest to so many seconds, rounded up to two digits."""
    digits = 10 ** max(math.floor(math.log10(max(seconds, 1.0))) - 1, 0)
    rounded = math.ceil(seconds / digits) * digits
    return f"{rounded // 60}m" if rounded % 60 == 0 and rounded >= 300 else f"{rounded}s"
