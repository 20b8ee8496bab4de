"""What a long history costs: a job with thousands of retired steps is listed, resumed and saved.

    PYTHONPATH=tests python -m bench.history_bench [STEPS ...]

A real daemon saves one small step; the records that retention leaves of a step (register, its copy,
its proof of reading back, its mark) are put for so many more; then each figure is the median of a
few. The last line of the table is the ratio of the longest history to the shortest.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from called import call
from ckptmgr.config import open_private_dir
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog, Verified
from ckptmgr.repository.commit import Retired, put_record
from ckptmgr.repository.record import Kind
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome, StepId
from driven import Daemon, Rank

KEEP, REPEAT = 3, 9


async def grow(root: Path, steps: int) -> None:
    """What retention leaves of steps 2 to `steps`, after a first one that was really saved."""
    store = LocalStore(str(root))
    first = await Catalog(store).decision(StepId(1, 1))
    for number in range(2, steps + 1):
        step = StepId(1, number)
        decision = msgspec.structs.replace(first, step=number)
        await put_record(store, Kind.COMMIT, keys.commit(step), decision)
        await put_record(store, Kind.COMMIT, keys.tags(step), decision)
        await put_record(store, Kind.VERIFIED, keys.verified(step), Verified(1, number, "00" * 32))
        await put_record(store, Kind.RETIRED, keys.retired(step), Retired(1, number, "keep=3"))
    await store.aclose()


def seconds(act: Callable[[], object]) -> float:
    """Median time of a call."""
    found = []
    for _ in range(REPEAT):
        begun = time.monotonic()
        act()
        found.append(time.monotonic() - begun)
    return statistics.median(found)


def measured(place: Path, steps: int) -> dict[str, float]:
    """Figures of a history of so many steps, in seconds."""
    runtime, root = place / "runtime", place / "store"
    open_private_dir(runtime)
    url = f"file://{root}"
    with Daemon(runtime), Rank(runtime, url, keep=KEEP) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
    asyncio.run(grow(root, steps))
    shutil.rmtree(runtime / "buffers")
    numbers = iter(range(steps + 1, steps + 1000))
    with Daemon(runtime), Rank(runtime, url, keep=KEEP) as rank:

        def commit() -> None:
            step = next(numbers)
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED

        found = {"restore": seconds(rank.restore), "commit": seconds(commit)}
    return found | {
        "ls": seconds(lambda: call("ls", url)),
        "show": seconds(lambda: call("show", url)),
    }


def main(histories: list[int]) -> None:
    rows = []
    for steps in histories:
        place = Path(f"/dev/shm/ckptmgr-history-{os.getpid()}-{secrets.token_hex(4)}")
        place.mkdir(mode=0o700)
        try:
            rows.append(measured(place, steps))
        finally:
            shutil.rmtree(place)
    names = list(rows[0])
    print(f"| steps | {' | '.join(f'{name}, ms' for name in names)} |")
    print("| ---: |" + " ---: |" * len(names))
    for steps, row in zip(histories, rows, strict=True):
        print(f"| {steps:,} | " + " | ".join(f"{1000 * row[name]:.0f}" for name in names) + " |")
    ratios = [rows[-1][name] / rows[0][name] for name in names]
    print("| ratio | " + " | ".join(f"{ratio:.1f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [10, 100, 1_000, 10_000])
