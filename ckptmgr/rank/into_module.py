"""A saved state_dict goes into a live module: checked first, then copied into what exists."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.names import match_names
from ckptmgr.rank.saved import Clones, SavedLeaf, fresh
from ckptmgr.rank.tensors import carried
from ckptmgr.staging.paths import segment

_EXTRA_STATE = "_extra_state"
_LOADING_METHODS = ("load_state_dict", "_load_from_state_dict", "set_extra_state")


@dataclass(frozen=True, slots=True)
class ModuleLoad:
    """A state_dict that fits `module`; `own_code` if classes of the user take part in loading."""

    path: str
    module: nn.Module
    state: OrderedDict[str, Any]
    own_code: bool
    ignored: frozenset[str]

    def backup(self) -> Any:
        """What `undo` needs; taken only where loading can fail half-way."""
        return copy.deepcopy(self.module.state_dict()) if self.own_code else None

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""
        if backup is not None:
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


def plan_module(
    path: str, module: nn.Module, saved: Any, clones: Clones, problems: list[str]
) -> ModuleLoad | None:
    """Compare a saved state_dict with a live module; what differs is added to `problems`."""
    live = module.state_dict()
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        problems.append(f"{path}: is a module, but no state_dict was saved")
        return None
    matched = match_names(saved, live)
    _compare_names(path, saved, live, matched, problems)
    for name, live_name in matched.items():
        _compare(f"{path}/{segment(name)}", saved[name], live[live_name], problems)
    _compare_ties(path, saved, live, matched, problems)
    own_code = has_own_code(module)
    state: OrderedDict[str, Any] = OrderedDict(
        (matched[name], _to_load(item, clones, own_code=own_code))
        for name, item in saved.items()
        if name in matched
    )
    _rename_metadata(saved, live, state)
    known = set(dict(module.named_parameters(remove_duplicate=False)))
    known |= set(dict(module.named_buffers(remove_duplicate=False)))
    return ModuleLoad(path, module, state, own_code, frozenset(known - set(live)))


def has_own_code(module: nn.Module) -> bool:
    """Whether anything but torch.nn takes part in loading: it may keep what it is given."""
    for part in module.modules():
        if part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks:
            return True
        for method in _LOADING_METHODS:
            home = getattr(getattr(type(part), method), "__module__", "")
            if not home.startswith("torch.nn."):
                return True
    return False


def _to_load(item: Any, clones: Clones, *, own_code: bool) -> Any:
    if type(item) is SavedLeaf and not own_code:
        return item.view
    return fresh(item, clones)


def _compare_names(
    path: str, saved: Any, live: Any, matched: dict[str, str], problems: list[str]
) -> None:
    known = set(matched.values())
    problems.extend(
        f"{path}/{segment(name)}: is in the live state, but was not saved"
        for name in live
        if name not in known
    )
    problems.extend(
        f"{path}/{segment(name)}: was saved, but is not in the live state"
        for name in saved
        if name not in matched
    )


def _compare(path: str, saved: Any, live: Any, problems: list[str]) -> None:
    if path.endswith(_EXTRA_STATE) or is_lazy(live) or not isinstance(live, Tensor):
        return
    found = saved.view if type(saved) is SavedLeaf else saved
    if not isinstance(found, Tensor):
        problems.append(f"{path}: is a tensor, but a {type(saved).__name__} was saved")
        return
    difference = tensor_difference(found, live)
    if difference:
        problems.append(f"{path}: {difference}")


def tensor_difference(saved: Tensor, live: Tensor) -> str:
    """How shape or dtype differ, or an empty string."""
    if saved.shape != live.shape:
        return f"has shape {list(live.shape)}, but {list(saved.shape)} was saved"
    if saved.layout != live.layout:
        return f"is {live.layout}, but {saved.layout} was saved"
    if saved.dtype != live.dtype:
        return f"is {live.dtype}, but {saved.dtype} was saved"
    return ""


def _compare_ties(
    path: str, saved: Any, live: Any, matched: dict[str, str], problems: list[str]
) -> None:
    """Tied tensors can hold one value only; two different saved ones do not fit."""
    seen: dict[Any, str] = {}
    for name, live_name in matched.items():
        here, there = saved[name], live[live_name]
        if type(here) is not SavedLeaf or not isinstance(there, Tensor) or not there.numel():
            continue
        if is_lazy(there) or there.layout != torch.strided:
            continue
        place = (there.device, there.data_ptr(), there.shape, there.stride())
        first = seen.setdefault(place, name)
        one, other = saved[first], here
        if type(one) is SavedLeaf and one.view is not other.view and not _same(one, other):
            problems.append(
                f"{path}/{segment(name)}: is tied to {first} in the live state, "
                "but they differ in the saved one"
            )


def _same(one: SavedLeaf, other: SavedLeaf) -> bool:
    # Bits, not values: NaN is equal to itself here.
    if one.view.dtype != other.view.dtype or one.view.shape != other.view.shape:
        return False
    left, right = carried(one.view), carried(other.view)
    as_bytes = left.flatten().view(torch.uint8), right.flatten().view(torch.uint8)
    return torch.equal(*as_bytes)


def _rename_metadata(saved: Any, live: Any, state: OrderedDict[str, Any]) -> None:
    """Versions of submodules, by which torch.nn upgrades what older modules saved."""
    metadata = getattr(saved, "_metadata", None)
    if metadata is None:
        return
    matched = match_names(metadata, getattr(live, "_metadata", {}))
    renamed = {matched.get(name, name): item for name, item in metadata.items()}
    state._metadata = OrderedDict(renamed)  # type: ignore[attr-defined]
