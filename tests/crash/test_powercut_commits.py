"""G2 for the whole product: a committed step survives a power cut at any instant after its word.

A real daemon writes to a store on a disk that logs what it is told; retention runs all the while.
Every image that a cut could have left is mounted and read as a restore reads it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from content import content, fault_in, layout_of
from powercut import Image, Mark, images, mounted, needs_powercut, record

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import DamageError
from ckptmgr.rank.link import Link, Wanted
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, list_steps
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.staging.control import Client, Done, Release, Stop, Wait, Waited
from ckptmgr.staging.inbox import SOCKET
from ckptmgr.staging.slots import free_slot
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome, StepId
from processes import owners_of
from scale import scaled

SEED = 20261124
NBYTES = 1 << 20
KEEP = 3

pytestmark = [pytest.mark.root, pytest.mark.reliability, pytest.mark.timeout(scaled(600, 3600))]


def train(runtime: Path, root: Path, codec: str, steps: int, mark: Mark) -> None:
    """Seal and commit `steps` steps through a real daemon; mark each when it is acknowledged."""
    wanted = Wanted(str(root), 0, 1, 2, codec, KEEP, 1 << 17, NBYTES)
    link = Link(runtime, wanted)
    link.ask(Release(), Done)
    layout, layout_hash = layout_of(NBYTES)
    for step in range(1, steps + 1):
        slot = free_slot(2, [(s, link.buffer.outcome(s)) for s in link.buffer.snapshots()])
        assert slot is not None
        link.wait_populated(slot)
        writer = link.buffer.begin(slot)
        with writer.data as data:
            data[:] = content(link.attempt, step, NBYTES).tobytes()
        writer.seal(
            attempt=link.attempt,
            nonce=link.nonce,
            rank=0,
            world=1,
            step=step,
            layout=layout,
            layout_hash=layout_hash,
            values=b"\x90",
            tags={"step": step},
            data_bytes=NBYTES,
            stall_seconds=0.0,
        )
        link.sealed()
        assert link.ask(Wait(step, 60.0), Waited, 90).outcome == Outcome.COMMITTED
        mark(f"{link.attempt}.{step}")
    link.close(clean=True)
    with Client(runtime / SOCKET) as client:
        client.ask(Stop(), Done)
        client.wait_closed()
    deadline = time.monotonic() + 60
    while owners_of(runtime):  # its last threads may still have the disk open
        assert time.monotonic() < deadline, "the daemon does not end"
        time.sleep(0.02)


async def faults_of(image: Image) -> list[str]:
    """What is wrong in one image: an acknowledged step lost, a step torn, the latest gone back."""
    faults = []
    with mounted(image) as directory:
        store = LocalStore(str(directory / "store"))
        catalog = Catalog(store)
        listing = await list_steps(store)
        acknowledged = sorted(_step(text) for text in image.marks)
        faults += [f"{step} is lost" for step in acknowledged if step not in listing.decided]
        kept = set(listing.standing())
        newest = set(acknowledged[-2:])  # what retention may never touch
        faults += [f"{step} was retired" for step in newest - kept]
        for step in kept:
            fault = await _fault_of(catalog, step)
            # A step whose register became durable before the cut was not acknowledged yet is
            # whole as well: its data was durable before its register.
            if fault:
                faults.append(f"{step}: {fault}")
        await store.aclose()
    return faults


async def _fault_of(catalog: Catalog, step: StepId) -> str:
    target = memoryview(bytearray(NBYTES))
    try:
        decision = await catalog.decision(step)
        if not decision.committed:
            return "was aborted"
        manifest = (await catalog.manifest(decision, 0)).manifest
        await fetch(catalog.store, plan_whole(manifest), target, BufferPool(BUDGET_BYTES))
    except DamageError as error:
        return str(error)
    return fault_in(target, step.attempt, step.step, NBYTES)


def _step(text: str) -> StepId:
    attempt, number = StepId.parse(text)
    assert attempt is not None
    return StepId(attempt, number)


@pytest.mark.parametrize(
    ("system", "codec"), [("ext4", "none"), ("xfs", "planes"), ("btrfs", "none")]
)
def test_no_acknowledged_commit_is_lost(
    runtime: Path, tmp_path: Path, system: str, codec: str
) -> None:
    steps = scaled(8, 20)

    def workload(directory: Path, mark: Mark) -> None:
        train(runtime, directory / "store", codec, steps, mark)

    log = record(needs_powercut(system), tmp_path, workload)
    assert sum(entry.kind == "M" for entry in log.entries) == steps
    looked = 0
    for image in images(log, SEED, scaled(24, 400)):
        assert asyncio.run(faults_of(image)) == []
        looked += 1
    print(f"power cut {system} {codec}: {looked} images, {steps} commits, 0 lost, 0 torn")
