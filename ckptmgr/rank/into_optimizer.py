"""A saved state goes into a live optimizer by the names of its parameters, in the saved dtypes.

torch's own Optimizer.load_state_dict goes by position, casts state to the dtype of its parameter,
which loses the float32 state of a bfloat16 parameter, and may keep the tensors that it is given.
It is called only where hooks or an override take part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.optim import Optimizer

from ckptmgr.rank.externals import OPTIMIZER
from ckptmgr.rank.living import is_spread, live_box
from ckptmgr.rank.names import unwrapped
from ckptmgr.rank.objects import parameters_of
from ckptmgr.rank.regions import Clones, SavedLeaf
from ckptmgr.rank.saved import fresh
from ckptmgr.rank.wants import Wants, part_like
from ckptmgr.staging.paths import segment
from ckptmgr.staging.values import External

_LIKE_PARAMETER = frozenset(
    {
        "acc_delta",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "prev",
        "square_avg",
        "sum",
    }
)
"""State of torch.optim that has the shape of its parameter: shows parameters in another order."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What was saved of one live parameter, and its position among the live ones."""

    param: Tensor
    position: int
    saved: Any
    step_device: torch.device

    def device(self, name: Any) -> torch.device:
        """Where a state tensor that does not exist yet belongs."""
        return self.step_device if name == "step" else self.param.device

    def pattern(self, leaf: SavedLeaf) -> Tensor | None:
        """The parameter, where it is spread over processes and this state tensor is like it."""
        alike = is_spread(self.param) and leaf.shape == self.param.shape
        return self.param if alike else None


@dataclass(slots=True)
class OptimizerLoad:
    """A saved state that fits `optimizer`; `own_code` if hooks or an override take part.

    `entries` are in the saved order, `options` one mapping for each group, `others` what the
    optimizer keeps under keys of its own, `extras` what an override added to its state_dict.
    `built` is the state to be, parameter by parameter; in it are the tensors that are `kept`.
    """

    path: str
    optimizer: Optimizer
    own_code: bool
    entries: list[Entry]
    options: list[dict[str, Any]]
    others: dict[Any, Any]
    extras: dict[str, Any]
    kept: dict[tuple[int, Any], Tensor] = field(default_factory=dict)
    kept_options: dict[tuple[int, Any], Tensor] = field(default_factory=dict)
    built: list[Any] = field(default_factory=list)
    built_options: list[dict[str, Any]] = field(default_factory=list)

    def build(self, clones: Clones) -> None:
        """Make the state that does not exist yet; nothing in it is in saved memory."""
        self.built = [self._built_state(entry, clones) for entry in self.entries]
        self.built_options = [
            {
                name: self.kept_options[at, name]
                if (at, name) in self.kept_options
                else fresh(item, clones)
                for name, item in options.items()
            }
            for at, options in enumerate(self.options)
        ]
        self.others = {key: fresh(item, clones) for key, item in self.others.items()}
        self.extras = {key: fresh(item, clones) for key, item in self.extras.items()}

    def _built_state(self, entry: Entry, clones: Clones) -> Any:
        if not isinstance(entry.saved, dict):
            return fresh(entry.saved, clones)
        items: dict[Any, Any] = {}
        for name, item in entry.saved.items():
            if type(item) is not SavedLeaf:
                items[name] = _to_device(fresh(item, clones), entry.param.device)
            elif (entry.position, name) in self.kept:
                items[name] = self.kept[entry.position, name]
            else:
                made = part_like(entry.pattern(item), item, clones.regions)
                items[name] = made.to(entry.device(name))
        return items

    def backup(self) -> Any:
        """What `undo` needs; taken only where loading can fail half-way."""
        return copy.deepcopy(self.optimizer.state_dict()) if self.own_code else None

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""
        if backup is not None:
            self.optimizer.load_state_dict(backup)

    def apply(self) -> None:
        """Give the optimizer its state; tensors that are kept are written afterwards."""
        if self.own_code:
            self._load()
            return
        state: Any = self.optimizer.state
        before = dict(state)
        state.clear()
        for entry, items in zip(self.entries, self.built, strict=True):
            inner = before.get(entry.param)
            state[entry.param] = inner if isinstance(inner, dict) else items
            if isinstance(inner, dict) and isinstance(items, dict):
                inner.clear()
                inner.update(items)
        state.update(self.others)
        for group, options in zip(self.optimizer.param_groups, self.built_options, strict=True):
            _fill_group(group, options, self.optimizer.defaults)

    def _load(self) -> None:
        """Let its own code load; what it made stays, unless only the dtype was lost."""
        state = {e.position: items for e, items in zip(self.entries, self.built, strict=True)}
        start, groups = 0, []
        for group, options in zip(self.optimizer.param_groups, self.built_options, strict=True):
            stop = start + len(group["params"])
            groups.append({**options, "params": list(range(start, stop))})
            start = stop
        self.optimizer.load_state_dict(
            {**self.extras, "state": {**state, **self.others}, "param_groups": groups}
        )
        for entry, items in zip(self.entries, self.built, strict=True):
            now = self.optimizer.state[entry.param]
            for name, exact in items.items() if isinstance(items, dict) else ():
                if isinstance(exact, Tensor) and _only_dtype_differs(now.get(name), exact):
                    now[name] = exact


