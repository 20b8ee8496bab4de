"""A saved state_dict goes into a live optimizer, with the exact dtypes that were saved.

torch's own Optimizer.load_state_dict casts state to the dtype of its parameter, which loses the
float32 state of a bfloat16 parameter, and it may keep the tensors that it is given.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ckptmgr.rank.names import unwrapped
from ckptmgr.rank.saved import Clones, SavedLeaf, exact_clone, fresh
from ckptmgr.rank.tensors import carried

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
class OptimizerLoad:
    """A state_dict that fits `optimizer`; `own_code` if hooks or an override take part.

    `writes` collects (live tensor, saved view): what is to be written in place after `apply`.
    """

    path: str
    optimizer: Optimizer
    saved: dict[str, Any]
    clones: Clones
    own_code: bool
    writes: list[tuple[Tensor, Tensor]]

    def backup(self) -> Any:
        """What `undo` needs; taken only where loading can fail half-way."""
        return copy.deepcopy(self.optimizer.state_dict()) if self.own_code else None

    def undo(self, backup: Any) -> None:
        """Put back what `backup` kept."""
        if backup is not None:
            self.optimizer.load_state_dict(backup)

    def apply(self) -> None:
        """Load it; state tensors and tensor options that exist and fit stay, and join `writes`."""
        before = {p: dict(state) for p, state in self.optimizer.state.items()}
        options = [dict(group) for group in self.optimizer.param_groups]
        if self.own_code:
            self.optimizer.load_state_dict(fresh(self.saved, self.clones))
        else:
            self.optimizer.load_state_dict(_with_stand_ins(self.saved, self.clones))
        on_device = self._on_device()
        for number, param in enumerate(_params(self.optimizer)):
            saved = self.saved["state"].get(number)
            if isinstance(saved, dict):
                step_device = param.device if id(param) in on_device else torch.device("cpu")
                self._place_state(param, saved, before.get(param, {}), step_device)
        pairs = zip(self.optimizer.param_groups, self.saved["param_groups"], strict=True)
        for (group, saved), old in zip(pairs, options, strict=True):
            self._place_options(group, saved, old)

    def _on_device(self) -> set[int]:
        """Parameters whose step count a kernel needs beside them; the others keep it on the CPU."""
        return {
            id(param)
            for group in self.optimizer.param_groups
            if group.get("capturable") or group.get("fused")
            for param in group["params"]
        }

    def _place_state(
        self,
        param: Tensor,
        saved: dict[Any, Any],
        before: dict[Any, Any],
        step_device: torch.device,
    ) -> None:
        state = self.optimizer.state[param]
        for name, item in saved.items():
            # What hooks or an override made of it stays, unless only the dtype was lost.
            if type(item) is SavedLeaf:
                if not self.own_code or _only_dtype_differs(state.get(name), item.view):
                    device = step_device if name == "step" else param.device
                    state[name] = self._exact(item.view, before.get(name), device)
            elif not self.own_code and isinstance(item, (list, tuple)):
                state[name] = _to_device(fresh(item, self.clones), param.device)

    def _exact(self, view: Tensor, before: Any, device: torch.device) -> Tensor:
        if isinstance(before, Tensor) and fits(before, view):
            self.writes.append((before, view))
            return before
        return exact_clone(view).to(device)

    def _place_options(
        self, group: dict[str, Any], saved: dict[str, Any], before: dict[str, Any]
    ) -> None:
        for name, item in saved.items():
            if name == "params":
                continue
            old = before.get(name)
            if type(item) is SavedLeaf and isinstance(old, Tensor) and fits(old, item.view):
                self.writes.append((old, item.view))
                group[name] = old
            elif not self.own_code:
                group[name] = fresh(item, self.clones)


def fits(live: Tensor, view: Tensor) -> bool:
    """Whether a saved tensor can be written into `live`."""
    same = live.shape == view.shape and live.dtype == view.dtype
    return same and live.layout == torch.strided


def write(live: Tensor, view: Tensor) -> None:
    """Write saved bits into a live tensor of the same shape and dtype.

    Dimensions that were expanded (stride 0) are one element in memory, and written once.
    """
    for dimension, (size, stride) in enumerate(zip(live.shape, live.stride(), strict=True)):
        if size > 1 and stride == 0:
            live = live.narrow(dimension, 0, 1)
            view = view.narrow(dimension, 0, 1)
    with torch.inference_mode() if live.is_inference() else torch.no_grad():
        if live.is_conj() or live.is_neg():
            live.copy_(view)
        else:
            carried(live).copy_(carried(view))


def plan_optimizer(
    path: str,
    optimizer: Optimizer,
    saved: Any,
    clones: Clones,
    writes: list[tuple[Tensor, Tensor]],
    problems: list[str],
) -> OptimizerLoad | None:
    """Compare a saved state_dict with a live optimizer; what differs is added to `problems`."""
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        problems.append(f"{path}: is an optimizer, but no state_dict of one was saved")
        return None
    groups, live_groups = saved["param_groups"], optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    live_sizes = [len(group["params"]) for group in live_groups]
    if sizes != live_sizes:
        problems.append(
            f"{path}/param_groups: have {live_sizes} parameters, but {sizes} were saved"
        )
        return None
    for number, (group, live) in enumerate(zip(groups, live_groups, strict=True)):
        names, live_names = group.get("param_names"), live.get("param_names")
        if names and live_names and _bare(names) != _bare(live_names):
            problems.append(f"{path}/param_groups/{number}: has other parameters or another order")
    _compare_state(path, optimizer, saved["state"], problems)
    return OptimizerLoad(path, optimizer, saved, clones, _has_own_code(optimizer), writes)


def _bare(names: list[str]) -> list[str]:
    return [unwrapped(name) for name in names]


def _compare_state(path: str, optimizer: Optimizer, state: Any, problems: list[str]) -> None:
    params = _params(optimizer)
    known = type(optimizer).__module__.startswith("torch.optim.")
    for number, items in state.items():
        if not isinstance(number, int) or not 0 <= number < len(params):
            problems.append(f"{path}/state/{number}: was saved, but there is no such parameter")
            continue
        if not known or not isinstance(items, dict) or len(params[number].shape) == 0:
            continue
        for name, item in items.items():
            if name not in _LIKE_PARAMETER or type(item) is not SavedLeaf:
                continue
            if item.view.dim() and item.view.shape != params[number].shape:
                problems.append(
                    f"{path}/state/{number}/{name}: the parameter has shape "
                    f"{list(params[number].shape)}, but {list(item.view.shape)} was saved"
                )


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _has_own_code(optimizer: Optimizer) -> bool:
    hooks = (
        optimizer._optimizer_load_state_dict_pre_hooks
        or optimizer._optimizer_load_state_dict_post_hooks
    )
    return bool(hooks) or type(optimizer).load_state_dict is not Optimizer.load_state_dict


def _with_stand_ins(saved: dict[str, Any], clones: Clones) -> dict[str, Any]:
    """Everything but the tensors: these are put in place one by one afterwards.

    torch would first copy each to the device and dtype of its parameter, a second whole state.
    """
    state = {number: _stand_in(items, clones) for number, items in saved["state"].items()}
    groups = [_stand_in(group, clones) for group in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def _stand_in(items: Any, clones: Clones) -> Any:
    if not isinstance(items, dict):
        return fresh(items, clones)
    return {
        name: torch.zeros(()) if type(item) is SavedLeaf else fresh(item, clones)
        for name, item in items.items()
    }


def _only_dtype_differs(kept: Any, view: Tensor) -> bool:
    return isinstance(kept, Tensor) and kept.shape == view.shape and kept.dtype != view.dtype


def _to_device(item: Any, device: torch.device) -> Any:
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        return type(item)(_to_device(part, device) for part in item)
    return item
