"""The bytes of a slot go back into live objects: everything is checked, then applied."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.capture import collection_paused, keeps_own_state
from ckptmgr.rank.externals import GENERATORS, same_generator, take_over
from ckptmgr.rank.into_module import plan_module, tensor_difference
from ckptmgr.rank.into_optimizer import plan_optimizer, write
from ckptmgr.rank.overlap import CopyThread
from ckptmgr.rank.parts import local_tensor
from ckptmgr.rank.randomness import RNG_KEY, check_generators, write_generators
from ckptmgr.rank.saved import Clones, Saved, SavedLeaf, fresh, read_state, rebuild
from ckptmgr.rank.tensors import carried
from ckptmgr.staging.paths import Trail, render
from ckptmgr.staging.values import MAPPING_TAGS

__all__ = ["Saved", "check", "place", "rebuild"]

PROBLEMS_SHOWN_MAX = 20
"""Differences told in one error; the others are counted."""


class Load(Protocol):
    """Something that loads, and can be undone if a later one fails."""

    @property
    def path(self) -> str: ...
    @property
    def own_code(self) -> bool: ...
    def backup(self) -> Any: ...
    def undo(self, backup: Any) -> None: ...
    def apply(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ObjectLoad:
    """A state for an object with its own load_state_dict, about which nothing is known."""

    path: str
    live: Any
    state: Any
    own_code: bool = True

    def backup(self) -> Any:
        """A deep copy of the state it has now."""
        return copy.deepcopy(self.live.state_dict())

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


@dataclass(slots=True)
class Plan:
    """What `place` will do once all of it is known to fit."""

    clones: Clones
    problems: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    writes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    arrays: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(default_factory=list)
    generators: list[tuple[Any, Any]] = field(default_factory=list)
    fills: list[tuple[Any, Any]] = field(default_factory=list)
    merged: dict[str, Any] = field(default_factory=dict)
    rng: Any = None


def check(
    state: MutableMapping[str, Any], saved: Saved, *, rng: bool = True, partial: bool = False
) -> None:
    """Compare a saved state with the live one; changes nothing. Arguments are those of `place`.

    Raises:
        StateMismatchError: they differ in leaves, shapes or dtypes; at most 20 are named.
        RecordDamagedError, HostBufferDamagedError: what was saved can not be read.
    """
    _plan(state, saved, rng=rng, partial=partial)


def place(
    state: MutableMapping[str, Any], saved: Saved, *, rng: bool = True, partial: bool = False
) -> None:
    """Put a saved state into the live objects; afterwards nothing refers to the slot.

    Parameters, buffers, optimizer state, tensors and arrays that exist are written in place, so
    ties and references hold. Plain Python is replaced. Generators of the process come last.

    Args:
        state: the mapping that was captured, or one built in the same way.
        saved: what a slot holds.
        rng: also put back the generators of the process.
        partial: leave out what was saved under names that `state` does not have.

    Raises:
        StateMismatchError: as for `check`, and nothing was changed; or an object refused its
            state, and those loaded before it were given their old state again.
    """
    with collection_paused():
        plan = _plan(state, saved, rng=rng, partial=partial)
        _apply_loads(plan.loads)
        _write_all(plan.writes)
    for array, found in plan.arrays:
        array[...] = found
    for generator, found in plan.generators:
        take_over(generator, found)
    for container, items in plan.fills:
        _fill(container, items)
    _replace(state, plan.merged)
    if plan.rng is not None:
        write_generators(plan.rng)


def _plan(state: MutableMapping[str, Any], saved: Saved, *, rng: bool, partial: bool) -> Plan:
    plan = Plan(Clones())
    found = read_state(saved, clones=plan.clones)
    if not isinstance(found, dict):
        raise StateMismatchError("the saved state is not a mapping of names")
    if RNG_KEY not in state:
        generators = found.pop(RNG_KEY, None)
        if rng and generators is not None:
            plan.rng = fresh(generators, plan.clones)
            plan.problems += check_generators(plan.rng)
    for name in state:
        if name not in found:
            plan.problems.append(f"{render((None, name))}: is in the live state, but was not saved")
    for name in found:
        if name not in state and not partial:
            plan.problems.append(f"{render((None, name))}: was saved, but is not in the live state")
    merged = {
        name: _merge(plan, state[name], found[name], (None, name))
        for name in state
        if name in found
    }
    if plan.problems:
        raise StateMismatchError(_shown(plan.problems))
    plan.merged = merged
    return plan


def _shown(problems: list[str]) -> str:
    lines = problems[:PROBLEMS_SHOWN_MAX]
    more = len(problems) - len(lines)
    if more:
        lines.append(f"and {more} more")
    return "the saved state does not fit the live one:\n  " + "\n  ".join(lines)


def _merge(plan: Plan, live: Any, saved: Any, trail: Trail) -> Any:
    """Plan how `saved` goes into `live`; gives what will stand in its place."""
    if isinstance(live, Tensor):
        return _merge_tensor(plan, live, saved, trail)
    if isinstance(live, np.ndarray):
        return _merge_array(plan, live, saved, trail)
    if keeps_own_state(live):
        return _merge_object(plan, live, saved, trail)
    if isinstance(live, GENERATORS) and same_generator(live, saved):
        plan.generators.append((live, saved))
        return live
    if type(live) is type(saved):
        if type(live) in MAPPING_TAGS:
            return _merge_mapping(plan, live, saved, trail)
        if type(live) in (list, tuple, deque):
            return _merge_sequence(plan, live, saved, trail)
    _need_nothing_of(plan, live, trail, f"but a {_kind(saved)} was saved")
    return fresh(saved, plan.clones)


def _kind(saved: Any) -> str:
    return "tensor" if type(saved) is SavedLeaf else type(saved).__name__


def _merge_tensor(plan: Plan, live: Tensor, saved: Any, trail: Trail) -> Any:
    found = saved.view if type(saved) is SavedLeaf else saved
    if not isinstance(found, Tensor):
        plan.problems.append(f"{render(trail)}: is a tensor, but a {_kind(saved)} was saved")
        return live
    local = local_tensor(live)
    difference = tensor_difference(found, local)
    if not difference and type(saved) is SavedLeaf and _spoiled(local, found):
        difference = "is expanded, but the saved elements differ"
    if difference:
        plan.problems.append(f"{render(trail)}: {difference}")
    if type(saved) is not SavedLeaf:
        return found  # a sparse or quantized tensor, put together anew
    plan.writes.append((local, found))
    return live


def _spoiled(live: Tensor, view: Tensor) -> bool:
    """Whether `live` has one element in memory where `view` has different ones."""
    strides = zip(live.shape, live.stride(), strict=True)
    flat = [at for at, (size, stride) in enumerate(strides) if size > 1 and stride == 0]
    for dimension in flat:
        first = view.narrow(dimension, 0, 1).expand_as(view)
        if not bool((first == view).all()):
            return True
    return False


def _merge_array(plan: Plan, live: Any, saved: Any, trail: Trail) -> Any:
    if not isinstance(saved, np.ndarray):
        plan.problems.append(f"{render(trail)}: is an array, but a {_kind(saved)} was saved")
    elif saved.shape != live.shape or saved.dtype != live.dtype:
        plan.problems.append(
            f"{render(trail)}: is {live.dtype}{list(live.shape)}, "
            f"but {saved.dtype}{list(saved.shape)} was saved"
        )
    elif live.flags.writeable:
        plan.arrays.append((live, saved))
    else:
        return saved
    return live


def _merge_object(plan: Plan, live: Any, saved: Any, trail: Trail) -> Any:
    path = render(trail)
    load: Load | None
    if isinstance(live, nn.Module):
        load = plan_module(path, live, saved, plan.clones, plan.problems)
    elif isinstance(live, Optimizer):
        load = plan_optimizer(path, live, saved, plan.clones, plan.writes, plan.problems)
    else:
        # Its own clones: two objects never share what they were given.
        load = ObjectLoad(path, live, fresh(saved, Clones()))
    plan.loads += [load] if load is not None else []
    return live


def _merge_mapping(plan: Plan, live: Any, saved: Any, trail: Trail) -> Any:
    items = {
        key: _merge(plan, live[key], item, (trail, key))
        if key in live
        else fresh(item, plan.clones)
        for key, item in saved.items()
    }
    for key, item in live.items():
        if key not in saved:
            _need_nothing_of(plan, item, (trail, key), "but was not saved")
    plan.fills.append((live, items))
    return live


def _merge_sequence(plan: Plan, live: Any, saved: Any, trail: Trail) -> Any:
    items = [
        _merge(plan, live[at], item, (trail, at)) if at < len(live) else fresh(item, plan.clones)
        for at, item in enumerate(saved)
    ]
    for at in range(len(saved), len(live)):
        _need_nothing_of(plan, live[at], (trail, at), "but was not saved")
    if type(live) is tuple:
        return tuple(items)
    plan.fills.append((live, items))
    return live


def _need_nothing_of(plan: Plan, live: Any, trail: Trail, why: str) -> None:
    """Every tensor or object in `live` is a problem: nothing was saved for it."""
    plan.problems.extend(f"{path}: is in the live state, {why}" for path in _needy(live, trail, 0))


def _needy(live: Any, trail: Trail, depth: int) -> Iterator[str]:
    if isinstance(live, (Tensor, np.ndarray, *GENERATORS)) or keeps_own_state(live):
        yield render(trail)
    elif depth < 100 and type(live) in MAPPING_TAGS:
        for key, item in live.items():
            yield from _needy(item, (trail, key), depth + 1)
    elif depth < 100 and type(live) in (list, tuple, deque):
        for at, item in enumerate(live):
            yield from _needy(item, (trail, at), depth + 1)


def _apply_loads(loads: list[Load]) -> None:
    """Objects with code of their own go first: they may refuse, the others no longer can."""
    done: list[tuple[Load, Any]] = []
    for load in sorted(loads, key=lambda item: not item.own_code):
        try:
            done.append((load, load.backup()))
            load.apply()
        except Exception as error:
            for earlier, backup in reversed(done):
                earlier.undo(backup)
            raise StateMismatchError(
                f"refused its saved state: {error}", subject=load.path
            ) from error


def _write_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write into plain tensors of host memory all at once, on one core; into others one by one."""
    plain = []
    for live, view in pairs:
        if live.is_cpu and live.is_contiguous() and not _is_special(live):
            plain.append((carried(live.detach()), view))
        else:
            write(live, view)
    thread = CopyThread()
    try:
        thread.copy([live for live, _ in plain], [view for _, view in plain])
    finally:
        thread.close()


def _is_special(live: Tensor) -> bool:
    return live.is_conj() or live.is_neg() or live.is_inference()


def _fill(container: Any, items: Any) -> None:
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


def _replace(state: MutableMapping[str, Any], items: dict[str, Any]) -> None:
    """Put new values into the user's mapping, which keeps its other names and its order."""
    for name, item in items.items():
        if state[name] is not item:
            state[name] = item
