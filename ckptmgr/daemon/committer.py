"""One step becomes a commit when every rank's manifest is there, or is given up; nobody is asked.

Every daemon of the attempt watches the step. The one of rank `step mod world` looks for the
manifests and puts COMMIT; the others look for the register, and for the manifests only when it is
late, one after the other. All would put the same bytes, and a register has one winner.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ckptmgr.config import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from ckptmgr.daemon.log import warning
from ckptmgr.daemon.resume import parent_of
from ckptmgr.errors import RegisterConflictError, StoreError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import in_thread
from ckptmgr.repository.catalog import Catalog, exists
from ckptmgr.repository.commit import (
    Decision,
    abort_of,
    abort_step,
    commit_step,
    put_witness,
    stored_manifest,
)
from ckptmgr.repository.manifest import SealedManifest, uncovered
from ckptmgr.repository.opening import open_manifest
from ckptmgr.repository.rules import (
    TURN_SECONDS,
    goes_first,
    may_decide,
    missing_ranks,
    turn,
)
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import StepId

LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 0.01, 1.0
"""Pause between two looks: short while a commit is likely, long while a rank is late."""

READS_AT_ONCE = 64
"""Manifests read at a time by the daemon that commits: it reads all of them once."""

LISTINGS_MIN = 8
"""How often the manifests of a step are listed, at least, before it is given up."""

WITNESS_SECONDS_MAX = 5.0
"""Longest delay of the word "committed" for the copy of the commit; a put takes milliseconds."""


@dataclass(slots=True, eq=False)
class Watch:
    """A step that waits for its decision, and what this host has put for it.

    `awaited` is a rank whose manifest was not there at the last listing.
    """

    id: StepId
    nonce: str
    world: int
    since: float
    news_at: float
    manifests: dict[int, SealedManifest] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    present: tuple[int, ...] = ()
    packs: frozenset[str] = frozenset()
    awaited: int | None = None
    listed_at: float = 0.0
    answered_at: float = 0.0


class Committer:
    """Decides the steps of one job; one task for each, shared by all ranks of this host.

    `tell` hears of every commit once, when it is durable.
    """

    def __init__(
        self, catalog: Catalog, tell: Callable[[Decision], None], stuck_seconds: float
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._tell = tell
        self._stuck_seconds = stuck_seconds
        self._watches: dict[StepId, Watch] = {}
        self._tasks: dict[StepId, asyncio.Task[Decision]] = {}
        # Only of the newest incarnation: a store may be emptied under a daemon that still runs.
        self._parents: dict[str, StepId] = {}

    async def decision(self, nonce: str, manifest: SealedManifest) -> Decision:
        """What becomes of the step of a manifest that this daemon has put; waits for it.

        Raises:
            RegisterConflictError: something of the step belongs to another incarnation.
            DamageError: a manifest or the register does not hold, or is not to be trusted.
        """
        step, world = manifest.manifest.id, manifest.manifest.world
        watch = self._watches.get(step)
        if watch is None:
            now = time.monotonic()
            watch = Watch(step, nonce, world, since=now, news_at=now, answered_at=now)
            self._watches[step] = watch
            task = asyncio.create_task(self._decide(watch), name=f"commit {step}")
            task.add_done_callback(lambda _: self._forget(step))
            self._tasks[step] = task
        watch.manifests[manifest.manifest.rank] = manifest
        watch.news.set()
        # Shielded: the ranks of a host wait for one task, and one that leaves ends only its wait.
        return await asyncio.shield(self._tasks[step])

    def silent_seconds(self, step: StepId) -> float:
        """How long the store has not answered what was asked about a step that is watched."""
        watch = self._watches.get(step)
        return 0.0 if watch is None else time.monotonic() - watch.answered_at

    def missing(self, step: StepId) -> tuple[int, ...]:
        """Ranks whose part of a step is not known to be in the store, once that was asked."""
        watch = self._watches.get(step)
        if watch is None or not watch.listed_at:
            return ()
        there = {*watch.present, *watch.manifests}
        return tuple(rank for rank in range(watch.world) if rank not in there)

    def _forget(self, step: StepId) -> None:
        task = self._tasks.pop(step)
        del self._watches[step]
        if not task.cancelled():
            task.exception()  # looked at, so that it is not reported when nobody waits any more

    async def aclose(self) -> None:
        """End all waits; what is undecided stays so for the next daemon."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _decide(self, watch: Watch) -> Decision:
        pause, retry = LOOK_SECONDS_MIN, RETRY_SECONDS_MIN
        while True:
            watch.news.clear()
            try:
                decision = await self._look(watch)
                retry = RETRY_SECONDS_MIN
                watch.answered_at = time.monotonic()
            except StoreError as error:
                warning("write_failed", step=str(watch.id), why=str(error), retry_in=retry)
                await asyncio.sleep(retry)
                retry = min(2 * retry, RETRY_SECONDS_MAX)
                continue
            if decision is not None:
                if decision.committed:
                    await self._committed(watch, decision)
                return decision
            try:
                await asyncio.wait_for(watch.news.wait(), pause)
                pause = LOOK_SECONDS_MIN
            except TimeoutError:
                pause = min(2 * pause, LOOK_SECONDS_MAX)

    async def _committed(self, watch: Watch, decision: Decision) -> None:
        """Before it is told: after that the user may move the store, or end the machine."""
        if self._parents.get(watch.nonce, decision.id) <= decision.id:
            self._parents = {watch.nonce: decision.id}
        if goes_first(watch.id.step, watch.world, watch.manifests, self._store.exclusive):
            await self._witness(decision)
        self._tell(decision)

    async def _witness(self, decision: Decision) -> None:
        """Put the copy of a commit, if that is quick: the step is committed without it."""
        try:
            async with asyncio.timeout(WITNESS_SECONDS_MAX):
                await put_witness(self._store, decision)
        except (StoreError, TimeoutError) as error:
            why = str(error) or f"was not done in {WITNESS_SECONDS_MAX:.0f} s"
            warning("witness_failed", step=str(decision.id), why=why)

    async def _look(self, watch: Watch) -> Decision | None:
        """One look at the store: the decision if it is made now, or was made by somebody else."""
        step = watch.id
        if len(watch.manifests) < watch.world:
            registered = await self._catalog.registered(step)
            if registered is not None:
                return registered
            turns = turn(step.step, watch.world, watch.manifests)
            if time.monotonic() - watch.since < turns * TURN_SECONDS:
                return None
            if await self._still_awaited(watch):
                return None
        present = await self._present(watch)
        missing = missing_ranks(watch.world, watch.nonce, dict.fromkeys(present, watch.nonce))
        if missing or not self._decides(watch):
            return await self._wait_or_give_up(watch, present, missing)
        manifests = await self._all_manifests(watch)
        if watch.world > 1:
            gap = await in_thread(self._uncovered, manifests)
            if gap:
                return await abort_step(self._store, step, gap, self._catalog.keyring)
        parent = self._parents.get(watch.nonce) or await parent_of(self._catalog, step)
        return await commit_step(self._store, manifests, parent, self._catalog.keyring)

    def _uncovered(self, manifests: list[SealedManifest]) -> str:
        keyring = self._catalog.keyring
        return uncovered([open_manifest(one, keyring).manifest for one in manifests])

    def _decides(self, watch: Watch) -> bool:
        return may_decide(self._store.exclusive, watch.manifests)

    async def _still_awaited(self, watch: Watch) -> bool:
        """Whether a rank that was missing at the last listing still is; asked of this one alone.

        A listing returns a key for every rank, so one at every look would be most of what a large
        job asks of its store while a rank is late.
        """
        due = watch.listed_at + self._stuck_seconds / LISTINGS_MIN
        if watch.awaited is None or time.monotonic() >= due:
            return False
        return not await exists(self._store, keys.manifest(watch.id, watch.awaited))

    async def _present(self, watch: Watch) -> tuple[int, ...]:
        """Ranks whose manifest is in the store. Their nonces are looked at when all are there."""
        if len(watch.manifests) == watch.world:
            return tuple(range(watch.world))
        found = {keys.parse_rank(key) for key in await self._store.list(keys.manifests(watch.id))}
        watch.listed_at = time.monotonic()
        if self._store.exclusive is False:  # then its listings may be late, too
            found.update(await self._present_one_by_one(watch, found))
        return tuple(sorted(rank for rank in found if rank is not None))

    async def _present_one_by_one(self, watch: Watch, listed: set[int | None]) -> list[int]:
        asked = [rank for rank in range(watch.world) if rank not in listed]

        async def is_there(rank: int) -> bool:
            return await exists(self._store, keys.manifest(watch.id, rank))

        there = await in_lanes(is_there, asked, READS_AT_ONCE)
        return [rank for rank, found in zip(asked, there, strict=True) if found]

    async def _wait_or_give_up(
        self, watch: Watch, present: tuple[int, ...], missing: tuple[int, ...]
    ) -> Decision | None:
        """Give the step up when nothing of it has come for so long that its ranks must be dead.

        Who may not decide waits twice as long for the one who may, and then for itself only.
        """
        now, decides = time.monotonic(), self._decides(watch)
        watch.awaited = missing[-1] if missing else None
        if present != watch.present:
            watch.present, watch.news_at = present, now
        if now - watch.news_at < self._stuck_seconds * (1 if decides else 2):
            return None
        packs = frozenset(await self._store.list(keys.packs(watch.id)))
        if packs != watch.packs:  # a rank with much to write, or a slow store
            watch.packs, watch.news_at = packs, now
            return None
        if not decides:
            return abort_of(watch.id, "the daemon of rank 0, which decides, is silent")
        why = f"no manifest of {_ranks(missing)} of {watch.world} in {self._stuck_seconds:g} s"
        return await abort_step(self._store, watch.id, why, self._catalog.keyring)

    async def _all_manifests(self, watch: Watch) -> list[SealedManifest]:
        """All manifests of a step, those of others checked and made durable."""
        gate = asyncio.Semaphore(READS_AT_ONCE)

        async def one(rank: int) -> SealedManifest:
            own = watch.manifests.get(rank)
            if own is not None:
                return own
            async with gate:
                await self._store.make_durable(keys.manifest(watch.id, rank))
                return await stored_manifest(self._store, watch.id, rank)

        found = await asyncio.gather(*map(one, range(watch.world)))
        nonces = {one.manifest.rank: one.manifest.nonce for one in found}
        foreign = missing_ranks(watch.world, watch.nonce, nonces)
        if foreign:
            raise RegisterConflictError(
                f"{_ranks(foreign)} belong to another incarnation",
                subject=keys.manifests(watch.id),
            )
        return list(found)


def _ranks(ranks: Iterable[int]) -> str:
    """Ranks for people: at most ten of them."""
    listed = list(ranks)
    shown = ", ".join(map(str, listed[:10]))
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f"rank{'s' if len(listed) > 1 else ''} {shown}{more}"
