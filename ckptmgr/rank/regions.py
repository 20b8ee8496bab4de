"""The bytes of saved ranks in this process's memory: views of them, and exact copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import torch
from torch import Tensor

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.rank.sources import Origin, Whole, origins
from ckptmgr.rank.tensors import IS_PARAMETER, REQUIRES_GRAD, carried, dtype_of
from ckptmgr.rank.views import contiguous_stride
from ckptmgr.staging.boxes import Box, box_of
from ckptmgr.types import Leaf

Pair = tuple[Tensor, Tensor]
"""A live tensor, and a view of saved memory with its shape and dtype."""


class SavedLeaf(msgspec.Struct, frozen=True, eq=False):
    """A saved tensor in its place in a saved state; its flags are those of the tree."""

    whole: Whole
    flags: int

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor, over all ranks."""
        return self.whole.shape


class Regions:
    """The data regions of saved ranks. Nothing that a caller keeps may refer to them.

    Only the bytes that `ranges_needed` gave are there; the others may be anything.
    """

    def __init__(self, regions: Mapping[int, memoryview]) -> None:
        self._bytes = {rank: _bytes_of(region) for rank, region in regions.items()}
        self._bases: dict[tuple[int, str], Tensor] = {}

    def view(self, rank: int, leaf: Leaf) -> Tensor:
        """A leaf in its own dtype.

        Raises:
            HostBufferDamagedError: the data region is too short for it, or not there.
        """
        base = self._bases.get((rank, leaf.dtype))
        try:
            if base is None:
                base = self._bases[rank, leaf.dtype] = self._base(rank, dtype_of(leaf.dtype))
            at = leaf.offset // base.element_size()
            # Torch refuses what would lie outside of the region.
            return base.as_strided(leaf.shape, contiguous_stride(leaf.shape), at)
        except (KeyError, ValueError, RuntimeError) as error:
            raise HostBufferDamagedError(
                f"lies outside of the data of rank {rank}", subject=leaf.path
            ) from error

    def _base(self, rank: int, dtype: torch.dtype) -> Tensor:
        """All of a region in one dtype."""
        found = self._bytes[rank]
        return found[: found.numel() // dtype.itemsize * dtype.itemsize].view(dtype)

    def pairs(self, live: Tensor, box: Box, taken: Iterable[Origin]) -> Iterator[Pair]:
        """What is to be copied so that `live`, which is `box` of the whole, has its saved bits."""
        for piece in taken:
            yield _cut(live, box, piece.box), self._part(piece)

    def _part(self, piece: Origin) -> Tensor:
        view = self.view(piece.rank, piece.leaf)
        return view if piece.is_all else _cut(view, box_of(piece.leaf), piece.box)

    def gathered(self, found: Whole, box: Box) -> Tensor:
        """A new contiguous tensor with the bits of a part of a saved one."""
        taken, _ = origins(found, box)
        if len(taken) == 1:
            return exact_clone(self._part(taken[0]))
        made = torch.empty(box.shape, dtype=found.dtype, device="cpu")
        for live, view in self.pairs(made, box, taken):
            carried(live).copy_(carried(view))
        return made


def _bytes_of(region: memoryview) -> Tensor:
    if not len(region):
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory may be read-only; it is never written
        return torch.frombuffer(region, dtype=torch.uint8)


def _cut(tensor: Tensor, box: Box, part: Box) -> Tensor:
    """A part of a tensor that is `box` of the whole one."""
    if part.shape == box.shape:
        return tensor
    inside = part.within(box)
    for at, (start, length) in enumerate(zip(inside.offset, inside.shape, strict=True)):
        tensor = tensor.narrow(at, start, length)
    return tensor


def exact_clone(view: Tensor) -> Tensor:
    """A contiguous copy with the same bits, also of dtypes that torch can not clone."""
    return carried(view).clone(memory_format=torch.contiguous_format).view(view.dtype)


class Clones:
    """Clones of saved tensors, one each: what was one tensor when it was saved is one again."""

    def __init__(self, regions: Regions) -> None:
        self.regions = regions
        self._bases: dict[Whole, Tensor] = {}
        self._dressed: dict[tuple[Whole, int], Tensor] = {}

    def of(self, leaf: SavedLeaf) -> Tensor:
        """The clone of a whole tensor, as a Parameter or requiring grad if it was one."""
        place = leaf.whole, leaf.flags
        if place not in self._dressed:
            if leaf.whole not in self._bases:
                self._bases[leaf.whole] = self.regions.gathered(leaf.whole, leaf.whole.box)
            self._dressed[place] = _dress(self._bases[leaf.whole], leaf.flags)
        return self._dressed[place]


def _dress(base: Tensor, flags: int) -> Tensor:
    grad = bool(flags & REQUIRES_GRAD)
    if flags & IS_PARAMETER:
        return torch.nn.Parameter(base, requires_grad=grad)
    return base.detach().requires_grad_() if grad else base
