"""Retention: which steps are given up (a pure function), and how (retired, holds, then data)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from ckptmgr.daemon.log import event, label_of, warning
from ckptmgr.daemon.readback import ReadBack
from ckptmgr.daemon.resume import claimed_from
from ckptmgr.errors import DamageError, ObjectNotFoundError
from ckptmgr.keep import Keep
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import (
    Catalog,
    Listing,
    Verified,
    is_retired,
    list_steps,
    list_stored,
    packed_steps,
)
from ckptmgr.repository.commit import (
    Decision,
    Retired,
    abort_step,
    get_record,
    has_locked_tags,
    put_record,
    read_record,
)
from ckptmgr.repository.hold import left_behind
from ckptmgr.repository.keeping import NEWER_MIN, reasons
from ckptmgr.repository.line import resumed_from
from ckptmgr.repository.record import Kind, digest_of
from ckptmgr.restore.verify import verify_step
from ckptmgr.staging.bufferfile import SLOTS_MAX
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import StepId

DELETES_AT_ONCE = 32
"""Objects of a step deleted at a time: it has as many manifests as ranks, and more packs."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a collection did (or, as a dry run, would do) with one step, and why."""

    step: StepId
    action: str
    why: str


def victims(commits: list[StepId], held: frozenset[StepId], keep: int) -> list[StepId]:
    """Commits to give up, oldest first. `commits` are those that stand, in any order; `held` are
    those that a hold, a running attempt or a rule of the policy keeps besides the newest `keep`.
    """
    newest_first = sorted(commits, reverse=True)
    return [s for s in reversed(newest_first[max(keep, NEWER_MIN) :]) if s not in held]


def garbage(
    listing: Listing, stored: frozenset[StepId], commits: Collection[StepId]
) -> list[StepId]:
    """Undecided steps that nobody will finish: of an attempt before that of the newest commit, or
    of the same one where more steps after it are decided than a host buffer has slots, so that no
    rank can have it in memory any more.
    """
    undecided = (stored | frozenset(listing.manifests)) - listing.decided
    newest = max(commits, default=None)
    return sorted(
        step
        for step in undecided
        if newest is not None
        and step < newest
        and (step.attempt < newest.attempt or _decided_after(listing, step) > SLOTS_MAX)
    )


def _decided_after(listing: Listing, step: StepId) -> int:
    return sum(one > step for one in listing.decided if one.attempt == step.attempt)


async def collect(
    catalog: Catalog,
    pool: BufferPool,
    keep: int | str | Keep,
    protected: Collection[StepId] = (),
    *,
    readback: ReadBack | None = None,
    dry_run: bool = False,
    whole: bool = True,
) -> list[Given]:
    """Give up what retention and garbage rules allow; returns what was done.

    Never touches one of the newest two commits, a held step, one of `protected`, or what the
    newest attempts resumed from. A dry run also tells of each step that stays, and why.

    Without `whole` only steps that still have objects are looked at, so that a long history costs
    nothing. What is done is the same, but that a commit of which nothing is left stays as it is.

    Raises:
        StoreError: the store failed; what was done so far stays true.
    """
    policy, readback = Keep.of(keep), readback or ReadBack()
    readback.begin()
    if not dry_run:
        await _drop_dead_holds(catalog.store)
    packed = await packed_steps(catalog.store)
    listing = await _looked_at(catalog.store, packed, whole=whole)
    commits, damaged = await _commits(catalog, listing)
    sources = dict.fromkeys(protected, "a running attempt")
    if len(commits) > NEWER_MIN:
        sources |= await _resume_sources(catalog.store, commits[0].id.attempt)
    locked = {one.id for one in commits if has_locked_tags(one, catalog.keyring)}
    kept = reasons(commits, policy, listing.holds, sources, locked)
    done = [Given(step, "keep", "; ".join(kept[step])) for step in sorted(kept) if dry_run]
    durable: set[StepId] = set()
    verified, gone = set(listing.verified), set[StepId]()
    for step in victims([c.id for c in commits], frozenset(kept), policy.last):
        newer = [c for c in commits if c.id > step]
        if not dry_run:
            stands_in = await _one_verified(catalog, newer, listing, pool, readback)
            if stands_in is None:
                why = "no newer commit could be verified"
                warning("retention_blocked", step=str(step), why=why)
                break
            verified.add(stands_in)
            # Visible is not durable: those that stand in for it must survive a power cut first.
            for decision in newer[: max(policy.last, NEWER_MIN)]:
                if decision.id not in durable:
                    await catalog.store.make_durable(keys.commit(decision.id))
                    durable.add(decision.id)
            nbytes = next(c.stored_bytes for c in commits if c.id == step)
            if await _wanted_by_now(catalog.store, step, commits[0].id.attempt):
                continue
            if not await retire(catalog.store, step, f"keep={policy.wire}", nbytes):
                continue
            readback.retired()
            gone.add(step)
        done.append(Given(step, "retire", f"{len(newer)} newer commits, keep={policy.wire}"))
    if not dry_run:
        stand = [decision for decision in commits if decision.id not in gone]
        readback.left(stand, verified=verified, held=listing.holds)
    done += await _sweep(catalog, listing, packed, commits, dry_run=dry_run)
    return done + (_left_alone(listing, damaged, done) if dry_run else [])


