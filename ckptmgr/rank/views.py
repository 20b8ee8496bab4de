"""Tensors over the memory of slots: made once per layout, so that a snapshot allocates nothing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptmgr.rank.tensors import carrier, dtype_of
from ckptmgr.types import Layout

SLOTS_KEPT_MAX = 3
"""A host buffer has at most three slots."""


@dataclass(frozen=True, slots=True)
class SlotViews:
    """One tensor per leaf over a slot's data region, in the carrier dtypes."""

    layout: Layout
    leaves: list[Tensor]


class ViewCache:
    """Views of the slots that were written lately; registered with CUDA where it is in use.

    The slots' memory can not be unmapped before `clear`.
    """

    def __init__(self) -> None:
        self._views: dict[int, SlotViews] = {}
        self._registered: dict[int, Tensor] = {}

    def of(self, layout: Layout, data: memoryview) -> SlotViews:
        """The views of a slot; its bytes between the leaves are cleared for a new layout."""
        if not layout.data_bytes:
            return SlotViews(layout, slot_tensors(layout, torch.empty(0, dtype=torch.uint8)))
        base = torch.frombuffer(data, dtype=torch.uint8)
        place = base.data_ptr()
        found = self._views.get(place)
        if found is None or found.layout is not layout:
            if place not in self._views and len(self._views) >= SLOTS_KEPT_MAX:
                self.clear()
            self._register(place, base)
            clear_gaps(layout, data)
            found = SlotViews(layout, slot_tensors(layout, base))
            self._views[place] = found
        return found

    def _register(self, place: int, base: Tensor) -> None:
        """Lock a slot's pages for the GPU: only then is a copy faster than, and beside, training.

        Not run on a GPU yet.
        """
        if place in self._registered or not cuda_in_use():
            return
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(place, base.numel(), 0)
        if int(status) == 0:
            self._registered[place] = base
        else:
            warnings.warn(
                f"ckptmgr: host memory can not be page-locked (CUDA error {int(status)}); "
                "copies from the GPU will be slow. Raise the limit of locked memory (ulimit -l).",
                RuntimeWarning,
                stacklevel=2,
            )

    def clear(self) -> None:
        """Let go of the slots' memory."""
        self._views.clear()
        for place in self._registered:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(place)
        self._registered.clear()


def cuda_in_use() -> bool:
    """Whether this process has started CUDA; asking does not start it."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use


def slot_tensors(layout: Layout, base: Tensor) -> list[Tensor]:
    """Views of the leaves in the data region `base` (uint8), in their carrier dtypes."""
    bases: dict[torch.dtype, Tensor] = {}
    views = []
    for leaf in layout.leaves:
        dtype = carrier(dtype_of(leaf.dtype))
        if leaf.nbytes == 0:
            views.append(torch.empty(leaf.shape, dtype=dtype))
            continue
        if dtype not in bases:
            bases[dtype] = base[: layout.data_bytes].view(dtype)
        stride = contiguous_stride(leaf.shape)
        views.append(bases[dtype].as_strided(leaf.shape, stride, leaf.offset // dtype.itemsize))
    return views


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    stride = [1] * len(shape)
    for at in range(len(shape) - 2, -1, -1):
        stride[at] = stride[at + 1] * shape[at + 1]
    return tuple(stride)


def clear_gaps(layout: Layout, data: memoryview) -> None:
    """Zero the bytes between leaves, so that what a slot held before is never stored."""
    end = 0
    for leaf in layout.leaves:
        if leaf.offset > end:
            data[end : leaf.offset] = bytes(leaf.offset - end)
        end = leaf.offset + leaf.nbytes
    data[end : layout.data_bytes] = bytes(layout.data_bytes - end)
