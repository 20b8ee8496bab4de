"""Where each part of a saved tensor lies, over all ranks that saved: pure, without any data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import torch

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.rank.tensors import dtype_of
from ckptmgr.staging.boxes import Box, box_of, joined, spans, whole, whole_shape
from ckptmgr.types import Layout, Leaf

MERGE_BYTES_MAX = 4 << 10
"""Bytes between two wanted runs that are asked for along: columns out of rows of this length bring
their rows with them, and nothing else does."""

RANGES_MAX = 50_000
"""Runs of one request (about 1 MiB). With more, runs that are farther apart are joined: bytes that
are not wanted cost less than a request that is too long."""

Ranges = tuple[tuple[int, int], ...]
"""Runs of bytes (start, stop) of a data region: ascending, apart from each other."""


@dataclass(frozen=True, slots=True)
class Table:
    """What one saved rank says of its slot: a layout and encoded values; no data."""

    rank: int
    layout: Layout
    values: bytes


class Whole(msgspec.Struct, frozen=True, eq=False):
    """A saved tensor with all the leaves that hold parts of it, as (saved rank, leaf).

    There is one object for each saved tensor: tied tensors are recognised by it.
    """

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    leaves: tuple[tuple[int, Leaf], ...]

    @property
    def box(self) -> Box:
        """All of it."""
        return whole(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Origin(msgspec.Struct, frozen=True):
    """A part of a tensor, counted from the start of the whole, and the leaf to take it from."""

    rank: int
    leaf: Leaf
    box: Box

    @property
    def is_all(self) -> bool:
        """Whether it is all that the leaf holds."""
        return self.box.shape == self.leaf.shape


def own_rank(rank: int, saved_world: int) -> int:
    """The saved rank whose private state a reader takes over."""
    return rank if rank < saved_world else rank % saved_world


class Sources:
    """The tables of saved ranks, the reader's own first, and which tensors they hold together.

    Args:
        tables: of one or more saved ranks, in any order.
        own: the saved rank that stands first; its table is among them.

    Raises:
        HostBufferDamagedError: a leaf that contradicts itself, or those of other ranks.
    """

    def __init__(self, tables: Iterable[Table], own: int) -> None:
        self.tables = tuple(sorted(tables, key=lambda table: (table.rank != own, table.rank)))
        self.own = own
        together: defaultdict[str, list[tuple[int, Leaf]]] = defaultdict(list)
        for table in self.tables:
            for leaf in table.layout.leaves:
                dtype = _checked(leaf)
                if leaf.global_shape is not None:
                    together[leaf.path].append((table.rank, leaf))
                    _check_alike(together[leaf.path][0][1], leaf, dtype)
        self._together = together
        self._shared: dict[str, Whole] = {}
        self._private: dict[tuple[int, int], Whole] = {}

    def whole(self, table: Table, index: int) -> Whole:
        """The tensor that a leaf of `table` is, or is a part of.

        Raises:
            IndexError: there is no such leaf.
        """
        leaf = table.layout.leaves[index]
        # A rank with no element of a tensor without dimensions has an empty leaf of its own for it.
        is_shared = leaf.global_shape is not None or (
            not leaf.nbytes and leaf.path in self._together
        )
        if not is_shared:
            key = table.rank, index
            if key not in self._private:
                self._private[key] = _whole(leaf, ((table.rank, leaf),))
            return self._private[key]
        if leaf.path not in self._shared:
            leaves = tuple(self._together[leaf.path])
            self._shared[leaf.path] = _whole(leaves[0][1], leaves)
        return self._shared[leaf.path]


def _whole(leaf: Leaf, leaves: tuple[tuple[int, Leaf], ...]) -> Whole:
    return Whole(leaf.path, dtype_of(leaf.dtype), whole_shape(leaf), leaves)


def _checked(leaf: Leaf) -> torch.dtype:
    """The dtype of a leaf that holds together."""
    try:
        dtype = dtype_of(leaf.dtype)
        nbytes = math.prod(leaf.shape) * dtype.itemsize
        if leaf.nbytes != nbytes or min(leaf.shape, default=0) < 0:
            raise ValueError(f"{leaf.nbytes} bytes for shape {list(leaf.shape)}")
        if nbytes and leaf.offset % dtype.itemsize:
            raise ValueError(f"{leaf.dtype} at byte {leaf.offset}")
        if leaf.global_shape is not None and nbytes and not _lies_in(leaf, leaf.global_shape):
            raise ValueError(f"{list(leaf.shape)} is no part of {list(leaf.global_shape)}")
    except ValueError as error:
        raise HostBufferDamagedError(str(error), subject=leaf.path) from error
    return dtype


def _lies_in(leaf: Leaf, shape: Sequence[int]) -> bool:
    offset = leaf.global_offset
    if offset is None or not len(offset) == len(leaf.shape) == len(shape):
        return False
    sides = zip(offset, leaf.shape, shape, strict=True)
    return all(start >= 0 and start + length <= size for start, length, size in sides)


def _check_alike(first: Leaf, leaf: Leaf, dtype: torch.dtype) -> None:
    if leaf.global_shape != first.global_shape or dtype_of(first.dtype) != dtype:
        raise HostBufferDamagedError(
            f"is {first.dtype}{list(whole_shape(first))} of one rank, "
            f"and {leaf.dtype}{list(whole_shape(leaf))} of another",
            subject=leaf.path,
        )


def origins(found: Whole, wanted: Box) -> tuple[list[Origin], Box | None]:
    """How `wanted` is put together, each element from one leaf; and a part that nobody holds.

    Leaves of the own rank come first, then those of the lowest saved rank.
    """
    made: list[Origin] = []
    left = [wanted] if wanted.count else []
    for rank, leaf in found.leaves:
        if not left:
            break
        if not leaf.nbytes:
            continue
        if leaf.shape == found.shape:  # it has everything, as nearly every leaf has
            made += [Origin(rank, leaf, part) for part in left]
            return made, None
        box = box_of(leaf)
        rest: list[Box] = []
        for part in left:
            common = part.common(box)
            if common is None:
                rest.append(part)
            else:
                made.append(Origin(rank, leaf, common))
                rest += part.without(common)
        left = rest
    return made, (left[0] if left else None)


def ranges_needed(wanted: Iterable[Origin]) -> dict[int, Ranges]:
    """Which bytes of which saved rank's data region `wanted` takes, near ones as one range."""
    parts, distance = list(wanted), MERGE_BYTES_MAX
    while True:
        found = _ranges(parts, distance)
        if sum(map(len, found.values())) <= max(RANGES_MAX, len(parts)):
            return found
        distance *= 4


def _ranges(wanted: Sequence[Origin], distance: int) -> dict[int, Ranges]:
    found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for one in wanted:
        found[one.rank].extend(_byte_spans(one, distance))
    return {rank: tuple(joined(sorted(ranges), distance)) for rank, ranges in sorted(found.items())}


def _byte_spans(one: Origin, distance: int) -> Iterator[tuple[int, int]]:
    leaf = one.leaf
    if one.is_all:
        yield leaf.offset, leaf.offset + leaf.nbytes
        return
    itemsize = dtype_of(leaf.dtype).itemsize
    inside = one.box.within(box_of(leaf))
    for start, stop in spans(inside, leaf.shape, distance // itemsize):
        yield leaf.offset + start * itemsize, leaf.offset + stop * itemsize
