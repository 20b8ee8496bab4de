"""The way to one store: what is on it now, what it gives, and so what is sent next."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum

from ckptmgr.config import MIB
from ckptmgr.repository.choice import Arrival, Seen, compression_pays
from ckptmgr.repository.rates import Meter, Ratio
from ckptmgr.repository.width import Width

PROBE_EVERY_BYTES = 4096 * MIB
"""Raw bytes after which a codec that is not in use is measured again, with PROBE_CHUNKS chunks:
0.4 % of the work that compressing everything would be."""

PROBE_CHUNKS = 4
"""From all over the snapshot: weights shrink more than momenta, and counters most."""

ENCODER_HALF_BYTES = 256 * MIB
"""The past of one encoder's speed counts half after so many bytes: it changes with the load."""


FULL_MIN = 0.9
"""A put counts as one of many if on an average so much of all places was taken beside it."""

ROUND_PUTS_MIN = 4
"""Least number of such puts that tell how much so many places bring; otherwise one a place."""

UNUSED_PUTS_MIN = 3
"""After so many puts a place without a round, so many places are taken for not needed."""


class Send(Enum):
    """What to do with the next pack."""

    RAW = "raw"
    COMPRESSED = "compressed"


@dataclass(eq=False, slots=True)
class Work:
    """A pack that is being compressed or put since `since`."""

    nbytes: int
    since: float


