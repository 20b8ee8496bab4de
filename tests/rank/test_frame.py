"""The layout is kept while it fits, and every change of structure is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.rank.capture import Capture, Prepared
from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.types import PAGE_BYTES
from rank.shape import difference
from rank.slot import buffer_for, read, seal


def copied(capture: Capture, prepared: Prepared, data: memoryview) -> list[BaseException | None]:
    heard: list[BaseException | None] = []
    capture.copy(prepared, data, heard.append)
    return heard


def test_layout_is_the_same_object_while_nothing_but_values_changes() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "step": 0}

    def train() -> None:
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        state["step"] += 1

    train()
    capture = Capture(state)
    first = capture.prepare()
    train()
    second = capture.prepare()
    assert second.layout is first.layout
    assert second.layout_hash == first.layout_hash
    assert second.values != first.values


def _grow(state: dict[str, Any]) -> None:
    state["x"] = torch.zeros(3)


def _reshape(state: dict[str, Any]) -> None:
    state["t"].resize_(2, 3)


def _retype(state: dict[str, Any]) -> None:
    state["t"] = state["t"].double()


def _nest(state: dict[str, Any]) -> None:
    state["plain"] = {"k": torch.zeros(1)}


def _untie(state: dict[str, Any]) -> None:
    state["b"] = state["a"].clone() + 1


def _tie(state: dict[str, Any]) -> None:
    state["t"] = state["c"]


def _transpose_tied(state: dict[str, Any]) -> None:
    state["b"] = state["a"].t()


def _rename(state: dict[str, Any]) -> None:
    state["list"][0] = {True: state["list"][0].pop(1)}


def _rename_inside(state: dict[str, Any]) -> None:
    state["deep"] = {(True, (2.0,)): state["deep"].pop((1, (2,)))}


def _sign(state: dict[str, Any]) -> None:
    state["zero"] = {-0.0: state["zero"].pop(0.0)}


def _unite(state: dict[str, Any]) -> None:
    state["set"] = {frozenset({True}): state["set"].pop(frozenset({1}))}


def _grad(state: dict[str, Any]) -> None:
    state["t"].requires_grad_()


def _sparse(state: dict[str, Any]) -> None:
    state["t"] = torch.eye(2).to_sparse()


def _wrap(state: dict[str, Any]) -> None:
    state["plain"] = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    "change",
    [
        _grow,
        _reshape,
        _retype,
        _nest,
        _untie,
        _tie,
        _transpose_tied,
        _rename,
        _rename_inside,
        _sign,
        _unite,
        _grad,
        _sparse,
        _wrap,
    ],
)
def test_every_change_of_structure_is_noticed(change: Callable[[dict[str, Any]], None]) -> None:
    one = torch.arange(9.0).view(3, 3)
    state: dict[str, Any] = {
        "a": one,
        "b": one,
        "c": torch.ones(4),
        "t": torch.zeros(4),
        "plain": {"k": None},
        "list": [{1: torch.ones(2)}],
        "deep": {(1, (2,)): torch.ones(2)},
        "zero": {0.0: torch.ones(2)},
        "set": {frozenset({1}): torch.ones(2)},
    }
    capture = Capture(state, rng=False)
    before = capture.prepare()
    change(state)
    prepared = capture.prepare()
    assert prepared.layout is not before.layout
    with buffer_for(prepared) as buffer:
        assert copied(capture, prepared, buffer.data(0)) == [None]
        seal(buffer, 0, prepared)
        saved = read(buffer, 0)
        found = rebuild(saved)
        saved.data.release()
        capture.close()
    expected = {key: item for key, item in state.items() if not isinstance(item, nn.Module)}
    assert difference(expected, {key: found[key] for key in expected}) == ""


def test_values_that_change_their_kind_do_not_change_the_layout() -> None:
    state: dict[str, Any] = {"best": None, "history": [], "t": torch.zeros(2)}
    capture = Capture(state, rng=False)
    before = capture.prepare()
    state.update(best=0.5, history=[1, 2, {"a": (1 << 90, "\ud800")}])
    after = capture.prepare()
    assert after.layout is before.layout
    data = memoryview(bytearray(after.data_bytes))
    assert copied(capture, after, data) == [None]
    capture.close()
    found = rebuild(Saved(after.layout, after.values, data))
    assert difference(state, found) == ""


def test_groups_are_pages_of_one_kind_and_leaves_are_aligned() -> None:
    dtypes = [torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.complex64, torch.int32]
    state = {f"x{at}": torch.ones(7 + at, dtype=dtypes[at % 6]) for at in range(30)}
    prepared = Capture(state, rng=False).prepare()
    layout = prepared.layout
    kinds = [(group.itemsize, group.is_float) for group in layout.groups]
    assert len(set(kinds)) == len(kinds)
    for group in layout.groups:
        assert group.offset % PAGE_BYTES == group.nbytes % PAGE_BYTES == 0
    for leaf in layout.leaves:
        assert leaf.offset % 64 == 0
        (home,) = [
            group
            for group in layout.groups
            if group.offset <= leaf.offset
            and leaf.offset + leaf.nbytes <= group.offset + group.nbytes
        ]
        dtype = getattr(torch, leaf.dtype)
        assert home.is_float == (dtype.is_floating_point or dtype.is_complex)
    assert [leaf.offset for leaf in layout.leaves] == sorted(leaf.offset for leaf in layout.leaves)
    assert len({leaf.path for leaf in layout.leaves}) == len(layout.leaves)


def test_bytes_between_leaves_are_zero_whatever_the_slot_held() -> None:
    state = {"a": torch.ones(3), "b": torch.ones(5, dtype=torch.uint8)}
    capture = Capture(state, rng=False)
    prepared = capture.prepare()
    raw = bytearray(b"\xff" * prepared.data_bytes)
    assert copied(capture, prepared, memoryview(raw)) == [None]
    capture.close()
    used = sum(leaf.nbytes for leaf in prepared.layout.leaves)
    assert len(raw) - raw.count(0) == 5 + 6  # five ones, and two bytes of each 1.0
    assert used == 17


def test_tied_tensors_are_one_leaf() -> None:
    one = torch.ones(4)
    layout = Capture({"a": one, "b": [one], "c": one.view(2, 2)}, rng=False).prepare().layout
    assert [leaf.path for leaf in layout.leaves] == ["a", "c"]


def test_a_module_in_the_place_of_another_is_looked_at_anew() -> None:
    state: dict[str, Any] = {"m": nn.Linear(2, 2)}
    capture = Capture(state, rng=False)
    before = capture.prepare()
    state["m"] = nn.Linear(2, 2)
    after = capture.prepare()
    assert after.layout is not before.layout
    assert after.layout_bytes == before.layout_bytes
