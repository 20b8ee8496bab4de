"""The bytes of saved ranks in this process's memory: views of them, and exact copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.rank.sources import Origin, Whole, origins
from ckptmgr.rank.tensors import IS_PARAMETER, REQUIRES_GRAD, carried, dtype_of
from ckptmgr.staging.boxes import Box
from ckptmgr.types import Leaf

Pair = tuple[Tensor, Tensor]
"""A live tensor, and a view of saved memory with its shape and dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedLeaf:
    """A saved tensor in its place in a saved state; its flags are those of the tree."""

    whole: Whole
    flags: int

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.whole.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor, over all ranks."""
        return torch.Size(self.whole.shape)


class Regions:
    """The data regions of saved ranks. Nothing that a caller keeps may refer to them.

    Only the bytes that `ranges_needed` gave are there; the others may be anything.
    """

    def __init__(self, regions: Mapping[int, memoryview]) -> None:
        self._bases = {rank: _bytes_of(region) for rank, region in regions.items()}
        self._views: dict[tuple[int, int], Tensor] = {}

    def view(self, rank: int, leaf: Leaf) -> Tensor:
        """A leaf in its own dtype.

        Raises:
            HostBufferDamagedError: the data region is too short for it, or not there.
        """
        key = rank, id(leaf)
        if key not in self._views:
            self._views[key] = self._made(rank, leaf)
        return self._views[key]

    def _made(self, rank: int, leaf: Leaf) -> Tensor:
        base = self._bases.get(rank)
        if base is None or leaf.offset + leaf.nbytes > base.numel():
            raise HostBufferDamagedError(
                f"lies outside of the data of rank {rank}", subject=leaf.path
            )
        try:
            piece = base[leaf.offset : leaf.offset + leaf.nbytes]
            return piece.view(dtype_of(leaf.dtype)).view(leaf.shape)
        except (ValueError, RuntimeError) as error:
            raise HostBufferDamagedError(str(error), subject=leaf.path) from error

    def pairs(self, live: Tensor, box: Box, taken: Iterable[Origin]) -> Iterator[Pair]:
        """What is to be copied so that `live`, which is `box` of the whole, has its saved bits."""
        for piece in taken:
            view = self.view(piece.rank, piece.leaf)
            inside, target = piece.inside, piece.box.within(box)
            yield _cut(live, target), _cut(view, inside)

    def gathered(self, found: Whole, box: Box) -> Tensor:
        """A new contiguous tensor with the bits of a part of a saved one."""
        taken, _ = origins(found, box)
        if len(taken) == 1:
            view = _cut(self.view(taken[0].rank, taken[0].leaf), taken[0].inside)
            return exact_clone(view)
        made = torch.empty(box.shape, dtype=found.dtype)
        for live, view in self.pairs(made, box, taken):
            carried(live).copy_(carried(view))
        return made


def _bytes_of(region: memoryview) -> Tensor:
    if not len(region):
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory may be read-only; it is never written
        return torch.frombuffer(region, dtype=torch.uint8)


def _cut(tensor: Tensor, box: Box) -> Tensor:
    if tuple(tensor.shape) == box.shape:
        return tensor
    for at, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
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
