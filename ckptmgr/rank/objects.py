"""The modules and optimizers of a state, and what their parameters are called."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ckptmgr.rank.flat import Original, flat_state, is_flat, originals
from ckptmgr.rank.members import Members
from ckptmgr.rank.names import bare_names, parameter_names
from ckptmgr.rank.optimizers import Cut, Names, by_name, parameters_of, state_dict_of
from ckptmgr.staging.paths import Trail, render
from ckptmgr.staging.tree import StructureChangedError
from ckptmgr.staging.values import DEPTH_MAX, MAPPING_TAGS, refuse

Home = tuple[str, str, Cut | None]
"""Path of a module, name in it, and how to find its part of what an optimizer keeps."""


@dataclass(slots=True)
class Objects:
    """What was found in a state; it stays right as long as `check` finds nothing changed."""

    modules: list[tuple[Trail, nn.Module]] = field(default_factory=list)
    optimizers: list[tuple[Trail, Optimizer]] = field(default_factory=list)
    _is_flat: dict[int, bool] = field(default_factory=dict)
    _homes: dict[int, list[Home]] = field(default_factory=dict)
    _named: dict[int, tuple[list[Tensor], Names]] = field(default_factory=dict)
    _members: Members = field(default_factory=lambda: Members(()))

    def add_module(self, trail: Trail, module: nn.Module) -> None:
        """Note a module, and the names of those parameters that no earlier one has.

        What FSDP2 has gathered for a forward is put back first, as `state_dict` does: an optimizer
        knows the shards alone.
        """
        _reshard(module)
        self.modules.append((trail, module))
        path = render(trail)
        homes: dict[int, list[Home]] = {}
        self._is_flat[id(module)] = is_flat(module)
        if self._is_flat[id(module)]:
            for entry in originals(module):
                home = path, entry.name, _cut_of(entry)
                homes.setdefault(id(entry.stepped), []).append(home)
        params = dict(module.named_parameters(remove_duplicate=False))
        for name, bare in bare_names(params).items():
            homes.setdefault(id(params[name]), [(path, bare, None)])
        for key, found in homes.items():
            self._homes.setdefault(key, found)

    def add_optimizer(self, trail: Trail, optimizer: Optimizer) -> None:
        """Note an optimizer; the modules were all added before."""
        self.optimizers.append((trail, optimizer))
        params = parameters_of(optimizer)
        self._named[id(optimizer)] = params, self._names_of(params)

    def note_members(self) -> None:
        """Note what the names in the modules mean; all were added before."""
        self._members = Members(module for _, module in self.modules)

    def check(self, state: Any) -> None:
        """Look whether the objects have their places, and the names in them their meaning, still.

        Args:
            state: as it was when the objects were found, but for what is checked here.

        Raises:
            StructureChangedError: they have not.
        """
        places = [*self.modules, *self.optimizers]
        if any(_at(state, trail) is not item for trail, item in places):
            raise StructureChangedError
        if not self._members.are_unchanged():
            raise StructureChangedError

    def _names_of(self, params: list[Tensor]) -> Names:
        """The names, where torch counts a parameter that a group has twice as two positions."""
        first: dict[int, int] = {}
        for at, param in enumerate(params):
            first.setdefault(id(param), at)
        nowhere: list[Home | None] = [None]
        homes = [
            (at, home)
            for at, param in enumerate(params)
            if first[id(param)] == at
            for home in self._homes.get(id(param)) or nowhere
        ]
        called = parameter_names([(at, home and home[:2]) for at, home in homes])
        found: list[list[tuple[str, Cut | None]]] = [[] for _ in params]
        for (at, home), name in zip(homes, called, strict=True):
            found[at].append((name, None if home is None else home[2]))
        return [found[first[id(param)]] for param in params]

    def names(self, optimizer: Optimizer) -> Names:
        """What the parameters of an optimizer are called, in torch's order.

        Raises:
            StructureChangedError: it was not in the state, or has other parameters by now.
        """
        params, names = self._named.get(id(optimizer), ([], []))
        now = parameters_of(optimizer)
        if list(map(id, now)) != list(map(id, params)):
            raise StructureChangedError
        return names

    def state_of(self, item: Any) -> Any:
        """The state of an object that keeps its own; no rank is asked for anything.

        Raises:
            StructureChangedError: it is a module or optimizer that was not found in the state, or
                holds other parameters by now.
        """
        if isinstance(item, Optimizer):
            return by_name(state_dict_of(item), self.names(item))
        if isinstance(item, nn.Module):
            if id(item) not in self._is_flat:
                raise StructureChangedError
            return flat_state(item) if self._is_flat[id(item)] else item.state_dict()
        return item.state_dict()


def _reshard(module: nn.Module) -> None:
    """Put back what FSDP2 has gathered and kept, as it does for its root after a forward under
    no_grad. No rank is asked for anything.
    """
    # It is called FSDPModule, in the second of these since torch 2.6.
    places = "torch.distributed._composable.fsdp", "torch.distributed.fsdp"
    kinds: tuple[Any, ...] = tuple(
        kind
        for place in places
        if isinstance(kind := getattr(sys.modules.get(place), "FSDPModule", None), type)
    )
    for part in module.modules():
        if isinstance(part, kinds):
            part.reshard()


def _cut_of(entry: Original) -> Cut:
    """Finds an original parameter in the state of the flat one (or of its own shard)."""

    def cut(item: Any) -> Any:
        if isinstance(item, Tensor) and item.dim() and item.numel() == entry.state_count:
            return entry.state_run.of(item.reshape(-1))
        return item

    return cut


def find_objects(state: Any) -> Objects:
    """Look for modules and optimizers in a state and the containers in it.

    Raises:
        UnsupportedLeafError: it is nested too deep, or contains itself.
    """
    found = Objects()
    places = list(_objects_in(state, None, 0))
    for trail, item in places:
        if isinstance(item, nn.Module):
            found.add_module(trail, item)
    for trail, item in places:
        if isinstance(item, Optimizer):
            found.add_optimizer(trail, item)
    found.note_members()
    return found


def _at(state: Any, trail: Trail) -> Any:
    """What is at a place in the containers of a state."""
    return state if trail is None else _at(state, trail[0])[trail[1]]


def _objects_in(item: Any, trail: Trail, depth: int) -> Iterator[tuple[Trail, Any]]:
    kind = type(item)
    if isinstance(item, (nn.Module, Optimizer)):
        yield trail, item
        return
    if kind in MAPPING_TAGS:
        places: Any = item.items()
    elif kind in (list, tuple, deque):
        places = enumerate(item)
    else:
        return
    if depth >= DEPTH_MAX:
        raise refuse(trail, f"is nested more than {DEPTH_MAX} deep, or contains itself")
    for key, part in places:
        yield from _objects_in(part, (trail, key), depth + 1)
