"""What a row of the table of state shapes is, and an oracle that compares two states bit by bit.

The oracle knows nothing of ckptmgr: it looks at live objects only.
"""

from __future__ import annotations

import random
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A kind of state: `make(seed)` builds it, so that two seeds give twins that differ.

    `refused` is the path that the refusal must name, None where the way back must be exact.
    `advance` trains one step, to show that the restored twin goes on like the original.
    """

    area: str
    name: str
    make: Callable[[int], State]
    refused: str | None = None
    advance: Callable[[State], None] | None = None


def random_bits(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every bit pattern: NaN payloads, -0.0, denormals, infinities; on the default device."""
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator, device="cpu")
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).view(shape).to(torch.get_default_device())


def bytes_of(tensor: Tensor) -> bytes:
    """The logical elements, row by row."""
    whole = tensor if tensor.layout == torch.strided else tensor.to_dense()
    plain = whole.detach().resolve_conj().resolve_neg().cpu()
    if plain.dtype.itemsize == 1 and plain.dtype != torch.bool:
        plain = plain.view(torch.uint8)
    flat = plain.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def difference(left: Any, right: Any, path: str = "") -> str:
    """Where two states differ first, or an empty string."""
    if hasattr(left, "load_state_dict") and not isinstance(left, type):
        left = left.state_dict()
    if hasattr(right, "load_state_dict") and not isinstance(right, type):
        right = right.state_dict()
    if type(left) is not type(right):
        return f"{path}: {type(left)} is not {type(right)}"
    if isinstance(left, Tensor):
        return _tensors(left, right, path)
    if isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape
        return "" if same and left.tobytes() == right.tobytes() else f"{path}: arrays differ"
    if isinstance(left, Mapping):
        return _mappings(left, right, path)
    if isinstance(left, (list, tuple, deque)):
        if len(left) != len(right):
            return f"{path}: {len(left)} items are not {len(right)}"
        pairs = zip(left, right, strict=True)
        inside = (difference(a, b, f"{path}/{at}") for at, (a, b) in enumerate(pairs))
        return next((found for found in inside if found), "")
    return "" if _plain(left) == _plain(right) else f"{path}: {left!r} is not {right!r}"


def _mappings(left: Any, right: Any, path: str) -> str:
    if [(type(k), _plain(k)) for k in left] != [(type(k), _plain(k)) for k in right]:
        return f"{path}: keys {list(left)[:9]} are not {list(right)[:9]}"
    if isinstance(left, defaultdict) and left.default_factory is not right.default_factory:
        return f"{path}: other default_factory"
    if isinstance(left, OrderedDict) and vars(left) != vars(right):
        return f"{path}: attributes {vars(left)} are not {vars(right)}"
    pairs = zip(left.items(), right.items(), strict=True)
    inside = (difference(a, b, f"{path}/{key}") for (key, a), (_, b) in pairs)
    return next((found for found in inside if found), "")


def _tensors(left: Tensor, right: Tensor, path: str) -> str:
    for what in ("dtype", "shape", "layout", "requires_grad", "is_quantized"):
        if getattr(left, what) != getattr(right, what):
            return f"{path}: {what} {getattr(left, what)} is not {getattr(right, what)}"
    if left.is_quantized:
        return difference(_quantized(left), _quantized(right), path)
    if left.layout == torch.sparse_coo:
        if left.is_coalesced() != right.is_coalesced():
            return f"{path}: is_coalesced"
        return difference([left._indices(), left._values()], [right._indices(), right._values()])
    if left.layout in (torch.sparse_csr, torch.sparse_bsr):
        return difference(
            [left.crow_indices(), left.col_indices(), left.values()],
            [right.crow_indices(), right.col_indices(), right.values()],
        )
    if left.layout in (torch.sparse_csc, torch.sparse_bsc):
        return difference(
            [left.ccol_indices(), left.row_indices(), left.values()],
            [right.ccol_indices(), right.row_indices(), right.values()],
        )
    return "" if bytes_of(left) == bytes_of(right) else f"{path}: bytes differ"


def _quantized(tensor: Tensor) -> list[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.int_repr(), tensor.q_scale(), tensor.q_zero_point()]
    parts = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return [tensor.int_repr(), *parts, tensor.q_per_channel_axis()]


def _plain(item: Any) -> Any:
    """Something that is equal only for the same bits."""
    if isinstance(item, (float, np.floating)):
        return type(item), np.asarray(item).tobytes()
    if isinstance(item, complex):
        return type(item), struct.pack("<dd", item.real, item.imag)
    if isinstance(item, torch.Generator):
        return item.device, bytes_of(item.get_state())
    if isinstance(item, random.Random):
        return item.getstate()
    if isinstance(item, np.random.Generator):
        return repr(item.bit_generator.state)
    if isinstance(item, np.random.RandomState):
        return repr(item.get_state(legacy=False))
    if isinstance(item, tuple):
        return type(item), tuple(_plain(part) for part in item)
    if isinstance(item, (set, frozenset)):
        return type(item), frozenset((type(part), _plain(part)) for part in item)
    return item


def ties(state: Any) -> set[tuple[str, str]]:
    """Pairs of paths that are one tensor (or views of the same memory at the same place)."""
    seen: dict[Any, str] = {}
    found = set()
    for path, tensor in tensors(state):
        if tensor.layout != torch.strided or not tensor.numel() or tensor.is_quantized:
            continue
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        first = seen.setdefault(key, path)
        if first != path:
            found.add((first, path))
    return found


def tensors(item: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """All tensors in a state with where they are."""
    if hasattr(item, "load_state_dict") and not isinstance(item, type):
        item = item.state_dict()
    if isinstance(item, Tensor):
        return [(path, item)]
    if isinstance(item, Mapping):
        pairs = list(item.items())
    elif isinstance(item, (list, tuple, deque)):
        pairs = list(enumerate(item))
    else:
        return []
    return [found for key, part in pairs for found in tensors(part, f"{path}/{key}")]
