"""Read a step for evaluation: nothing is claimed, nothing is written."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ckptmgr.config import runtime_dir
from ckptmgr.errors import NothingToRestoreError
from ckptmgr.rank.checkpointer import (
    RESTORE_SECONDS_MAX,
    absolute_url,
    parse_step,
    place_from,
    read_saved,
)
from ckptmgr.rank.place import rebuild
from ckptmgr.staging.control import Load, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.launch import connect_or_start


def load(
    url: str | os.PathLike[str],
    into: MutableMapping[str, Any] | None = None,
    *,
    step: int | str | None = None,
) -> Any:
    """Read the last consistent step of a job, or `step` (1200, or "3.1200" for attempt 3).

    With `into` (as `state` of a Checkpointer; random states are left alone) the saved state is
    put into the live objects, and its step number is returned. Entries that `into` leaves out
    are left out. Without `into`, returns the saved state as nested containers of new tensors.

    Raises:
        NothingToRestoreError: there is no such step.
        StateMismatchError: it does not fit `into`; nothing was changed.
        DamageError: no step can be read.
        StoreUnreachableError: the store does not answer.
    """
    attempt, number = parse_step(step)
    request = Load(absolute_url(url), 0, number, attempt)
    with connect_or_start(runtime_dir()) as client:
        reply = client.ask(request, Restored, RESTORE_SECONDS_MAX)
        if reply.attempt == 0:
            raise NothingToRestoreError("the job has no committed step", subject=os.fspath(url))
        with HostBuffer.open(Path(reply.path)) as buffer:
            if into is not None:
                place_from(buffer, reply, into, rng=False, partial=True)
                return reply.step
            _, saved = read_saved(buffer, reply)
            return rebuild(saved)
