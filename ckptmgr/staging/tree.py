"""The fixed shape of a nested state: found once, then refilled at every snapshot.

`flatten` walks everything with care and gives a template. `refill` walks the same state again and
only collects its leaves and values; it says that the structure changed rather than guess.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

from ckptmgr.staging import values as v
from ckptmgr.staging.paths import Trail, render

_encode = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Seams:
    """What the walk must be told about the objects of the rank.

    `leaf_types` are the types that may be leaves, `is_leaf` tells whether one is, `expand` gives
    the state of an object that keeps its own (state_dict) if `expands`, `externalize` takes others
    apart.
    """

    leaf_types: frozenset[type]
    is_leaf: Callable[[Any], bool]
    expands: Callable[[Any], bool]
    expand: Callable[[Any], Any]
    externalize: v.Externalize


class Leaf:
    """Marks the place of a tensor in a template."""


class Value:
    """Marks the place of a plain value in a template; the trail is for messages."""

    __slots__ = ("trail",)

    def __init__(self, trail: Trail) -> None:
        self.trail = trail


@dataclass(slots=True)
class Branch:
    """A container with leaves inside: its exact type, keys, fixed attributes and children.

    `shape` is "map", "sequence", "object" (its state_dict is the only child) or "external" (the
    attributes are the first child). `key_forms` tell the keys of a map from others that are equal
    to them; None if all are str.
    """

    shape: str
    kind: type
    children: list[Template]
    keys: list[Hashable] = field(default_factory=list)
    key_forms: list[Any] | None = None
    fixed: Any = None
    only_leaves: bool = False


Template: TypeAlias = "Leaf | Value | Branch"
_LEAF = Leaf()


class StructureChangedError(Exception):
    """The state is no longer the one that the template was made of."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A flattened state: leaves with their paths and plain values with their places, in order."""

    template: Template
    leaves: list[Any]
    trails: list[Trail]
    values: list[Any]
    value_trails: list[Trail]

    def paths(self) -> list[str]:
        """The path of each leaf."""
        return [render(trail) for trail in self.trails]


@dataclass(slots=True)
class _Flattener:
    seams: Seams
    leaves: list[Any] = field(default_factory=list)
    trails: list[Trail] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    value_trails: list[Trail] = field(default_factory=list)
    owners: list[Trail] = field(default_factory=list)

    def walk(self, item: Any, trail: Trail, depth: int) -> Template:
        kind = type(item)
        if kind in self.seams.leaf_types and self.seams.is_leaf(item):
            self.leaves.append(item)
            self.trails.append(trail)
            return _LEAF
        if depth >= v.DEPTH_MAX:
            raise v.refuse(trail, f"is nested more than {v.DEPTH_MAX} deep, or contains itself")
        mark = len(self.leaves), len(self.values)
        if kind in v.MAPPING_TAGS:
            v.check_keys(item, trail)
            branch = self._branch("map", item, trail, depth, item.items())
            branch.keys = list(item)
            if not {str}.issuperset(map(type, item)):
                branch.key_forms = list(map(v.exact_form, item))
        elif kind in (list, tuple, deque):
            branch = self._branch("sequence", item, trail, depth, enumerate(item))
        elif self.seams.expands(item):
            return self._object(item, trail, depth)
        else:
            return self._outside(item, trail, depth)
        if len(self.leaves) == mark[0] and all(type(c) is Value for c in branch.children):
            # Nothing but plain values: the whole container is one of them.
            del self.values[mark[1] :], self.value_trails[mark[1] :]
            return self._value(item, trail)
        branch.only_leaves = all(child is _LEAF for child in branch.children)
        branch.fixed = v.fixed_attributes(item)
        return branch

    def _branch(
        self,
        shape: str,
        item: Any,
        trail: Trail,
        depth: int,
        places: Iterable[tuple[Hashable, Any]],
    ) -> Branch:
        children = [self.walk(child, (trail, key), depth + 1) for key, child in places]
        return Branch(shape, type(item), children)

    def _object(self, item: Any, trail: Trail, depth: int) -> Branch:
        """An object with a state of its own; not within another's, which would be given a plain
        dictionary in its place.
        """
        kind = type(item)
        if self.owners:
            raise v.refuse(
                trail,
                f"is a {kind.__module__}.{kind.__qualname__} within the state_dict of "
                f"{render(self.owners[-1])}",
                hint="Return its own state_dict() there, and give that back to it when loading.",
            )
        self.owners.append(trail)
        child = self.walk(self.seams.expand(item), trail, depth + 1)
        self.owners.pop()
        return Branch("object", kind, [child])

    def _value(self, item: Any, trail: Trail) -> Value:
        self.values.append(item)
        self.value_trails.append(trail)
        return Value(trail)

    def _outside(self, item: Any, trail: Trail, depth: int) -> Template:
        known = type(item) in _PLAIN_KINDS
        taken = None if known else self.seams.externalize(item, trail)
        if taken is None or not taken.children:
            return self._value(item, trail)
        first = self._value(taken.attributes, trail)
        rest = [
            self.walk(child, (trail, name), depth + 1) for name, child in taken.children.items()
        ]
        branch = Branch("external", type(item), [first, *rest], keys=list(taken.children))
        branch.fixed = taken.kind
        return branch


