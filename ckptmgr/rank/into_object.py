"""An object with a state_dict of its own gets what its rank saved, or refuses it."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.backup import backup_of
from ckptmgr.rank.devices import moved
from ckptmgr.rank.living import is_spread
from ckptmgr.rank.pagelocks import cuda_in_use
from ckptmgr.rank.regions import Clones, SavedLeaf
from ckptmgr.rank.saved import fresh, has_shared, like_mapping
from ckptmgr.rank.wants import Wants, part_like
from ckptmgr.staging.paths import Trail
from ckptmgr.staging.values import MAPPING_TAGS


class Load(Protocol):
    """Something that loads, and can be undone if a later one fails."""

    path: str
    own_code: bool

    def build(self, clones: Clones) -> None:
        """Make what it will be given, while it can still be refused."""

    def backup(self) -> Any:
        """What `undo` needs."""

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""

    def apply(self) -> None:
        """Load it."""


@dataclass(slots=True)
class ObjectLoad:
    """A state for an object with its own load_state_dict, about which nothing is known.

    `pattern` is its state now, where it has parts of tensors that are spread over processes.
    """

    path: str
    live: Any
    saved: Any
    pattern: Any
    state: Any = None
    own_code: bool = True

    def build(self, clones: Clones) -> None:
        """Make the state that it will be given. Two objects never share what they get."""
        self.state = _fresh_like(self.saved, self.pattern, Clones(clones.regions))
        if cuda_in_use():
            now = self.live.state_dict() if self.pattern is None else self.pattern
            self.state = moved(self.state, now)

    def backup(self) -> Any:
        """A deep copy of the state it has now."""
        return backup_of(self.live.state_dict())

    def undo(self, backup: Any) -> None:
        """Load what `backup` kept."""
        self.live.load_state_dict(backup)

    def apply(self) -> None:
        """Load it; the object may keep what it is given.

        It is asked for its state at once: a loader then makes the iterator that goes on from there,
        and draws a number for it, before the generators are put back.
        """
        self.live.load_state_dict(self.state)
        self.live.state_dict()


def plan_object(path: str, live: Any, saved: Any, wants: Wants) -> ObjectLoad:
    """Want what an object takes; parts of tensors, where its own tensors are parts."""
    pattern = live.state_dict() if has_shared(saved) else None
    _want_like(saved, pattern, wants)
    return ObjectLoad(path, live, saved, pattern)


def _want_like(saved: Any, pattern: Any, wants: Wants) -> None:
    for key, item in _places(saved, pattern):
        _want_like(item, _at(pattern, key), wants)
    if type(saved) is SavedLeaf and _alike(saved, pattern):
        wants.parts_like(saved.whole.path, pattern, saved)
    elif not _places(saved, pattern):
        wants.all_of(saved)


def _fresh_like(saved: Any, pattern: Any, clones: Clones) -> Any:
    """New objects; a tensor that is spread over processes in `pattern` is spread like it."""
    if type(saved) is SavedLeaf and _alike(saved, pattern):
        return part_like(pattern, saved, clones.regions)
    places = _places(saved, pattern)
    if not places:
        return fresh(saved, clones)
    items = {key: _fresh_like(item, _at(pattern, key), clones) for key, item in places}
    if type(saved) in MAPPING_TAGS:
        return like_mapping(saved, items)
    return type(saved)(items.values())


def _alike(saved: SavedLeaf, pattern: Any) -> bool:
    return is_spread(pattern) and bool(pattern.shape == saved.shape)


def _places(saved: Any, pattern: Any) -> list[tuple[Any, Any]]:
    """Keys and items of a container whose tensors may be spread; nothing of any other."""
    if pattern is None or not has_shared(saved):
        return []
    if type(saved) in MAPPING_TAGS:
        return list(saved.items())
    return list(enumerate(saved)) if type(saved) in (list, tuple) else []


def _at(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError, TypeError):
        return None


def own_part(own: Any, trail: Trail, other: Any) -> Any:
    """What is at a place of the own rank's state; `other` where it has no such place."""
    keys = []
    while trail is not None:
        trail, key = trail
        keys.append(key)
    for key in reversed(keys):
        own = _at(own, key) if type(own) in (*MAPPING_TAGS, list, tuple, deque) else None
    return other if own is None else own


def apply_loads(loads: list[Load], undo: contextlib.ExitStack) -> None:
    """Give objects with code of their own their state; closing `undo` gives them their old one.

    Raises:
        StateMismatchError: one refused; what was done to it and to others is still to be undone.
    """
    for load in loads:
        try:
            undo.callback(load.undo, load.backup())
            load.apply()
        except Exception as error:
            raise StateMismatchError(
                f"refused its saved state: {error}", subject=load.path
            ) from error
