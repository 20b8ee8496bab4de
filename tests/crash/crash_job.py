"""A job of several ranks on any store: the real repository, commit, resume and retention code, with
the daemons of all ranks in one coroutine, so that a run is a list of changes.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from functools import cache

from ckptmgr.daemon.committer import Committer, Watch
from ckptmgr.daemon.pipeline import adopt_manifest
from ckptmgr.daemon.resume import (
    Standing,
    candidates,
    claim_attempt,
    decide_resume,
    held_by_hosts,
    publish_have,
    put_active,
    standing_of,
)
from ckptmgr.daemon.retain import collect, retire
from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, standing_steps
from ckptmgr.repository.chunk import Chunk, hash_of
from ckptmgr.repository.commit import FROM_SCRATCH, Decision, abort_step, put_witness
from ckptmgr.repository.hold import held_step, put_hold, release_hold
from ckptmgr.repository.manifest import Manifest, SealedManifest, read_manifest, seal_manifest
from ckptmgr.repository.pack import pack_header
from ckptmgr.repository.record import Kind, digest_of, unseal
from ckptmgr.repository.rules import complete_steps, goes_first
from ckptmgr.staging.layout import encode_layout
from ckptmgr.store.base import Store
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf, Snapshot, StepId
from crash.crash_store import CrashStore, Sealed, State, ViolatedError

KEEP = 2
_LAYOUT = encode_layout(
    Layout(
        (Leaf("w", "uint8", (PAGE_BYTES,), 0, PAGE_BYTES),),
        (Group(0, PAGE_BYTES, 1, False),),
        PAGE_BYTES,
        b"",
    )
)
STUCK_SECONDS = 120.0


@cache
def content(step: StepId, rank: int) -> bytes:
    """The state of one rank at one step."""
    return f"{step}/{rank};".encode().ljust(16, b".") * (PAGE_BYTES // 16)


@cache
def pack_of(key: str, step: StepId, rank: int, nonce: str) -> bytes:
    """The pack of a rank under a name."""
    return pack_header(key, step, rank, nonce) + content(step, rank)


@cache
def manifest_of(step: StepId, rank: int, world: int, nonce: str, pack: str) -> SealedManifest:
    """The manifest that names a pack."""
    raw = content(step, rank)
    chunk = Chunk(0, PAGE_BYTES, len(raw), 0, len(raw), 0, hash_of(raw), b"")
    manifest = Manifest(
        attempt=step.attempt,
        step=step.step,
        nonce=nonce,
        rank=rank,
        world=world,
        host=f"host{rank}",
        layout=_LAYOUT,
        values=b"",
        packs=((pack, 2 * PAGE_BYTES),),
        chunks=(chunk,),
        raw_bytes=len(raw),
        stored_bytes=2 * PAGE_BYTES,
        sealed_at=0.0,
    )
    return seal_manifest(manifest)


class Job:
    """The daemons of a job on one store."""

    def __init__(self, inner: CrashStore, store: Store, world: int, pool: BufferPool) -> None:
        self.inner = inner
        self.store = store
        self.world = world
        self.pool = pool
        self.catalog = Catalog(store)
        self.attempt = 0
        self.nonce = ""
        self.base = FROM_SCRATCH

    # -- the way back -------------------------------------------------------------------------

    async def enter(self) -> None:
        """Claim an attempt, tell what memory holds, and agree on the step to go on from."""
        self.attempt, self.nonce = await claim_attempt(self.store, self.world, "")
        held = self.inner.ledger.sealed
        for rank in range(self.world):
            found = [(sealed.attempt, sealed.step, rank) for sealed in held]
            await publish_have(self.store, self.attempt, f"host{rank}", found)
        decided = {await self._choose() for _ in range(self.world)}
        if len(decided) > 1:
            raise ViolatedError(f"I6 ranks resume from {decided}")
        (self.base,) = decided
        self.inner.tell(resumed=(*self.inner.ledger.resumed, (self.attempt, self.base)))

    async def _choose(self) -> StepId:
        """As Reader does, whose other half is host buffers."""
        held = await held_by_hosts(self.store, self.attempt)
        complete = complete_steps(held.ranks, held.worlds)
        standing = await standing_steps(self.store)
        for choice in candidates(standing, complete, (), None, None):
            decision = await self._decision(choice)
            if decision is not None and not decision.committed:
                continue
            if decision is not None:
                await self.store.make_durable(keys.commit(choice))
                await self.read(choice)
            return await decide_resume(self.store, self.attempt, 0, choice)
        return await decide_resume(self.store, self.attempt, 0, FROM_SCRATCH)

    async def _decision(self, step: StepId) -> Decision | None:
        try:
            return await self.catalog.decision(step)
        except ObjectNotFoundError:
            return None

    async def read(self, step: StepId) -> None:
        """Read a committed step back under a hold and compare every bit."""
        decision = await self.catalog.decision(step)
        async with held_step(self.store, step):
            await self.fetch(decision)

    async def fetch(self, decision: Decision) -> None:
        """Compare every bit of a step that is held."""
        for rank in range(decision.world):
            sealed = await self.catalog.manifest(decision, rank)
            ((pack, nbytes),) = sealed.manifest.packs
            found = bytes(await self.store.get(pack))
            if found != pack_of(pack, decision.id, rank, decision.nonce) or len(found) != nbytes:
                raise ViolatedError(f"I11 rank {rank} of {decision.id} is not what was saved")

    # -- saves --------------------------------------------------------------------------------

    async def save(self, step: int) -> None:
        """Seal a step on all ranks, and bring it into the store."""
        sealed = Sealed(self.attempt, self.nonce, step)
        self.inner.tell(sealed=(*self.inner.ledger.sealed, sealed)[-2:])
        await self.finish(sealed)

    async def finish(self, sealed: Sealed) -> None:
        """What the daemons do with a sealed snapshot; the first time or after they died."""
        for rank in range(self.world):
            await self.write(sealed, rank)
        # All daemons decide; whose turn it is goes first.
        ranks = range(self.world)
        exclusive = self.store.exclusive
        (first,) = (r for r in ranks if goes_first(sealed.step, self.world, (r,), exclusive))
        for turn in ranks:
            await self.decide(sealed, (first + turn) % self.world)
        self.settled(sealed)

    async def write(self, sealed: Sealed, rank: int) -> None:
        """One rank's packs and manifest, as Writer and Pipeline do."""
        snapshot = _snapshot(sealed, rank, self.world)
        if await standing_of(self.store, snapshot) is not Standing.OURS:
            raise ViolatedError(f"the claim of {sealed} is not there")
        await put_active(self.store, sealed.attempt, sealed.nonce)
        if await adopt_manifest(self.store, sealed.id, rank, sealed.nonce) is not None:
            return
        key = keys.new_pack(sealed.id, rank)
        pack = pack_of(key, sealed.id, rank, sealed.nonce)
        await self.store.put_new(key, [memoryview(pack)])
        manifest = manifest_of(sealed.id, rank, self.world, sealed.nonce, key)
        await self.store.put_new(manifest.key, [memoryview(manifest.record)])

    async def decide(self, sealed: Sealed, rank: int) -> None:
        """What one daemon does when all manifests are there."""
        register = await self._decision(sealed.id)
        if register is not None and not register.committed:
            return
        key = keys.manifest(sealed.id, rank)
        own = read_manifest(sealed.id, rank, await self.store.get(key))
        watch = Watch(sealed.id, sealed.nonce, self.world, -math.inf, 0.0, {rank: own})
        committer = Committer(self.catalog, lambda _: None, STUCK_SECONDS)
        decision = await committer._look(watch)
        if decision is None:
            raise ViolatedError(f"L1 {sealed.id} is whole, and rank {rank} does not commit it")
        if decision.committed:
            self.inner.tell(acked=self.inner.ledger.acked | {sealed.id})
            await put_witness(self.store, decision)

    def settled(self, sealed: Sealed) -> None:
        left = tuple(one for one in self.inner.ledger.sealed if one != sealed)
        self.inner.tell(sealed=left)

    async def restart(self) -> None:
        """Daemons that start again finish what memory holds, newest first."""
        for sealed in reversed(self.inner.ledger.sealed):
            register = await self._decision(sealed.id)
            if register is not None and not register.committed:
                self.settled(sealed)
            else:
                await self.finish(sealed)

    async def collect(self) -> None:
        await collect(self.catalog, self.pool, KEEP, frozenset({self.base}), whole=False)


