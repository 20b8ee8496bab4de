"""Raw or compressed: which of the two lets the store finish a pack's bytes sooner.

Codec and store work side by side. Compressing all of it takes as long as the slower of the two,
and where the codec is the slower one, it pays to send raw what it does not get to. So each pack is
judged by itself: compression saves store time, and may let the store wait for the codec.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GAIN_MIN = 1.03
"""Compress only where a snapshot finishes so much sooner: less is not worth the cores that it
takes from training, and is within the noise of what was measured."""

MIXED_GAIN_MIN = 1.10
"""The same where the store is faster than all encoders together. Then every encoder is busy until
the end for what a part of the packs saves, and a restore, which reads faster still, has to wait for
the decoder: that must bring more."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What was measured; 0 where nothing is known.

    `store` is in stored bytes per second; `codec`, of all encoders together, in raw bytes per
    second; `ratio` is raw/stored bytes.
    """

    store: float = 0.0
    codec: float = 0.0
    ratio: float = 0.0

    @property
    def known(self) -> bool:
        """Whether everything was measured."""
        return min(self.store, self.codec, self.ratio) > 0


def gain(seen: Seen) -> float:
    """How many times sooner a long snapshot is stored if the codec takes part.

    The store moves `store` bytes a second. For each raw byte that the codec takes in that second,
    1 - 1/ratio bytes need not be moved, until everything is compressed.
    """
    if not seen.known or seen.ratio <= 1:
        return 1.0
    return min(seen.ratio, 1 + seen.codec / seen.store * (1 - 1 / seen.ratio))


def gain_wanted(seen: Seen) -> float:
    """The least gain for which anything is compressed."""
    return GAIN_MIN if seen.codec >= seen.store else MIXED_GAIN_MIN


Arrival = tuple[float, float]
"""When something is ready to be put, in seconds from now, and its stored bytes."""


def finish_seconds(store: float, arrivals: Iterable[Arrival]) -> float:
    """When a store of `store` bytes per second has it all: it idles until the next is ready."""
    end = 0.0
    for ready, nbytes in sorted(arrivals):
        end = max(end, ready) + nbytes / store
    return end


def compression_pays(seen: Seen, raw: Iterable[Arrival], compressed: Iterable[Arrival]) -> bool:
    """Whether all that is to be put has been put sooner if the pack at hand is compressed: `raw`
    and `compressed` are what arrives at the store either way, that pack included.
    """
    if gain(seen) < gain_wanted(seen):
        return False
    return finish_seconds(seen.store, compressed) < finish_seconds(seen.store, raw)
