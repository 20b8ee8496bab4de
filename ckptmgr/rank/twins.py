"""What an optimizer will hold after its first step, learned from a twin of one element."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ckptmgr.rank.living import like
from ckptmgr.rank.optimizers import local_optimizer, state_dict_of, steps_here
from ckptmgr.rank.parts import dtensor_type, local_tensor
from ckptmgr.rank.replicas import keeps_alike

FALLBACK_NAMES = ("exp_avg", "exp_avg_sq")
"""State assumed of an optimizer whose twin can not be stepped: as much as Adam has."""


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of the state of a parameter; `like_parameter` if it has its shape."""

    name: str
    dtype: torch.dtype
    like_parameter: bool


def predicted_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The state_dict after the first step, with meta tensors in place of those still missing."""
    now = state_dict_of(optimizer)
    state = dict(now["state"])
    stepped = steps_here(optimizer)
    learned: dict[Any, list[StateTensor]] = {}
    number = 0
    for at, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if not state.get(number) and param.requires_grad and stepped(param):
                key = at, param.dtype, param.dim(), param.device
                if key not in learned:
                    learned[key] = learn(local_optimizer(optimizer), group, param)
                state[number] = {item.name: _meta(item, param) for item in learned[key]}
            number += 1
    return {**now, "state": state}


def _meta(item: StateTensor, param: Tensor) -> Tensor:
    if not item.like_parameter:
        return torch.empty((), dtype=item.dtype, device="meta")
    made = torch.empty(local_tensor(param).shape, dtype=item.dtype, device="meta")
    if type(param) is not dtensor_type():
        return made
    return like(param, made)


def _made_like(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """A new optimizer of this class with one group; its defaults are not all arguments."""
    kind: Any = type(optimizer)
    known = inspect.signature(kind).parameters
    return kind([group], **{k: v for k, v in optimizer.defaults.items() if k in known})


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def learn(optimizer: Optimizer, group: dict[str, Any], param: Tensor) -> list[StateTensor]:
    """State tensors that one step makes for a parameter like `param`."""
    fallback = [StateTensor(name, param.dtype, like_parameter=True) for name in FALLBACK_NAMES]
    if _has_peers() and not keeps_alike(optimizer):
        return fallback  # its step may wait for the other ranks, which do not step theirs now
    options = {name: item for name, item in group.items() if name not in ("params", "param_names")}
    try:
        twin = torch.nn.Parameter(
            torch.zeros((1,) * param.dim(), dtype=param.dtype, device=param.device)
        )
        twin.grad = torch.zeros_like(twin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _made_like(optimizer, {**options, "params": [twin]})
            made.step()
        state = dict(made.state[twin])
    except Exception:  # noqa: BLE001 - any optimizer, any signature: this is only a forecast
        return fallback
    return [
        StateTensor(str(name), item.dtype, item.shape == twin.shape and param.dim() > 0)
        for name, item in state.items()
        if isinstance(item, Tensor)
    ]
