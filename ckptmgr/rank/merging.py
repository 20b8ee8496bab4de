"""The walk over a live and a saved state: what is written in place, what is loaded, what is new."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ckptmgr.rank.capture import keeps_own_state
from ckptmgr.rank.claims import alike
from ckptmgr.rank.devices import moved
from ckptmgr.rank.externals import GENERATORS, same_generator, take_over
from ckptmgr.rank.into_module import plan_module
from ckptmgr.rank.into_object import Load, apply_loads, own_part, plan_object
from ckptmgr.rank.into_optimizer import plan_optimizer
from ckptmgr.rank.objects import Objects
from ckptmgr.rank.outline import array_outline, kind_of, outline
from ckptmgr.rank.regions import Clones, SavedLeaf
from ckptmgr.rank.saved import fresh
from ckptmgr.rank.wants import Wants
from ckptmgr.staging.paths import Trail, render
from ckptmgr.staging.values import MAPPING_TAGS, External, fixed_attributes


@dataclass(frozen=True, slots=True)
class New:
    """A saved item that is made anew when its bytes are there; `live` is what it replaces."""

    saved: Any
    live: Any = None


@dataclass(frozen=True, slots=True)
class NewTuple:
    """A tuple with live objects and new ones in it."""

    items: list[Any]


@dataclass(slots=True)
class Merging:
    """The walk over live and saved state, and what it finds to be done.

    `own` is what the own rank alone saved, `seen` what was saved for each live object so far.
    """

    wants: Wants
    objects: Objects
    own: Any
    seen: dict[int, tuple[Any, Any, str]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    arrays: list[tuple[Any, Any]] = field(default_factory=list)
    generators: list[tuple[Any, Any]] = field(default_factory=list)
    fills: list[tuple[Any, Any]] = field(default_factory=list)
    loaded: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def build(self, clones: Clones) -> None:
        """Make everything that is new; nothing in it is in saved memory."""
        for load in self.loads:
            load.build(clones)
        self.arrays = [(live, fresh(item, clones)) for live, item in self.arrays]
        self.generators = [(live, fresh(item, clones)) for live, item in self.generators]
        self.fills = [(live, finished_all(items, clones)) for live, items in self.fills]

    def load_objects(self) -> None:
        """Give objects with code of their own their state, which they may refuse.

        Raises:
            StateMismatchError: one refused; `undo_objects` is to be called, as after any exception.
        """
        apply_loads([load for load in self.loads if load.own_code], self.loaded)

    def undo_objects(self) -> None:
        """Give them their old state again, each of them whatever the others do."""
        self.loaded.close()

    def load_others(self) -> None:
        """Give the others their state, after which nothing is undone."""
        self.loaded.pop_all()
        for load in self.loads:
            if not load.own_code:
                load.apply()

    def fill(self) -> None:
        """Change arrays, generators and containers."""
        for array, found in self.arrays:
            array[...] = found
        for generator, found in self.generators:
            take_over(generator, found)
        for container, items in self.fills:
            fill(container, items)

    def merge(self, live: Any, saved: Any, trail: Trail) -> Any:
        """Plan how `saved` goes into `live`; gives what will stand in its place."""
        if isinstance(live, Tensor):
            return self._tensor(live, saved, trail)
        if isinstance(live, np.ndarray):
            return self._array(live, saved, trail)
        if keeps_own_state(live):
            return self._object(live, saved, trail)
        if isinstance(live, GENERATORS) and takes_over(live, saved):
            if not self._is_again(live, saved, trail):
                self.wants.all_of(saved)
                self.generators.append((live, saved))
            return live
        if can_be_filled(live, saved):
            if type(live) in MAPPING_TAGS:
                return self._mapping(live, saved, trail)
            if type(live) in (list, tuple, deque):
                return self._sequence(live, saved, trail)
        self._need_nothing_of(live, trail, f"but a {_called(saved)} was saved")
        return self._new(saved)

    def _is_again(self, live: Any, saved: Any, trail: Trail) -> bool:
        """Whether a live object was come to before, under another name: it can hold one state only.

        Then what was saved under both names must be the same.
        """
        wants, path = self.wants, render(trail)
        _, before, first = self.seen.setdefault(id(live), (live, saved, path))
        if first == path:
            return False
        pairs: list[tuple[SavedLeaf, SavedLeaf]] = []
        if not alike(before, saved, pairs):
            wants.problems.append(
                f"{path}: is {first} in the live state, but they differ in the saved one"
            )
        for one, other in pairs:
            wants.tie(other.whole.path, [one.whole.box], one.whole.path, one, other)
        return True

    def _new(self, saved: Any, live: Any = None) -> New:
        self.wants.all_of(saved)
        return New(saved, live)

    def _tensor(self, live: Tensor, saved: Any, trail: Trail) -> Any:
        wants, path = self.wants, render(trail)
        found = outline(saved)
        if found is None:
            wants.problems.append(f"{path}: is a tensor, but a {kind_of(saved)} was saved")
        elif difference := found.difference(live):
            wants.problems.append(f"{path}: {difference}")
        elif type(saved) is SavedLeaf:
            wants.write(path, live, saved)
        else:
            return self._new(saved, live)  # a sparse or quantized tensor, put together anew
        return live

    def _array(self, live: Any, saved: Any, trail: Trail) -> Any:
        problems, path = self.wants.problems, render(trail)
        found = array_outline(saved)
        if found is None:
            problems.append(f"{path}: is an array, but a {kind_of(saved)} was saved")
        elif found != (live.dtype.str, list(live.shape)):
            problems.append(
                f"{path}: is {live.dtype.str}{list(live.shape)}, but {found[0]}{found[1]} was saved"
            )
        elif live.flags.writeable:
            self.wants.all_of(saved)
            leaf = saved.children.get("elements")
            # One with other bytes is damaged, which is found when it is made.
            fits = type(leaf) is SavedLeaf and leaf.whole.nbytes == live.nbytes
            if not fits or self.wants.claim(path, live, leaf, leaf.whole.box):
                self.arrays.append((live, saved))
        else:
            return self._new(saved)
        return live

    def _object(self, live: Any, saved: Any, trail: Trail) -> Any:
        path, wants = render(trail), self.wants
        if self._is_again(live, saved, trail):
            return live
        load: Load | None
        if isinstance(live, nn.Module):
            load = plan_module(path, live, self.objects.state_of(live), saved, wants)
        elif isinstance(live, Optimizer):
            load = plan_optimizer(path, live, saved, self.objects.names(live), wants)
        else:
            # An object of the user gets what its own rank saved, not what others have besides.
            load = plan_object(path, live, own_part(self.own, trail, saved), wants)
        self.loads += [load] if load is not None else []
        return live

    def _mapping(self, live: Any, saved: Any, trail: Trail) -> Any:
        if self._is_again(live, saved, trail):
            return live
        items = {
            key: self.merge(live[key], item, (trail, key)) if key in live else self._new(item)
            for key, item in saved.items()
        }
        for key, item in live.items():
            if key not in saved:
                self._need_nothing_of(item, (trail, key), "but was not saved")
        self.fills.append((live, items))
        return live

    def _sequence(self, live: Any, saved: Any, trail: Trail) -> Any:
        if type(live) is not tuple and self._is_again(live, saved, trail):
            return live
        items = [
            self.merge(live[at], item, (trail, at)) if at < len(live) else self._new(item)
            for at, item in enumerate(saved)
        ]
        for at in range(len(saved), len(live)):
            self._need_nothing_of(live[at], (trail, at), "but was not saved")
        if type(live) is tuple:
            return NewTuple(items)
        self.fills.append((live, items))
        return live

    def _need_nothing_of(self, live: Any, trail: Trail, why: str) -> None:
        """Every tensor or object in `live` is a problem: nothing was saved for it."""
        self.wants.problems.extend(
            f"{path}: is in the live state, {why}" for path in _needy(live, trail, 0)
        )


def _needy(live: Any, trail: Trail, depth: int) -> Iterator[str]:
    if isinstance(live, (Tensor, np.ndarray, *GENERATORS)) or keeps_own_state(live):
        yield render(trail)
    elif depth < 100 and type(live) in MAPPING_TAGS:
        for key, item in live.items():
            yield from _needy(item, (trail, key), depth + 1)
    elif depth < 100 and type(live) in (list, tuple, deque):
        for at, item in enumerate(live):
            yield from _needy(item, (trail, at), depth + 1)


def can_be_filled(live: Any, saved: Any) -> bool:
    """Whether a live container can become what was saved: neither maxlen nor default_factory can
    be changed, and a deque with another maxlen would drop items.
    """
    if type(live) is not type(saved):
        return False
    return type(live) not in (deque, defaultdict) or fixed_attributes(live) == fixed_attributes(
        saved
    )


def _called(saved: Any) -> str:
    if type(saved) is deque:
        return f"deque with maxlen={saved.maxlen}"
    return kind_of(saved)


def fill(container: Any, items: Any) -> None:
    """Make a container hold `items`, in their order. A Counter or defaultdict stays what it is.

    Only OrderedDict has methods of its own that must be used: they keep its order.
    """
    if isinstance(container, (list, deque)):
        container.clear()
        container.extend(items)
        return
    kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
    kind.clear(container)
    for key, item in items.items():
        kind.__setitem__(container, key, item)


def finished(item: Any, clones: Clones) -> Any:
    """`item` with everything that was to be made anew made; live objects in it are themselves."""
    kind = type(item)
    if kind is New:
        return moved(fresh(item.saved, clones), item.live)
    if kind is NewTuple:
        return tuple(finished(part, clones) for part in item.items)
    return item


def finished_all(items: Any, clones: Clones) -> Any:
    """As `finished`, for each item of a dictionary or list."""
    if isinstance(items, dict):
        return {key: finished(item, clones) for key, item in items.items()}
    return [finished(item, clones) for item in items]


def takes_over(live: Any, saved: Any) -> bool:
    """Whether a live generator can take over the state of a saved one."""
    if type(saved) is External and saved.kind == "torch.Generator":
        return isinstance(live, torch.Generator) and str(live.device) == saved.attributes
    return same_generator(live, saved)
