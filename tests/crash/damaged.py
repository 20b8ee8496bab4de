"""A store with every kind of object, to be damaged: what verify names and what restore gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ckptmgr.errors import DamageError
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import check_format
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import PAGE_BYTES
from small_step import (
    Objects,
    SavedStep,
    same_bits,
    shelf_of,
)

KINDS = {
    "format": "format",
    "attempts": "attempts/",
    "registers": "commit/",
    "manifests": "man/",
    "marks": ("retired/", "holds/", "verified/", "tags/"),
    "packs": "data/",
}


@dataclass
class Rig:
    """A damaged copy of a store, the truth about it, and what was counted."""

    saved: list[SavedStep]
    objects: Objects
    store: MemoryStore
    directory: Path
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def newest(self) -> SavedStep:
        return self.saved[-1]

    def keys_of(self, kind: str) -> list[str]:
        return [key for key in self.objects if key.startswith(KINDS[kind])]

    def put_back(self) -> None:
        shelf = shelf_of(self.store)
        shelf.clear()
        shelf.update({key: bytearray(blob) for key, blob in self.objects.items()})

    async def verify(self) -> list[tuple[str, int]]:
        """What `ckptmgr verify --all` does; the places that it names."""
        try:
            await check_format(self.store, create=False)
            reports = await verify_store(
                Catalog(self.store), None, every=True, quick=False, progress=lambda _: None
            )
        except DamageError as error:
            return [(error.subject, 0)]
        return [(d["key"], d["offset"]) for report in reports for d in report["damage"]]

    async def restore(self) -> str:
        """What `ckptmgr restore` does; the step it gave, after its bits were compared."""
        for path in self.directory.iterdir():
            path.unlink()
        try:
            document = await restore_files(
                Catalog(self.store), None, "safetensors", self.directory, lambda _: None
            )
        except DamageError:
            self.counts["refused"] += 1
            return ""
        truth = {str(one.id): one for one in self.saved}[document["id"]]
        assert same_bits(self.directory, truth), "SILENTLY WRONG"
        skipped = [one["id"] for one in document["skipped"]]
        if truth is self.newest:
            self.counts["exact"] += 1
        else:
            told = [*skipped, *document["not_committed"]]
            assert str(self.newest.id) in told, "fell back and did not say so"
            self.counts["fell back"] += 1
        return document["id"]

    async def judge(self, key: str, offset: int | None = None) -> None:
        """Both must do right by an object that is damaged (at `offset`)."""
        found = await self.verify()
        assert key in {name for name, _ in found}, f"verify did not find {key}: {found}"
        if offset is not None and key.startswith("data/"):
            assert any(n == key and at <= offset < at + 4 * PAGE_BYTES for n, at in found), found
        self.counts["found"] += 1
        await self.restore()

    def tell(self, what: str) -> None:
        parts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        print(f"\n{what}: {parts}")
