"""Who of several replicas saves which rows, so that each saves an equal part of the bytes. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def share(sizes: Sequence[tuple[int, int]], replicas: int, index: int) -> list[tuple[int, int]]:
    """The rows [start, stop) of each tensor that replica `index` saves.

    Laid end to end, the tensors are one run of bytes that is cut into equal parts; each cut moves
    to the nearest boundary of rows. So the shares of all replicas tile every tensor, and none is
    longer than an equal part by more than one row.

    Args:
        sizes: rows, and bytes of one row, of each tensor; the same on all replicas.
        replicas: how many hold all of them.
        index: which of these is asked for.
    """
    total = sum(rows * row_bytes for rows, row_bytes in sizes)
    first, last = total * index // replicas, total * (index + 1) // replicas
    found = []
    begin = 0
    for rows, row_bytes in sizes:
        start = 0 if index == 0 else _nearest(first - begin, row_bytes, rows)
        stop = rows if index == replicas - 1 else _nearest(last - begin, row_bytes, rows)
        found.append((start, stop))
        begin += rows * row_bytes
    return found


def _nearest(byte: int, row_bytes: int, rows: int) -> int:
    """The boundary of rows that is nearest to a byte; the upper one of two."""
    if row_bytes == 0:
        return 0
    return min(max((2 * byte + row_bytes) // (2 * row_bytes), 0), rows)
