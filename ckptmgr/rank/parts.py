"""Which part of a whole tensor a leaf is in this process. All that is known of distributed ones."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.parameter import Parameter

from ckptmgr.staging.boxes import Box, boxes_of_run

PLAIN_TYPES: frozenset[type] = frozenset({Tensor, Parameter})
"""Exact types of tensors that are whole in this process."""


@dataclass(frozen=True, slots=True, eq=False)
class FlatRun:
    """A run of a flattened tensor, as FSDP1 keeps it; a leaf.

    `count` elements of the one-dimensional `tensor` from `first` on are those from `start` on of a
    whole tensor of shape `shape`. `ranks` are all that hold this run.
    """

    tensor: Tensor
    first: int
    count: int
    shape: tuple[int, ...]
    start: int
    ranks: tuple[int, ...]

    @property
    def requires_grad(self) -> bool:
        """Whether the tensor that it lies in does."""
        return self.tensor.requires_grad

    @property
    def place(self) -> tuple[Any, ...]:
        """Everything but the tensor."""
        return self.first, self.count, self.shape, self.start, self.ranks

    def of(self, tensor: Tensor) -> FlatRun:
        """The same run of another tensor of this length."""
        return replace(self, tensor=tensor)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a whole tensor, and where in the local tensor it is: one slice per dimension.

    With `flat` the local tensor has one dimension, and the one slice has the box row by row.
    """

    box: Box
    inside: tuple[slice, ...]
    flat: bool = False

    @property
    def starts(self) -> tuple[int, ...]:
        """Where it starts in the local tensor."""
        return tuple(part.start for part in self.inside)

    def rows(self, start: int, stop: int) -> Piece:
        """Rows `start` to `stop` of the box, along its first dimension."""
        offset, shape = self.box.offset, self.box.shape
        box = Box((offset[0] + start, *offset[1:]), (stop - start, *shape[1:]))
        step = math.prod(shape[1:]) if self.flat else 1
        first = self.inside[0].start
        rows = slice(first + start * step, first + stop * step)
        return Piece(box, (rows, *self.inside[1:]), self.flat)

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the piece in a local tensor."""
        found = tensor[self.inside]
        return found.view(self.box.shape) if self.flat else found


@dataclass(frozen=True, slots=True)
class LocalPart:
    """What this rank holds of a tensor.

    `tensor` is the memory; `pieces` say which boxes of a tensor of shape `global_shape` lie in it
    (None: it is the whole, and in one piece).
    """

    tensor: Tensor
    global_shape: tuple[int, ...] | None = None
    pieces: tuple[Piece, ...] = ()


def leaf_types() -> frozenset[type]:
    """Exact types whose instances may be leaves; every other subclass of Tensor is refused."""
    dtensor = dtensor_type()
    return PLAIN_TYPES | {FlatRun} | ({dtensor} if dtensor is not None else set())


def dtensor_type() -> type | None:
    """The class DTensor, if anything in this process has imported it (that takes a second)."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def local_tensor(leaf: Any) -> Tensor:
    """The memory of a leaf in this process."""
    kind = type(leaf)
    if kind is FlatRun:
        return leaf.tensor  # type: ignore[no-any-return]
    return leaf._local_tensor if kind is dtensor_type() else leaf  # type: ignore[no-any-return]


def distribution(leaf: Any) -> Any:
    """What is equal for two leaves that hold the same boxes of equally large tensors."""
    kind = type(leaf)
    if kind in PLAIN_TYPES:
        return None
    return leaf.place if kind is FlatRun else leaf._spec


def local_part(leaf: Any) -> LocalPart:
    """The part of a leaf in this process. The one place that knows of distributed tensors."""
    kind = type(leaf)
    if kind in PLAIN_TYPES:
        return LocalPart(leaf)
    if kind is FlatRun:
        boxes = boxes_of_run(leaf.shape, leaf.start, leaf.start + leaf.count)
        pieces = tuple(_laid_flat(boxes, leaf.first))
        return LocalPart(leaf.tensor, leaf.shape, pieces or _none(leaf))
    return LocalPart(leaf._local_tensor, tuple(leaf.shape), _pieces(leaf) or _none(leaf))


def _laid_flat(boxes: list[Box], first: int) -> list[Piece]:
    ends = itertools.accumulate((box.count for box in boxes), initial=first)
    return [
        Piece(box, (slice(start, start + box.count),), flat=True)
        for box, start in zip(boxes, ends, strict=False)
    ]


def _none(leaf: Any) -> tuple[Piece, ...]:
    """No element, in the shape of the tensor; a tensor without dimensions has no such box."""
    if not leaf.shape:
        return ()
    rest = tuple(leaf.shape[1:])
    empty = Box((0,) * len(leaf.shape), (0, *rest))
    return (Piece(empty, (slice(0, 0),), flat=True),)


def _pieces(tensor: Any) -> tuple[Piece, ...]:
    """The boxes of a DTensor here: one, save where a strided shard is not one run of rows."""
    if tensor.device_mesh.get_coordinate() is None:
        return ()
    spans = [_spans(tensor, dim, size) for dim, size in enumerate(tensor.shape)]
    found = []
    for combination in itertools.product(*spans):
        box = Box(tuple(first for first, _, _ in combination), tuple(n for _, n, _ in combination))
        inside = tuple(slice(at, at + n) for _, n, at in combination)
        found.append(Piece(box, inside))
    return tuple(found)


def _spans(tensor: Any, dim: int, size: int) -> list[tuple[int, int, int]]:
    """Runs along one dimension that are here: start in the whole, length, start in the memory."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    held: Sequence[int] = range(size)
    for at, placement in enumerate(tensor.placements):
        if getattr(placement, "dim", None) != dim:
            continue
        where = len(held), mesh.size(at), coordinate[at]
        if placement.is_shard():
            count, first = placement.local_shard_size_and_offset(*where)
            held = held[first : first + count]
        else:
            _, chosen = placement._local_shard_size_and_offset(*where, offset_mode=_ALL_OFFSETS)
            held = [held[index] for index in chosen]
    if isinstance(held, range):
        return [(held.start, len(held), 0)]
    breaks = [at for at in range(1, len(held)) if held[at] != held[at - 1] + 1]
    edges = [0, *breaks, len(held)]
    return [(held[a], b - a, a) for a, b in itertools.pairwise(edges) if a < b]


_ALL_OFFSETS = 1
"""torch's _StridedShardOffsetMode.ALL, which can not be imported without all of DTensor."""


def mesh_replicas(tensor: Any) -> tuple[int, ...]:
    """The ranks that hold the same boxes of a DTensor as this one, which is among them."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return ()
    index = tuple(
        slice(None) if placement.is_replicate() else coordinate[at]
        for at, placement in enumerate(tensor.placements)
    )
    return tuple(mesh.mesh[index].flatten().tolist())
