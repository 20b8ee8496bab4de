"""A saved state_dict goes into a live module: checked first, then written into what exists.

Where only torch.nn takes part, the tensors are written in place, one part from each rank that holds
one, and load_state_dict is not called. Code of the user gets new tensors, by load_state_dict.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.backup import backup_of
from ckptmgr.rank.devices import moved
from ckptmgr.rank.flat import free_gathered, is_flat
from ckptmgr.rank.living import is_spread, is_tensor
from ckptmgr.rank.names import match_names
from ckptmgr.rank.outline import kind_of, outline
from ckptmgr.rank.regions import Clones, SavedLeaf
from ckptmgr.rank.saved import fresh
from ckptmgr.rank.wants import Wants, part_like
from ckptmgr.staging.paths import segment

_EXTRA_STATE = "_extra_state"
_METHODS = (
    "get_extra_state",
    "load_state_dict",
    "set_extra_state",
    "state_dict",
    "_load_from_state_dict",
    "_save_to_state_dict",
)
_TORCH = ("torch.nn.", "torch.distributed.")


@dataclass(frozen=True, slots=True)
class Place:
    """An item of a module's state: its path and its name, what was saved and what is there."""

    path: str
    name: str
    saved: Any
    live: Any

    @property
    def is_plain(self) -> bool:
        """Whether it can be written in place."""
        live = self.live
        if type(self.saved) is not SavedLeaf or not is_tensor(live) or is_lazy(live):
            return False
        return not isinstance(live, Tensor) or (
            live.layout == torch.strided and not live.is_quantized
        )

    @property
    def is_spread(self) -> bool:
        """Whether it is written in parts, of which other processes may hold others."""
        return type(self.saved) is SavedLeaf and is_spread(self.live)


@dataclass(slots=True)
class ModuleLoad:
    """A saved state_dict for a module that loads it by code of its own."""

    path: str
    module: nn.Module
    places: list[Place]
    versions: OrderedDict[str, Any] | None
    ignored: frozenset[str]
    state: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    own_code: bool = True

    def build(self, clones: Clones) -> None:
        """Make the state that it will be given; nothing in it is in saved memory."""
        for place in self.places:
            self.state[place.name] = (
                part_like(place.live, place.saved, clones.regions)
                if place.is_spread
                else moved(fresh(place.saved, clones), place.live)
            )
        if self.versions is not None:
            self.state._metadata = self.versions  # type: ignore[attr-defined]

    def backup(self) -> Any:
        """What `undo` needs."""
        return backup_of(self.module.state_dict())

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""
        self.module.load_state_dict(backup, strict=False)

    def apply(self) -> None:
        """Load it.

        Raises:
            StateMismatchError: the module's own code asks for names that were not saved, or has put
                what it was given nowhere (torch copies into a meta tensor without a word).
        """
        found = self.module.load_state_dict(self.state, strict=False)
        missing = [name for name in found.missing_keys if name not in self.ignored]
        if missing or found.unexpected_keys:
            raise StateMismatchError(
                f"did not take {found.unexpected_keys} and misses {missing}", subject=self.path
            )
        if any(_is_meta(place.live) for place in self.places):
            empty = [name for name, item in self.module.state_dict().items() if _is_meta(item)]
            if empty:
                raise StateMismatchError(f"left {empty} on the meta device", subject=self.path)


def plan_module(
    path: str, module: nn.Module, live: Any, saved: Any, wants: Wants
) -> ModuleLoad | None:
    """Compare a saved state_dict with `live`, that of a module, and want what it takes.

    Returns what has to be loaded by the module itself; None if all is written in place.
    """
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        wants.problems.append(f"{path}: is a module, but no state_dict was saved")
        return None
    matched = match_names(saved, live)
    _compare_names(path, saved, live, matched, wants)
    places = [
        Place(f"{path}/{segment(name)}", matched[name], saved[name], live[matched[name]])
        for name in saved
        if name in matched
    ]
    for place in places:
        _compare(place, wants.problems)
    flat = is_flat(module)  # whose own state_dict and load_state_dict need all ranks
    if flat:
        wants.problems += [f"{p.path}: is no tensor of an FSDP module" for p in _not_plain(places)]
    if flat:
        free_gathered(module)
    if flat or not (has_own_code(module) or _not_plain(places)):
        _want_in_place(places, wants, write=True)
        return None
    _want_in_place(places, wants, write=False)
    for place in places:
        if place.is_spread:
            wants.parts_like(place.path, place.live, place.saved)
        else:
            wants.all_of(place.saved)
    known = set(dict(module.named_parameters(remove_duplicate=False)))
    known |= set(dict(module.named_buffers(remove_duplicate=False)))
    return ModuleLoad(path, module, places, _versions(saved, live), frozenset(known - set(live)))


def has_own_code(module: nn.Module) -> bool:
    """Whether anything but torch takes part in its state: it may keep what it is given."""
    for part in module.modules():
        hooks = [
            *part._load_state_dict_pre_hooks.values(),
            *part._load_state_dict_post_hooks.values(),
            *part._state_dict_pre_hooks.values(),
            *part._state_dict_hooks.values(),
        ]
        if not all(_home(hook).startswith(_TORCH) for hook in hooks):
            return True
        # What was put onto the instance counts as well: it may give copies.
        methods = (vars(part).get(name, getattr(type(part), name)) for name in _METHODS)
        if not all(_home(method).startswith(_TORCH) for method in methods):
            return True
    return False


def _is_meta(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_meta


def _home(code: Any) -> str:
    """The module that a hook or a method was written in."""
    while (inner := getattr(code, "func", None) or getattr(code, "hook", None)) is not None:
        code = inner
    return str(getattr(code, "__module__", ""))


def _not_plain(places: list[Place]) -> list[Place]:
    return [place for place in places if not place.is_plain]


def _want_in_place(places: list[Place], wants: Wants, *, write: bool) -> None:
    """Want each saved tensor; tied live ones once, as they can hold one value only."""
    want = wants.write if write else wants.hold
    for place in places:
        if place.is_plain:
            want(place.path, place.live, place.saved)


def _compare_names(path: str, saved: Any, live: Any, matched: dict[str, str], wants: Wants) -> None:
    known = set(matched.values())
    wants.problems.extend(
        f"{path}/{segment(name)}: is in the live state, but was not saved"
        for name in live
        if name not in known
    )
    wants.leave(f"{path}/{segment(name)}" for name in saved if name not in matched)


def _compare(place: Place, problems: list[str]) -> None:
    live = place.live
    if place.path.endswith(_EXTRA_STATE) or is_lazy(live) or not is_tensor(live):
        return
    found = outline(place.saved)
    if found is None:
        problems.append(f"{place.path}: is a tensor, but a {kind_of(place.saved)} was saved")
    elif (difference := found.difference(live)) != "":
        problems.append(f"{place.path}: {difference}")


def _versions(saved: Any, live: Any) -> OrderedDict[str, Any] | None:
    """Versions of submodules, by which torch.nn upgrades what older modules saved."""
    versions = getattr(saved, "_metadata", None)
    if versions is None:
        return None
    matched = match_names(versions, getattr(live, "_metadata", {}))
    return OrderedDict((matched.get(name, name), item) for name, item in versions.items())
