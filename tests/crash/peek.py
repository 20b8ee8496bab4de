"""What a host buffer file holds, read by docs/format.md section 1 and by no code of the product."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

PAGE = 4096
WRITING, SEALED = 1, 2
COMMITTED, ABORTED = 1, 2


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot: `outcome` is 0 while undecided; `whole` says whether its record holds.

    `data_at` and `data_bytes` are where its data is in `path`.
    """

    state: int
    generation: int
    id: tuple[int, int]
    outcome: int
    whole: bool
    path: Path
    data_at: int
    data_bytes: int

    @property
    def usable(self) -> bool:
        return self.state == SEALED and self.whole and self.outcome != ABORTED

    @property
    def undecided(self) -> bool:
        return self.state == SEALED and self.whole and not self.outcome


def slots_of(path: Path) -> list[Slot]:
    """The slots of one buffer; empty if it is gone."""
    try:
        with path.open("rb") as file:
            head = file.read(2 * PAGE)
            count, table, data = struct.unpack_from("<IQQ", head, 12)
            starts = [2 * PAGE + (PAGE + table + data) * k for k in range(count)]
            return [_slot(path, file, head, k, table, at) for k, at in enumerate(starts)]
    except FileNotFoundError:
        return []


def _slot(path: Path, file: BinaryIO, head: bytes, k: int, table: int, at: int) -> Slot:
    file.seek(at)
    page = file.read(PAGE)
    word, generation, attempt, step = struct.unpack_from("<Q56xQQQ", page)
    data_bytes = struct.unpack_from("<Q", page, 128)[0]
    settled, outcome = struct.unpack_from("<QQ", head, PAGE + 64 + 64 * k)
    whole = page[184:200] == xxhash.xxh3_128_digest(page[64:184]) and generation == word >> 2
    decided = outcome if settled == word >> 2 else 0
    data_at = at + PAGE + table
    one = (attempt, step)
    return Slot(word & 3, word >> 2, one, decided, whole, path, data_at, data_bytes)


def data_of(slot: Slot) -> bytes:
    """The data of a slot."""
    with slot.path.open("rb") as file:
        file.seek(slot.data_at)
        return file.read(slot.data_bytes)


def slots_below(runtime: Path) -> list[Slot]:
    """All slots of all buffers of a runtime directory."""
    return [s for path in sorted((runtime / "buffers").glob("*.buf")) for s in slots_of(path)]


def newest_usable(runtime: Path) -> tuple[int, int] | None:
    """The newest sealed snapshot in host memory that was not given up."""
    return max((s.id for s in slots_below(runtime) if s.usable), default=None)
