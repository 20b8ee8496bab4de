"""The table of state shapes, made on a GPU: each comes back exactly, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from ckptmgr.rank.place import place
from rank.shape import Shape, difference, tensors
from rank.shapes import SHAPES
from rank.slot import snapshot

EXACT = [shape for shape in SHAPES if shape.refused is None]


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.mark.parametrize("shape", EXACT, ids=lambda shape: f"{shape.area}: {shape.name}")
def test_a_state_made_on_the_gpu_is_placed_exactly(shape: Shape) -> None:
    try:
        state, twin = shape.make(1), shape.make(2)
    except RuntimeError as error:
        pytest.skip(f"can not be made there: {str(error).splitlines()[0]}")
    before = {path: item.device for path, item in tensors(twin)}
    with snapshot(state) as saved:
        place(twin, saved)
    assert difference(state, twin) == ""
    after = {path: item.device for path, item in tensors(twin)}
    assert {path: after[path] for path in before if path in after} == {
        path: device for path, device in before.items() if path in after
    }
    if shape.advance is not None:
        for _ in range(2):
            shape.advance(state)
            shape.advance(twin)
        assert difference(state, twin) == ""
