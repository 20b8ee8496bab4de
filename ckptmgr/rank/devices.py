"""New tensors go where those are that they take the place of."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ckptmgr.rank.parts import PLAIN_TYPES
from ckptmgr.staging.values import MAPPING_TAGS


def moved(made: Any, live: Any) -> Any:
    """New objects, with each tensor on the GPU that the one at its place in `live` is on.

    What has nothing at its place stays in host memory, and what was one tensor is one again.
    """
    return _moved(made, live, {})


def _moved(made: Any, live: Any, known: dict[tuple[int, torch.device], Tensor]) -> Any:
    if isinstance(live, Tensor):
        if type(made) not in PLAIN_TYPES or live.device.type != "cuda":
            return made
        place = id(made), live.device
        if place not in known:
            known[place] = _on(live.device, made)
        return known[place]
    kind = type(made)
    if kind is not type(live) or not made:
        return made
    if kind in MAPPING_TAGS:
        for key in made:
            if key in live:
                dict.__setitem__(made, key, _moved(made[key], live[key], known))
    elif kind in (list, deque):
        for at, (item, other) in enumerate(zip(made, live, strict=False)):
            made[at] = _moved(item, other, known)
    elif kind is tuple:
        begin = [_moved(item, other, known) for item, other in zip(made, live, strict=False)]
        return (*begin, *made[len(begin) :])
    return made


def _on(device: torch.device, made: Tensor) -> Tensor:
    there = made.detach().to(device)
    if isinstance(made, torch.nn.Parameter):
        return torch.nn.Parameter(there, requires_grad=made.requires_grad)
    return there.requires_grad_(made.requires_grad)
