"""What a bucket truly holds: its objects, fetched by a bare client and judged as local files."""

from __future__ import annotations

import shutil
from pathlib import Path

from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, list_steps
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.store.local import LocalStore
from crash.content import fault_in, values_of
from servers.buckets import Bucket
from small_step import write_tree


def copied(bucket: Bucket, prefix: str, to: Path) -> Path:
    """All objects below `prefix/` as the files of a local store."""
    shutil.rmtree(to, ignore_errors=True)
    write_tree(
        to, {key.removeprefix(f"{prefix}/"): bucket.read(key) for key in bucket.keys(prefix)}
    )
    return to


async def exact_commits(bucket: Bucket, prefix: str, to: Path) -> list[tuple[int, int]]:
    """Every committed step, oldest first; an AssertionError if one is not, bit by bit, what
    crash/content.py says.
    """
    store = LocalStore(str(copied(bucket, prefix, to)))
    catalog = Catalog(store)
    found = []
    for step in sorted((await list_steps(store)).standing()):
        decision = await catalog.decision(step)
        if not decision.committed:
            continue
        manifest = (await catalog.manifest(decision, 0)).manifest
        state = memoryview(bytearray(plan_whole(manifest).target_bytes))
        await fetch(store, plan_whole(manifest), state, BufferPool(64 << 20))
        assert manifest.values == values_of(step.attempt, step.step), f"{step}: other values"
        fault = fault_in(state, step.attempt, step.step, len(state))
        assert not fault, f"{step}: {fault}"
        found.append((step.attempt, step.step))
    await store.aclose()
    return found
