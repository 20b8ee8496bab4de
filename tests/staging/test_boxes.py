"""Boxes against NumPy: every operation on random boxes is what slicing says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.staging.boxes import Box, box_of, boxes_of_run, gap, runs, whole, whole_shape
from ckptmgr.types import Leaf

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
full_shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    limits = zip(shape, offset, strict=True)
    return Box(offset, tuple(draw(st.integers(0, size - start)) for size, start in limits))


def elements(shape: tuple[int, ...], box: Box) -> set[int]:
    """The flat indices of a box."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
    return set(np.asarray(numbers[cut]).reshape(-1).tolist())


@given(st.data(), shapes)
def test_common_is_the_intersection(data: Any, shape: tuple[int, ...]) -> None:
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    expected = elements(shape, one) & elements(shape, other)
    found = one.common(other)
    assert (elements(shape, found) if found else set()) == expected
    if found is not None:
        inner = found.within(one)
        assert all(0 <= o <= n for o, n in zip(inner.offset, one.shape, strict=True))


@given(st.data(), shapes)
def test_runs_are_the_elements_in_order_and_maximal(data: Any, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes(shape))
    found = list(runs(box, shape))
    listed = [i for start, count in found for i in range(start, start + count)]
    assert listed == sorted(elements(shape, box))
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found))


@given(st.data(), full_shapes)
def test_a_run_of_the_flattened_tensor_is_boxes(data: Any, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    found = boxes_of_run(shape, start, stop)
    listed = [sorted(elements(shape, box)) for box in found]
    assert [i for box in listed for i in box] == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(st.data(), shapes)
def test_a_gap_is_held_by_nobody_and_is_found_if_there_is_one(
    data: Any, shape: tuple[int, ...]
) -> None:
    held = data.draw(st.lists(boxes(shape), max_size=6))
    missing = elements(shape, whole(shape)).difference(*(elements(shape, box) for box in held))
    found = gap(shape, held)
    assert (found is None) == (not missing)
    if found is not None:
        assert elements(shape, found) <= missing


def test_a_leaf_is_a_part_or_the_whole() -> None:
    assert box_of(Leaf("a", "f", (2, 3), 0, 24)) == whole((2, 3))
    part = Leaf("a", "f", (2, 3), 0, 24, (8, 3), (4, 0))
    assert (box_of(part), whole_shape(part)) == (Box((4, 0), (2, 3)), (8, 3))
    assert whole_shape(Leaf("a", "f", (), 0, 4)) == ()


@pytest.mark.parametrize("at", [0, 1])
def test_each_of_ten_thousand_boxes_is_looked_at_a_few_times(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon that commits looks at every tensor of every rank."""
    count, asked, common = 10_000, [], Box.common
    parts = [Box((n, 0), (1, 8)) if at == 0 else Box((0, n), (8, 1)) for n in range(count)]
    shape = (count, 8) if at == 0 else (8, count)
    monkeypatch.setattr(Box, "common", lambda one, other: asked.append(1) or common(one, other))
    assert gap(shape, parts) is None
    assert gap(shape, [*parts[:5000], *parts[5001:]]) == parts[5000]
    assert len(asked) <= 2 * count
