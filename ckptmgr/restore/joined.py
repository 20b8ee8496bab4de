"""What all ranks of a step saved, as the tensors of one file: names, shapes, who has which part.

A shared tensor is whole, under its path. What a rank has for itself is under its path where no
lower rank has that, and else under `ranks/<rank>/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptmgr.errors import RecordDamagedError
from ckptmgr.repository import keys
from ckptmgr.repository.manifest import Manifest, uncovered
from ckptmgr.restore.plan import Move, Plan, plan_moves
from ckptmgr.staging.boxes import Box, box_of, runs, whole_shape
from ckptmgr.types import Leaf

Part = tuple[int, Leaf]
"""A rank, and what it holds of a tensor."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A leaf that one rank has, the tensor that it is (a part of), and where that starts."""

    leaf: Leaf
    tensor: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Joined:
    """All tensors in the order of the file, and the leaves of each rank that they are made of.

    `names` are those of the tensors by rank and path.
    """

    tensors: tuple[Tensor, ...]
    placed: dict[int, list[Placed]]
    names: dict[tuple[int, str], str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors back to back."""
        return sum(tensor.nbytes for tensor in self.tensors)


def join(manifests: Sequence[Manifest]) -> Joined:
    """Join what the ranks of a step saved.

    Raises:
        RecordDamagedError: they do not hold all of a shared tensor, or not as one.
    """
    where = keys.manifests(manifests[0].id)
    gap = uncovered(manifests)
    if gap:
        raise RecordDamagedError(f"is no whole step: {gap}", subject=where)
    shared: dict[str, list[Part]] = {}
    private: dict[str, list[Part]] = {}
    for manifest in sorted(manifests, key=lambda one: one.rank):
        for leaf in manifest.read_layout().leaves:
            of_kind = private if leaf.global_shape is None else shared
            of_kind.setdefault(leaf.path, []).append((manifest.rank, leaf))
    found: list[tuple[Tensor, list[Part]]] = [
        (_whole(path, parts, where), parts) for path, parts in shared.items()
    ]
    for path, parts in private.items():
        # Where a flat shard holds nothing of a tensor without dimensions, an empty leaf stands.
        own = [(r, leaf) for r, leaf in parts if leaf.nbytes or path not in shared]
        for at, (rank, leaf) in enumerate(own):
            name = path if at == 0 and path not in shared else f"ranks/{rank}/{path}"
            found.append((Tensor(name, leaf.dtype, leaf.shape, leaf.nbytes), [(rank, leaf)]))
    return _place(found)


def _place(found: list[tuple[Tensor, list[Part]]]) -> Joined:
    placed: dict[int, list[Placed]] = {}
    names: dict[tuple[int, str], str] = {}
    start = 0
    for tensor, parts in found:
        boxes: set[Box] = set()
        for rank, leaf in parts:
            names[rank, leaf.path] = tensor.name
            box = box_of(leaf)
            if leaf.nbytes and box not in boxes:  # of replicas, one is enough
                placed.setdefault(rank, []).append(Placed(leaf, tensor, start))
            boxes.add(box)
        start += tensor.nbytes
    return Joined(tuple(tensor for tensor, _ in found), placed, names)


def _whole(path: str, parts: list[Part], where: str) -> Tensor:
    shape = whole_shape(parts[0][1])
    sizes = {leaf.nbytes / math.prod(leaf.shape) for _, leaf in parts if math.prod(leaf.shape)}
    if len(sizes) > 1 or not all(size.is_integer() for size in sizes):
        raise RecordDamagedError(f"has parts of {path} of odd lengths", subject=where)
    itemsize = int(sizes.pop()) if sizes else 0
    nbytes = math.prod(shape) * itemsize
    return Tensor(path, parts[0][1].dtype, shape, nbytes)


def plan_part(manifest: Manifest, joined: Joined) -> Plan:
    """The reads that bring what one rank has to its places in the file's tensors."""
    placed = joined.placed.get(manifest.rank, [])
    return plan_moves(manifest, (move for one in placed for move in _moves(one)), joined.nbytes)


def _moves(one: Placed) -> Iterator[Move]:
    leaf = one.leaf
    if leaf.global_shape is None:
        yield Move(leaf.offset, one.start, leaf.nbytes)
        return
    box, source = box_of(leaf), leaf.offset
    itemsize = leaf.nbytes // box.count
    for first, count in runs(box, one.tensor.shape):
        yield Move(source, one.start + first * itemsize, count * itemsize)
        source += count * itemsize
