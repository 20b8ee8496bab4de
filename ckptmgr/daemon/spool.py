"""The spool: parts of steps on a disk of this host, until the store takes them (docs/format.md 8).

A part is there as long as its manifest is: it is put after its packs and deleted before them.
Nothing is ever decided in a spool; that is done in the store only.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ckptmgr.config import STORE_TIMEOUT_SECONDS, open_private_dir
from ckptmgr.daemon.log import label_of, warning
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    HostMemoryError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    UnsupportedFormatError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.commit import get_record, put_record, stored_manifest
from ckptmgr.repository.manifest import SealedManifest
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import PAGE_BYTES, Snapshot, StepId

_LOCK = "lock"
_BINDINGS = "binding/"

_SLACK_BYTES = 64 * PAGE_BYTES
"""Room that a part takes beside its data and its table: headers, padding, directories."""


class SpoolBinding(msgspec.Struct, frozen=True):
    """Which job a spool belongs to, and which steps that job keeps."""

    url: str
    keep: int | str


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """What one rank has of one step, whole and durable in the spool."""

    id: StepId
    rank: int
    nonce: str
    world: int
    nbytes: int
    sealed_at: float

    @classmethod
    def of(cls, sealed: SealedManifest) -> Part:
        """The part that a manifest tells of."""
        one = sealed.manifest
        nbytes = one.stored_bytes + len(sealed.record)
        return cls(one.id, one.rank, one.nonce, one.world, nbytes, one.sealed_at)


class Spool:
    """The parts of one job. `copied` are those that the store holds, too, and that wait for their
    decision; `stranded` are attempts that the store does not know; `aside` are parts that could not
    be copied by a fault of ours: none of them holds others up.
    """

    def __init__(self, directory: SpoolDirectory, url: str) -> None:
        self._directory = directory
        self._path = directory.path / label_of(url)
        self.url = url
        self.keep: int | str = 0
        self.store = LocalStore(str(self._path))
        self._binding = ""
        self._parts: dict[tuple[StepId, int], Part] = {}
        self._newer: set[tuple[StepId, int]] = set()
        self.copied: set[Part] = set()
        self.aside: set[Part] = set()
        self.stranded: set[int] = set()
        self.changed = asyncio.Condition()
        self.reserved_bytes = 0
        self.full = False
        self.failing = False

    # -- what is there ------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Where it is."""
        return str(self._path)

    @property
    def parts(self) -> list[Part]:
        """All parts, oldest first."""
        return sorted(self._parts.values())

    @property
    def waiting(self) -> list[Part]:
        """Parts that are still to be copied, oldest first; new snapshots queue behind them."""
        return [
            part
            for part in self.parts
            if part not in self.copied | self.aside and part.id.attempt not in self.stranded
        ]

    def blocks(self, attempt: int) -> bool:
        """Whether a new snapshot of an attempt has to queue behind what is there.

        Within an attempt steps are decided in order: many later ones that are decided prove an
        undecided one to be garbage.
        """
        passed = self.copied | self.aside
        uncopied = self._parts.keys() - {(part.id, part.rank) for part in passed}
        return bool(self.waiting) or any(step.attempt == attempt for step, _ in uncopied)

    @property
    def used_bytes(self) -> int:
        """Bytes of all parts, and of those that are being written."""
        return self.reserved_bytes + sum(part.nbytes for part in self._parts.values())

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether the part of a snapshot is there."""
        return self.has(snapshot.nonce, snapshot.id, snapshot.rank)

    def has(self, nonce: str, step: StepId, rank: int) -> bool:
        """Whether a rank's part of a step is there."""
        found = self._parts.get((step, rank))
        return found is not None and found.nonce == nonce

    @property
    def reading(self) -> Store:
        """Where parts are read: what stays unreadable while the binding can be read is damaged, and
        costs its own part only.
        """
        return RetryingStore(
            self.store, deadline_seconds=STORE_TIMEOUT_SECONDS, landmark=self._binding
        )

    # -- parts come ---------------------------------------------------------------------------

    def room_for(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot fits."""
        return self._directory.room_for(_room(snapshot))

    @asynccontextmanager
    async def writing(self, snapshot: Snapshot, keep: int | str) -> AsyncIterator[LocalStore]:
        """The store to write a part into. What was written is deleted again if that fails.

        Raises:
            StoreFullError: it does not fit.
            StoreError: the disk failed, or a newer ckptmgr has written this part.
        """
        if (snapshot.id, snapshot.rank) in self._newer:
            key = keys.manifest(snapshot.id, snapshot.rank)
            raise StoreError("is there already, by a newer ckptmgr", subject=key)
        if not self.room_for(snapshot):
            raise StoreFullError("has no room for another snapshot", subject=str(self._path))
        self.reserved_bytes += _room(snapshot)
        try:
            await self._bind(keep)
            yield self.store
        except BaseException:
            with contextlib.suppress(StoreError):  # the next daemon deletes it
                await self._discard(snapshot.id, snapshot.rank)
            raise
        finally:
            self.reserved_bytes -= _room(snapshot)

    async def add(self, sealed: SealedManifest) -> Part:
        """Take note of a part whose manifest is durable."""
        part = Part.of(sealed)
        self._parts[part.id, part.rank] = part
        await self.tell()
        return part

    async def _bind(self, keep: int | str) -> None:
        """Say whose spool it is, durably, before its first part."""
        if self.keep == keep:
            return
        try:
            open_private_dir(self._path)
        except HostMemoryError as error:
            raise StoreError(error.message, subject=error.subject) from error
        old = await self.store.list(_BINDINGS)
        number = 1 + max((int(key.removeprefix(_BINDINGS)) for key in old), default=0)
        key = f"{_BINDINGS}{number:08d}"
        await put_record(self.store, Kind.SPOOL, key, SpoolBinding(self.url, keep))
        for other in old:
            await self.store.delete(other)
        self.bound(key, keep)

    def bound(self, key: str, keep: int | str) -> None:
        """Take note of the binding that counts."""
        self._binding, self.keep = key, keep

    # -- parts go -----------------------------------------------------------------------------

    async def manifest(self, part: Part) -> SealedManifest:
        """The manifest of a part.

        Raises:
            DamageError: it does not hold.
        """
        try:
            return await stored_manifest(self.reading, part.id, part.rank)
        except ObjectNotFoundError as error:
            key = keys.manifest(part.id, part.rank)
            raise DamageError("is gone from the spool", subject=key) from error

    async def remove(self, part: Part) -> None:
        """Delete a part: call it only when its step is decided, durably, in the store.

        What a disk does not delete is no part any more all the same: the next daemon looks at the
        register before it brings it, and deletes it then.
        """
        try:
            await self._discard(part.id, part.rank)
        except StoreError as error:
            warning("spool_left", job=label_of(self.url), step=str(part.id), why=str(error))
        self._parts.pop((part.id, part.rank), None)
        self.copied.discard(part)
        self.aside.discard(part)
        self.full = False
        await self._prune(part.id)
        await self.tell()

    async def _discard(self, step: StepId, rank: int) -> None:
        # The manifest first: without it packs are leftovers, which `load` deletes.
        await self.store.delete(keys.manifest(step, rank))
        for key in await self.store.list(keys.packs(step, rank)):
            await self.store.delete(key)

    async def _prune(self, step: StepId) -> None:
        """Let go of the directories of a step, unless something may be on its way into them."""
        if self.reserved_bytes or any(part.id == step for part in self._parts.values()):
            return
        with contextlib.suppress(StoreError):  # `load` does it
            await self.store.prune(keys.manifests(step))
            await self.store.prune(keys.packs(step))

    async def tell(self) -> None:
        """Let those who wait look again."""
        async with self.changed:
            self.changed.notify_all()

    async def wait_empty(self) -> None:
        """Return when everything is decided in the store."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self._parts)

    async def aclose(self) -> None:
        """End the threads of its store; nothing is read or written any more."""
        await self.store.aclose()

    # -- start --------------------------------------------------------------------------------

    async def load(self) -> None:
        """Find the parts that a daemon before this one left, and delete what it did not finish.

        Parts of a newer ckptmgr are left alone: it is the one that can bring them into the store.
        """
        await self.store.sweep_temporaries(0.0)
        for key in await self.store.list("man/"):
            step, rank = keys.parse_step(key), keys.parse_rank(key)
            if step is None or rank is None:
                continue
            try:
                sealed = await stored_manifest(self.reading, step, rank)
            except UnsupportedFormatError as error:
                warning("spool_refused", path=f"{label_of(self.url)}/{key}", why=str(error))
                self._newer.add((step, rank))
                continue
            except DamageError as error:
                warning("spool_dropped", job=label_of(self.url), step=str(step), why=str(error))
                await self._discard(step, rank)
                continue
            self._parts[step, rank] = Part.of(sealed)
        whole = {keys.packs(step, rank) for step, rank in self._newer.union(self._parts)}
        for key in await self.store.list("data/"):
            if key.rpartition("/")[0] + "/" not in whole:
                await self.store.delete(key)
        for prefix in ("man/", "data/"):
            await self.store.prune(prefix)


def _room(snapshot: Snapshot) -> int:
    return snapshot.data_bytes + snapshot.layout_bytes + snapshot.values_bytes + _SLACK_BYTES


class SpoolDirectory:
    """The spools of all jobs of one daemon; `bytes_max` 0 means what the file system has."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self.path = path
        self.bytes_max = bytes_max
        self._spools: dict[str, Spool] = {}
        self._lock = -1

    @classmethod
    async def open(cls, path: Path, bytes_max: int) -> SpoolDirectory:
        """Open a directory for this daemon alone, and find what is in it.

        Raises:
            HostMemoryError: it is not a private directory of this user, or another daemon has it.
            StoreError: it can not be read.
        """
        open_private_dir(path)
        found = cls(path, bytes_max)
        found._lock = _locked(path / _LOCK)
        try:
            for entry in sorted(path.iterdir()):
                if entry.name != _LOCK:
                    await found._adopt(entry)
        except BaseException:
            await found.aclose()
            raise
        return found

    async def _adopt(self, path: Path) -> None:
        """Open the spool of a job; one that says nothing of its job is told and left alone."""
        try:
            open_private_dir(path)
            key, binding = await _binding_of(path)
            if binding is None:
                return  # it ended before its first part
            if path.name != label_of(binding.url):
                raise DamageError("is the spool of another job", subject=str(path))
            spool = self.of(binding.url)
            spool.bound(key, binding.keep)
            await spool.load()
        except CkptmgrError as error:
            warning("spool_refused", path=path.name, why=str(error))

    def of(self, url: str) -> Spool:
        """The spool of a job; nothing is made before its first part."""
        if url not in self._spools:
            self._spools[url] = Spool(self, url)
        return self._spools[url]

    def forget(self, url: str) -> None:
        """A job that has nothing in its spool is not in use any more; who has that closes it."""
        self._spools.pop(url, None)

    def unfinished(self) -> Iterator[Spool]:
        """Spools that hold something."""
        return (spool for spool in list(self._spools.values()) if spool.parts)

    @property
    def used_bytes(self) -> int:
        """Bytes of all parts of all jobs."""
        return sum(spool.used_bytes for spool in self._spools.values())

    def room_for(self, nbytes: int) -> bool:
        """Whether so many bytes more are allowed, and there."""
        return self.free_bytes() >= nbytes

    def free_bytes(self) -> int:
        """How many bytes more are allowed, and there."""
        try:
            found = os.statvfs(self.path)
        except OSError:
            return 0
        reserved = sum(spool.reserved_bytes for spool in self._spools.values())
        free = found.f_bavail * found.f_frsize - reserved
        if self.bytes_max:
            free = min(free, self.bytes_max - self.used_bytes)
        return max(free, 0)

    def state(self) -> dict[str, Any]:
        """What `status` says of it."""
        return {
            "path": str(self.path),
            "used_bytes": self.used_bytes,
            "bytes_max": self.bytes_max or None,
        }

    async def aclose(self) -> None:
        """Close all spools, and let another daemon have the directory."""
        while self._spools:
            _, spool = self._spools.popitem()
            await spool.aclose()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


async def _binding_of(path: Path) -> tuple[str, SpoolBinding | None]:
    """The newest binding of a spool, and its key; the one before it goes when it is durable."""
    store = LocalStore(str(path))
    try:
        found = await store.list(_BINDINGS)
        if not found:
            return "", None
        return found[-1], await get_record(store, Kind.SPOOL, found[-1], SpoolBinding)
    finally:
        await store.aclose()


def _locked(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostMemoryError(f"can not be opened: {error.strerror}", subject=str(path)) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise HostMemoryError("belongs to another daemon", subject=str(path.parent)) from None
    return fd
