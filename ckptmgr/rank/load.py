"""`load` reads a committed step without claiming anything."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

from ckptmgr.config import RESTORE_SECONDS_MAX, runtime_dir
from ckptmgr.errors import DamageError, NothingToRestoreError
from ckptmgr.rank.arguments import absolute_url, parse_step
from ckptmgr.rank.place import plan_building, plan_placing
from ckptmgr.rank.taking import planned, taken
from ckptmgr.staging.control import Client, Done, Load, Release, Restored
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
    rejected = list[tuple[int, int]]()
    with connect_or_start(runtime_dir()) as client:
        while True:
            request = Load(absolute_url(url), number, attempt, tuple(rejected))
            reply = client.ask(request, Restored, RESTORE_SECONDS_MAX)
            if reply.attempt == 0:
                raise NothingToRestoreError("the job has no committed step", subject=os.fspath(url))
            try:
                return _built(client, reply) if into is None else _placed(client, reply, into)
            except DamageError:
                rejected.append((reply.attempt, reply.step))
            finally:
                client.ask(Release(), Done)


def _built(client: Client, reply: Restored) -> Any:
    """The state of all ranks together, as new objects."""
    plan = planned(client.ask, reply, plan_building, everything=True)
    with taken(client.ask, plan.needs) as found:
        state = plan.build(found.data)
        found.check_unchanged()
        return state


def _placed(client: Client, reply: Restored, into: MutableMapping[str, Any]) -> int:
    plan = planned(
        client.ask,
        reply,
        lambda tables: plan_placing(into, tables, saved_world=reply.world, rng=False, partial=True),
    )
    with taken(client.ask, plan.needs) as found:
        plan.verify(found.data)
        plan.apply()
        found.check_unchanged()
    return reply.step
