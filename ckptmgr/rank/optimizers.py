"""The state of an optimizer keyed by names of parameters, and torch's form keyed by positions.

Positions depend on how parameters are grouped, and with flat parameters on how they are packed;
names are the same under every parallelism.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True, eq=False)
class NamedState:
    """A state_dict whose `state` is keyed by names, and whose groups hold names (`torch.optim`)."""

    entries: dict[str, Any]


Cut = Callable[[Any], Any]
"""Gives the part of a state tensor that belongs to one name; other items as they are."""

Names = Sequence[Sequence[tuple[str, Cut | None]]]
"""For each position what it is called: several names where a flat parameter stands for many."""


def by_name(state_dict: Any, names: Names) -> Any:
    """A NamedState of a state_dict that torch keyed by position; anything else as it is."""
    if not _is_torch_form(state_dict, len(names)):
        return state_dict
    state: dict[Any, Any] = {}
    count = 0
    for key, items in state_dict["state"].items():
        for name, cut in names[key] if type(key) is int else [(key, None)]:
            state[name] = items if cut is None else _cut(items, cut)
            count += 1
    if len(state) != count:
        return state_dict  # a key of the optimizer's own is also the name of a parameter
    groups = [
        {**group, "params": [name for at in group["params"] for name, _ in names[at]]}
        for group in state_dict["param_groups"]
    ]
    return NamedState({**state_dict, "state": state, "param_groups": groups})


def _cut(items: Any, cut: Cut) -> Any:
    return {key: cut(item) for key, item in items.items()} if type(items) is dict else items


def _is_torch_form(state_dict: Any, count: int) -> bool:
    """Whether it is what Optimizer.state_dict makes: an override may give anything."""
    if type(state_dict) is not dict or not all(type(key) is str for key in state_dict):
        return False
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    if type(state) is not dict or type(groups) is not list:
        return False
    keys = [key for key in state if type(key) is int]
    return all(0 <= key < count for key in keys) and all(
        type(group) is dict and _are_positions(group.get("params"), count) for group in groups
    )


def _are_positions(params: Any, count: int) -> bool:
    return type(params) is list and all(type(at) is int and 0 <= at < count for at in params)


def by_position(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict as torch keys it, with the very items of `entries`.

    Raises:
        KeyError, TypeError: it is not what `by_name` makes.
    """
    names = [name for group in entries["param_groups"] for name in group["params"]]
    position: dict[Any, int] = {}
    for at, name in enumerate(names):
        position.setdefault(name, at)
    state = {position.get(key, key): items for key, items in entries["state"].items()}
    groups = [
        {**group, "params": [position[name] for name in group["params"]]}
        for group in entries["param_groups"]
    ]
    return {**entries, "state": state, "param_groups": groups}


def is_partitioned(optimizer: Optimizer) -> bool:
    """Whether it is a ZeroRedundancyOptimizer: each rank has the state of some parameters."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return isinstance(optimizer, getattr(module, "ZeroRedundancyOptimizer", ()))


def state_dict_of(optimizer: Optimizer) -> Any:
    """The state_dict of an optimizer; of a partitioned one, with the state that this rank holds."""
    if not is_partitioned(optimizer):
        return optimizer.state_dict()
    whole = Optimizer.state_dict(optimizer)
    held = held_state(optimizer)
    params = parameters_of(optimizer)
    state = {at: held[param] for at, param in enumerate(params) if param in held}
    return {**whole, "state": state}


def local_optimizer(optimizer: Optimizer) -> Any:
    """The optimizer that steps on this rank: of a partitioned one, that of its partition."""
    if not is_partitioned(optimizer):
        return optimizer
    return getattr(optimizer, "optim", optimizer)  # it may not be made before DDP's second step


def held_state(optimizer: Optimizer) -> Any:
    """The map from parameters to the state that this rank holds and steps."""
    return local_optimizer(optimizer).state


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer in the order in which torch numbers them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def steps_here(optimizer: Optimizer) -> Callable[[Tensor], bool]:
    """Tells whether this rank steps a parameter of an optimizer, and so will keep state of it."""
    if not is_partitioned(optimizer):
        return lambda _: True
    partitioned: Any = optimizer
    rank_of = partitioned._param_to_rank
    return lambda param: bool(rank_of[param] == partitioned.rank)
