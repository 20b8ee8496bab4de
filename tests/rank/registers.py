"""Registers in memory, for ranks that are threads; they can be made to hang like a dead server."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ckptmgr.rank.group import Claimed, Verdict


class MemoryRegisters:
    """As promised by Registers; `answering` is cleared to let every question hang."""

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}
        self.answering = threading.Event()
        self.answering.set()
        self.callers: set[str] = set()
        self._lock = threading.Lock()

    def _asked(self) -> None:
        self.callers.add(threading.current_thread().name)
        self.answering.wait()

    def decide(self, key: str, record: str) -> bytes:
        self._asked()
        with self._lock:
            return self.records.setdefault(key, record.encode())

    def read(self, key: str) -> bytes | None:
        self._asked()
        return self.records.get(key)

    def count(self, key: str, more: int = 0) -> int:
        self._asked()
        with self._lock:
            self.counts[key] = self.counts.get(key, 0) + more
            return self.counts[key]

    def forget(self, key: str) -> None:
        self._asked()
        with self._lock:
            self.records.pop(key, None)

    def twin(self) -> MemoryRegisters:
        return self


class MemberOf:
    """Rank `rank` of `world` threads: what a Group is to processes, for the save path."""

    def __init__(self, rank: int, world: int, registers: object) -> None:
        self.rank, self.world = rank, world
        self._registers = registers

    def share(self, claim: Callable[[], Claimed]) -> Claimed:
        return claim()

    def agree(self, topic: str, verdict: Verdict, timeout_seconds: float) -> Verdict:
        return verdict

    def registers(self) -> object:
        return self._registers.twin()  # type: ignore[attr-defined]
