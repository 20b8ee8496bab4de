"""The shares of all replicas tile every tensor, and are even."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.rank.shares import share
from ckptmgr.staging.boxes import Box, gap

SHAPES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
        st.sampled_from([1, 2, 4, 8, 16]),
    ),
    max_size=12,
)


@given(SHAPES, st.integers(1, 9))
def test_shares_tile_every_tensor_and_are_even(
    tensors: list[tuple[tuple[int, ...], int]], replicas: int
) -> None:
    sizes = [(shape[0], math.prod(shape[1:]) * itemsize) for shape, itemsize in tensors]
    shares = [share(sizes, replicas, index) for index in range(replicas)]
    for at, (shape, _) in enumerate(tensors):
        boxes = [
            Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))
            for start, stop in (rows[at] for rows in shares)
        ]
        assert gap(shape, boxes) is None
        assert sum(box.count for box in boxes) == math.prod(shape)  # so none overlaps another
    total = sum(rows * row_bytes for rows, row_bytes in sizes)
    longest = max((row_bytes for _, row_bytes in sizes), default=0)
    for rows in shares:
        held = sum((b - a) * size[1] for (a, b), size in zip(rows, sizes, strict=True))
        assert abs(held - total / replicas) <= longest + 1


@given(SHAPES)
def test_one_replica_saves_everything(tensors: list[tuple[tuple[int, ...], int]]) -> None:
    sizes = [(shape[0], math.prod(shape[1:]) * itemsize) for shape, itemsize in tensors]
    assert share(sizes, 1, 0) == [(0, rows) for rows, _ in sizes]
