"""Every state shape comes back exactly, or is refused with its path; nothing is silently lossy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.rank.capture import Capture
from ckptmgr.rank.place import place, rebuild
from rank import shapes
from rank.shape import Shape, bytes_of, difference, tensors, ties
from rank.shapes import SHAPES
from rank.slot import buffer_for, read, seal, snapshot
from scale import FULL

EXACT = [shape for shape in SHAPES if shape.refused is None]
REFUSED = [shape for shape in SHAPES if shape.refused is not None]


def _name(shape: Shape) -> str:
    return f"{shape.area}: {shape.name}"


@pytest.fixture(autouse=True)
def _quiet_torch() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch says of many things that they are experimental, and of some schedulers that they
        # were stepped in an unusual order.
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _plain(state: Any) -> Any:
    """A state with the state_dicts of its objects: what rebuilding it can give."""
    if hasattr(state, "load_state_dict") and not isinstance(state, type):
        return _plain(state.state_dict())
    if type(state) is dict:
        return {key: _plain(item) for key, item in state.items()}
    if type(state) in (list, tuple):
        return type(state)(_plain(item) for item in state)
    return state


@pytest.mark.parametrize("shape", EXACT, ids=_name)
def test_rebuilt_state_is_exact(shape: Shape) -> None:
    state = shape.make(1)
    with snapshot(state) as saved:
        found = rebuild(saved)
    # The slot is unmapped now: whatever still pointed into it would crash here.
    assert difference(_plain(state), found) == ""
    assert ties(state) <= ties(found)


@pytest.mark.parametrize("shape", [shape for shape in EXACT if shape.area == "special"], ids=_name)
def test_a_default_device_changes_nothing(shape: Shape) -> None:
    state, live = shape.make(1), shape.make(2)
    with snapshot(state) as saved, torch.device("meta"):
        place(live, saved)
        found = rebuild(saved)
    assert difference(state, live) == ""
    assert difference(_plain(state), found) == ""


@pytest.mark.parametrize("shape", EXACT, ids=_name)
def test_placed_state_is_exact(shape: Shape) -> None:
    state, twin = shape.make(1), shape.make(2)
    before = dict(tensors(twin))
    memory = {path: item.data_ptr() for path, item in before.items() if _stays(path, item)}
    with snapshot(state) as saved:
        place(twin, saved)
    assert difference(state, twin) == ""
    after = dict(tensors(twin))
    moved = [path for path in memory if path in after and after[path].data_ptr() != memory[path]]
    assert moved == []
    if shape.advance is not None:
        for _ in range(2):
            shape.advance(state)
            shape.advance(twin)
        assert difference(state, twin) == ""


def _stays(path: str, tensor: torch.Tensor) -> bool:
    """Whether it must be written in place; what objects do inside is their own affair."""
    own = path.startswith("/loader") or "_extra_state" in path
    return tensor.layout == torch.strided and not tensor.is_quantized and not own


@pytest.mark.parametrize("shape", REFUSED, ids=_name)
def test_refusal_names_the_path(shape: Shape) -> None:
    with pytest.raises(UnsupportedLeafError) as caught:
        Capture(shape.make(1)).prepare()
    assert caught.value.subject == shape.refused


def test_table_has_more_shapes_than_any_peer_was_measured_with() -> None:
    assert len(SHAPES) >= 75
    assert len({_name(shape) for shape in SHAPES}) == len(SHAPES)


def test_page_is_up_to_date() -> None:
    assert shapes.PAGE.read_text() == shapes.page(), "cd tests && python -m rank.shapes"


@pytest.mark.parametrize("spoil", ["bit", "dtype", "tie", "order", "float", "grad", "metadata"])
def test_oracle_sees_what_it_must(spoil: str) -> None:
    def make() -> dict[str, Any]:
        one = torch.arange(6, dtype=torch.float32)
        weights = torch.nn.Linear(2, 2).state_dict()
        for tensor in weights.values():
            tensor.zero_()
        return {"a": one, "b": one, "c": {"x": 0.0, "y": np.float32(1)}, "d": weights}

    good, bad = make(), make()
    assert difference(good, bad) == ""
    if spoil == "bit":
        bad["a"].view(torch.int32)[3] ^= 1
    elif spoil == "dtype":
        bad["a"] = bad["a"].double()
    elif spoil == "tie":
        bad["b"] = copy.deepcopy(bad["b"])
        assert not ties(good) <= ties(bad)
        return
    elif spoil == "order":
        bad["c"] = dict(reversed(bad["c"].items()))
    elif spoil == "float":
        bad["c"]["x"] = -0.0
    elif spoil == "grad":
        bad["a"].requires_grad_()
    else:
        bad["d"]._metadata[""]["version"] = 7
    assert difference(good, bad) != ""


def test_bytes_of_conjugate_views_are_those_of_their_values() -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    assert bytes_of(values.conj()) == bytes_of(torch.tensor([1 - 2j, 3 + 4j]))


@pytest.mark.reliability
@pytest.mark.skipif(not FULL, reason="needs 9 GiB of memory; CKPTMGR_RELIABILITY=1 runs it")
def test_more_than_2_to_the_31_elements_and_4_gib() -> None:
    count = (1 << 31) + 5
    row = torch.arange(1 << 15, dtype=torch.int16)
    live = torch.zeros(count, dtype=torch.int16)
    ends = {0: 7, count - 1: -3, 1 << 31: 11}
    state = {"x": row.repeat(count // row.numel() + 1)[:count]}
    for at, value in ends.items():
        state["x"][at] = value
    capture = Capture(state, rng=False)
    prepared = capture.prepare()
    with buffer_for(prepared) as buffer:
        heard: list[BaseException | None] = []
        capture.copy(prepared, buffer.data(0), heard.append)
        capture.close()
        assert heard == [None]
        state.clear()
        prepared.sources.tensors.clear()
        seal(buffer, 0, prepared)
        saved = read(buffer, 0)
        place({"x": live}, saved)
        saved.data.release()
    assert {at: int(live[at]) for at in ends} == ends
    assert torch.equal(live[1 << 30 : (1 << 30) + row.numel()], row)