class Route:
    """Shared by all snapshots that go to one store, so that eight ranks do not make it eight times
    as busy as one. `bell` rings, once, when anything changes.
    """

    def __init__(self, encoders: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.encoders = encoders
        self.store = Meter(clock)
        self.codec = Meter(clock)
        self.ratio = Ratio()
        self.width = Width()
        self.pending_bytes = 0
        self.bell = asyncio.Event()
        self._clock = clock
        self._encoder: dict[int, Ratio] = {}
        self._encoding: list[Work] = []
        self._places: list[Work] = []
        self._moved = self._moved_at = 0.0
        self._waiting: list[int] = []
        self._raw_since_probe = 0
        self._area = self._area_at = 0.0
        self._full: list[tuple[float, float]] = []
        self._ended = 0

    @property
    def seen(self) -> Seen:
        """What was measured so far."""
        return Seen(self.store.rate, self.codec.rate, self.ratio.value)

    # -- the decision -------------------------------------------------------------------------

    def next(self, codec: str, nbytes: int, *, spare: bool, copied: bool = False) -> Send | None:
        """What to do with the next pack of a snapshot; None: wait for the bell.

        `spare` is whether a buffer is free; `copied` says that raw packs need one and an encoder,
        too, as they do where they are copied. It never says to wait when nothing is under way.
        """
        place = len(self._places) + len(self._waiting) < self.width.now
        encoder = len(self._encoding) < self.encoders
        if codec not in ("none", "auto"):
            return Send.COMPRESSED if encoder else None
        if codec == "auto" and self._compression_pays(nbytes, spare=encoder and spare):
            return Send.COMPRESSED if encoder and spare else None
        return Send.RAW if place and (encoder or not copied) else None

    def _compression_pays(self, nbytes: int, *, spare: bool) -> bool:
        """Whether an encoder is to have the pack: one that is free, or the next that will be."""
        seen = self.seen
        if not seen.known:
            return False
        flying, count = self._flying(), len(self._encoding)
        waiting: list[Arrival] = [(0.0, sum(flying) + sum(self._waiting))]
        if spare:
            # Meanwhile the store is not idle: the packs behind this one may be sent raw.
            waiting.append((0.0, self.pending_bytes - nbytes))
            start, together = 0.0, count + 1
        else:
            # The next encoder is free when one of them is done; without a buffer it has to wait
            # until something is put.
            starts = [ready for ready, _ in self._encoded_soon(count)]
            starts += [left * len(flying) / seen.store for left in flying]
            start, together = min(starts, default=math.inf), count
        ready = start + nbytes / self._encoder_rate(together)
        return compression_pays(
            seen,
            raw=[*waiting, *self._encoded_soon(count), (0.0, nbytes)],
            compressed=[*waiting, *self._encoded_soon(together), (ready, nbytes / seen.ratio)],
        )

    def _encoded_soon(self, together: int) -> list[Arrival]:
        """When what is being encoded will be ready, if so many encoders share the cores."""
        now, rate = self._clock(), self._encoder_rate(together)
        return [
            (max(work.since + work.nbytes / rate - now, 0.0), work.nbytes / self.ratio.value)
            for work in self._encoding
        ]

    def _encoder_rate(self, count: int) -> float:
        """Bytes per second of one encoder where `count` of them share the cores: as it was with
        so many, or with a number next to it.
        """
        known = min(self._encoder, key=lambda seen: abs(seen - count))
        return self._encoder[known].value

    def _flying(self) -> list[float]:
        """Bytes of each pack being put that the store has not got yet, if it serves all alike."""
        self._move()
        left, moved = [], self._moved
        for at, nbytes in enumerate(sorted(work.nbytes for work in self._places)):
            part = min(moved / (len(self._places) - at), nbytes)
            left.append(nbytes - part)
            moved -= part
        return left

    def _move(self) -> None:
        """Bring up to date how much the store has got of all packs under way together.

        A pack that has ended takes its bytes out of that, whichever way the store serves them: one
        that it puts off until then still has all of its own to go.
        """
        now = self._clock()
        most = sum(work.nbytes for work in self._places)
        self._moved = min(self._moved + (now - self._moved_at) * self.store.rate, most)
        self._moved_at = now

    # -- encoders -----------------------------------------------------------------------------

    def start_encoding(self, nbytes: int) -> Work:
        """Take an encoder; `stop_encoding` gives it back."""
        work = Work(nbytes, self._clock())
        self._encoding.append(work)
        return work

    def stop_encoding(self, work: Work) -> None:
        """Give it back; it may have been given back before."""
        if work in self._encoding:
            self._encoding.remove(work)
            self._ring()

    def begin(self) -> tuple[float, int]:
        """An encoder begins; what is returned is for `encoded`, or else `codec.drop` is told."""
        self.codec.begin()
        return self._clock(), self.codec.running

    def encoded(self, begun: tuple[float, int], raw_bytes: int, stored_bytes: int) -> None:
        """Learn from what one encoder did."""
        since, beside = begun
        beside = max(beside, self.codec.running)
        self.codec.end(raw_bytes)
        rate = self._encoder.setdefault(beside, Ratio(ENCODER_HALF_BYTES))
        rate.saw(raw_bytes, max(self._clock() - since, 1e-9))
        self.ratio.saw(raw_bytes, stored_bytes)
        self._raw_since_probe = 0

    def probe_is_due(self, nbytes: int) -> bool:
        """Whether a snapshot of `nbytes` is one to measure the codec with."""
        due = not self.ratio.value or self._raw_since_probe >= PROBE_EVERY_BYTES
        self._raw_since_probe = 0 if due else self._raw_since_probe + nbytes
        return due

    # -- places -------------------------------------------------------------------------------

    def take_place(self, nbytes: int) -> Work:
        """Take a place before the store; `leave_place` gives it back."""
        self._move()
        work = Work(nbytes, self._clock())
        self._places.append(work)
        return work

    def leave_place(self, work: Work) -> None:
        """Give it back."""
        self._move()
        self._moved = max(self._moved - work.nbytes, 0.0)
        self._places.remove(work)
        self._ring()

    @asynccontextmanager
    async def place(self, nbytes: int) -> AsyncIterator[None]:
        """A place before the store, when there is one. Raw packs do not come in between."""
        self._waiting.append(nbytes)
        try:
            while len(self._places) >= self.width.now:
                await self.bell.wait()
        finally:
            self._waiting.remove(nbytes)
        work = self.take_place(nbytes)
        try:
            yield
        finally:
            self.leave_place(work)

    @asynccontextmanager
    async def putting(self, nbytes: int) -> AsyncIterator[None]:
        """Measure a put, which has a place."""
        self._add_area()
        self.store.begin()
        start, area, width = self._clock(), self._area, self.width.now
        try:
            yield
        except BaseException:
            self._add_area()
            self.store.drop()
            raise
        self._add_area()
        self.store.end(nbytes)
        seconds = max(self._clock() - start, 1e-9)
        if width == self.width.now:
            self._one_of_many(nbytes, seconds, (self._area - area) / seconds)

    def _add_area(self) -> None:
        """Bring the integral of the number of puts over time up to date."""
        now = self._clock()
        self._area += self.store.running * (now - self._area_at)
        self._area_at = now

    def _one_of_many(self, nbytes: int, seconds: float, beside: float) -> None:
        """Learn from a put with `beside` puts under way, itself too, on an average. Where all
        places were taken, throughput is that of one put times their number.
        """
        width = self.width.now
        self._ended += 1
        if beside >= FULL_MIN * width:
            self._full.append((beside * nbytes, seconds))
        if len(self._full) >= max(width, ROUND_PUTS_MIN):
            moved, elapsed = (sum(column) for column in zip(*self._full, strict=True))
            self.width.saw(moved / elapsed)
        elif self._ended < UNUSED_PUTS_MIN * width:
            return
        else:
            self.width.unused()
        self._full, self._ended = [], 0

    def _ring(self) -> None:
        self.bell.set()
        self.bell = asyncio.Event()


def spread(count: int, wanted: int) -> Sequence[int]:
    """`wanted` indices all over `count`, or all there are."""
    return sorted({at * count // wanted for at in range(wanted)}) if count else []
