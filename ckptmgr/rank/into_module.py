"""A saved state_dict goes into a live module: checked first, then written into what exists.

Where only torch.nn takes part, the tensors are written in place, one part from each rank that holds
one, and load_state_dict is not called. Code of the user gets new tensors, by load_state_dict.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.living import is_spread, live_box, live_part
from ckptmgr.rank.names import match_names
from ckptmgr.rank.outline import kind_of, outline
from ckptmgr.rank.regions import Clones, SavedLeaf
from ckptmgr.rank.saved import fresh
from ckptmgr.rank.wants import Tie, Wants, part_like
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


@dataclass(slots=True)
class ModuleLoad:
    """A saved state_dict for a module that loads it by code of its own.

    `items` are (live name, saved item, live item).
    """

    path: str
    module: nn.Module
    items: list[tuple[str, Any, Any]]
    versions: OrderedDict[str, Any] | None
    ignored: frozenset[str]
    state: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    own_code: bool = True

    def build(self, clones: Clones) -> None:
        """Make the state that it will be given; nothing in it is in saved memory."""
        for name, saved, live in self.items:
            spread = type(saved) is SavedLeaf and is_spread(live)
            self.state[name] = (
                part_like(live, saved, clones.regions) if spread else fresh(saved, clones)
            )
        if self.versions is not None:
            self.state._metadata = self.versions  # type: ignore[attr-defined]

    def backup(self) -> Any:
        """What `undo` needs."""
        return copy.deepcopy(self.module.state_dict())

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""
        self.module.load_state_dict(backup, strict=False)

    def apply(self) -> None:
        """Load it.

        Raises:
            StateMismatchError: the module's own code asks for names that were not saved.
        """
        found = self.module.load_state_dict(self.state, strict=False)
        missing = [name for name in found.missing_keys if name not in self.ignored]
        if missing or found.unexpected_keys:
            raise StateMismatchError(
                f"did not take {found.unexpected_keys} and misses {missing}", subject=self.path
            )


def plan_module(path: str, module: nn.Module, saved: Any, wants: Wants) -> ModuleLoad | None:
    """Compare a saved state_dict with a live module, and want what it takes.

    Returns what has to be loaded by the module itself; None if all is written in place.
    """
    live = module.state_dict()
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        wants.problems.append(f"{path}: is a module, but no state_dict was saved")
        return None
    matched = match_names(saved, live)
    _compare_names(path, saved, live, matched, wants)
    for name, live_name in matched.items():
        _compare(f"{path}/{segment(name)}", saved[name], live[live_name], wants.problems)
    pairs = [(name, saved[name], live[live_name]) for name, live_name in matched.items()]
    if not has_own_code(module) and all(_is_plain(item, there) for _, item, there in pairs):
        _want_in_place(path, pairs, wants)
        return None
    _want_in_place(path, pairs, wants, ties_only=True)
    for _, item, there in pairs:
        if type(item) is SavedLeaf and is_spread(there):
            wants.part(item.whole.path, item.whole, live_box(there))
        else:
            wants.all_of(item)
    known = set(dict(module.named_parameters(remove_duplicate=False)))
    known |= set(dict(module.named_buffers(remove_duplicate=False)))
    items = [(matched[name], item, there) for name, item, there in pairs]
    return ModuleLoad(path, module, items, _versions(saved, live), frozenset(known - set(live)))


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
        if not all(_home(getattr(type(part), name)).startswith(_TORCH) for name in _METHODS):
            return True
    return False


def _home(code: Any) -> str:
    """The module that a hook or a method was written in."""
    while (inner := getattr(code, "func", None) or getattr(code, "hook", None)) is not None:
        code = inner
    return str(getattr(code, "__module__", ""))


def _is_plain(saved: Any, live: Any) -> bool:
    """Whether a saved tensor can be written into a live one in place."""
    if type(saved) is not SavedLeaf or not isinstance(live, Tensor) or is_lazy(live):
        return False
    return live.layout == torch.strided and not live.is_quantized


def _want_in_place(
    path: str, pairs: list[tuple[str, Any, Any]], wants: Wants, *, ties_only: bool = False
) -> None:
    """Want each saved tensor; tied live ones once, as they can hold one value only."""
    seen: dict[Any, tuple[str, SavedLeaf]] = {}
    for name, saved, live in pairs:
        if not _is_plain(saved, live):
            continue
        shown = f"{path}/{segment(name)}"
        box, local = live_part(live)
        place = (local.device, local.data_ptr(), local.shape, local.stride())
        if local.numel() and place in seen:
            first, other = seen[place]
            if other.whole is not saved.whole:
                wants.part(shown, saved.whole, box)
                wants.part(shown, other.whole, box)
                wants.ties.append(Tie(shown, first, other.whole, saved.whole, box))
            continue
        seen[place] = name, saved
        if not ties_only:
            wants.write(shown, live, saved)


def _compare_names(path: str, saved: Any, live: Any, matched: dict[str, str], wants: Wants) -> None:
    known = set(matched.values())
    wants.problems.extend(
        f"{path}/{segment(name)}: is in the live state, but was not saved"
        for name in live
        if name not in known
    )
    wants.leave(f"{path}/{segment(name)}" for name in saved if name not in matched)


def _compare(path: str, saved: Any, live: Any, problems: list[str]) -> None:
    if path.endswith(_EXTRA_STATE) or is_lazy(live) or not isinstance(live, Tensor):
        return
    found = outline(saved)
    if found is None:
        problems.append(f"{path}: is a tensor, but a {kind_of(saved)} was saved")
    elif (difference := found.difference(live)) != "":
        problems.append(f"{path}: {difference}")


def _versions(saved: Any, live: Any) -> OrderedDict[str, Any] | None:
    """Versions of submodules, by which torch.nn upgrades what older modules saved."""
    versions = getattr(saved, "_metadata", None)
    if versions is None:
        return None
    matched = match_names(versions, getattr(live, "_metadata", {}))
    return OrderedDict((matched.get(name, name), item) for name, item in versions.items())
