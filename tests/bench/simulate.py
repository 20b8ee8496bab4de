"""What a job of any size asks of its store: the real protocol, on a store that counts.

`PYTHONPATH=tests python -m bench.simulate [WORLD ...]` prints the tables of docs/scale.md.

One Committer for each daemon, eight ranks to a daemon. What a daemon does around it for a rank is
written out here in the order of daemon/writer.py and daemon/reader.py; every function is theirs.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import secrets
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field

from bench.virtual import Bucket, Door, run_virtually
from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon.committer import Committer
from ckptmgr.daemon.resume import (
    ActiveMarks,
    Standing,
    await_resume,
    claim_attempt,
    decide_resume,
    held_by_hosts,
    publish_have,
    put_active,
    standing_of,
)
from ckptmgr.daemon.retain import collect
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, standing_steps
from ckptmgr.repository.chunk import Chunk, hash_of
from ckptmgr.repository.codec import Codec
from ckptmgr.repository.commit import FROM_SCRATCH, Decision
from ckptmgr.repository.manifest import Manifest, SealedManifest, seal_manifest
from ckptmgr.repository.pack import pack_header
from ckptmgr.repository.rules import complete_steps, resume_order
from ckptmgr.staging.layout import encode_layout
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf, Snapshot, StepId

WORLDS = (16, 64, 256, 1024, 4096, 10_000)
RANKS_PER_DAEMON = 8
TENSORS = 4
LATE_SECONDS = 30.0
STUCK_SECONDS = 120.0
PAGE = memoryview(bytes(PAGE_BYTES))
KINDS = ("put", "get", "make_durable", "list", "delete")


@dataclass(slots=True)
class Host:
    """A daemon and its ranks; `heard` is when it learned of each commit."""

    door: Door
    ranks: range
    committer: Committer = field(init=False)
    marks: ActiveMarks = field(default_factory=ActiveMarks)
    heard: dict[StepId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.committer = Committer(Catalog(self.door), self._hear, STUCK_SECONDS)

    def _hear(self, decision: Decision) -> None:
        self.heard[decision.id] = asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class Phase:
    """What one part of the run asked of the store: all daemons, and the one that asked most."""

    name: str
    world: int
    asked: Counter[str]
    most: Counter[str]
    seconds: float
    cpu_seconds: float

    def requests(self, *kinds: str) -> int:
        """Requests of all daemons."""
        return sum(self.asked[kind] for kind in kinds or KINDS)

    def of_one(self) -> int:
        """Requests of the daemon that made most."""
        return sum(self.most[kind] for kind in KINDS)


class Job:
    """A simulated job; phases are measured one after the other."""

    def __init__(self, world: int, seed: int = 1) -> None:
        self.world = world
        self.bucket = Bucket(seed)
        self.phases: list[Phase] = []
        starts = range(0, world, RANKS_PER_DAEMON)
        self.hosts = [
            Host(Door(self.bucket), range(start, min(start + RANKS_PER_DAEMON, world)))
            for start in starts
        ]
        self.attempt, self.nonce = 0, ""
        self._seconds = 0.0

    # -- a save ------------------------------------------------------------------------------

    async def save(self, step: int, *, late: int | None = None) -> None:
        """All ranks seal at once, but for one that is `late`; ends when every daemon knows."""

        async def one(host: Host, rank: int) -> None:
            if rank == late:
                await asyncio.sleep(LATE_SECONDS)
            sealed.append(asyncio.get_running_loop().time())
            manifest = await self._write(host, rank, step)
            decision = await host.committer.decision(self.nonce, manifest)
            assert decision.committed, decision.why

        sealed: list[float] = []
        await asyncio.gather(*(one(host, rank) for host in self.hosts for rank in host.ranks))
        known = max(host.heard[StepId(self.attempt, step)] for host in self.hosts)
        self._seconds = known - max(sealed)

    async def _write(self, host: Host, rank: int, step: int) -> SealedManifest:
        """As daemon/writer.py: is the attempt ours and the newest? Then a pack and the manifest."""
        snapshot = self._snapshot(rank, step)
        assert await standing_of(host.door, snapshot) is Standing.OURS
        newest = await put_active(host.door, self.attempt, self.nonce, host.marks)
        assert newest == self.attempt
        sealed = _manifest(snapshot)
        header = pack_header(sealed.manifest.packs[0][0], snapshot.id, rank, self.nonce)
        await host.door.put_new(sealed.manifest.packs[0][0], [memoryview(header), PAGE])
        await host.door.put_new(sealed.key, [memoryview(sealed.record)])
        return sealed

    def _snapshot(self, rank: int, step: int) -> Snapshot:
        return Snapshot(
            *(0, 1, self.attempt, self.nonce, rank, self.world, step, 0, 0, PAGE_BYTES),
            sealed_at=0.0,
            stall_seconds=0.0,
        )

    async def retain(self, step: int) -> None:
        """What the daemon of the rank that committed does afterwards, in the background."""
        host = self.hosts[step % self.world // RANKS_PER_DAEMON]
        start = asyncio.get_running_loop().time()
        await collect(Catalog(host.door), BufferPool(BUDGET_BYTES), 2, whole=False)
        self._seconds = asyncio.get_running_loop().time() - start

    # -- a start -----------------------------------------------------------------------------

    async def start(self, held: int | None) -> None:
        """Claim, publish what memory holds (all ranks of step `held`), decide, and obey."""
        start = asyncio.get_running_loop().time()
        first, before = self.hosts[0], (self.attempt, self.nonce)
        attempt, nonce = await claim_attempt(first.door, self.world, "")

        async def join(number: int, host: Host) -> None:
            found = [] if held is None else [self._snapshot(rank, held) for rank in host.ranks]
            for snapshot in found:
                assert await standing_of(host.door, snapshot) is Standing.OURS
            held_here = [(s.attempt, s.step, s.rank) for s in found]
            await publish_have(host.door, attempt, f"host-{number:06d}-0123abcd", held_here)

        await asyncio.gather(*(join(*one) for one in enumerate(self.hosts)))
        asked = [await_resume(h.door, attempt, 0) for h in self.hosts for r in h.ranks if r]
        choice, *obeyed = await asyncio.gather(self._decide(first, attempt), *asked)
        expected = FROM_SCRATCH if held is None else StepId(before[0], held)
        assert {choice, *obeyed} == {expected}, (choice, set(obeyed))
        self.attempt, self.nonce = attempt, nonce
        self._seconds = asyncio.get_running_loop().time() - start

    async def _decide(self, host: Host, attempt: int) -> StepId:
        """As daemon/reader.py does for rank 0."""
        held = await held_by_hosts(host.door, attempt)
        complete = complete_steps(held.ranks, held.worlds)
        found = resume_order(await standing_steps(host.door), complete, (), ())
        return await decide_resume(host.door, attempt, 0, found[0] if found else FROM_SCRATCH)

    # -- measuring ---------------------------------------------------------------------------

    async def measure(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run one phase and note what it asked."""
        self.bucket.count()
        before = [host.door.asked.copy() for host in self.hosts]
        cpu = time.process_time()
        await work
        cpu = time.process_time() - cpu
        of_each = [host.door.asked - b for host, b in zip(self.hosts, before, strict=True)]
        most = max(of_each, key=lambda asked: sum(asked[kind] for kind in KINDS))
        self.phases.append(Phase(name, self.world, self.bucket.count(), most, self._seconds, cpu))


