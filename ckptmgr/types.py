"""The nouns that travel between stages: frozen, typed, without I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Annotated

import msgspec

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the message they should be."""

PAGE_BYTES = 4096
"""Alignment of everything that may be written with O_DIRECT or registered for RDMA."""


ATTEMPT_MAX, STEP_MAX, RANK_MAX = 10**8 - 1, 10**12 - 1, 10**6 - 1
"""The greatest numbers that have a name: a key has 8 digits for an attempt, 12 for a step and 6 for
a rank, and what were written under more of them would be found by nobody."""


@dataclass(frozen=True, slots=True, order=True)
class StepId:
    """A step of one attempt. Order is lexicographic: a newer attempt wins whatever its step."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.attempt}.{self.step}"

    def document(self) -> dict[str, int | str]:
        """How every JSON document names a step: `id`, `attempt` and `step`."""
        return {"id": str(self), "attempt": self.attempt, "step": self.step}

    @classmethod
    def parse(cls, text: str) -> tuple[int | None, int]:
        """Read `s` or `a.s`; the attempt is None for `s`. Raises ValueError otherwise."""
        match = re.fullmatch(r"(?:(\d{1,10})\.)?(\d{1,18})", text)
        if match is None:
            raise ValueError(f"{text!r} is not a step; write 1200, or 3.1200 for attempt 3")
        return (int(match[1]) if match[1] else None), int(match[2])


class Leaf(msgspec.Struct, frozen=True, array_like=True):
    """One tensor (or the shard of one) in the data region of a snapshot.

    `offset` and `nbytes` are bytes in the data region; elements are contiguous, row-major,
    little-endian. `global_shape` and `global_offset` (elements) are None for a whole tensor.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    global_shape: tuple[int, ...] | None = None
    global_offset: tuple[int, ...] | None = None


class Group(msgspec.Struct, frozen=True, array_like=True):
    """A page-aligned run of the data region whose elements have one size (bytes) and kind.

    Chunks never cross a group, so that a codec can split them into byte planes.
    """

    offset: int
    nbytes: int
    itemsize: int
    is_float: bool


LEAVES_MAX = 1 << 22
"""Leaves (and groups) of one layout. An array that declares more is refused before it is read: a
leaf may be 6 bytes in a hostile file and is a hundred in memory."""


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """Where every leaf of a snapshot is; computed once, constant from step to step.

    `tree` is the typed encoding of the containers (staging/values.py), with the index of a leaf
    in place of each tensor and the index of a value in place of each plain Python value.
    """

    leaves: Annotated[tuple[Leaf, ...], msgspec.Meta(max_length=LEAVES_MAX)]
    groups: Annotated[tuple[Group, ...], msgspec.Meta(max_length=LEAVES_MAX)]
    data_bytes: int
    tree: bytes


class SlotState(IntEnum):
    """What a slot of a host buffer holds. Only SEALED is ever read as a snapshot."""

    EMPTY = 0
    WRITING = 1
    SEALED = 2


class Outcome(IntEnum):
    """What became of a sealed snapshot; written by the daemon into the host buffer.

    SPOOLED: its step is undecided, but all of it is on stable storage in the spool of this host.
    """

    UNDECIDED = 0
    COMMITTED = 1
    ABORTED = 2
    SPOOLED = 3

    @property
    def decided(self) -> bool:
        """Whether the register of the step says so, for ever."""
        return self in (Outcome.COMMITTED, Outcome.ABORTED)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's state at one step, sealed in slot `slot` of a host buffer.

    `generation` counts the writes of the buffer: it tells a reader that the slot was reused.
    `sealed_at` is Unix time in seconds, for people only; nothing is decided by it.
    """

    slot: int
    generation: int
    attempt: int
    nonce: str
    rank: int
    world: int
    step: int
    layout_bytes: int
    values_bytes: int
    data_bytes: int
    sealed_at: float
    stall_seconds: float

    @property
    def id(self) -> StepId:
        """The (attempt, step) it belongs to."""
        return StepId(self.attempt, self.step)


class Reach(msgspec.Struct, frozen=True, array_like=True):
    """The first and the last step that a trainer told of in an attempt, and when (Unix seconds)."""

    attempt: int
    first_step: int
    first_at: float
    last_step: int
    last_at: float


class Binding(msgspec.Struct, frozen=True):
    """Which rank of which job a host buffer belongs to; constant for the life of the buffer.

    `keep` is a number of steps, or the text of a policy (keep.py).
    """

    url: str
    rank: int
    world: int
    codec: str = "auto"
    keep: int | str = 3


class StepState(str, Enum):
    """State of a step in a store, as `ls` shows it."""

    COMMITTED = "committed"
    VERIFIED = "verified"
    RETIRED = "retired"
    ABORTED = "aborted"
    UNDECIDED = "undecided"


Tags = dict[str, int | float | str | bool]
"""What a training loop may say of a step: finite JSON scalars under short names."""
