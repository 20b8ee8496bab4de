"""Live tensors as parts of whole ones: which boxes this process holds, and the memory of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ckptmgr.rank.parts import PLAIN_TYPES, FlatRun, dtensor_type, local_part
from ckptmgr.staging.boxes import Box, whole

View = tuple[Box, Tensor]
"""A box of a whole tensor, and the live memory of it, in its shape."""


def is_tensor(item: Any) -> bool:
    """Whether it is a tensor, or the part of one in the flat parameters of FSDP1."""
    return isinstance(item, (Tensor, FlatRun))


def views(item: Any, memory: Tensor | None = None) -> list[View]:
    """What this process holds of a tensor; or of another one that `memory` is the local part of."""
    if not is_spread(item):
        local = item if memory is None else memory
        return [(whole(local.shape), local.detach())]
    part = local_part(item)
    local = (part.tensor if memory is None else memory).detach()
    return [(piece.box, piece.of(local)) for piece in part.pieces if piece.box.count]


def is_spread(item: Any) -> bool:
    """Whether it is a tensor of which this process may hold only a part."""
    kind = type(item)
    return kind not in PLAIN_TYPES and kind in (FlatRun, dtensor_type())


def empty_like(pattern: Any, dtype: torch.dtype) -> Tensor:
    """Memory for another tensor of which this process holds what it holds of `pattern`."""
    return torch.zeros(local_part(pattern).tensor.shape, dtype=dtype, device="cpu")


def like(pattern: Any, local: Tensor) -> Tensor:
    """A tensor that is spread over processes as the DTensor `pattern` is, with this local part."""
    made: Tensor = type(pattern).from_local(
        local,
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )
    return made
