"""Records as the processes of the model put them: visible first, durable when the put returns."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from model.explore import Local, Move, World
from model.protocol_rules import Rules, Setup

STOPPED = None
"""A process that does nothing any more."""

PUTTING = frozenset({"flush", "settle"})
"""States of a process that `Records.step` goes on from."""


class Records:
    """How records come into the store under a setup.

    Without power cuts a put is one step. With them it is two: the record is visible from the
    first on, and durable from the second on. A process that is found dead in between leaves a
    record that is visible only, until somebody makes it durable or a power cut takes it away.
    """

    def __init__(self, setup: Setup, decide: Rules) -> None:
        self.setup = setup
        self.decide = decide

    def put(self, w: World, label: str, key: Hashable, value: Any, then: Local) -> Move:
        """Put a record, over whatever is there: for random names, which nobody else uses."""
        return self._visible(label, key, value, then)

    def put_new(
        self, w: World, label: str, key: Hashable, value: Any, won: Local, lost: Local
    ) -> Move:
        """Put a record unless there is one already."""
        if w[key] is not None:
            return (f"{label}: there is one", lost, {})
        return self._visible(label, key, value, won)

    def decide_once(
        self, w: World, label: str, key: Hashable, value: Any, again: Local, then: Any
    ) -> Move:
        """Put into a register or obey what is there; `then(value)` is what comes after.

        What is there is made durable, and read after that, in the state `again`: whatever was
        read before may be gone, and another decision in its place.
        """
        found = w[key]
        if found is None:
            return self._visible(label, key, value, then(value))
        if not is_soft(w, key) or "settle" in self.decide.without:
            return (f"{label}: {found} is there", then(found), {})
        after = then(found) if "read after settling" in self.decide.without else again
        return (f"{label}: {found} is there", self.settled(key, after), {})

    def settled(self, key: Hashable, then: Local) -> Local:
        """The local state that makes an existing record durable and goes on with `then`."""
        return ("settle", key, then) if self.setup.cuts else then

    def step(self, local: Any, w: World) -> list[Move]:
        """The second half of what is begun by the other methods."""
        if local[0] == "flush":
            return self._flush(local, w)
        _, key, then = local
        if w[key] is None:
            return [(f"make {key} durable: it is gone", STOPPED, {})]
        return [(f"make {key} durable", then, {("soft", key): None})]

    def _visible(self, label: str, key: Hashable, value: Any, then: Local) -> Move:
        if not self.setup.cuts:
            return (label, then, {key: value})
        changes = {key: value, ("soft", key): True}
        return (f"{label} (visible)", ("flush", key, value, then), changes)

    def _flush(self, local: Any, w: World) -> list[Move]:
        _, key, value, then = local
        if w[key] != value:
            return [(f"{key} is gone", STOPPED, {})]
        return [(f"{key} is durable", then, {("soft", key): None})]


def is_soft(w: World, key: Hashable) -> bool:
    """Whether a record is visible but not durable."""
    return w[key] is not None and bool(w["soft", key])


def dropped(w: World, keys: list[Hashable]) -> list[Mapping[Hashable, Any]]:
    """Everything that a power cut may do to those of the records that are not durable."""
    outcomes: list[dict[Hashable, Any]] = [{}]
    for key in keys:
        if is_soft(w, key):
            kept = [{**one, ("soft", key): None} for one in outcomes]
            outcomes = kept + [{**one, key: None} for one in kept]
    return outcomes
