"""The bytes of saved ranks go back into live objects: everything is checked, then applied.

plan = plan_placing(state, tables, ...)   looks at layouts and live objects only
plan.needs                                bytes of each saved rank to fetch
plan.verify({rank: memoryview})           what only the bytes can tell; makes what is new
plan.load()                               objects with code of their own, which may refuse
plan.write()                              all else, which may not: or undo(), and nothing is changed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.capture import collection_paused
from ckptmgr.rank.merging import Merging, finished_all
from ckptmgr.rank.objects import find_objects
from ckptmgr.rank.randomness import RNG_KEY, check_generators, check_names, write_generators
from ckptmgr.rank.regions import Clones, Regions
from ckptmgr.rank.saved import Saved, SavedState, fresh, read_state
from ckptmgr.rank.sources import Ranges, Sources, Table, own_rank
from ckptmgr.rank.wants import Wants, write_all
from ckptmgr.staging.paths import render

__all__ = [
    "Building",
    "Placing",
    "Saved",
    "check",
    "place",
    "plan_building",
    "plan_placing",
    "rebuild",
]


@dataclass
class Placing:
    """What will be done to a live state; nothing was changed yet.

    `surplus` are paths that were saved and that this process does not take: with several
    processes, those that no one takes are a mismatch. `notes` are for a person.
    """

    wants: Wants
    state: MutableMapping[str, Any]
    merging: Merging
    notes: list[str] = field(default_factory=list)
    merged: dict[str, Any] = field(default_factory=dict)
    rng: Any = None
    _regions: Regions | None = None

    @property
    def surplus(self) -> list[str]:
        """See the class."""
        return self.wants.surplus

    @property
    def complete(self) -> bool:
        """Whether no other saved rank can have more of what this process wants."""
        return not self.wants.incomplete and not self.wants.surplus

    @cached_property
    def needs(self) -> dict[int, Ranges]:
        """Byte ranges (start, stop) of the data region of each saved rank that must be there."""
        with collection_paused():
            return self.wants.needs()

    def verify(self, data: Mapping[int, memoryview]) -> None:
        """Look at the bytes, and make all that is new; the live state is still unchanged.

        What is new is for training, also if this is called under `torch.inference_mode`.

        Args:
            data: the data region of every rank in `needs`; other bytes of it are not read.

        Raises:
            StateMismatchError: tied or expanded tensors would have to hold different elements.
            RecordDamagedError, HostBufferDamagedError: what was saved does not hold together.
        """
        with collection_paused(), torch.inference_mode(False):
            regions = Regions(data)
            clones = Clones(regions)
            self.wants.compare(regions)
            if self.rng is not None:
                self.rng = fresh(self.rng, clones)
                self.wants.problems += check_generators(self.rng)
            self.wants.refuse()
            self.merging.build(clones)
            self.merged = finished_all(self.merged, clones)
        self._regions = regions

    def load(self) -> None:
        """Give objects with code of their own their state, after `verify`.

        Raises:
            StateMismatchError: one refused it; `undo` is to be called, as after any exception.
        """
        with collection_paused():
            self.merging.load_objects()

    def undo(self) -> None:
        """Give them their old state again: the live state is what it was before `load`."""
        self.merging.undo_objects()

    def write(self) -> None:
        """Change all else, after `load`; nothing refers to the slots afterwards."""
        assert self._regions is not None, "verify comes first"
        with collection_paused():
            self.merging.load_others()
            write_all(self.wants.writes, self._regions)
        self._regions = None
        self.merging.fill()
        _replace(self.state, self.merged)
        if self.rng is not None:
            write_generators(self.rng)

    def apply(self) -> None:
        """Change the live state of a process that is alone, after `verify`.

        Raises:
            StateMismatchError: an object refused its state, and those loaded before it were given
                their old state again.
        """
        try:
            self.load()
        except BaseException:
            self.undo()
            raise
        self.write()


def plan_placing(
    state: MutableMapping[str, Any],
    tables: Iterable[Table],
    *,
    rank: int = 0,
    saved_world: int | None = None,
    rng: bool = True,
    partial: bool = False,
    alone: bool = True,
) -> Placing:
    """Compare saved states with the live one, and plan what goes where; changes nothing.

    Private state (loaders, plain Python, generators, tensors that are no shard) comes from the
    own rank: `rank`, or `rank` modulo `saved_world` if fewer were saved; then the generators of the
    process stay as they are.

    Args:
        state: the mapping that was captured, or one built in the same way.
        tables: of all saved ranks; that of the own rank is enough where it has everything.
        rank: which of the live processes this is.
        saved_world: how many ranks saved; by default as many as there are tables.
        rng: also put back the generators of the process.
        partial: leave out what was saved under names that `state` does not have.
        alone: this is the only live process; else see `Placing.surplus`.

    Raises:
        UsageError: `rng`, and the name of the generators is taken in `state`.
        StateMismatchError: they differ in leaves, shapes or dtypes; at most 20 are named.
        RecordDamagedError, HostBufferDamagedError: what was saved can not be read.
    """
    if rng:
        check_names(state)
    known = list(tables)
    own = own_rank(rank, saved_world if saved_world is not None else len(known))
    with collection_paused():
        found = read_state(Sources(known, own))
        wants = Wants(alone)
        plan = Placing(wants, state, Merging(wants, find_objects(dict(state)), found.own))
        if rng and own != rank:
            plan.notes.append(f"the generators of rank {rank} were not saved and stay as they are")
        _plan(plan, found, rng=rng and own == rank, partial=partial)
    return plan


def check(
    state: MutableMapping[str, Any], *saved: Saved, rng: bool = True, partial: bool = False
) -> None:
    """Compare a saved state with the live one; changes nothing. Arguments are those of `place`.

    Raises:
        StateMismatchError, RecordDamagedError, HostBufferDamagedError: as `place`.
    """
    _verified(state, saved, rng=rng, partial=partial)


def place(
    state: MutableMapping[str, Any], *saved: Saved, rng: bool = True, partial: bool = False
) -> None:
    """Put what all saved ranks hold into the live objects of one process, as its only one.

    Parameters, buffers, optimizer state, tensors and arrays that exist are written in place, so
    ties and references hold. Plain Python is replaced. Generators of the process come last.

    Args:
        state: the mapping that was captured, or one built in the same way.
        saved: what the slots hold.
        rng: also put back the generators of the process.
        partial: leave out what was saved under names that `state` does not have.

    Raises:
        StateMismatchError: it does not fit, and nothing was changed; or an object refused its
            state, and those loaded before it were given their old state again.
        RecordDamagedError, HostBufferDamagedError: what was saved can not be read.
    """
    _verified(state, saved, rng=rng, partial=partial).apply()


def _verified(state: Any, saved: tuple[Saved, ...], *, rng: bool, partial: bool) -> Placing:
    plan = plan_placing(state, [one.table for one in saved], rng=rng, partial=partial)
    plan.verify({one.rank: one.data for one in saved})
    return plan


def _plan(plan: Placing, saved: SavedState, *, rng: bool, partial: bool) -> None:
    wants, state = plan.wants, plan.state
    if not isinstance(saved.all, dict):
        raise StateMismatchError("the saved state is not a mapping of names")
    found = dict(saved.all)
    if RNG_KEY not in state:
        plan.rng = found.pop(RNG_KEY, None) if rng else None
        found.pop(RNG_KEY, None)
        wants.all_of(plan.rng)
    for name in state:
        if name not in found:
            wants.problems.append(
                f"{render((None, name))}: is in the live state, but was not saved"
            )
    if not partial:
        wants.leave(render((None, name)) for name in found if name not in state)
    plan.merged = {
        name: plan.merging.merge(state[name], found[name], (None, name))
        for name in state
        if name in found
    }
    wants.refuse()


def _replace(state: MutableMapping[str, Any], items: dict[str, Any]) -> None:
    """Put new values into the user's mapping, which keeps its other names and its order."""
    for name, item in items.items():
        if state[name] is not item:
            state[name] = item


# -- without live objects -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Building:
    """A whole saved state that will be made anew; `needs` as of Placing."""

    saved: Any
    needs: dict[int, Ranges]

    def build(self, data: Mapping[int, memoryview]) -> Any:
        """The state as new objects in host memory; state_dicts stand for modules and others.

        Raises:
            RecordDamagedError, HostBufferDamagedError: what was saved does not hold together.
        """
        with torch.inference_mode(False):
            return fresh(self.saved, Clones(Regions(data)))


def plan_building(tables: Iterable[Table], *, own: int = 0) -> Building:
    """Plan the state of all ranks together: private parts are those of the rank `own`.

    Raises:
        StateMismatchError: nobody saved some part of a tensor.
        RecordDamagedError, HostBufferDamagedError: what was saved can not be read.
    """
    found = read_state(Sources(tables, own)).all
    wants = Wants()
    wants.all_of(found)
    wants.refuse()
    return Building(found, wants.needs())


def rebuild(*saved: Saved) -> Any:
    """The whole state that slots hold, as new objects in host memory.

    Raises:
        StateMismatchError, RecordDamagedError, HostBufferDamagedError: as `plan_building`.
    """
    plan = plan_building(one.table for one in saved)
    return plan.build({one.rank: one.data for one in saved})
