"""The layout of a live state: found with care once, then recognised quickly at every snapshot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from ckptmgr.rank.tensors import (
    IS_PARAMETER,
    LEAF_TYPES,
    REQUIRES_GRAD,
    LocalPart,
    admit,
    dtype_name,
    element_kind,
    is_leaf,
    local_part,
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

    A state mentions `mentions` tensors; those that are one and the same are one leaf. `order[i]`
    is the mention that leaf i is read from.
    """

    template: Template
    kinds: list[type]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    grads: list[bool]
    pointers: list[int]
    first_mention: list[int]
    shared: list[tuple[int, int]]
    order: list[int]
    value_trails: list[Any]
    layout: Layout
    layout_bytes: bytes
    layout_hash: bytes


def make_frame(flat: Flat, seams: Seams, *, with_meta: bool = False) -> Frame:
    """The frame of a flattened state.

    Args:
        flat: the flattened state.
        seams: what it was flattened with.
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
    owner = _owners(tensors, pointers)
    order = sorted(
        (at for at, first in enumerate(owner) if at == first),
        key=lambda at: (element_kind(tensors[at].dtype), at),
    )
    index = {at: leaf for leaf, at in enumerate(order)}
    items = [(index[first], _flags(leaf)) for first, leaf in zip(owner, flat.leaves, strict=True)]
    tree = encode_tree(flat, items, seams.externalize)
    layout = lay_out([parts[at] for at in order], _paths(flat, order), tree)
    encoded = encode_layout(layout)
    return Frame(
        template=flat.template,
        kinds=list(map(type, flat.leaves)),
        dtypes=[tensor.dtype for tensor in tensors],
        shapes=[tensor.shape for tensor in tensors],
        grads=[leaf.requires_grad for leaf in flat.leaves],
        pointers=pointers,
        first_mention=_first_mentions(pointers),
        shared=[(first, at) for at, first in enumerate(owner) if at != first],
        order=order,
        value_trails=flat.value_trails,
        layout=layout,
        layout_bytes=encoded,
        layout_hash=xxhash.xxh3_128_digest(encoded),
    )


def _paths(flat: Flat, order: list[int]) -> list[str]:
    paths = flat.paths()
    return [paths[at] for at in order]


def _flags(leaf: Tensor) -> int:
    flags = REQUIRES_GRAD if leaf.requires_grad else 0
    return flags | (IS_PARAMETER if type(leaf) is torch.nn.Parameter else 0)


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    try:
        return [tensor.data_ptr() for tensor in tensors]
    except RuntimeError as error:  # a tensor became sparse where it was dense
        raise StructureChangedError from error


def _first_mentions(pointers: list[int]) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(pointer, at) for at, pointer in enumerate(pointers)]


def _owners(tensors: Sequence[Tensor], pointers: list[int]) -> list[int]:
    """For each mention, the first one of the very same tensor (memory, shape, stride, dtype)."""
    seen: dict[Any, int] = {}
    owners = []
    for at, (tensor, pointer) in enumerate(zip(tensors, pointers, strict=True)):
        # An empty tensor has no memory to tell it by; the same object is the same tensor.
        place = pointer or ("object", id(tensor))
        key = (place, tensor.device, tensor.dtype, tensor.shape, _view(tensor))
        owners.append(seen.setdefault(key, at))
    return owners


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.stride(), tensor.is_conj(), tensor.is_neg()


def lay_out(parts: Sequence[LocalPart], paths: Sequence[str], tree: bytes) -> Layout:
    """Give each leaf its place: one page-aligned group per kind of element, in leaf order."""
    leaves: list[Leaf] = []
    groups: list[Group] = []
    runs: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
    for at, part in enumerate(parts):
        runs[element_kind(part.tensor.dtype)].append(at)
    start = 0
    for (itemsize, is_float), members in runs.items():
        end = start
        for at in members:
            offset = round_up(end, LEAF_ALIGN_BYTES)
            leaf = _leaf(parts[at], paths[at], offset)
            leaves.append(leaf)
            end = offset + leaf.nbytes
        length = round_up(end - start, PAGE_BYTES)
        if length:
            groups.append(Group(start, length, itemsize, is_float))
        start += length
    return Layout(tuple(leaves), tuple(groups), start, tree)


def _leaf(part: LocalPart, path: str, offset: int) -> Leaf:
    tensor = part.tensor
    return Leaf(
        path=path,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        offset=offset,
        nbytes=tensor.numel() * tensor.dtype.itemsize,
        global_shape=part.global_shape,
        global_offset=part.global_offset,
    )


def sources_again(frame: Frame, state: Any, seams: Seams) -> tuple[list[Tensor], list[Any]]:
    """The tensors in leaf order and the values of a state that still fits `frame`.

    Raises:
        StructureChangedError: it does not.
    """
    leaves, values = refill(frame.template, state, seams)
    if list(map(type, leaves)) != frame.kinds:
        raise StructureChangedError
    tensors = leaves if LEAF_TYPES.issuperset(frame.kinds) else _local(leaves)
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
        if pointer != before and not (is_leaf(tensor) and _has_bytes(tensor)):
            raise StructureChangedError
    for first, at in frame.shared:
        if _view(tensors[first]) != _view(tensors[at]):
            raise StructureChangedError
    return [tensors[at] for at in frame.order], values


def _local(leaves: list[Any]) -> list[Tensor]:
    return [local_part(leaf).tensor for leaf in leaves]


def _has_bytes(tensor: Tensor) -> bool:
    return not tensor.is_meta and (tensor.data_ptr() != 0 or tensor.numel() == 0)
