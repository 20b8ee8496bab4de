"""`ckptmgr watch` as a process, and what it has adopted, read by other code than its own."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from ckptmgr.repository.catalog import Catalog, StepEntry
from ckptmgr.restore.check import restore_files
from ckptmgr.store.local import LocalStore
from ckptmgr.types import StepId
from driven import PYTHON_PATH, events_of
from nursery import nursery

T = TypeVar("T")


PATIENCE_SECONDS = 240.0
"""A command is started again and again beside everything else that a machine does."""


def patiently(holds: Callable[[], T], what: str) -> T:
    """Wait for something that another process will do; its first true value."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)
    return found


class Watch:
    """The command as a child; `log` is what it writes to stderr."""

    def __init__(self, root: Path, store: Path, *arguments: str, quiet: float = 0.3) -> None:
        self.log = store.parent / "watch.log"
        self._before = len(events_of(self.log))
        with self.log.open("ab") as log:
            self.process = nursery().start(
                [
                    *("ckptmgr.cli", "watch", str(root), "--to", str(store)),
                    *(f"--quiet-seconds={quiet}", *arguments),
                ],
                env={**os.environ, "PYTHONPATH": PYTHON_PATH},
                stderr=log,
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those of this process."""
        return [one for one in events_of(self.log)[self._before :] if one["event"] == name]

    def await_event(self, name: str, source: str = "") -> dict[str, Any]:
        def look() -> list[dict[str, Any]]:
            assert self.process.poll() is None, self.log.read_text()
            return [one for one in self.events(name) if one.get("source", "") == source]

        return patiently(look, f"{name} {source}")[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Pair:
    """`watch` beside a process that saves: one of them or both are killed, by chance.

    `kills` counts them by who was killed; whoever uses it starts and ends the other process.
    """

    def __init__(self, place: Path, other: str) -> None:
        self.seed = random.randrange(1 << 30)
        self.chance = random.Random(self.seed)
        self.root, self.store = place / "output", place / "store"
        self.root.mkdir()
        self.kills = {other: 0, "watch": 0, "both": 0}
        self._other = other
        self.watch = self._watch()

    def _watch(self) -> Watch:
        return Watch(self.root, self.store, "--keep=100000", quiet=0.3)

    def whose_turn(self, number: int) -> str:
        """Who is killed at the `number`-th kill."""
        return list(self.kills)[number % 3]

    def kill(self, who: str, other_again: Callable[[], None]) -> None:
        """Kill them and start them again; `other_again` does that to the other process."""
        self.kills[who] += 1
        if who != self._other:
            self.watch.kill()
        if who != "watch":
            other_again()
        if who != self._other:
            self.watch = self._watch()


def with_catalog(store: Path, use: Callable[[Catalog], Awaitable[T]]) -> T:
    async def run() -> T:
        opened = LocalStore(str(store))
        try:
            return await use(Catalog(opened))
        finally:
            await opened.aclose()

    return asyncio.run(run())


def commits_of(store: Path) -> list[StepEntry]:
    """Committed steps that stand, oldest first."""
    found = with_catalog(store, lambda catalog: catalog.entries())
    return [
        one
        for one in reversed(found)
        if one.state.value in ("committed", "verified") and not one.damage
    ]


def tree_of(root: Path) -> dict[str, str]:
    """Every file below a directory, with a digest of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def restored(store: Path, step: StepId) -> dict[str, str]:
    """What is restored of a step."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)

        async def use(catalog: Catalog) -> None:
            await restore_files(catalog, str(step), "files", directory, lambda _: None)

        with_catalog(store, use)
        return tree_of(directory)