def _manifest(snapshot: Snapshot) -> SealedManifest:
    """A rank's rows of some tensors, 4 KiB in all."""
    size = PAGE_BYTES // TENSORS
    shape, whole = (1, size // 4), (snapshot.world, size // 4)
    leaves = tuple(
        Leaf(f"net/{at}/weight", "float32", shape, at * size, size, whole, (snapshot.rank, 0))
        for at in range(TENSORS)
    )
    layout = Layout(leaves, (Group(0, PAGE_BYTES, 4, True),), PAGE_BYTES, b"\xc0")
    pack = f"{keys.packs(snapshot.id, snapshot.rank)}{secrets.token_hex(10)}.pack"
    chunk = Chunk(0, PAGE_BYTES, PAGE_BYTES, 0, PAGE_BYTES, Codec.NONE, hash_of(PAGE), b"")
    return seal_manifest(
        Manifest(
            attempt=snapshot.attempt,
            step=snapshot.step,
            nonce=snapshot.nonce,
            rank=snapshot.rank,
            world=snapshot.world,
            host="host",
            layout=encode_layout(layout),
            values=b"\x90",
            packs=((pack, 2 * PAGE_BYTES),),
            chunks=(chunk,),
            raw_bytes=PAGE_BYTES,
            stored_bytes=PAGE_BYTES,
            sealed_at=0.0,
        )
    )


async def _run(world: int) -> list[Phase]:
    job = Job(world)
    await job.measure("first start", job.start(None))
    await job.measure("first save", job.save(1))
    await job.measure("save", job.save(2))
    await job.measure("save, one rank 30 s late", job.save(3, late=world // 2))
    await job.measure("retention", job.retain(3))
    await job.measure("second start", job.start(3))
    await job.measure("first save after it", job.save(4))
    for host in job.hosts:
        await host.committer.aclose()
    return job.phases


def simulate(world: int) -> list[Phase]:
    """The phases of a job: a start, saves, a late rank, retention, a second start, a save."""
    return run_virtually(_run(world))


def table(phases: Sequence[Phase]) -> str:
    """One phase in all worlds, as Markdown."""
    columns = (
        *("ranks", "seconds", "requests per rank", *KINDS),
        *("keys listed", "KB listed", "MB read", "of one daemon", "CPU s"),
    )
    lines = [" | ".join(columns), " | ".join(["---:"] * len(columns))]
    for one in phases:
        cells = [f"{one.world:,}", f"{one.seconds:.2f}", f"{one.requests() / one.world:.2f}"]
        cells += [f"{one.requests(kind) / one.world:.2f}" for kind in KINDS]
        cells += [f"{one.asked['keys listed']:,}", f"{one.asked['bytes listed'] / 1e3:,.0f}"]
        cells += [f"{one.asked['bytes read'] / 1e6:,.1f}", f"{one.of_one():,}"]
        lines.append(" | ".join([*cells, f"{one.cpu_seconds:.1f}"]))
    return "\n".join(f"| {line} |" for line in lines)


def main(worlds: Sequence[int]) -> None:
    logging.disable()
    found = []
    for world in worlds:
        found.append(simulate(world))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{world} ranks simulated, {memory:.0f} MiB", file=sys.stderr, flush=True)
    for phases in zip(*found, strict=True):
        print(f"### {phases[0].name}\n\n{table(phases)}\n")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or WORLDS)