async def _looked_at(store: Store, packed: frozenset[StepId], *, whole: bool) -> Listing:
    """A listing that tells enough. Of an undecided step behind others of its attempt all that were
    decided after it count, those too of which nothing is left.
    """
    if whole:
        return await list_steps(store)
    listing = await list_stored(store, packed)
    newest = max(listing.decided, default=None)
    undecided = (packed | frozenset(listing.manifests)) - listing.decided
    if newest and any(s.attempt == newest.attempt and s < newest for s in undecided):
        return await list_steps(store)
    return listing


def _left_alone(listing: Listing, damaged: list[StepId], done: list[Given]) -> list[Given]:
    """What a collection does not touch because it can not know enough of it."""
    told = {one.step for one in done}
    undecided = frozenset(listing.manifests) - listing.decided - listing.retired - told
    found = dict.fromkeys(damaged, "its commit record does not hold")
    found |= dict.fromkeys(undecided, "undecided: its ranks may still finish it")
    return [Given(step, "keep", why) for step, why in sorted(found.items())]


async def _wanted_by_now(store: Store, step: StepId, attempt: int) -> bool:
    """Whether somebody holds a step by now, or an attempt from `attempt` on has resumed from it: to
    read a newer one back takes minutes where steps are large.
    """
    if await store.list(keys.holds(step)):
        return True
    return step in await _resume_sources(store, attempt)


async def _resume_sources(store: Store, attempt: int) -> dict[StepId, str]:
    """What the attempts from `attempt`, the newest with a commit, resumed from. Any of them may
    run, here or on another host, and go back there once more before its first commit.
    """
    found = {}
    async for later in claimed_from(store, attempt):
        try:
            source = await resumed_from(store, later)
        except (DamageError, ObjectNotFoundError):
            continue  # nobody can tell any more
        if source is not None:
            found[source] = f"attempt {later}"
    return found


async def _drop_dead_holds(store: Store) -> None:
    """A reader of this host that was killed, or that the store failed, left its hold."""
    for key in await store.list("holds/"):
        if left_behind(key.rsplit("/", 1)[1]):
            await store.delete(key)


async def _commits(catalog: Catalog, listing: Listing) -> tuple[list[Decision], list[StepId]]:
    """Commits that stand, newest first, and steps whose register does not hold: it is not counted
    as a commit, and nothing of it is deleted.
    """
    found, damaged = [], []
    for step in listing.standing():
        try:
            decision = await catalog.decision(step)
        except (DamageError, ObjectNotFoundError):
            damaged.append(step)
            continue
        if decision.committed:
            found.append(decision)
    return found, damaged


async def _one_verified(
    catalog: Catalog,
    newer: list[Decision],
    listing: Listing,
    pool: BufferPool,
    readback: ReadBack,
) -> StepId | None:
    """One of `newer` that is verified; if none is, read the newest back that holds."""
    for decision in newer:
        if decision.id in listing.verified and await _is_verified(catalog.store, decision.id):
            return decision.id
    for decision in newer:
        damage = await verify_step(catalog, decision, pool, pace=readback.pace)
        if not damage:
            await mark_verified(catalog.store, decision.id)
            readback.verified()
            return decision.id
        readback.damaged(decision.id)
        job, found = label_of(catalog.store.url), damage[0]
        warning("damaged", job=job, step=str(decision.id), key=found.key, what=found.what)
    return None


