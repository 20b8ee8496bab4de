"""The modules and optimizers of a state, and what their parameters are called."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ckptmgr.rank.names import bare_names, parameter_names
from ckptmgr.staging.paths import Trail, render
from ckptmgr.staging.tree import StructureChangedError
from ckptmgr.staging.values import DEPTH_MAX, MAPPING_TAGS, refuse


@dataclass(frozen=True, slots=True)
class Objects:
    """What was found in a state; it stays right as long as the objects hold the same parameters.

    `homes` has for each parameter (by id) the path of its first module and its name there.
    """

    modules: list[tuple[Trail, nn.Module]] = field(default_factory=list)
    optimizers: list[tuple[Trail, Optimizer]] = field(default_factory=list)
    homes: dict[int, tuple[str, str]] = field(default_factory=dict)
    named: dict[int, tuple[list[Tensor], list[str]]] = field(default_factory=dict)

    def names(self, optimizer: Optimizer) -> list[str]:
        """What the parameters of an optimizer are called, in torch's order.

        Raises:
            StructureChangedError: it was not in the state, or has other parameters by now.
        """
        params, names = self.named.get(id(optimizer), ([], []))
        now = parameters_of(optimizer)
        if list(map(id, now)) != list(map(id, params)):
            raise StructureChangedError
        return names


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer in the order in which torch numbers them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def find_objects(state: Any) -> Objects:
    """Look for modules and optimizers in a state and the containers in it.

    Raises:
        UnsupportedLeafError: it is nested too deep, or contains itself.
    """
    found = Objects()
    for trail, item in _objects_in(state, None, 0):
        if isinstance(item, nn.Module):
            found.modules.append((trail, item))
        else:
            found.optimizers.append((trail, item))
    for trail, module in found.modules:
        path = render(trail)
        params = dict(module.named_parameters(remove_duplicate=False))
        for name, bare in bare_names(params).items():
            found.homes.setdefault(id(params[name]), (path, bare))
    for _, optimizer in found.optimizers:
        params_now = parameters_of(optimizer)
        found.named[id(optimizer)] = params_now, _names_in(params_now, found.homes)
    return found


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


def _names_in(params: list[Tensor], homes: Mapping[int, tuple[str, str]]) -> list[str]:
    """The names, where torch counts a parameter that a group has twice as two positions."""
    first: dict[int, int] = {}
    for at, param in enumerate(params):
        first.setdefault(id(param), at)
    places = [
        homes.get(id(param)) if first[id(param)] == at else None for at, param in enumerate(params)
    ]
    names = parameter_names(places)
    return [names[first[id(param)]] for param in params]
