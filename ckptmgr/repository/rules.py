"""The decisions of the protocol, as pure functions: the daemon runs them, the model checks them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ckptmgr.types import StepId

TURN_SECONDS = 2.0
"""How long a daemon leaves a commit to the one whose turn it is: some puts of a slow store. Only
the number of store operations depends on it; any daemon may commit at any time."""

TURNS_MAX = 300
"""Turns until a step is everybody's business: ten minutes. A commit reads all manifests, so that
thousands of daemons must not try it together because one rank, or the store, is slow."""


LOTS = 10_000
"""Attempts per number in single-decider mode, where two incarnations that start at once may both
be told that a number is theirs: each draws a lot. Two that draw the same meet the other's nonce."""


def next_attempt(taken: Iterable[int], lot: int = 0) -> int:
    """The number that a new incarnation claims, given those that are taken.

    Args:
        taken: numbers of the claims that are there.
        lot: 0 where a claim is exclusive, else a random number below LOTS.
    """
    newest = max(taken, default=0)
    return (newest // LOTS + 1) * LOTS + lot if lot else 1 + newest


def missing_ranks(world: int, nonce: str, manifests: Mapping[int, str]) -> tuple[int, ...]:
    """Ranks that a step still lacks: without a manifest, or with one of another incarnation.

    Args:
        world: ranks of the attempt.
        nonce: of the attempt's claim.
        manifests: nonce of each rank's manifest.
    """
    return tuple(rank for rank in range(world) if manifests.get(rank) != nonce)


def may_decide(exclusive: bool | None, ranks_here: Collection[int]) -> bool:
    """Whether the daemon of these ranks may put COMMIT or ABORT: any, where the store lets one of
    them win; else that of rank 0 alone (single-decider mode).
    """
    return exclusive is not False or 0 in ranks_here


def goes_first(
    step: int, world: int, ranks_here: Collection[int], exclusive: bool | None = True
) -> bool:
    """Whether the daemon of these ranks is the one to commit a step, and to collect after it."""
    return (step % world if exclusive is not False else 0) in ranks_here


def turn(step: int, world: int, ranks_here: Collection[int]) -> int:
    """How many turns the daemon of these ranks leaves a commit to others: 0 if it goes first."""
    return min(TURNS_MAX, *((rank - step) % world for rank in ranks_here))


def complete_steps(
    held: Mapping[StepId, Collection[int]], worlds: Mapping[int, int]
) -> frozenset[StepId]:
    """Steps of which every rank's part can be had, whether they are committed or not.

    Args:
        held: ranks of each step whose part is sealed in the memory of a host that has joined, or
            whose manifest is in the store.
        worlds: ranks of each attempt, from its claim; an attempt without one is not looked at.
    """
    return frozenset(
        step
        for step, ranks in held.items()
        if step.attempt in worlds and set(ranks) >= set(range(worlds[step.attempt]))
    )


def resume_order(
    committed: Collection[StepId],
    complete: Collection[StepId],
    given_up: Collection[StepId],
    rejected: Collection[StepId],
) -> list[StepId]:
    """What an attempt may resume from, best first: the newest by (attempt, step).

    Args:
        committed: steps with a COMMIT that stands.
        complete: from `complete_steps`.
        given_up: steps whose register is ABORT, or that are retired.
        rejected: what this attempt found unusable, by its earlier resume decisions.
    """
    usable = (set(committed) | set(complete)) - set(given_up) - set(rejected)
    return sorted(usable, reverse=True)