async def _is_verified(store: Store, step: StepId) -> bool:
    """Whether the mark holds and is of the register that is there now."""
    try:
        mark = await get_record(store, Kind.VERIFIED, keys.verified(step), Verified)
    except (DamageError, ObjectNotFoundError):
        return False
    return mark.commit == await _digest_of_commit(store, step)


async def _digest_of_commit(store: Store, step: StepId) -> str:
    return digest_of(await read_record(store, Kind.COMMIT, keys.commit(step))).hex()


async def mark_verified(store: Store, step: StepId) -> None:
    """Record that a step was read back whole."""
    key = keys.verified(step)
    record = Verified(step.attempt, step.step, await _digest_of_commit(store, step))
    put = await put_record(store, Kind.VERIFIED, key, record)
    if put is PutResult.CONFLICT and not await _is_verified(store, step):
        # A mark decides nothing: whoever finds none, or one that does not hold, reads the step
        # back. So one that does not hold may be replaced, or each collection would read it again.
        await store.delete(key)
        await put_record(store, Kind.VERIFIED, key, record)
    event("verified", job=label_of(store.url), step=str(step))


async def retire(store: Store, step: StepId, why: str, stored_bytes: int = 0) -> bool:
    """Give a committed step up; False if somebody holds it, and then its data stays.

    `stored_bytes` is what that frees, for those who count it.
    """
    await put_record(store, Kind.RETIRED, keys.retired(step), Retired(step.attempt, step.step, why))
    if not await _delete_retired(store, step):
        return False
    job = label_of(store.url)
    event("retired", job=job, step=str(step), bytes=stored_bytes, why=why)
    return True


async def _delete_retired(store: Store, step: StepId) -> bool:
    """Delete the data of a retired step, unless somebody holds it."""
    await store.make_durable(keys.retired(step))
    # A reader puts its hold and then looks for `retired`; we do the reverse. Whatever the order,
    # one of us sees the other. Where keys are shown late: a reader that comes within the lag of our
    # mark may miss it, and its hold may be shown to us one lag later still.
    if store.visibility_lag_seconds:
        await asyncio.sleep(2 * store.visibility_lag_seconds)
    if await store.list(keys.holds(step)):
        return False
    await _delete(store, step)
    return True


async def _delete(store: Store, step: StepId) -> None:
    for prefix in (keys.packs(step), keys.manifests(step)):
        await in_lanes(store.delete, await store.list(prefix), DELETES_AT_ONCE)
        await store.prune(prefix)


async def _sweep(
    catalog: Catalog,
    listing: Listing,
    packed: frozenset[StepId],
    commits: list[Decision],
    *,
    dry_run: bool,
) -> list[Given]:
    """Delete what undecided, aborted and half-deleted retired steps left behind."""
    store = catalog.store
    newest = commits[0].id if commits else None
    known = {commit.id for commit in commits}
    done = []
    for step in garbage(listing, packed, [commit.id for commit in commits]):
        done.append(Given(step, "abort", f"undecided, and {newest} is committed"))
        if not dry_run and not (await abort_step(store, step, "superseded")).committed:
            await _delete(store, step)
    for step in sorted((packed | frozenset(listing.manifests)) & listing.decided):
        if step in listing.retired:
            # Read, because a mark that was copied from another step must not cost this one's data.
            if step in listing.holds or not await is_retired(store, step):
                continue
            if dry_run or await _delete_retired(store, step):
                done.append(Given(step, "delete", "retired"))
        elif step not in known and await _aborted(catalog, step):
            done.append(Given(step, "delete", "aborted"))
            if not dry_run:
                await store.make_durable(keys.commit(step))
                await _delete(store, step)
    return done


async def _aborted(catalog: Catalog, step: StepId) -> bool:
    try:
        return not (await catalog.decision(step)).committed
    except (DamageError, ObjectNotFoundError):
        return False