def _snapshot(sealed: Sealed, rank: int, world: int) -> Snapshot:
    head = (0, 1, sealed.attempt, sealed.nonce, rank, world, sealed.step)
    return Snapshot(*head, len(_LAYOUT), 0, PAGE_BYTES, 0.0, 0.0)


@cache
def _read(step: StepId, rank: int, record: bytes) -> SealedManifest:
    return read_manifest(step, rank, record)


@cache
def _decision(key: str, record: bytes) -> Decision:
    return unseal(Kind.COMMIT, key, record, Decision)


def check(state: State) -> None:
    """The invariants of a store, by an oracle that looks at its objects only."""
    objects = state.objects
    registers = [_decision(key, blob) for key, blob in objects.items() if key.startswith("commit/")]
    commits = sorted(d.id for d in registers if d.committed)
    lost = state.ledger.acked - set(commits)
    if lost:
        raise ViolatedError(f"I12 {[*map(str, lost)]} was acknowledged, and is no commit")
    standing = [step for step in commits if keys.retired(step) not in objects]
    for decision in registers:
        if decision.id in standing:
            _check_whole(decision, objects)
    for key in objects:
        step = keys.parse_step(key) if key.startswith("retired/") else None
        if step is None or not (state.exclusive or step in state.ledger.acked):
            continue  # where one decides alone, what is given up is retired first
        if sum(other > step for other in standing) < 2:
            raise ViolatedError(f"I3 {step} is given up, and less than two newer ones stand")
    newest = standing[-1] if standing else FROM_SCRATCH
    if state.ledger.acked and newest < max(state.ledger.acked):
        raise ViolatedError(f"I4 the last consistent step went back to {newest}")
    for attempt, step in state.ledger.resumed:
        if f"attempts/{attempt:08d}/resume/0000" not in objects:
            raise ViolatedError(f"I6 attempt {attempt} resumed from {step}, and nothing says so")


