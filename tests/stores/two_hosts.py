"""Two ranks on two hosts over one store, driven through faults, and an observer who never leaves.

What must hold whatever fails: nothing that was acknowledged is lost, `latest` never goes back, and
when the fault is over commits go on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ckptmgr.errors import StoreError
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import verify_store
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId
from driven import Daemon, Rank, until

LOOK_SECONDS = 0.05


@dataclass
class Observer:
    """Asks for the latest step all along, in a thread of its own."""

    url: str
    latest: list[StepId] = field(default_factory=list)
    misses: int = 0
    _end: threading.Event = field(default_factory=threading.Event)

    def _look(self) -> None:
        asyncio.run(self._look_on())

    async def _look_on(self) -> None:
        store = open_store(self.url)
        while not self._end.wait(LOOK_SECONDS):
            try:
                found = await Catalog(store).latest()
            except StoreError:
                self.misses += 1
                continue
            if found is not None:
                self.latest.append(found)
        await store.aclose()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def judge(self) -> None:
        """What it saw never went back, and it did see something."""
        assert self.latest
        assert self.latest == sorted(self.latest), "the latest step went back"


@dataclass
class Job:
    """The ranks of one attempt, their daemons, and what they were told."""

    url: str
    daemons: list[Daemon]
    ranks: list[Rank]
    step: int = 0
    acknowledged: list[int] = field(default_factory=list)

    def save(self) -> int:
        """All ranks seal the next step."""
        self.step += 1
        for rank in self.ranks:
            rank.save(self.step)
        return self.step

    def undecided(self, step: int, seconds: float) -> bool:
        """Whether no rank knows of a decision, after waiting so long for one."""
        told = [rank.wait(step, seconds).outcome for rank in self.ranks]
        return all(outcome == Outcome.UNDECIDED for outcome in told)

    def committed(self, step: int) -> None:
        """Wait until every rank has been told that a step is committed."""
        for rank in self.ranks:
            assert Outcome(rank.wait(step).outcome) is Outcome.COMMITTED
        self.acknowledged.append(step)

    def save_and_commit(self) -> int:
        step = self.save()
        self.committed(step)
        return step

    def writing(self, step: int) -> None:
        """Wait until every daemon has begun to write a step."""
        for daemon in self.daemons:
            until(lambda one=daemon: step in steps_written(one), f"step {step} is being written")

    def audit(self) -> None:
        """The newest steps are those that were acknowledged last, and every byte of them holds."""
        reports = asyncio.run(verified(self.url))
        damage = [one for report in reports for one in report["damage"]]
        assert damage == []
        standing = [report["id"] for report in reports if report["committed"]]
        assert standing[0] == f"1.{self.acknowledged[-1]}"


def steps_written(daemon: Daemon) -> list[int]:
    """Steps that a daemon has begun to write."""
    return [int(event["step"].partition(".")[2]) for event in daemon.events("writing")]


async def verified(url: str) -> list[dict[str, object]]:
    """What `verify --all` says."""
    store = open_store(url)
    try:
        return await verify_store(
            Catalog(store), None, every=True, quick=False, progress=lambda _: None
        )
    finally:
        await store.aclose()


@contextmanager
def job(
    urls: Sequence[str],
    runtime: Path,
    prefixes: Sequence[Sequence[str]],
    *,
    mib: int = 1,
    environment: dict[str, str] | None = None,
) -> Iterator[Job]:
    """A rank and a daemon on each host; `urls` is the one store as each host names it."""
    with ExitStack() as stack:
        places = [runtime / f"host{number}" for number in range(len(urls))]
        daemons, ranks = [], []
        for number, (url, place, prefix) in enumerate(zip(urls, places, prefixes, strict=True)):
            place.mkdir(mode=0o700)
            daemon = Daemon(place, environment=environment, prefix=prefix)
            daemons.append(stack.enter_context(daemon))
            first = ranks[0] if ranks else None
            rank = Rank(place, url, rank=number, world=len(urls), first=first, mib=mib)
            ranks.append(stack.enter_context(rank))
        yield Job(urls[0], daemons, ranks)