_PLAIN_KINDS = frozenset({type(None), bool, int, float, complex, str, bytes, set, frozenset})


def flatten(state: Any, seams: Seams) -> Flat:
    """Walk `state`; a second mention of a container is a second copy of it.

    Raises:
        UnsupportedLeafError: something in it can not be stored exactly; `subject` is its path.
    """
    found = _Flattener(seams)
    template = found.walk(state, None, 0)
    return Flat(template, found.leaves, found.trails, found.values, found.value_trails)


def refill(template: Template, state: Any, seams: Seams) -> tuple[list[Any], list[Any]]:
    """Leaves and values of a state that still has the structure of `template`.

    Types, dtypes and shapes of the leaves are for the caller to compare.

    Raises:
        StructureChangedError: it has not; flatten it again.
    """
    leaves: list[Any] = []
    values: list[Any] = []
    _refill(template, state, seams, leaves, values)
    return leaves, values


def _refill(
    template: Template, item: Any, seams: Seams, leaves: list[Any], values: list[Any]
) -> None:
    if type(template) is Leaf:
        leaves.append(item)
        return
    if type(template) is Value:
        values.append(item)
        return
    assert type(template) is Branch
    if type(item) is not template.kind:
        raise StructureChangedError
    if template.only_leaves:
        leaves.extend(_same_places(template, item, seams))
        return
    places = _same_places(template, item, seams)
    for child, part in zip(template.children, places, strict=True):
        if child is _LEAF:
            leaves.append(part)
        elif type(child) is Value:
            values.append(part)
        else:
            _refill(child, part, seams, leaves, values)


def _same_places(template: Branch, item: Any, seams: Seams) -> Iterable[Any]:
    """The children of `item`, in the order of the template."""
    if template.shape == "map":
        if template.keys != list(item):
            raise StructureChangedError
        forms = template.key_forms
        if forms is not None and forms != list(map(v.exact_form, item)):
            raise StructureChangedError
        if template.fixed is not None and template.fixed != v.fixed_attributes(item):
            raise StructureChangedError
        children: Iterable[Any] = item.values()
        return children
    if template.shape == "sequence":
        if len(item) != len(template.children) or template.fixed != v.fixed_attributes(item):
            raise StructureChangedError
        sequence: Iterable[Any] = item
        return sequence
    if template.shape == "object":
        return (seams.expand(item),)
    return _external_parts(template, item, seams)


def _external_parts(template: Branch, item: Any, seams: Seams) -> Iterator[Any]:
    taken = seams.externalize(item, None)
    if taken is None or taken.kind != template.fixed or list(taken.children) != template.keys:
        raise StructureChangedError
    yield taken.attributes
    yield from taken.children.values()


def encode_tree(flat: Flat, leaf_items: list[tuple[int, int]], externalize: v.Externalize) -> bytes:
    """The tree of a flattened state; `leaf_items` has (index, flags) of each leaf in order.

    Raises:
        UnsupportedLeafError: it is more than may be restored.
    """
    former = v.Former(externalize, careful=True)
    leaves = iter([v.LEAF, index, flags] for index, flags in leaf_items)
    values = iter([v.VALUE, index] for index in range(len(flat.values)))
    return v.within_bounds(_encode(_form(flat.template, None, former, leaves, values)))


def _form(
    template: Template,
    trail: Trail,
    former: v.Former,
    leaves: Iterator[Any],
    values: Iterator[Any],
) -> Any:
    if type(template) is Leaf:
        return next(leaves)
    if type(template) is Value:
        return next(values)
    assert type(template) is Branch
    if template.shape == "object":
        return _form(template.children[0], trail, former, leaves, values)
    if template.shape == "external":
        first, *rest = (_form(c, trail, former, leaves, values) for c in template.children)
        named = [part for pair in zip(template.keys, rest, strict=True) for part in pair]
        return [v.EXTERNAL, template.fixed, first, *named]
    head = former.head(template.kind, template.fixed, trail)
    keys = template.keys if template.shape == "map" else [None] * len(template.children)
    for key, child in zip(keys, template.children, strict=True):
        if template.shape == "map":
            head.append(former.key(key, trail, 0))
        head.append(_form(child, (trail, key), former, leaves, values))
    return head
