"""The layout of a live state: found with care once, then recognised quickly at every snapshot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from ckptmgr.rank.held import Held, held_by
from ckptmgr.rank.parallel import Parallel
from ckptmgr.rank.parts import (
    PLAIN_TYPES,
    FlatRun,
    LocalPart,
    distribution,
    local_part,
    local_tensor,
)
from ckptmgr.rank.tensors import (
    IS_PARAMETER,
    REQUIRES_GRAD,
    admit,
    dtype_name,
    element_kind,
    is_plain,
)
from ckptmgr.staging.hostbuffer import round_up
from ckptmgr.staging.layout import encode_layout
from ckptmgr.staging.tree import Flat, Seams, StructureChangedError, Template, encode_tree, refill
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf

LEAF_ALIGN_BYTES = 64
"""A cache line, and enough for every vector load."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A layout, and what must be unchanged for it to fit the live state again.

    A state mentions `mentions` tensors; those that are one and the same are one leaf, or several
    where the part of this rank is no box. `held[i]` says what leaf i is read from.
    """

    template: Template
    kinds: list[type]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    grads: list[bool]
    spread: list[Any] | None
    pointers: list[int]
    first_mention: list[int]
    shared: list[tuple[int, int]]
    held: list[Held]
    value_trails: list[Any]
    layout: Layout
    layout_bytes: bytes
    layout_hash: bytes


@dataclass(frozen=True, slots=True)
class Sources:
    """What the leaves are read from, in leaf order.

    A write into `tensors[i]` is counted by `counted[i]`; the memory that it is in, and that an
    optimizer knows, starts at `pointers[i]`.
    """

    tensors: list[Tensor]
    counted: list[Tensor]
    pointers: list[int]


def make_frame(flat: Flat, seams: Seams, around: Parallel, *, with_meta: bool = False) -> Frame:
    """The frame of a flattened state.

    Args:
        flat: the flattened state.
        seams: what it was flattened with.
        around: who else holds what is in it.
        with_meta: accept meta tensors, to plan for tensors that do not exist yet.

    Raises:
        UnsupportedLeafError: a leaf whose bytes can not be read.
    """
    parts = [local_part(leaf) for leaf in flat.leaves]
    tensors = [part.tensor for part in parts]
    for tensor, trail in zip(tensors, flat.trails, strict=True):
        if not (with_meta and tensor.is_meta):
            admit(tensor, trail)
    pointers = _pointers(tensors)
    owner = _owners(flat.leaves, parts, pointers)
    order = sorted(
        (at for at, first in enumerate(owner) if at == first),
        key=lambda at: (element_kind(tensors[at].dtype), at),
    )
    paths = around.paths(flat.trails)
    held = held_by(flat, parts, order, paths, around)
    index: dict[int, int] = {}
    for leaf, one in enumerate(held):
        index.setdefault(one.mention, leaf)
    items = [(index[first], _flags(leaf)) for first, leaf in zip(owner, flat.leaves, strict=True)]
    tree = encode_tree(flat, items, seams.externalize)
    layout = lay_out(held, tensors, tree)
    encoded = encode_layout(layout)
    kinds = list(map(type, flat.leaves))
    return Frame(
        template=flat.template,
        kinds=kinds,
        dtypes=[tensor.dtype for tensor in tensors],
        shapes=[tensor.shape for tensor in tensors],
        grads=[leaf.requires_grad for leaf in flat.leaves],
        spread=None if PLAIN_TYPES.issuperset(kinds) else list(map(distribution, flat.leaves)),
        pointers=pointers,
        first_mention=_first_mentions(pointers),
        shared=[(first, at) for at, first in enumerate(owner) if at != first],
        held=held,
        value_trails=flat.value_trails,
        layout=layout,
        layout_bytes=encoded,
        layout_hash=xxhash.xxh3_128_digest(encoded),
    )


def _flags(leaf: Tensor) -> int:
    flags = REQUIRES_GRAD if leaf.requires_grad else 0
    return flags | (IS_PARAMETER if isinstance(leaf, torch.nn.Parameter) else 0)


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    try:
        return [tensor.data_ptr() for tensor in tensors]
    except RuntimeError as error:  # a tensor became sparse where it was dense
        raise StructureChangedError from error


def _first_mentions(pointers: list[int]) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(pointer, at) for at, pointer in enumerate(pointers)]


def _owners(leaves: Sequence[Any], parts: Sequence[LocalPart], pointers: list[int]) -> list[int]:
    """For each mention, the first one of the very same tensor (memory, shape, stride, dtype)."""
    seen: dict[Any, int] = {}
    owners = []
    for at, (leaf, part, pointer) in enumerate(zip(leaves, parts, pointers, strict=True)):
        tensor = part.tensor
        # An empty tensor has no memory to tell it by, nor has one that lies in a flat shard of
        # which no element is here; the same object is the same tensor.
        place = pointer or ("object", id(tensor))
        if type(leaf) is FlatRun and not leaf.count:
            place = "object", id(leaf)
        boxes = part.global_shape, tuple((piece.box, piece.starts) for piece in part.pieces)
        key = (place, tensor.device, tensor.dtype, tensor.shape, _view(tensor), boxes)
        owners.append(seen.setdefault(key, at))
    return owners


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.stride(), tensor.is_conj(), tensor.is_neg()


def lay_out(held: Sequence[Held], tensors: Sequence[Tensor], tree: bytes) -> Layout:
    """Give each leaf its place: one page-aligned group per kind of element, in leaf order."""
    leaves: list[Leaf] = []
    groups: list[Group] = []
    runs: defaultdict[tuple[int, bool], list[Held]] = defaultdict(list)
    for one in held:
        runs[element_kind(tensors[one.mention].dtype)].append(one)
    start = 0
    for (itemsize, is_float), members in runs.items():
        end = start
        for one in members:
            offset = round_up(end, LEAF_ALIGN_BYTES)
            leaf = _leaf(one, tensors[one.mention].dtype, offset)
            leaves.append(leaf)
            end = offset + leaf.nbytes
        length = round_up(end - start, PAGE_BYTES)
        if length:
            groups.append(Group(start, length, itemsize, is_float))
        start += length
    return Layout(tuple(leaves), tuple(groups), start, tree)


def _leaf(one: Held, dtype: torch.dtype, offset: int) -> Leaf:
    return Leaf(
        path=one.path,
        dtype=dtype_name(dtype),
        shape=one.box.shape,
        offset=offset,
        nbytes=one.box.count * dtype.itemsize,
        global_shape=one.global_shape,
        global_offset=None if one.global_shape is None else one.box.offset,
    )


def sources_again(frame: Frame, state: Any, seams: Seams) -> tuple[Sources, list[Any]]:
    """The tensors in leaf order and the values of a state that still fits `frame`.

    Raises:
        StructureChangedError: it does not.
    """
    leaves, values = refill(frame.template, state, seams)
    if list(map(type, leaves)) != frame.kinds:
        raise StructureChangedError
    tensors = leaves
    if frame.spread is not None:
        tensors = list(map(local_tensor, leaves))
        if list(map(distribution, leaves)) != frame.spread:
            raise StructureChangedError
    pointers = _pointers(tensors)
    same = (
        [tensor.dtype for tensor in tensors] == frame.dtypes
        and [tensor.shape for tensor in tensors] == frame.shapes
        and [leaf.requires_grad for leaf in leaves] == frame.grads
        and (pointers == frame.pointers or _first_mentions(pointers) == frame.first_mention)
    )
    if not same:
        raise StructureChangedError
    for tensor, pointer, before in zip(tensors, pointers, frame.pointers, strict=True):
        if pointer != before and not (is_plain(tensor) and _has_bytes(tensor)):
            raise StructureChangedError
    for first, at in frame.shared:
        if _view(tensors[first]) != _view(tensors[at]):
            raise StructureChangedError
    return sources_of(frame, leaves, tensors, pointers), values


def sources_of(
    frame: Frame, leaves: list[Any], tensors: list[Tensor], pointers: list[int]
) -> Sources:
    """What each leaf is read from: the memory of a tensor, or a piece of it."""
    found = [
        tensors[one.mention] if one.piece is None else one.piece.of(tensors[one.mention])
        for one in frame.held
    ]
    counted = found
    if frame.spread is not None:
        # An operation on a DTensor is counted by itself and not by the local tensor it changes.
        counted = [
            _counted(leaves[one.mention], t) for one, t in zip(frame.held, found, strict=True)
        ]
    return Sources(found, counted, [pointers[one.mention] for one in frame.held])


def _counted(leaf: Any, source: Tensor) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else source


def _has_bytes(tensor: Tensor) -> bool:
    return not tensor.is_meta and (tensor.data_ptr() != 0 or tensor.numel() == 0)
