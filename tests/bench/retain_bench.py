"""What one collection costs behind a long history: keys listed, memory at its peak, and CPU.

    PYTHONPATH=tests python -m bench.retain_bench [STEPS ...]

A local store on tmpfs holds three small commits and the records that are left of so many retired
steps. It is collected as the first collection of a daemon does (`whole`) and as all later ones do
(`stored`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import shutil
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon.retain import collect
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.store.local import LocalStore
from daemon.test_long_history import FIRST, CountingStore, grow
from small_step import memory_store, save_steps, shelf_of, smallest_state, write_tree

REPEAT = 5


async def fill(root: Path, steps: int) -> None:
    """Three commits, and what is left of so many steps before them."""
    store = memory_store({})
    saved = await save_steps(store, (FIRST, FIRST + 1, FIRST + 2), state=smallest_state)
    await grow(store, saved[0].decision, steps)
    write_tree(root, {key: bytes(blob) for key, blob in shelf_of(store).items()})


async def measured(root: Path, *, whole: bool) -> tuple[int, int, float, float]:
    """Operations, keys listed, KiB at the peak, and CPU seconds of a collection."""
    store = CountingStore(LocalStore(str(root)))
    pool, seconds = BufferPool(BUDGET_BYTES), []
    await collect(Catalog(store), pool, 2, whole=whole)  # gives up the first, which is not measured
    for _ in range(REPEAT):
        begun = time.process_time()
        await collect(Catalog(store), pool, 2, whole=whole)
        seconds.append(time.process_time() - begun)
    counted = CountingStore(LocalStore(str(root)))
    gc.collect()
    tracemalloc.start()
    await collect(Catalog(counted), pool, 2, whole=whole)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    await store.aclose()
    await counted.aclose()
    operations = len(counted.operations)
    return operations, counted.listed.total(), peak / 1024, statistics.median(seconds)


def main(histories: list[int]) -> None:
    print("| steps | looks at | operations | keys listed | peak, KiB | CPU, ms |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for steps in histories:
        root = Path(f"/dev/shm/ckptmgr-retain-{os.getpid()}-{secrets.token_hex(4)}")
        root.mkdir(mode=0o700)
        try:
            asyncio.run(fill(root, steps))
            for name, whole in (("everything", True), ("what is stored", False)):
                asked, listed, kib, cpu = asyncio.run(measured(root, whole=whole))
                figures = f"{asked} | {listed:,} | {kib:,.0f} | {1000 * cpu:.0f}"
                print(f"| {steps:,} | {name} | {figures} |", flush=True)
        finally:
            shutil.rmtree(root)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [100, 1_000, 9_000])
