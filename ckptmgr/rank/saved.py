"""A saved state on its way back: views of the slot's memory, and clones that outlive it."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ckptmgr.errors import HostBufferDamagedError
from ckptmgr.rank.externals import OPTIMIZER, assemble
from ckptmgr.rank.tensors import IS_PARAMETER, REQUIRES_GRAD, carried, dtype_of
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.staging.values import MAPPING_TAGS, External
from ckptmgr.types import Layout, Leaf


@dataclass(frozen=True, slots=True)
class Saved:
    """What a slot holds of a step: layout, encoded values, and the data region."""

    layout: Layout
    values: bytes
    data: memoryview


@dataclass(frozen=True, slots=True, eq=False)
class SavedLeaf:
    """A tensor still in the slot: `view` must not be kept. One leaf is always the same view."""

    view: Tensor
    flags: int


def leaf_views(saved: Saved) -> list[Tensor]:
    """One tensor per leaf over the data region, in its own dtype.

    Raises:
        HostBufferDamagedError: a leaf that does not fit its bytes, or of an unknown dtype.
    """
    layout = saved.layout
    if len(saved.data) < layout.data_bytes:
        raise HostBufferDamagedError(
            f"{len(saved.data)} bytes of data, the layout has {layout.data_bytes}"
        )
    with warnings.catch_warnings():
        # The memory may be read-only; it is never written. ComplexHalf is experimental.
        warnings.simplefilter("ignore")
        base = torch.empty(0, dtype=torch.uint8)
        if layout.data_bytes:
            base = torch.frombuffer(saved.data, dtype=torch.uint8, count=layout.data_bytes)
        return [_leaf_view(leaf, base) for leaf in layout.leaves]


def _leaf_view(leaf: Leaf, base: Tensor) -> Tensor:
    try:
        dtype = dtype_of(leaf.dtype)
        nbytes = math.prod(leaf.shape) * dtype.itemsize
        if leaf.nbytes != nbytes or min(leaf.shape, default=0) < 0:
            raise ValueError(f"{leaf.nbytes} bytes for shape {list(leaf.shape)}")
        piece = base[leaf.offset : leaf.offset + leaf.nbytes]
        return piece.view(dtype).view(leaf.shape)
    except (ValueError, RuntimeError) as error:
        raise HostBufferDamagedError(str(error), subject=leaf.path) from error


def exact_clone(view: Tensor) -> Tensor:
    """A contiguous copy with the same bits, also of dtypes that torch can not clone."""
    return carried(view).clone(memory_format=torch.contiguous_format).view(view.dtype)


class Clones:
    """Clones of leaves, one each: what was one tensor when it was saved is one again."""

    def __init__(self) -> None:
        self._bases: dict[int, Tensor] = {}
        self._dressed: dict[tuple[int, int], Tensor] = {}
        self._views: list[Tensor] = []

    def of(self, leaf: SavedLeaf) -> Tensor:
        """The clone of a leaf, as a Parameter or requiring grad if it was one."""
        place = id(leaf.view), leaf.flags
        if place not in self._dressed:
            self._views.append(leaf.view)  # keeps the id from being used again
            if place[0] not in self._bases:
                self._bases[place[0]] = exact_clone(leaf.view)
            self._dressed[place] = _dress(self._bases[place[0]], leaf.flags)
        return self._dressed[place]


def _dress(base: Tensor, flags: int) -> Tensor:
    grad = bool(flags & REQUIRES_GRAD)
    if flags & IS_PARAMETER:
        return torch.nn.Parameter(base, requires_grad=grad)
    return base.detach().requires_grad_() if grad else base


def read_state(saved: Saved, *, clones: Clones | None = None) -> Any:
    """The nested state, with a `SavedLeaf` for each tensor.

    Objects that are put together from tensors (sparse tensors, arrays) get clones; the state of
    an optimizer is keyed by position again.

    Raises:
        RecordDamagedError: tree or values can not be read.
        HostBufferDamagedError: leaves do not fit their bytes.
    """
    views = leaf_views(saved)
    copies = Clones() if clones is None else clones

    def external(parts: External) -> Any:
        if parts.kind == OPTIMIZER:
            return assemble(parts)
        children = {name: fresh(child, copies) for name, child in parts.children.items()}
        return assemble(External(parts.kind, parts.attributes, children))

    values = decode_values(saved.values, external=external, subject="values")
    return decode_tree(
        saved.layout.tree,
        values,
        lambda index, flags: SavedLeaf(views[index], flags),
        external=external,
        subject="layout",
    )


def fresh(item: Any, clones: Clones) -> Any:
    """`item` with each `SavedLeaf` replaced by its clone; nothing in it is in the slot any more."""
    kind = type(item)
    if kind is SavedLeaf:
        return clones.of(item)
    if kind in (list, tuple):
        return kind(fresh(part, clones) for part in item)
    if kind is deque:
        return deque((fresh(part, clones) for part in item), item.maxlen)
    if kind in MAPPING_TAGS:
        return like_mapping(item, {key: fresh(part, clones) for key, part in item.items()})
    return item


def like_mapping(pattern: Any, items: dict[Any, Any]) -> Any:
    """A new mapping with these items, of the type and with the attributes of `pattern`."""
    kind = type(pattern)
    if kind is defaultdict:
        return defaultdict(pattern.default_factory, items)
    made = kind()
    dict.update(made, items) if kind is not OrderedDict else made.update(items)
    if kind is OrderedDict:
        vars(made).update(vars(pattern))
    return made


def rebuild(saved: Saved) -> Any:
    """The whole state as new objects in host memory; state_dicts stand for modules and others.

    Raises:
        RecordDamagedError, HostBufferDamagedError: what was saved can not be read.
    """
    clones = Clones()
    return fresh(read_state(saved, clones=clones), clones)
