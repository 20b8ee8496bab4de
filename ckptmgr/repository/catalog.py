"""What a store holds: steps and their states, newest first, and the last consistent one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import dataclass
from heapq import nlargest

import msgspec

from ckptmgr.errors import (
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    RecordDamagedError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.commit import (
    Decision,
    Retired,
    claim_of,
    get_record,
    read_record,
    readable,
)
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.repository.manifest import SealedManifest, read_manifest
from ckptmgr.repository.opening import open_manifest
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.store.mirrored import from_either
from ckptmgr.types import StepId, StepState

_READS_AT_ONCE = 16


class Hold(msgspec.Struct, frozen=True):
    """Somebody needs a step: retention leaves it alone."""

    attempt: int
    step: int
    id: str
    why: str = ""


class Verified(msgspec.Struct, frozen=True):
    """A step was read back whole; `commit` is the digest of its commit record, in hex."""

    attempt: int
    step: int
    commit: str


MARKS_CHECKED_MAX = 64
"""Retired marks that are read before they are believed, newest first: what is older than those
has long been nobody's step to restore."""


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One step of the catalog. `decision` is None while undecided, or where it is damaged.

    `world` is the number of ranks of its attempt, 0 where that is not known; `ranks` are those
    whose manifest is there.
    """

    id: StepId
    state: StepState
    decision: Decision | None
    world: int = 0
    ranks: frozenset[int] = frozenset()
    holds: tuple[str, ...] = ()
    damage: str = ""

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that an undecided step still waits for."""
        waits = self.state is StepState.UNDECIDED and not self.damage
        return tuple(r for r in range(self.world) if r not in self.ranks) if waits else ()


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys of a store that tell the states of its steps: of all of them (`list_steps`), or of
    those that have data or manifests (`list_stored`).
    """

    decided: frozenset[StepId]
    retired: frozenset[StepId]
    verified: frozenset[StepId]
    holds: dict[StepId, tuple[str, ...]]
    manifests: dict[StepId, frozenset[int]]

    def standing(self) -> list[StepId]:
        """Decided steps that are not retired, newest first. Some may be ABORT."""
        return sorted(self.decided - self.retired, reverse=True)

    def steps(self, retired_max: int | None = None) -> list[StepId]:
        """All steps in any state, newest first; of those that are retired the newest so many."""
        retired = sorted(self.retired, reverse=True)[:retired_max]
        standing = (self.decided | frozenset(self.manifests)) - self.retired
        return sorted(standing.union(retired), reverse=True)


async def standing_steps(store: Store) -> list[StepId]:
    """Decided steps that stand, newest first, for whoever restores; some may be ABORT.

    A mark of retirement is read before it hides a step: one that is damaged, or was copied from
    another step, hides nothing.
    """
    # By names: to make a step of each of a long history takes twice the time.
    decided = await _decided_names(store)
    retired = await _names(store, "retired/")
    newest = map(keys.step_named, nlargest(MARKS_CHECKED_MAX, decided & retired))

    async def shown(step: StepId) -> StepId | None:
        return None if await is_retired(store, step) else step

    standing = await in_lanes(shown, newest, _READS_AT_ONCE)
    standing += map(keys.step_named, decided - retired)
    return sorted((step for step in standing if step is not None), reverse=True)


async def is_retired(store: Store, step: StepId) -> bool:
    """Whether a step has a mark of retirement that holds."""
    try:
        mark = await get_record(store, Kind.RETIRED, keys.retired(step), Retired)
    except (DamageError, ObjectNotFoundError):
        return False
    return (mark.attempt, mark.step) == (step.attempt, step.step)


async def exists(store: Store, key: str) -> bool:
    """Whether the store holds an object under `key`."""
    try:
        await store.get(key, length=0)
    except ObjectNotFoundError:
        return False
    except ObjectUnreadableError:  # which is there
        pass
    return True


async def decided_steps(store: Store) -> tuple[frozenset[StepId], frozenset[StepId]]:
    """Steps that are decided, and those that are retired, by keys of which a step has one each.

    A listing of the manifests would grow with the number of ranks.
    """
    decided = await _decided(store)
    return decided, await marked(store, "retired/")


async def _decided(store: Store) -> frozenset[StepId]:
    return frozenset(map(keys.step_named, await _decided_names(store)))


async def _decided_names(store: Store) -> set[str]:
    decided = await _names(store, "commit/")
    # A step with a copy of its commit was decided, even if the register itself is gone.
    return decided | await _names(store, "tags/")


async def list_steps(store: Store) -> Listing:
    """Take a listing: a step is seen as undecided before it is seen as decided, never after."""
    manifests = _ranks(await store.list("man/"))
    decided = await _decided(store)
    verified = await marked(store, "verified/")
    holds = await _holds(store)
    # Last: a step retired during the listing must not look as if it still stood.
    retired = await marked(store, "retired/")
    return Listing(decided, retired, verified, holds, manifests)


async def list_stored(store: Store, packed: Collection[StepId]) -> Listing:
    """As `list_steps`, of the steps that have a manifest or are among `packed`, and of no others.

    A step whose data went leaves its records for ever, one of each kind. Here they are asked for by
    name, for the few steps that have more than records, and what is listed does not grow.
    """
    manifests = _ranks(await store.list("man/"))
    steps = sorted(manifests.keys() | packed)
    registered = await _named(store, keys.commit, steps)
    decided = registered | await _named(store, keys.tags, set(steps) - registered)
    verified = await _named(store, keys.verified, decided)
    holds = await _holds(store)
    retired = await _named(store, keys.retired, steps)  # last, as in `list_steps`
    return Listing(decided, retired, verified, holds, manifests)


async def packed_steps(store: Store) -> frozenset[StepId]:
    """Steps that have packs, whatever their state."""
    steps = map(keys.parse_step, await store.list("data/"))
    return frozenset(step for step in steps if step is not None)


async def _holds(store: Store) -> dict[StepId, tuple[str, ...]]:
    """The ids of the holds of each step that is held."""
    holds: dict[StepId, tuple[str, ...]] = {}
    for key in await store.list("holds/"):
        step = keys.parse_step(key)
        if step is not None:
            holds[step] = (*holds.get(step, ()), key.rsplit("/", 1)[1])
    return holds


async def _named(
    store: Store, key: Callable[[StepId], str], steps: Iterable[StepId]
) -> frozenset[StepId]:
    """Those of `steps` that have the record; it may not hold."""

    async def found(step: StepId) -> StepId | None:
        return step if await exists(store, key(step)) else None

    answers = await in_lanes(found, steps, _READS_AT_ONCE)
    return frozenset(step for step in answers if step is not None)


async def marked(store: Store, prefix: str) -> frozenset[StepId]:
    """Steps that have the one record of theirs right below `prefix`; it may not hold."""
    return frozenset(map(keys.step_named, await _names(store, prefix)))


async def _names(store: Store, prefix: str) -> set[str]:
    return keys.named(prefix, await store.list(prefix))


def _ranks(found: list[str]) -> dict[StepId, frozenset[int]]:
    """The ranks of each step whose manifest is there."""
    ranks: dict[StepId, set[int]] = {}
    for key in found:
        step, rank = keys.parse_step(key), keys.parse_rank(key)
        if step is not None and rank is not None:
            ranks.setdefault(step, set()).add(rank)
    return {step: frozenset(of_step) for step, of_step in ranks.items()}


@dataclass(frozen=True, slots=True)
class Catalog:
    """Reads a store's steps, with the keys of who asks.

    Nothing is remembered from one call to the next: a user may empty a store and start the job
    anew under a daemon that is still running.
    """

    store: Store
    keyring: Keyring = NO_KEYS

    async def decision(self, step: StepId) -> Decision:
        """The register of a step.

        Raises:
            ObjectNotFoundError: undecided.
            DamageError: the register is damaged, or not signed as the keyring asks.
        """
        try:
            found = await get_record(self.store, Kind.COMMIT, keys.commit(step), Decision)
        except ObjectNotFoundError as error:
            if await exists(self.store, keys.tags(step)):
                raise MissingObjectError("is gone", subject=keys.commit(step)) from error
            raise
        if found.id != step:
            raise RecordDamagedError("decides another step", subject=keys.commit(step))
        if found.committed and not 0 < found.world == len(found.manifests):
            raise RecordDamagedError(
                "does not name one manifest per rank", subject=keys.commit(step)
            )
        return readable(found, self.keyring)

    async def registered(self, step: StepId) -> Decision | None:
        """The register of a step, made durable before it is relied on; None while undecided.

        Raises:
            DamageError: the register is damaged.
        """
        try:
            await self.store.make_durable(keys.commit(step))
            return await self.decision(step)
        except ObjectNotFoundError:
            return None

    async def entries(self, *, retired_max: int | None = None) -> list[StepEntry]:
        """All steps, newest first; damaged registers are entries too, with `damage` set.

        Each has its register read. A job that has run for long has thousands of retired steps:
        with `retired_max`, only the newest so many of them.
        """
        listing = await list_steps(self.store)
        return await self._entries(listing, listing.steps(retired_max))

    async def entry(self, attempt: int | None, number: int) -> StepEntry | None:
        """The newest step of that number, of one attempt or of any, in any state."""
        listing = await list_steps(self.store)
        named = [s for s in listing.steps() if s.step == number and attempt in (None, s.attempt)]
        found = await self._entries(listing, named[:1])
        return found[0] if found else None

    async def _entries(self, listing: Listing, steps: list[StepId]) -> list[StepEntry]:
        gate = asyncio.Semaphore(_READS_AT_ONCE)
        attempts = {step.attempt for step in steps if step not in listing.decided}
        claims = {attempt: await claim_of(self.store, attempt) for attempt in attempts}
        worlds = {a: claim.world for a, claim in claims.items() if claim is not None}

        async def entry(step: StepId) -> StepEntry:
            async with gate:
                return await self._entry(step, listing, worlds.get(step.attempt, 0))

        return list(await asyncio.gather(*map(entry, steps)))

    async def _entry(self, step: StepId, listing: Listing, world: int) -> StepEntry:
        decision, damage = None, ""
        if step in listing.decided:
            try:
                decision = await self.decision(step)
            except (DamageError, ObjectNotFoundError) as error:
                damage = error.message
        return StepEntry(
            id=step,
            state=_state(step, decision, listing),
            decision=decision,
            world=decision.world if decision else world,
            ranks=listing.manifests.get(step, frozenset()),
            holds=listing.holds.get(step, ()),
            damage=damage,
        )

    async def committed(self) -> AsyncIterator[Decision]:
        """Commits that stand, newest first. A damaged register is raised when it is reached.

        Raises:
            DamageError: the next register is damaged; iterate `standing_steps` and call
                `decision` yourself to go on behind it.
        """
        for step in await standing_steps(self.store):
            decision = await self.decision(step)
            if decision.committed:
                yield decision

    async def latest(self) -> StepId | None:
        """The newest committed step that is not retired: the last consistent step."""
        async for decision in self.committed():
            return decision.id
        return None

    async def manifests(self, decision: Decision) -> list[SealedManifest]:
        """All manifests of a commit, in rank order, checked against the commit's digests.

        Raises:
            DamageError: one is missing, damaged, or not the one that was committed.
            LockedError: it is encrypted with a key that is not given.
        """
        return [await self.manifest(decision, rank) for rank in range(decision.world)]

    async def manifest(
        self, decision: Decision, rank: int, *, closed: bool = False
    ) -> SealedManifest:
        """One rank's manifest of a commit; errors as `manifests`. With `closed` one that is
        encrypted is not opened, and needs no key.
        """
        key = keys.manifest(decision.id, rank)

        async def read(store: Store) -> SealedManifest:
            try:
                record = await read_record(store, Kind.MANIFEST, key)
            except ObjectNotFoundError as error:
                raise MissingObjectError("is gone", subject=key) from error
            sealed = read_manifest(decision.id, rank, record)
            if sealed.digest.hex() != decision.manifests[rank]:
                raise RecordDamagedError("is not the manifest that was committed", subject=key)
            if sealed.manifest.nonce != decision.nonce:
                raise RecordDamagedError("is of another incarnation", subject=key)
            return sealed if closed else open_manifest(sealed, self.keyring)

        return await from_either(self.store, key, read)


def _state(step: StepId, decision: Decision | None, listing: Listing) -> StepState:
    if step in listing.retired:
        return StepState.RETIRED
    if decision is None:
        return StepState.UNDECIDED
    if not decision.committed:
        return StepState.ABORTED
    return StepState.VERIFIED if step in listing.verified else StepState.COMMITTED
