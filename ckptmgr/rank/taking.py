"""The step that was decided on, from where the daemon put it into the live objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptmgr.rank.link import Link
from ckptmgr.rank.load import place_from, read_saved
from ckptmgr.rank.place import check
from ckptmgr.staging.control import Restored
from ckptmgr.staging.hostbuffer import HostBuffer


@dataclass(frozen=True, slots=True)
class Fetched:
    """A step whose bytes are here and fit the live state; `source` is "memory" or "store"."""

    source: str
    buffer: HostBuffer
    reply: Restored
    state: MutableMapping[str, Any]
    rng: bool

    def apply(self) -> None:
        """Put it into the live objects."""
        place_from(self.buffer, self.reply, self.state, rng=self.rng)


@contextlib.contextmanager
def fetched(
    link: Link, reply: Restored, state: MutableMapping[str, Any], *, rng: bool
) -> Iterator[Fetched]:
    """Bring the bytes of a step here and check them against the live state, changing nothing.

    Raises:
        StateMismatchError: it does not fit.
        DamageError: it can not be read; another step may do.
    """
    with contextlib.ExitStack() as opened:
        buffer = link.buffer
        if Path(reply.path) == buffer.path:
            link.wait_populated(reply.slot)
        else:
            buffer = opened.enter_context(HostBuffer.open(Path(reply.path)))
        check(state, read_saved(buffer, reply)[1], rng=rng)
        yield Fetched(reply.source, buffer, reply, state, rng)
