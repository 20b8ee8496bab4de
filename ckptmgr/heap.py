"""How the C library keeps freed memory, in processes of our own; never in a trainer."""

from __future__ import annotations

import ctypes

ARENAS = 2
"""Heaps of malloc, each with its own freed memory. By default there are eight for each core."""

FREED_BYTES_MAX = 64 << 20
"""Freed bytes that a heap keeps at its end: eight chunks on their way, twice."""

LARGE_BYTES_MIN = 32 << 20
"""From here on each block is mapped and unmapped by itself; the C library takes no greater limit,
and it sets its own, which follows what is freed, aside."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Have chunks that clients and codecs allocate come from memory that was used before.

    glibc gives back what lies free at the end of a heap, from twice the largest block on, so that
    nearly every chunk would be of fresh pages, and to make these takes as long as to receive them
    (docs/decisions/0041). False: another C library, which does as it likes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _M_ARENA_MAX: ARENAS,
        _M_MMAP_THRESHOLD: LARGE_BYTES_MIN,
        _M_TRIM_THRESHOLD: FREED_BYTES_MAX,
    }
    taken = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(taken)
