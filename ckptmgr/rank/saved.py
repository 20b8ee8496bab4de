"""A saved state on its way back: the trees of all saved ranks as one, and new objects from it."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptmgr.errors import RecordDamagedError, StateError
from ckptmgr.rank.externals import OPTIMIZER, assemble
from ckptmgr.rank.optimizers import by_position
from ckptmgr.rank.regions import Clones, SavedLeaf
from ckptmgr.rank.sources import Sources, Table
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.staging.values import MAPPING_TAGS, External
from ckptmgr.types import Layout


@dataclass(frozen=True, slots=True)
class Saved:
    """What a slot holds of one rank's step: layout, encoded values, and the data region."""

    layout: Layout
    values: bytes
    data: memoryview = field(repr=False)
    rank: int = 0

    @property
    def table(self) -> Table:
        """All but the data."""
        return Table(self.rank, self.layout, self.values)


@dataclass(frozen=True, slots=True)
class SavedState:
    """The nested state, with a `SavedLeaf` for each tensor and an External for each object.

    `own` is what the reader's own rank saved, `all` has in addition what only others saved.
    """

    own: Any
    all: Any


def read_state(sources: Sources) -> SavedState:
    """The nested state that the tables describe.

    Own objects come first. Names at the top, names of a module's tensors and of an optimizer's
    parameters that the own rank does not have come from the lowest rank that has them; so do keys
    of other mappings where shared tensors are. Everything else is the own rank's alone.

    Raises:
        RecordDamagedError: tree or values can not be read.
        HostBufferDamagedError: leaves do not hold together.
    """
    own, *others = sources.tables
    mine = _decoded(sources, own)
    together = mine
    seen = {own.layout.tree}
    for table in others:
        # Ranks of one layout have one tree: there is nothing in it that the own one lacks.
        if table.layout.tree not in seen:
            seen.add(table.layout.tree)
            together = _joined(together, _decoded(sources, table), top=True)
    return SavedState(mine, together)


def _decoded(sources: Sources, table: Table) -> Any:
    subject = f"rank {table.rank}"
    values = decode_values(table.values, external=_kept, subject=f"values of {subject}")

    def leaf(index: int, flags: int) -> SavedLeaf:
        return SavedLeaf(sources.whole(table, index), flags)

    tree = table.layout.tree
    return decode_tree(tree, values, leaf, external=_kept, subject=f"layout of {subject}")


def _kept(parts: External) -> Any:
    """What has tensors waits until their bytes are there."""
    if parts.kind == OPTIMIZER:
        by_position(parts.children)  # which shows that it holds together
        return parts
    return parts if parts.children else assemble(parts)


def assembled(parts: External) -> Any:
    """A new object from parts that are there.

    Raises:
        RecordDamagedError: they do not fit together.
        StateMismatchError: this process can not have such an object.
    """
    try:
        return assemble(parts)
    except StateError:
        raise
    except Exception as error:  # torch tells malformed parts by many types
        raise RecordDamagedError(f"holds a malformed {parts.kind}: {error}") from error


# -- joining the trees of ranks -------------------------------------------------------------------


def _joined(mine: Any, other: Any, *, top: bool = False) -> Any:
    if type(mine) is not type(other):
        return mine
    if type(mine) is External and mine.kind == other.kind == OPTIMIZER:
        return _joined_optimizer(mine, other)
    if type(mine) not in MAPPING_TAGS:
        return mine
    takes_all = top or hasattr(mine, "_metadata")
    items = {key: _joined(item, other[key]) if key in other else item for key, item in mine.items()}
    items |= {
        key: item
        for key, item in other.items()
        if key not in mine and (takes_all or has_shared(item))
    }
    made = like_mapping(mine, items)
    if hasattr(mine, "_metadata"):
        made._metadata = OrderedDict({**getattr(other, "_metadata", {}), **mine._metadata})
    return made


def _joined_optimizer(mine: External, other: External) -> External:
    state = dict(mine.children["state"])
    for name, items in other.children["state"].items():
        here = state.get(name)
        if name not in state:
            state[name] = items
        elif isinstance(here, dict) and isinstance(items, dict):
            state[name] = {**items, **here}
    groups = [dict(group) for group in mine.children["param_groups"]]
    theirs = other.children["param_groups"]
    for group, added in zip(groups, theirs, strict=False):
        known = set(group["params"])
        group["params"] = [*group["params"], *(n for n in added["params"] if n not in known)]
    groups += theirs[len(groups) :]
    return External(
        OPTIMIZER, mine.attributes, {**mine.children, "state": state, "param_groups": groups}
    )


def has_shared(item: Any) -> bool:
    """Whether a tensor in a saved state is one that several ranks hold together."""
    return any(leaf.whole.leaves[0][1].global_shape is not None for leaf in leaves_in(item))


def leaves_in(item: Any) -> Iterator[SavedLeaf]:
    """Every tensor in a saved state."""
    kind = type(item)
    if kind is SavedLeaf:
        yield item
    elif kind is External:
        for child in item.children.values():
            yield from leaves_in(child)
    elif kind in MAPPING_TAGS:
        for child in item.values():
            yield from leaves_in(child)
    elif kind in (list, tuple, deque):
        for child in item:
            yield from leaves_in(child)


# -- new objects ----------------------------------------------------------------------------------


def fresh(item: Any, clones: Clones) -> Any:
    """`item` as new objects in host memory; an optimizer as torch's state_dict, by index.

    Raises:
        RecordDamagedError: the parts of an object do not fit together.
    """
    kind = type(item)
    if kind is SavedLeaf:
        return clones.of(item)
    if kind is External:
        return _fresh_object(item, clones)
    if kind in (list, tuple):
        return kind(fresh(part, clones) for part in item)
    if kind is deque:
        return deque((fresh(part, clones) for part in item), item.maxlen)
    if kind in MAPPING_TAGS:
        return like_mapping(item, {key: fresh(part, clones) for key, part in item.items()})
    return item


def _fresh_object(item: External, clones: Clones) -> Any:
    if item.kind == OPTIMIZER:
        return fresh(by_position(item.children), clones)
    children = {name: fresh(child, clones) for name, child in item.children.items()}
    return assembled(External(item.kind, item.attributes, children))


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
