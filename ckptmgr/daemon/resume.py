"""Claiming an attempt, and deciding which step it resumes from."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from enum import Enum

from ckptmgr.daemon.log import warning
from ckptmgr.errors import (
    DamageError,
    ObjectNotFoundError,
    RegisterConflictError,
    StoreError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog, list_steps, standing_steps
from ckptmgr.repository.commit import (
    FROM_SCRATCH,
    Active,
    Claim,
    Have,
    Resume,
    check_format,
    decide,
    get_record,
    put_record,
)
from ckptmgr.repository.hold import host_name
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import PutResult, Store
from ckptmgr.types import Outcome, Snapshot, StepId

Skipped = tuple[str, str]
"""A step that could not be used, and why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A step that an attempt may resume from, and whether this host's memory holds it."""

    id: StepId
    in_memory: bool
    in_store: bool


def rank_candidates(
    memory: list[StepId], standing: list[StepId], rejected: frozenset[StepId]
) -> list[Candidate]:
    """Newest first, by (attempt, step). `standing` may hold steps that turn out to be ABORT."""
    found = (set(memory) | set(standing)) - rejected
    return [
        Candidate(step, step in set(memory), step in set(standing))
        for step in sorted(found, reverse=True)
    ]


def usable_in_memory(snapshots: list[tuple[Snapshot, Outcome]]) -> list[Snapshot]:
    """Sealed snapshots that may be resumed from: all but those whose step was given up."""
    return [snapshot for snapshot, outcome in snapshots if outcome is not Outcome.ABORTED]


async def claim_attempt(store: Store, world: int, run_id: str) -> tuple[int, str]:
    """Claim the next attempt of a job; returns its number and nonce (32 hex digits).

    Raises:
        UnsupportedFormatError: the store was written by a newer ckptmgr.
    """
    await check_format(store, create=True)
    nonce = secrets.token_hex(16)
    while True:
        taken = [keys.parse_attempt(key) or 0 for key in await store.list("attempts/")]
        attempt = 1 + max(taken, default=0)
        claim = Claim(attempt, nonce, world, host_name(), run_id, time.time())
        result = await put_record(store, Kind.CLAIM, keys.claim(attempt), claim)
        if result is PutResult.OK:
            return attempt, nonce


class Standing(Enum):
    """How a store knows the attempt of a snapshot in host memory."""

    OURS = "ours"
    OTHER = "claimed by another incarnation: the store was emptied and used again"
    MISSING = "not claimed: the store was emptied, or is not mounted"


async def standing_of(store: Store, snapshot: Snapshot) -> Standing:
    """Whether the snapshot's attempt was claimed in this store, as far as the store tells.

    Host memory may hold the steps of a job that no longer exists. A store that refuses to be
    read contradicts nothing.
    """
    try:
        claim = await get_record(store, Kind.CLAIM, keys.claim(snapshot.attempt), Claim)
    except ObjectNotFoundError:
        return Standing.MISSING
    except (StoreError, DamageError):
        return Standing.OURS
    return Standing.OURS if claim.nonce == snapshot.nonce else Standing.OTHER


async def publish_have(store: Store, attempt: int, found: list[Snapshot]) -> None:
    """Say which sealed snapshots this host's memory holds, once per attempt."""
    host = host_name()
    record = Have(host, tuple((s.attempt, s.step, s.rank) for s in found))
    await put_record(store, Kind.HAVE, keys.have(attempt, host), record)


@dataclass(slots=True)
class ActiveMarks:
    """What a job knows of the marks of active attempts, so that a save need not read them again.

    `newest` is the attempt whose mark was found to hold, and has been listed ever since; `told`
    are those whose mark does not hold, told once each.
    """

    newest: int = 0
    told: set[int] = field(default_factory=set)


async def newest_active(store: Store, marks: ActiveMarks) -> int:
    """The newest attempt that has put a snapshot, by a mark that holds; 0 if there is none."""
    listed = {(keys.parse_attempt(key) or 0, key) for key in await store.list("attempts/")}
    for attempt, key in sorted(listed, reverse=True):
        if key == keys.active(attempt) and (
            attempt == marks.newest or await _holds(store, attempt, marks)
        ):
            marks.newest = attempt
            return attempt
    marks.newest = 0
    return 0


async def _holds(store: Store, attempt: int, marks: ActiveMarks) -> bool:
    """Whether the mark of an attempt is one, and of the incarnation that claimed the attempt.

    A name alone must not end a job: it may be all that is left of the object, or a stray copy.
    """
    try:
        mark = await get_record(store, Kind.ACTIVE, keys.active(attempt), Active)
        claim = await get_record(store, Kind.CLAIM, keys.claim(attempt), Claim)
    except (DamageError, ObjectNotFoundError) as error:
        why = f"{error.subject}: {error.message}"
    else:
        if (mark.attempt, claim.attempt, claim.nonce) == (attempt, attempt, mark.nonce):
            return True
        why = "is not of the incarnation that claimed the attempt"
    if attempt not in marks.told:
        marks.told.add(attempt)
        warning("active_ignored", attempt=attempt, why=why)
    return False


async def put_active(
    store: Store, attempt: int, nonce: str, marks: ActiveMarks | None = None
) -> int:
    """Mark the attempt as active; returns the newest active attempt, which may be a newer one.

    Raises:
        RegisterConflictError: another incarnation has marked this attempt.
    """
    marks = marks or ActiveMarks()
    newest = await newest_active(store, marks)
    if newest < attempt:
        await _mark(store, Active(attempt, nonce))
        marks.newest = attempt
        newest = max(attempt, await newest_active(store, marks))
    return newest


async def _mark(store: Store, mark: Active) -> None:
    key = keys.active(mark.attempt)
    if await put_record(store, Kind.ACTIVE, key, mark) is PutResult.OK:
        return
    try:
        found = await get_record(store, Kind.ACTIVE, key, Active)
    except DamageError:
        # A mark decides nothing, and whoever puts it puts these bytes: it may be put again.
        await store.delete(key)
        await put_record(store, Kind.ACTIVE, key, mark)
        return
    if found != mark:
        raise RegisterConflictError("is of another incarnation", subject=key)
    await store.make_durable(key)


async def decide_resume(store: Store, attempt: int, k: int, choice: StepId) -> StepId:
    """Put `choice` as the k-th resume decision, or return what was decided."""
    record = Resume(choice.attempt, choice.step)
    return (await decide(store, Kind.RESUME, keys.resume(attempt, k), record)).id


async def resumed_from(store: Store, attempt: int) -> StepId | None:
    """What an attempt resumed from: its last resume decision, if it made one."""
    made = await store.list(keys.resumes(attempt))
    if not made:
        return None
    return (await get_record(store, Kind.RESUME, made[-1], Resume)).id


async def committed_choices(catalog: Catalog, step: int, of_attempt: int | None) -> list[StepId]:
    """Standing commits of step number `step` (of one attempt), newest attempt first."""
    return [
        found
        for found in await standing_steps(catalog.store)
        if found.step == step and of_attempt in (None, found.attempt)
    ]


async def parent_of(catalog: Catalog, step: StepId) -> StepId:
    """The commit before `step`: the newest one that stands and is older."""
    for found in (await list_steps(catalog.store)).standing():
        if found >= step:
            continue
        try:
            if (await catalog.decision(found)).committed:
                return found
        except (DamageError, ObjectNotFoundError):
            continue
    return FROM_SCRATCH
