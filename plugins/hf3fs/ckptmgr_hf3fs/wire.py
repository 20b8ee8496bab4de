"""The memory layout of a USRBIO ring, and the names under which memory is registered.

A ring of n entries is a file of shared memory (E = n + 1; little-endian; offsets in bytes):

    0   int32 sqe_head    written by the client        8   int32 cqe_head    written by the daemon
    4   int32 sqe_tail    written by the daemon        12  int32 cqe_tail    written by the client
    16  E arguments       56 bytes: id of the memory, offset, inode, file offset, length, token
        E completions     24 bytes: int32 slot, int32 0, int64 result (bytes or -errno), token
        E submissions     16 bytes: int32 slot, int32 0, token
        sem_t             32 bytes, posted by the daemon when completions are there
"""

from __future__ import annotations

import struct
import uuid

ARGUMENTS = struct.Struct("<16sQQQQQ")
COMPLETION = struct.Struct("<iiqQ")
SUBMISSION = struct.Struct("<i4xQ")

SQE_HEAD, SQE_TAIL, CQE_HEAD, CQE_TAIL = range(4)
"""Indices of the four int32 at the start of a ring."""

_MARKS_BYTES = 16
_SEMAPHORE_BYTES = 32
_SPARE_BYTES = 4096

FORBID_READ_HOLES = 2
"""Ring flag: a hole is an error (ENODATA), and not zeros."""

IOVS = "iovs"
SUBMIT_LINK = "submit-ios"
"""Link in the directory of registered memory; it names the semaphore that wakes the daemon."""


class Layout:
    """Where the parts of a ring with `entries` entries lie."""

    def __init__(self, entries: int) -> None:
        self.slots = entries + 1  # one stays free: it tells a full ring from an empty one
        self.arguments = _MARKS_BYTES
        self.completions = self.arguments + ARGUMENTS.size * self.slots
        self.submissions = self.completions + COMPLETION.size * self.slots
        self.semaphore = self.submissions + SUBMISSION.size * self.slots
        self.nbytes = self.semaphore + _SEMAPHORE_BYTES + _SPARE_BYTES


def ring_name(identity: uuid.UUID, *, for_read: bool, flags: int = 0) -> str:
    """Name of a registered ring: the daemon takes all that is prepared, and waits for no more."""
    attributes = f".{'r' if for_read else 'w'}0.t0"
    return f"{identity}{attributes}" + (f".f{flags:b}" if flags else "")
