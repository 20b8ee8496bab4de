"""Reading commits back in the background: at its own pace, and out of the way of saving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager, suppress

from ckptmgr.bucket import Bucket, bytes_per_second
from ckptmgr.metrics import STATES, Metrics
from ckptmgr.repository.commit import Decision
from ckptmgr.types import StepId

GIVE_WAY_SECONDS_MAX = 60.0
"""How long one collection lets snapshots that are being stored go before it. Bounded, because a
store that is written to all the time must still be collected, or it fills up."""


class ReadBack:
    """How fast commits of one job may be read back, and what came of it.

    `found_damaged` are commits that this collection read back, and that do not hold.
    """

    def __init__(self, label: str = "", metrics: Metrics | None = None, gbps: float = 0.0) -> None:
        self._label = label
        self._metrics = metrics
        self._limit = Bucket(bytes_per_second(gbps)) if gbps else None
        self._saving = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._patience_seconds = 0.0
        self.found_damaged: set[StepId] = set()

    def begin(self) -> None:
        """A collection begins: it may wait for saves anew."""
        self._patience_seconds = GIVE_WAY_SECONDS_MAX
        self.found_damaged.clear()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A snapshot is being stored, for as long as the block lasts."""
        self._saving += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._saving -= 1
            if not self._saving:
                self._quiet.set()

    async def pace(self, nbytes: int) -> None:
        """Wait for saves, and for the limit, before so many bytes are read back."""
        begun = time.monotonic()
        if not self._quiet.is_set() and self._patience_seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), self._patience_seconds)
            self._patience_seconds -= time.monotonic() - begun
        if self._limit is not None and nbytes:
            await asyncio.sleep(self._limit.reserve(nbytes))
        if self._metrics is not None:
            self._metrics.readback_bytes.labels(self._label).inc(nbytes)

    def verified(self) -> None:
        """A commit was read back whole."""
        if self._metrics is not None:
            self._metrics.verified.labels(self._label).inc()

    def damaged(self, step: StepId) -> None:
        """A commit was read back, and does not hold."""
        self.found_damaged.add(step)
        if self._metrics is not None:
            self._metrics.readback_damage.labels(self._label).inc()

    def retired(self) -> None:
        """A commit was given up."""
        if self._metrics is not None:
            self._metrics.retired.labels(self._label).inc()

    def left(
        self, commits: Collection[Decision], *, verified: Container[StepId], held: Container[StepId]
    ) -> None:
        """What a collection has left in the store: the commits that stand."""
        if self._metrics is None:
            return
        nbytes = dict.fromkeys(STATES, 0)
        for one in commits:
            nbytes["verified" if one.id in verified else "committed"] += one.stored_bytes
        for state, total in nbytes.items():
            self._metrics.store_bytes.labels(self._label, state).set(total)
        pinned = sum(one.stored_bytes for one in commits if one.id in held)
        self._metrics.pinned_bytes.labels(self._label).set(pinned)
