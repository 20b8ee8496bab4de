"""A saved state goes into a live optimizer by the names of its parameters, in the saved dtypes.

torch's own Optimizer.load_state_dict goes by position, casts state to the dtype of its parameter,
which loses the float32 state of a bfloat16 parameter, and may keep the tensors that it is given.
It is called only where hooks or an override take part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ckptmgr.rank.backup import backup_of
from ckptmgr.rank.externals import OPTIMIZER
from ckptmgr.rank.living import is_spread, is_tensor
from ckptmgr.rank.names import unwrapped
from ckptmgr.rank.optimizers import (
    Cut,
    Names,
    held_state,
    local_optimizer,
    parameters_of,
    steps_here,
)
from ckptmgr.rank.outline import outline_of_leaf
from ckptmgr.rank.parts import FlatRun
from ckptmgr.rank.regions import Clones, Regions, SavedLeaf
from ckptmgr.rank.saved import fresh, like_mapping
from ckptmgr.rank.tensors import ordered_as
from ckptmgr.rank.wants import Wants, filled, part_like
from ckptmgr.staging.paths import segment
from ckptmgr.staging.values import MAPPING_TAGS, External

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
class Named:
    """What was saved under one name, and how to find its part in what a live one keeps."""

    path: str
    saved: Any
    cut: Cut | None

    def part_of(self, live: Any) -> Any:
        """The part of a live state tensor that has this name."""
        return live if self.cut is None else self.cut(live)


@dataclass(frozen=True, slots=True)
class Entry:
    """What was saved of one live parameter: under several names if it is a flat one."""

    param: Tensor
    named: list[Named]
    step_device: torch.device

    @property
    def items(self) -> dict[Any, Any] | None:
        """What its first name has; None if that is not a mapping."""
        first = self.named[0].saved
        return first if isinstance(first, dict) else None

    def device(self, name: Any) -> torch.device:
        """Where a state tensor that does not exist yet belongs."""
        return self.step_device if name == "step" else self.param.device

    def made(self, name: Any, leaf: SavedLeaf, regions: Regions) -> Tensor:
        """A new state tensor, spread over processes as the parameter is if it has its shape."""
        if self.named[0].cut is not None:
            memory = torch.zeros(self.param.shape, dtype=leaf.dtype, device="cpu")
            runs = self.runs(name, memory)
            for _, run, part in runs:
                filled(run, run.tensor, part, regions)
            if runs:
                return memory.to(self.device(name))
        elif is_spread(self.param) and leaf.shape == self.param.shape:
            return part_like(self.param, leaf, regions)
        made = regions.gathered(leaf.whole, leaf.whole.box)
        if leaf.shape == self.param.shape:
            made = ordered_as(self.param, made)
        return made.to(self.device(name))

    def runs(self, name: Any, live: Any) -> list[tuple[Named, Any, SavedLeaf]]:
        """The runs of a live tensor that FSDP1 keeps flat, each with what was saved for it."""
        found = []
        for one in self.named:
            item = one.saved.get(name) if isinstance(one.saved, dict) else None
            run = one.part_of(live)
            if type(item) is SavedLeaf and type(run) is FlatRun and fits(run, item):
                found.append((one, run, item))
        return found


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
    kept: dict[tuple[int, Any], Any] = field(default_factory=dict)
    kept_options: dict[tuple[int, Any], Any] = field(default_factory=dict)
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
        if entry.items is None:
            return fresh(entry.named[0].saved, clones)
        items: dict[Any, Any] = {}
        for name, item in entry.items.items():
            if type(item) is not SavedLeaf:
                items[name] = _to_device(fresh(item, clones), entry.param.device)
            elif (id(entry.param), name) in self.kept:
                items[name] = self.kept[id(entry.param), name]
            else:
                items[name] = entry.made(name, item, clones.regions)
        return items

    def backup(self) -> Any:
        """What `undo` needs; taken only where loading can fail half-way."""
        return backup_of(self.optimizer.state_dict()) if self.own_code else None

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""
        if backup is not None:
            self.optimizer.load_state_dict(backup)

    def apply(self) -> None:
        """Give the optimizer its state; tensors that are kept are written afterwards."""
        if self.own_code:
            self._load()
            return
        state = held_state(self.optimizer)
        before = dict(state)
        state.clear()
        for entry, items in zip(self.entries, self.built, strict=True):
            inner = before.get(entry.param)
            state[entry.param] = inner if isinstance(inner, dict) else items
            if isinstance(inner, dict) and isinstance(items, dict):
                inner.clear()
                inner.update(items)
        state.update(self.others)
        for holder in {
            id(o): o for o in (local_optimizer(self.optimizer), self.optimizer)
        }.values():
            for group, options in zip(holder.param_groups, self.built_options, strict=True):
                _fill_group(group, options, holder.defaults)

    def _load(self) -> None:
        """Let its own code load; what it made stays, unless only the dtype was lost."""
        position = {id(param): at for at, param in enumerate(parameters_of(self.optimizer))}
        pairs = zip(self.entries, self.built, strict=True)
        state = {position[id(entry.param)]: items for entry, items in pairs}
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
    path: str, optimizer: Optimizer, saved: Any, names: Names, wants: Wants
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
        called: Any = names
        found: Any = saved.children
    elif isinstance(saved, dict) and {"state", "param_groups"} <= saved.keys():
        found, called = saved, [[(at, None)] for at in range(len(names))]
    else:
        wants.problems.append(f"{path}: is an optimizer, but no state_dict of one was saved")
        return None
    before = len(wants.problems)
    _compare_groups(path, optimizer, found["param_groups"], called, wants)
    if len(wants.problems) > before:
        return None
    load = _load_for(path, optimizer, found, called)
    for entry in load.entries:
        _want_state(load, entry, wants)
    _want_options(load, wants)
    for name, item in load.others.items():
        if type(name) is int:
            wants.problems.append(f"{path}/state/{name}: was saved, but is no such parameter")
        wants.all_of(item)
    wants.all_of(load.extras)
    wants.incomplete |= bool(found["state"]) and len(load.entries) < _stepped(optimizer)
    return load


def _stepped(optimizer: Optimizer) -> int:
    """How many parameters this process steps."""
    steps = steps_here(optimizer)
    here = [p for p in parameters_of(optimizer) if steps(p) and p.numel()]
    return len(set(map(id, here)))


def _load_for(path: str, optimizer: Optimizer, found: Any, called: Any) -> OptimizerLoad:
    groups, state = found["param_groups"], found["state"]
    known = {name for group in groups for name in group["params"]}
    own_code = _has_own_code(optimizer)
    return OptimizerLoad(
        path=path,
        optimizer=optimizer,
        own_code=own_code,
        entries=_entries(path, optimizer, state, called),
        options=_options(groups, optimizer, by_position=_by_position(called)),
        others={name: items for name, items in state.items() if name not in known},
        extras={k: v for k, v in found.items() if own_code and k not in ("state", "param_groups")},
    )


def _entries(path: str, optimizer: Optimizer, state: Any, called: Any) -> list[Entry]:
    """What was saved of the parameters that this process steps, in the saved order."""
    order = {name: at for at, name in enumerate(state)}
    steps = steps_here(optimizer)
    found: dict[int, tuple[int, Entry]] = {}
    places = zip(parameters_of(optimizer), called, _step_devices(optimizer), strict=True)
    for param, names, device in places:
        named = [
            Named(f"{path}/state/{segment(name)}", state[name], cut)
            for name, cut in names
            if name in state
        ]
        # FSDP1 has no gradient, and so no state, of a parameter that is in no part in its shard.
        is_elsewhere = bool(named and named[0].cut is not None and not param.numel())
        if named and steps(param) and not is_elsewhere and id(param) not in found:
            first = min(order[name] for name, _ in names if name in state)
            found[id(param)] = first, Entry(param, named, device)
    return [entry for _, entry in sorted(found.values(), key=lambda pair: pair[0])]


def _by_position(called: Any) -> bool:
    return any(type(name) is int for names in called for name, _ in names)


def _compare_groups(
    path: str, optimizer: Optimizer, groups: list[dict[str, Any]], called: Any, wants: Wants
) -> None:
    live = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    live_sizes = [len(group["params"]) for group in live]
    if len(sizes) != len(live_sizes) or (_by_position(called) and sizes != live_sizes):
        wants.problems.append(
            f"{path}/param_groups: have {live_sizes} parameters, but {sizes} were saved"
        )
        return
    start = 0
    for number, (group, size) in enumerate(zip(groups, live_sizes, strict=True)):
        place = f"{path}/param_groups/{number}"
        here = [name for names in called[start : start + size] for name, _ in names]
        mine, theirs = set(here), set(group["params"])
        wants.problems.extend(
            f"{place}: has {name}, which was not saved in it" for name in here if name not in theirs
        )
        wants.leave(f"{place}/{segment(name)}" for name in group["params"] if name not in mine)
        if any(type(name) is int or name == f"#{at}" for at, name in enumerate(here, start)):
            _compare_order(place, group, live[number], wants)
        start += size


def _compare_order(path: str, group: Any, live: Any, wants: Wants) -> None:
    """Parameters that are known by position only may still have been given names by the user."""
    names, live_names = group.get("param_names"), live.get("param_names")
    if names and live_names and list(map(unwrapped, names)) != list(map(unwrapped, live_names)):
        wants.problems.append(f"{path}: has other parameters or another order")


def _want_state(load: OptimizerLoad, entry: Entry, wants: Wants) -> None:
    """Want the state of one parameter: in place where it exists and fits, else anew."""
    if entry.items is None:
        wants.all_of(entry.named[0].saved)
        return
    if entry.param.is_meta:
        wants.problems.append(f"{entry.named[0].path}: the parameter is a meta tensor")
    before = held_state(load.optimizer).get(entry.param, {})
    for name, item in entry.items.items():
        if type(item) is not SavedLeaf:
            wants.all_of(item)
            continue
        old = before.get(name) if isinstance(before, dict) and not load.own_code else None
        if entry.named[0].cut is not None:
            _want_flat(load, entry, name, old, wants)
            continue
        path = f"{entry.named[0].path}/{segment(name)}"
        if _differs(load.optimizer, name, entry.param, item):
            wants.problems.append(
                f"{path}: the parameter has shape {list(entry.param.shape)}, "
                f"but {list(item.shape)} was saved"
            )
        elif fits(old, item) and not wants.is_taken(old, item):
            load.kept[id(entry.param), name] = old
            wants.write(path, old, item)
        elif is_spread(entry.param) and item.shape == entry.param.shape:
            wants.parts_like(path, entry.param, item)
        else:
            wants.all_of(item)


def _want_flat(load: OptimizerLoad, entry: Entry, name: Any, old: Any, wants: Wants) -> None:
    """Want the runs of a flat state tensor; or what all parameters in it have alike (step)."""
    leaf = entry.named[0].saved[name]
    runs = entry.runs(name, torch.empty(entry.param.shape, dtype=leaf.dtype, device="meta"))
    fitting = fits(old, leaf)
    if runs:
        fitting = isinstance(old, Tensor) and (old.shape, old.dtype) == (
            entry.param.shape,
            leaf.dtype,
        )
        for one, run, item in entry.runs(name, old) if fitting else runs:
            path = f"{one.path}/{segment(name)}"
            wants.write(path, run, item) if fitting else wants.parts_like(path, run, item)
    elif fitting:
        wants.write(f"{entry.named[0].path}/{segment(name)}", old, leaf)
    else:
        wants.all_of(leaf)
    if fitting:
        load.kept[id(entry.param), name] = old
    first = f"{entry.named[0].path}/{segment(name)}"
    for one in entry.named[1:] if not runs else ():
        other = one.saved.get(name) if isinstance(one.saved, dict) else None
        if type(other) is SavedLeaf:
            wants.tie(f"{one.path}/{segment(name)}", [leaf.whole.box], first, leaf, other)


def _differs(optimizer: Optimizer, name: Any, param: Tensor, item: SavedLeaf) -> bool:
    """Whether a state tensor that torch makes like its parameter is not; numbers always fit."""
    known = type(optimizer).__module__.startswith("torch.optim.") and name in _LIKE_PARAMETER
    return known and bool(param.dim() and item.shape) and item.shape != param.shape


def _want_options(load: OptimizerLoad, wants: Wants) -> None:
    for at, (group, options) in enumerate(
        zip(load.optimizer.param_groups, load.options, strict=True)
    ):
        for name, item in options.items():
            old = group.get(name)
            stays = type(item) is SavedLeaf and fits(old, item) and not load.own_code
            if stays and not wants.is_taken(old, item):
                load.kept_options[at, name] = old
                wants.write(f"{load.path}/param_groups/{at}/{segment(name)}", old, item)
            else:
                wants.all_of(item)


def fits(live: Any, saved: SavedLeaf) -> bool:
    """Whether a saved tensor can be written into `live`."""
    return is_tensor(live) and outline_of_leaf(saved).difference(live) == ""


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
    """Whether hooks or an override load; those of a partitioned one are not asked."""
    one = local_optimizer(optimizer)
    # One that wraps another may not have been initialised as an optimizer, and has no hooks then.
    names = (f"_optimizer_load_state_dict_{when}_hooks" for when in ("pre", "post"))
    hooks = any(getattr(one, name, None) for name in names)
    return hooks or type(one).load_state_dict is not Optimizer.load_state_dict


def _only_dtype_differs(kept: Any, exact: Tensor) -> bool:
    return isinstance(kept, Tensor) and kept.shape == exact.shape and kept.dtype != exact.dtype


def _to_device(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        return type(item)(_to_device(part, device) for part in item)
    if type(item) is deque:
        return deque((_to_device(part, device) for part in item), item.maxlen)
    if type(item) in MAPPING_TAGS:
        return like_mapping(item, {key: _to_device(part, device) for key, part in item.items()})
    return item