def _check_whole(decision: Decision, objects: Mapping[str, bytes]) -> None:
    if len(decision.manifests) != decision.world:
        raise ViolatedError(f"I2 {decision.id} is of {len(decision.manifests)} ranks")
    for rank, digest in enumerate(decision.manifests):
        record = objects.get(keys.manifest(decision.id, rank))
        if record is None or digest_of(record).hex() != digest:
            raise ViolatedError(f"I1 {decision.id} lacks the manifest of rank {rank}")
        manifest = _read(decision.id, rank, record).manifest
        if manifest.nonce != decision.nonce:
            raise ViolatedError(f"I2 {decision.id} mixes incarnations")
        for name, _ in manifest.packs:
            if objects.get(name) != pack_of(name, decision.id, rank, decision.nonce):
                raise ViolatedError(f"I1 {decision.id} lacks a pack of rank {rank}")


Script = Callable[[Job], Awaitable[None]]


async def first_run(job: Job) -> None:
    """Three steps: with the third, the first is given up."""
    await job.enter()
    for step in (1, 2, 3):
        await job.save(step)
        await job.collect()


async def second_run(job: Job) -> None:
    """A job that ended amid its third step goes on, twice, and collects what was left behind."""
    await job.enter()
    for step in (1, 2):
        await job.save(step)
    await job.write(Sealed(job.attempt, job.nonce, 3), 0)
    again = Job(job.inner, job.store, job.world, job.pool)
    await again.enter()
    for step in (again.base.step + 1, again.base.step + 2):
        await again.save(step)
        await again.collect()


async def reading(job: Job) -> None:
    """A step is held while it would be given up, and another when that has just been decided."""
    await job.enter()
    for step in (1, 2):
        await job.save(step)
    await put_hold(job.store, StepId(job.attempt, 1), "somebody", "for the test")
    await job.save(3)
    await job.collect()
    await job.read(StepId(job.attempt, 1))
    await release_hold(job.store, StepId(job.attempt, 1), "somebody")
    await job.save(4)
    held = await job.catalog.decision(StepId(job.attempt, 2))
    await put_hold(job.store, held.id, "somebody", "since the listing")
    await retire(job.store, held.id, "not held in the listing")
    await job.fetch(held)
    await release_hold(job.store, held.id, "somebody")
    await job.collect()


async def zombie(job: Job) -> None:
    """An incarnation goes on beside the next one; what it can not finish is given up."""
    await job.enter()
    await job.save(1)
    following = Job(job.inner, job.store, job.world, job.pool)
    await following.enter()
    await following.save(2)
    await job.save(2)
    await job.write(Sealed(job.attempt, job.nonce, 3), 1)
    await following.save(3)
    await following.collect()
    await abort_step(job.store, StepId(job.attempt, 3), "stuck")
    await following.collect()


async def recovery(job: Job) -> None:
    """Daemons and job start again after a crash: finish, resume, save and collect."""
    await job.restart()
    await job.enter()
    await job.save(job.base.step + 1)
    await job.collect()


async def last_recovery(job: Job) -> None:
    """The same after the second crash, without a further step."""
    await job.restart()
    await job.enter()
    await job.collect()


SCRIPTS: dict[str, tuple[int, Script]] = {
    "first run": (2, first_run),
    "second run": (2, second_run),
    "reading": (2, reading),
    "zombie": (3, zombie),
}
