"""What the modelled processes decide by: the product's own functions, each of which a seeded bug
may replace, and the orderings that a seeded bug may leave out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ckptmgr.daemon import retain
from ckptmgr.errors import RegisterConflictError
from ckptmgr.repository import commit, keys, rules
from ckptmgr.repository.commit import FROM_SCRATCH
from ckptmgr.repository.manifest import Manifest, SealedManifest
from ckptmgr.types import StepId

RANKS = 2
ABORT = "ABORT"


@dataclass(frozen=True)
class Rules:
    """The decisions, by default the product's; `without` names what a seeded bug leaves out."""

    next_attempt: Callable[..., int] = rules.next_attempt
    missing_ranks: Callable[..., tuple[int, ...]] = rules.missing_ranks
    goes_first: Callable[..., bool] = rules.goes_first
    complete_steps: Callable[..., frozenset[StepId]] = rules.complete_steps
    resume_order: Callable[..., list[StepId]] = rules.resume_order
    victims: Callable[..., list[StepId]] = retain.victims
    garbage: Callable[..., list[StepId]] = retain.garbage
    commit_of: Callable[..., Any] = commit.commit_of
    newer_min: int = retain.NEWER_MIN
    without: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Setup:
    """How many of what take part, and what may happen to them.

    `cuts` power cuts, each of which drops any of the records that are visible but not durable;
    those who were putting them are dead, all others live on. `damages` chunks rot, each of a
    commit that was not read back yet. `losses` hosts lose their memory. Of the last `lone`
    incarnations only rank 0 comes.
    """

    incarnations: int = 2
    steps: int = 1
    daemons: int = 2
    collectors: int = 0
    readers: int = 0
    keep: int = 2
    stale: bool = False
    memory: bool = False
    active: bool = False
    aborts: bool = False
    timely: bool = False
    cuts: int = 0
    damages: int = 0
    losses: int = 0
    lone: int = 0

    @property
    def attempts(self) -> range:
        return range(1, self.incarnations + 1)

    def ids(self) -> tuple[StepId, ...]:
        """Every step that there can be: an attempt goes on from a step of those before it."""
        return tuple(
            StepId(attempt, step)
            for attempt in self.attempts
            for step in range(1, attempt * self.steps + 1)
        )


@cache
def _sealed(step: StepId, rank: int, nonce: int) -> SealedManifest:
    manifest = Manifest(
        attempt=step.attempt,
        step=step.step,
        nonce=str(nonce),
        rank=rank,
        world=RANKS,
        host="",
        layout=b"",
        values=b"",
        packs=(),
        chunks=(),
        raw_bytes=0,
        stored_bytes=0,
        sealed_at=0.0,
    )
    digest = f"{step}/{rank}/{nonce}".encode()
    return SealedManifest(keys.manifest(step, rank), manifest, b"", digest)


def commit_value(decide: Rules, step: StepId, nonces: tuple[int | None, ...]) -> Any:
    """What goes into the register of a step whose manifests have these nonces; None if nothing."""
    found = [_sealed(step, r, nonce) for r, nonce in enumerate(nonces) if nonce is not None]
    try:
        decision = decide.commit_of(found, FROM_SCRATCH)
    except RegisterConflictError:
        return None
    return ("COMMIT", tuple(bytes.fromhex(digest).decode() for digest in decision.manifests))


def manifest_name(step: StepId, rank: int, nonce: int) -> str:
    """How a commit names a manifest."""
    return f"{step}/{rank}/{nonce}"


def committed(register: Any) -> bool:
    """Whether a register holds a COMMIT."""
    return register is not None and register != ABORT
