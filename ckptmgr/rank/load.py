"""`load` reads a committed step without claiming anything."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

from ckptmgr.config import RESTORE_SECONDS_MAX, runtime_dir
from ckptmgr.errors import DamageError, NothingToRestoreError
from ckptmgr.rank.arguments import absolute_url, parse_step
from ckptmgr.rank.taking import built, taken
from ckptmgr.staging.control import Done, Load, Release, Restored
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
    are left out. Without `into`, returns the saved state as nested containers of new tensors: whole
    ones, whoever of the ranks held them; optimizers as torch's state_dicts. Loaders, plain Python
    and whatever else each rank has for itself are those of rank 0.

    Raises:
        NothingToRestoreError: there is no such step.
        StateMismatchError: it does not fit `into`; nothing was changed.
        DamageError: no step can be read.
        StoreUnreachableError: the store does not answer.
    """
    attempt, number = parse_step(step)
    rejected = list[tuple[int, int]]()
    with connect_or_start(runtime_dir()) as client:
        while True:
            request = Load(absolute_url(url), number, attempt, tuple(rejected))
            reply = client.ask(request, Restored, RESTORE_SECONDS_MAX)
            if reply.attempt == 0:
                raise NothingToRestoreError("the job has no committed step", subject=os.fspath(url))
            try:
                if into is None:
                    return built(client.ask, reply)
                with taken(client.ask, reply, into, rng=False, partial=True) as found:
                    found.apply()
                    return reply.step
            except DamageError:
                rejected.append((reply.attempt, reply.step))
            finally:
                client.ask(Release(), Done)
