"""The state of an optimizer keyed by names of parameters, and torch's form keyed by positions.

Positions depend on how parameters are grouped, and with flat parameters on how they are packed;
names are the same under every parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class NamedState:
    """A state_dict whose `state` is keyed by names, and whose groups hold names (`torch.optim`)."""

    entries: dict[str, Any]


def by_name(state_dict: Any, names: Sequence[str]) -> Any:
    """A NamedState of a state_dict that torch keyed by position; anything else as it is."""
    if not _is_torch_form(state_dict, len(names)):
        return state_dict
    state = {_name(key, names): items for key, items in state_dict["state"].items()}
    if len(state) != len(state_dict["state"]):
        return state_dict  # a key of the optimizer's own is also the name of a parameter
    groups = [
        {**group, "params": [names[at] for at in group["params"]]}
        for group in state_dict["param_groups"]
    ]
    return NamedState({**state_dict, "state": state, "param_groups": groups})


def _name(key: Any, names: Sequence[str]) -> Any:
    return names[key] if type(key) is int else key


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