def plan_optimizer(
    path: str, optimizer: Optimizer, saved: Any, names: Sequence[str], wants: Wants
) -> OptimizerLoad | None:
    """Compare a saved state with a live optimizer, and want what it takes.

    Args:
        path: where it is in the state.
        optimizer: the live one.
        saved: an External by names, or a state_dict by position.
        names: of its parameters, by position.
        wants: hears what differs.
    """
    if type(saved) is External and saved.kind == OPTIMIZER:
        found, keys = saved.children, list[Any](names)
    elif isinstance(saved, dict) and {"state", "param_groups"} <= saved.keys():
        found, keys = saved, list[Any](range(len(names)))
    else:
        wants.problems.append(f"{path}: is an optimizer, but no state_dict of one was saved")
        return None
    groups: list[dict[str, Any]] = found["param_groups"]
    before = len(wants.problems)
    _compare_groups(path, optimizer, groups, keys, wants)
    if len(wants.problems) > before:
        return None
    load = _load_for(path, optimizer, found, keys)
    for entry in load.entries:
        _want_state(load, entry, f"{path}/state/{segment(keys[entry.position])}", wants)
    _want_options(load, wants)
    for name, item in load.others.items():
        if type(name) is int:
            wants.problems.append(f"{path}/state/{name}: was saved, but is no such parameter")
        wants.all_of(item)
    wants.all_of(load.extras)
    return load


def _load_for(path: str, optimizer: Optimizer, found: Any, keys: list[Any]) -> OptimizerLoad:
    groups = found["param_groups"]
    known = {name for group in groups for name in group["params"]}
    position = {name: at for at, name in reversed(list(enumerate(keys)))}
    params, devices = parameters_of(optimizer), list(_step_devices(optimizer))
    entries = [
        Entry(params[position[name]], position[name], items, devices[position[name]])
        for name, items in found["state"].items()
        if name in position
    ]
    own_code = _has_own_code(optimizer)
    return OptimizerLoad(
        path=path,
        optimizer=optimizer,
        own_code=own_code,
        entries=entries,
        options=_options(groups, optimizer, by_position=type(next(iter(keys), "")) is int),
        others={name: items for name, items in found["state"].items() if name not in known},
        extras={k: v for k, v in found.items() if own_code and k not in ("state", "param_groups")},
    )


def _compare_groups(
    path: str,
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    keys: list[Any],
    wants: Wants,
) -> None:
    live = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    live_sizes = [len(group["params"]) for group in live]
    by_position = bool(keys) and type(keys[0]) is int
    if len(sizes) != len(live_sizes) or (by_position and sizes != live_sizes):
        wants.problems.append(
            f"{path}/param_groups: have {live_sizes} parameters, but {sizes} were saved"
        )
        return
    start = 0
    for number, (group, size) in enumerate(zip(groups, live_sizes, strict=True)):
        here, there = keys[start : start + size], set(group["params"])
        start += size
        wants.problems.extend(
            f"{path}/param_groups/{number}: has {name}, which was not saved in it"
            for name in here
            if name not in there
        )
        mine = set(here)
        wants.leave(
            f"{path}/param_groups/{number}/{segment(name)}"
            for name in group["params"]
            if name not in mine
        )
        if any(name == f"#{at}" or type(name) is int for at, name in enumerate(here, start - size)):
            _compare_order(f"{path}/param_groups/{number}", group, live[number], wants)


