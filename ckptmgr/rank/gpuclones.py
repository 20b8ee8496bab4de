"""Small tensors that anybody may write are cloned on their GPU, so that no copy waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ckptmgr.rank.tensors import carried

CLONED_BYTES_MAX = 64 << 20
"""GPU memory that a snapshot takes for some milliseconds: running statistics, tables of positions,
scales. To wait for them costs what is left of the step that the GPU is at."""


def cloned(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Clones, in their carrier dtypes, of those that are on a GPU: their values are those after all
    that is in the current streams. None if they are many bytes, or if the GPU has no room.
    """
    there = {at: tensor for at, tensor in tensors.items() if tensor.is_cuda}
    if sum(tensor.nbytes for tensor in there.values()) > CLONED_BYTES_MAX:
        return {}
    try:
        with torch.no_grad():
            return {at: carried(tensor).clone() for at, tensor in there.items()}
    except torch.cuda.OutOfMemoryError:
        return {}
