"""A rare and bounded look into a job's store, while somebody looks at the status page."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from ckptmgr.daemon.history import History
from ckptmgr.daemon.log import fault
from ckptmgr.errors import CkptmgrError, DamageError, ObjectNotFoundError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog, decided_steps
from ckptmgr.repository.commit import Decision
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import StepId

GLANCE_SECONDS_MIN = 15.0
"""Pause between two looks: five listings each, of keys of which a step has one or few."""

GLANCE_STEPS_MAX = 64
"""Registers that are read, newest first, each once: they never change."""

_READS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Shown:
    """What a look has found: Unix time of the look, marks of steps, and the newest decisions."""

    at: float = 0.0
    retired: frozenset[StepId] = frozenset()
    verified: frozenset[StepId] = frozenset()
    held: frozenset[StepId] = frozenset()
    decisions: dict[StepId, Decision] = field(default_factory=dict)


class Glance:
    """Looks when asked, never twice at a time, and not at all while the store fails: then saving
    finds out by itself when it is back.
    """

    def __init__(self, catalog: Catalog, history: History) -> None:
        self._catalog = catalog
        self._history = history
        self._task: asyncio.Task[None] | None = None
        self._due_at = 0.0
        self.shown = Shown()
        self.why = ""

    def soon(self) -> None:
        """Look in the background, if it is time for it."""
        busy = self._task is not None and not self._task.done()
        if busy or self._history.failure is not None or time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + GLANCE_SECONDS_MIN
        self._task = asyncio.create_task(self._look(), name="glance")

    async def _look(self) -> None:
        try:
            self.shown, self.why = await self._found(), ""
        except CkptmgrError as error:
            self.why = str(error)
        except Exception as error:  # noqa: BLE001 - a page must not end the daemon
            fault(error)

    async def _found(self) -> Shown:
        store = self._catalog.store
        decided, retired = await decided_steps(store)
        verified = await self._marked("verified/")
        held = await self._marked("holds/")
        newest = sorted(decided, reverse=True)[:GLANCE_STEPS_MAX]
        before = self.shown.decisions
        if not before.keys() <= decided:  # somebody has emptied the store meanwhile
            before = {}
        known = {step: before.get(step) for step in newest}
        asked = [step for step, decision in known.items() if decision is None]
        found = await in_lanes(self._decision, asked, _READS_AT_ONCE)
        known.update(zip(asked, found, strict=True))
        decisions = {step: decision for step, decision in known.items() if decision is not None}
        return Shown(time.time(), retired, verified, held, decisions)

    async def _marked(self, prefix: str) -> frozenset[StepId]:
        steps = map(keys.parse_step, await self._catalog.store.list(prefix))
        return frozenset(step for step in steps if step is not None)

    async def _decision(self, step: StepId) -> Decision | None:
        try:
            found = await self._catalog.decision(step)
        except (DamageError, ObjectNotFoundError):
            return None
        return replace(found, manifests=())  # of which there is one for each rank

    async def aclose(self) -> None:
        """End a look that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
