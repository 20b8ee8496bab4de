"""Tensors over the memory of slots: made once per layout, so that a snapshot allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Views of the slots that were written lately.

    The slots' memory can not be unmapped before `clear`.
    """

    def __init__(self) -> None:
        self._views: dict[int, SlotViews] = {}

    def of(self, layout: Layout, data: memoryview) -> SlotViews:
        """The views of a slot; its bytes between the leaves are cleared for a new layout."""
        with torch.inference_mode(False):  # views that were made in it can be written only in it
            return self._of(layout, data)

    def _of(self, layout: Layout, data: memoryview) -> SlotViews:
        if not layout.data_bytes:
            return SlotViews(
                layout, slot_tensors(layout, torch.empty(0, dtype=torch.uint8, device="cpu"))
            )
        base = torch.frombuffer(data, dtype=torch.uint8)
        place = base.data_ptr()
        found = self._views.get(place)
        if found is None or found.layout is not layout:
            if place not in self._views and len(self._views) >= SLOTS_KEPT_MAX:
                self.clear()
            clear_gaps(layout, data)
            found = SlotViews(layout, slot_tensors(layout, base))
            self._views[place] = found
        return found

    def clear(self) -> None:
        """Let go of the slots' memory."""
        self._views.clear()


def slot_tensors(layout: Layout, base: Tensor) -> list[Tensor]:
    """Views of the leaves in the data region `base` (uint8), in their carrier dtypes."""
    bases: dict[torch.dtype, Tensor] = {}
    views = []
    for leaf in layout.leaves:
        dtype = carrier(dtype_of(leaf.dtype))
        if leaf.nbytes == 0:
            views.append(torch.empty(leaf.shape, dtype=dtype, device="cpu"))
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
