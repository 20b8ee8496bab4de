"""Live tensors as parts of whole ones: where what this process holds lies, and names for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ckptmgr.staging.boxes import Box, whole


def live_part(tensor: Tensor) -> tuple[Box, Tensor]:
    """What this process holds of a tensor: the box of it, and the local tensor."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return Box(tuple(offset), tuple(shape)), tensor._local_tensor
    return whole(tensor.shape), tensor


def live_box(tensor: Tensor) -> Box:
    """Where what this process holds of a tensor lies in the whole."""
    return live_part(tensor)[0]


def is_spread(item: Any) -> bool:
    """Whether it is a tensor of which this process holds only a part."""
    return isinstance(item, DTensor)


def like(pattern: Tensor, local: Tensor) -> Tensor:
    """A tensor that is spread over processes as `pattern` is, with this local part."""
    if not isinstance(pattern, DTensor):
        return local
    made: Any = DTensor.from_local(
        local,
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )
    found: Tensor = made
    return found
