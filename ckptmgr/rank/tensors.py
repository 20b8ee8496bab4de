"""Which tensors can be leaves, and how their bytes are seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ckptmgr.rank.parts import PLAIN_TYPES, FlatRun, leaf_types
from ckptmgr.staging.paths import Trail
from ckptmgr.staging.values import refuse

REQUIRES_GRAD, IS_PARAMETER = 1, 2
"""Flags of a leaf in the tree (staging/values.py, tag 23)."""

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def is_leaf(item: Any) -> bool:
    """Whether an instance of one of `leaf_types` is stored as plain bytes."""
    if type(item) is FlatRun:
        return True
    if type(item) not in PLAIN_TYPES:
        if not all(map(_is_known, item.placements)):
            return False
        item = item._local_tensor
    return is_plain(item)


def is_plain(item: Tensor) -> bool:
    """Whether a tensor is one of elements in memory and nothing else."""
    strided = item.layout == torch.strided and not item.is_quantized and not item.is_nested
    return type(item) in PLAIN_TYPES and strided


def _is_known(placement: Any) -> bool:
    return placement.is_replicate() or hasattr(placement, "dim")


def admit(tensor: Tensor, trail: Trail) -> None:
    """Check that the bytes of a leaf can be read.

    Raises:
        UnsupportedLeafError: it has no bytes (meta), or none that can be copied.
    """
    if tensor.is_meta:
        raise refuse(trail, "is a meta tensor: it has a shape but no values")
    if tensor.dim() > _DIMENSIONS_MAX:
        raise refuse(trail, f"has {tensor.dim()} dimensions, more than {_DIMENSIONS_MAX}")
    if tensor.numel() and tensor.data_ptr() == 0:
        raise refuse(trail, "has no storage (it was freed, or is not materialised yet)")


_DIMENSIONS_MAX = 64
"""PyTorch's own limit for most operations."""


def why_not(tensor: Tensor) -> str:
    """Why a tensor that is neither a leaf nor decomposed is refused."""
    if is_lazy(tensor):
        return "is not initialised; run one batch through the lazy module first"
    if tensor.is_nested:
        return "is a nested (jagged) tensor"
    if type(tensor) not in leaf_types():
        return f"is of the tensor subclass {type(tensor).__module__}.{type(tensor).__qualname__}"
    if type(tensor) not in PLAIN_TYPES:
        return _why_not_distributed(tensor)
    return f"is a tensor of layout {tensor.layout}"


def _why_not_distributed(tensor: Any) -> str:
    odd = [str(placement) for placement in tensor.placements if not _is_known(placement)]
    if odd:
        return f"is a DTensor with the partial placement {odd[0]}: it is not reduced yet"
    local = tensor._local_tensor
    return f"is a DTensor whose local tensor is a {type(local).__qualname__} of {local.layout}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in a layout: `float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype with this name.

    Raises:
        ValueError: this torch has no such dtype.
    """
    if name not in _DTYPES:
        raise ValueError(f"torch {torch.__version__} has no dtype {name!r}")
    return _DTYPES[name]


def element_kind(dtype: torch.dtype) -> tuple[int, bool]:
    """Bytes and kind of the numbers in a dtype; a complex number is two floats."""
    size = dtype.itemsize
    return (size // 2, True) if dtype.is_complex else (size, dtype.is_floating_point)


def carrier(dtype: torch.dtype) -> torch.dtype:
    """A dtype of the same size that every copy kernel knows, to copy `dtype` bit by bit."""
    if dtype == torch.complex32:
        return torch.int32
    if dtype.is_complex or dtype in _COPIED_AS_THEMSELVES:
        return dtype
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]


_COPIED_AS_THEMSELVES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


def carried(tensor: Tensor) -> Tensor:
    """`tensor` seen in its carrier dtype; its logical values, conjugation resolved."""
    if tensor.dtype in _COPIED_AS_THEMSELVES:
        return tensor
    dtype = carrier(tensor.dtype)
    if dtype == tensor.dtype:
        return tensor
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.view(dtype)


def ordered_as(pattern: Tensor, made: Tensor) -> Tensor:
    """The elements of `made`, which has the shape of `pattern`, in its order in memory.

    Kernels that go over the memory of a parameter and of its state together (fused optimizers)
    take both to have one order, as torch's own `zeros_like` makes them.
    """
    if pattern.layout != torch.strided or made.stride() == pattern.stride():
        return made
    order = torch.empty_like(pattern, device="meta").stride()
    if made.stride() == order:
        return made
    found = torch.empty_strided(made.shape, order, dtype=made.dtype, device=made.device)
    carried(found).copy_(carried(made))
    return found
