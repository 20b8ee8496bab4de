"""A store with every kind of object, to be damaged: what verify names and what restore gives."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import DamageError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import check_format
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.restore import check, fetch, verify
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.store import memory
from ckptmgr.store.base import Store
from ckptmgr.types import StepId
from small_step import (
    Objects,
    SavedStep,
    same_bits,
)

KINDS = {
    "format": "format",
    "attempts": "attempts/",
    "registers": "commit/",
    "manifests": "man/",
    "marks": ("retired/", "holds/", "verified/", "tags/"),
    "packs": "data/",
}


LOSES_NOTHING = (
    "attempts/00000001/have/",
    "attempts/00000002/resume/",
    "commit/00000001/000000000025",  # ABORT of a step of which nothing else was stored
    "holds/",
    "tags/",  # a copy
    "verified/",
)
"""Objects that may be missing in a healthy store too: nobody can say that they are gone."""


T = TypeVar("T")


class _NeverWaits(selectors.SelectSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return []


class AtOnce(asyncio.SelectorEventLoop):
    """Runs each task, and what others do in a thread, to its end when it is made.

    Nothing that works on a store in memory waits for anything, and half a million flips can not
    afford the kernel and the turns of a loop that looks for what might have come.
    """

    def __init__(self) -> None:
        super().__init__(_NeverWaits())

    def create_task(self, coro: Any, **named: Any) -> Any:
        if asyncio.current_task(self) is None:
            return super().create_task(coro, **named)
        done = self.create_future()
        try:
            coro.send(None)
        except StopIteration as end:
            done.set_result(end.value)
        except Exception as error:
            done.set_exception(error)
        else:
            raise AssertionError("it waits for something")
        return done

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def run_at_once(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` for work that never waits."""
    with asyncio.Runner(loop_factory=AtOnce) as runner:
        return runner.run(main)


async def at_once(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Stand in for `in_thread`: half a million flips can not afford a thread for each chunk."""
    return work(*arguments, **named)


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave away what costs time, and has no part in what is tested by sweeps."""
    monkeypatch.setattr(fetch, "in_thread", at_once)
    monkeypatch.setattr(verify, "in_thread", at_once)
    monkeypatch.setattr(keys, "parse_step", cache(keys.parse_step))
    monkeypatch.setattr(memory, "check_key", cache(memory.check_key))
    pool = BufferPool(BUDGET_BYTES)  # a process has one; a command, which does one thing, makes it
    monkeypatch.setattr(check, "BufferPool", lambda _: pool)


@dataclass
class Rig:
    """A damaged copy of a store, the truth about it, and what was counted."""

    saved: list[SavedStep]
    objects: Objects
    store: Store
    directory: Path
    counts: Counter[str] = field(default_factory=Counter)
    keyring: Keyring = NO_KEYS

    @property
    def newest(self) -> SavedStep:
        return self.saved[-1]

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.store, self.keyring)

    def keys_of(self, kind: str) -> list[str]:
        return [key for key in self.objects if key.startswith(KINDS[kind])]

    async def verify(self, step: str | None = None) -> list[tuple[str, int]]:
        """What `ckptmgr verify --all`, or of a step, does; the places that it names."""
        try:
            await check_format(self.store, create=False)
            reports = await verify_store(
                self.catalog, step, every=step is None, quick=False, progress=lambda _: None
            )
        except DamageError as error:
            return [(error.subject, 0)]
        return [(d["key"], d["offset"]) for report in reports for d in report["damage"]]

    async def restore(self, step: str | None = None) -> str:
        """What `ckptmgr restore` does; the step it gave, after its bits were compared."""
        for path in self.directory.iterdir():
            path.unlink()
        try:
            document = await restore_files(
                self.catalog, step, "safetensors", self.directory, lambda _: None
            )
        except DamageError:
            self.counts["refused"] += 1
            return ""
        truth = {str(one.id): one for one in self.saved}[document["id"]]
        assert same_bits(self.directory, truth), "SILENTLY WRONG"
        skipped = [one["id"] for one in document["skipped"]]
        assert step in (None, document["id"]), "gave another step than the one asked for"
        if step or truth is self.newest:
            self.counts["exact"] += 1
        else:
            told = [*skipped, *document["not_committed"]]
            assert str(self.newest.id) in told, "fell back and did not say so"
            self.counts["fell back"] += 1
        return document["id"]

    async def judge(self, key: str) -> None:
        """Both must do right by an object that is damaged.

        A pack is part of one step alone: that step is verified whole, and no other.
        """
        step = self._step_of_pack(key)
        found = await self.verify(str(step) if step else None)
        assert key in {name for name, _ in found}, f"verify did not find {key}: {found}"
        self.counts["found"] += 1
        await self.restore_with_damaged(key)

    async def restore_with_damaged(self, key: str) -> None:
        """Ask for the newest step, to fall back from it; for an older one where its pack is it."""
        step = self._step_of_pack(key)
        await self.restore(str(step) if step not in (None, self.newest.id) else None)

    def _step_of_pack(self, key: str) -> StepId | None:
        return keys.parse_step(key) if key.startswith("data/") and key in self.objects else None

    def tell(self, what: str) -> None:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        print(f"\n{what}: {parts}")
