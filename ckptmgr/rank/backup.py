"""A copy of the state that an object has now, to be given back to it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ckptmgr.staging.values import MAPPING_TAGS


def backup_of(state: Any) -> Any:
    """A deep copy. Of a tensor that still has its graph it is the values: torch copies no other."""
    return copy.deepcopy(state, {id(one): one.detach().clone() for one in _with_graph(state)})


def _with_graph(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield from () if item.is_leaf else (item,)
    elif type(item) in MAPPING_TAGS:
        for part in item.values():
            yield from _with_graph(part)
    elif type(item) in (list, tuple, deque):
        for part in item:
            yield from _with_graph(part)