def _compare_order(path: str, group: Any, live: Any, wants: Wants) -> None:
    """Parameters that are known by position only may still have been given names by the user."""
    names, live_names = group.get("param_names"), live.get("param_names")
    if names and live_names and list(map(unwrapped, names)) != list(map(unwrapped, live_names)):
        wants.problems.append(f"{path}: has other parameters or another order")


def _want_state(load: OptimizerLoad, entry: Entry, path: str, wants: Wants) -> None:
    """Want the state of one parameter: in place where it exists and fits, else anew."""
    if not isinstance(entry.saved, dict):
        wants.all_of(entry.saved)
        return
    known = type(load.optimizer).__module__.startswith("torch.optim.")
    before = load.optimizer.state.get(entry.param, {})
    for name, item in entry.saved.items():
        if type(item) is not SavedLeaf:
            wants.all_of(item)
            continue
        if known and name in _LIKE_PARAMETER and not _alike(entry.param, item):
            wants.problems.append(
                f"{path}/{name}: the parameter has shape {list(entry.param.shape)}, "
                f"but {list(item.shape)} was saved"
            )
            continue
        old = before.get(name) if isinstance(before, dict) else None
        if fits(old, item) and not load.own_code:
            load.kept[entry.position, name] = old
            wants.write(f"{path}/{name}", old, item)
        elif (pattern := entry.pattern(item)) is not None:
            wants.part(f"{path}/{name}", item.whole, live_box(pattern))
        else:
            wants.all_of(item)


def _alike(param: Tensor, item: SavedLeaf) -> bool:
    """Whether a state tensor may belong to a parameter; numbers are of no shape."""
    return not param.dim() or not item.shape or item.shape == param.shape


def _want_options(load: OptimizerLoad, wants: Wants) -> None:
    for at, (group, options) in enumerate(
        zip(load.optimizer.param_groups, load.options, strict=True)
    ):
        for name, item in options.items():
            old = group.get(name)
            if type(item) is SavedLeaf and fits(old, item) and not load.own_code:
                load.kept_options[at, name] = old
                wants.write(f"{load.path}/param_groups/{at}/{segment(name)}", old, item)
            else:
                wants.all_of(item)


def fits(live: Any, saved: SavedLeaf) -> TypeGuard[Tensor]:
    """Whether a saved tensor can be written into `live`."""
    if not isinstance(live, Tensor) or live.layout != torch.strided:
        return False
    return live.shape == saved.shape and live.dtype == saved.dtype


def _options(groups: Any, optimizer: Optimizer, *, by_position: bool) -> list[dict[str, Any]]:
    """The saved options of each group; by name, a group keeps the names of its own parameters."""
    found = []
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        options = {name: item for name, item in group.items() if name != "params"}
        if not by_position and "param_names" in options:
            options["param_names"] = live.get("param_names", options["param_names"])
        found.append(options)
    return found


def _fill_group(group: dict[str, Any], options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Make a live group hold the saved options in their order; its parameters stay."""
    before = dict(group)
    group.clear()
    group["params"] = before.pop("params")
    group.update(options)
    # What an older torch did not know has its default, as the optimizer was made with it.
    group.update({k: v for k, v in before.items() if k not in options and k in defaults})


def _step_devices(optimizer: Optimizer) -> Iterator[torch.device]:
    """Where the step count of each parameter is: beside it if a kernel needs it, else the CPU."""
    for group in optimizer.param_groups:
        beside = bool(group.get("capturable") or group.get("fused"))
        for param in group["params"]:
            yield param.device if beside else torch.device("cpu")


def _has_own_code(optimizer: Optimizer) -> bool:
    hooks = (
        optimizer._optimizer_load_state_dict_pre_hooks
        or optimizer._optimizer_load_state_dict_post_hooks
    )
    return bool(hooks) or type(optimizer).load_state_dict is not Optimizer.load_state_dict


def _only_dtype_differs(kept: Any, exact: Tensor) -> bool:
    return isinstance(kept, Tensor) and kept.shape == exact.shape and kept.dtype != exact.dtype


def _to_device(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        return type(item)(_to_device(part, device) for part in item)
    return item
