"""Containers come back with the saved keys in the saved order, and stay the objects they were."""

from __future__ import annotations

from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckptmgr.errors import StateMismatchError
from ckptmgr.rank.place import place
from rank.shape import difference
from rank.slot import snapshot

KINDS: dict[str, Callable[[list[tuple[str, Any]]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "defaultdict": lambda pairs: defaultdict(int, pairs),
    "Counter": lambda pairs: Counter(dict(pairs)),
}
SAVED = [("b", 2), ("c", 3), ("a", 1)]
LIVE = {
    "in another order": [("a", 7), ("b", 8), ("c", 9)],
    "with fewer keys": [("a", 1)],
    "with other keys": [("x", 0), ("c", 0), ("y", 0)],
    "without keys": [],
    "the same": SAVED,
}


@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE.keys())
@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("depth", [0, 1])
def test_keys_come_back_in_the_saved_order(
    build: Callable[[Any], Any], live: list[tuple[str, int]], depth: int
) -> None:
    container = build(live)
    state: dict[str, Any] = {"top": container if depth == 0 else [{"inside": container}]}
    saved_from = build(SAVED)
    with snapshot({"top": saved_from if depth == 0 else [{"inside": saved_from}]}) as saved:
        place(state, saved)
    found = state["top"] if depth == 0 else state["top"][0]["inside"]
    assert found is container
    assert list(container.items()) == SAVED
    assert list(reversed(container)) == ["a", "c", "b"]
    assert len(container) == 3
    assert difference(container, saved_from) == ""


def test_an_ordered_dict_can_still_be_reordered() -> None:
    live = OrderedDict(a=1)
    with snapshot({"od": OrderedDict(SAVED)}) as saved:
        place({"od": live}, saved)
    live.move_to_end("b")
    assert list(live) == ["c", "a", "b"]
    assert live.popitem(last=False) == ("c", 3)
    del live["a"]
    live["z"] = 26
    assert list(live.items()) == [("b", 2), ("z", 26)]


@pytest.mark.parametrize("build", [dict, OrderedDict])
def test_tensors_and_inner_containers_stay_what_they_were(build: Callable[[Any], Any]) -> None:
    x, inner = torch.zeros(2), OrderedDict(p=torch.zeros(1), q=1)
    live = build([("inner", inner), ("x", x)])
    there = build([("x", torch.ones(2)), ("inner", OrderedDict(q=5, p=torch.ones(1)))])
    p = inner["p"]
    with snapshot({"all": there}) as saved:
        place({"all": live}, saved)
    assert list(live) == ["x", "inner"]
    assert live["x"] is x
    assert live["inner"] is inner
    assert inner["p"] is p
    assert list(inner) == ["q", "p"]
    assert (x.tolist(), p.tolist() if isinstance(p, torch.Tensor) else p) == ([1.0, 1.0], [1.0])


def test_a_counter_gets_its_saved_zeros_and_negatives() -> None:
    live: Counter[str] = Counter(a=4)
    with snapshot({"c": Counter({"n": -2, "z": 0, "a": 1})}) as saved:
        place({"c": live}, saved)
    assert list(live.items()) == [("n", -2), ("z", 0), ("a", 1)]


def test_a_defaultdict_keeps_its_factory() -> None:
    live: defaultdict[str, list[int]] = defaultdict(list, a=[1])
    with snapshot({"d": defaultdict(list, {"b": [2], "a": [3]})}) as saved:
        place({"d": live}, saved)
    live["new"].append(9)
    assert list(live.items()) == [("b", [2]), ("a", [3]), ("new", [9])]


class Watched(UserDict[str, Any]):
    """A mapping of the user's own, which may not lose a name."""

    def __delitem__(self, key: str) -> None:
        raise AssertionError(f"{key} was removed")

    def clear(self) -> None:
        raise AssertionError("was emptied")


@pytest.mark.parametrize("build", [dict, OrderedDict, Watched])
def test_the_users_mapping_keeps_its_own_order(build: Callable[..., Any]) -> None:
    x = torch.zeros(1)
    state = build({"n": 0, "x": x, "inner": {"a": 1, "b": 2}})
    there = {"inner": {"b": 3, "a": 4}, "x": torch.ones(1), "n": 6, "left": 1}
    with snapshot(there) as saved:
        place(state, saved, partial=True)
    assert list(state) == ["n", "x", "inner"]
    assert state["x"] is x
    assert state["n"] == 6
    assert list(state["inner"].items()) == [("b", 3), ("a", 4)]


def test_a_deque_of_another_length_drops_nothing() -> None:
    """Its length can not be changed: it is replaced, or where it has tensors refused."""
    short: deque[float] = deque([9.0], maxlen=2)
    live = {"losses": short, "same": deque([1], maxlen=3)}
    same = live["same"]
    with snapshot({"losses": deque(range(4), maxlen=4), "same": deque([5], maxlen=3)}) as saved:
        place(live, saved)
    assert live["losses"] == deque(range(4))
    assert live["losses"].maxlen == 4
    assert list(short) == [9.0]
    assert live["same"] is same
    assert list(same) == [5]
    why = r"x/0: .* but a deque with maxlen=None was"
    with (
        snapshot({"x": deque([torch.ones(1), torch.ones(2)])}) as saved,
        pytest.raises(StateMismatchError, match=why),
    ):
        place({"x": deque([torch.zeros(1)], maxlen=1)}, saved)


def test_a_defaultdict_keeps_no_factory_that_was_not_saved() -> None:
    live: dict[str, Any] = {"x": defaultdict(int, a=1)}
    with snapshot({"x": defaultdict(list, a=[1])}) as saved:
        place(live, saved)
    live["x"]["b"].append(2)
    assert live["x"] == {"a": [1], "b": [2]}
