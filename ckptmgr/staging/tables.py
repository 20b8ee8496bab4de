"""Tables of a step's ranks as a file: how the daemon tells a rank what was saved, and where."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ckptmgr.errors import HostMemoryError, RecordDamagedError
from ckptmgr.types import MALFORMED, Tags


class RankTable(msgspec.Struct, frozen=True, array_like=True):
    """What one rank saved: its encoded layout and values, as they are in a slot, and its tags."""

    rank: int
    layout: bytes
    values: bytes
    tags: Tags = {}


class Tables(msgspec.Struct, frozen=True):
    """Tables of some or all ranks of a step."""

    attempt: int
    step: int
    world: int
    ranks: tuple[RankTable, ...]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Tables).decode


def write_tables(path: Path, tables: Tables) -> None:
    """Make the file, readable by this user only.

    Raises:
        HostMemoryError: it can not be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_encode(tables))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise HostMemoryError(f"can not be written: {error.strerror}", subject=str(path)) from error


def read_tables(path: Path) -> Tables:
    """What a daemon of this user wrote.

    Raises:
        HostMemoryError: it is gone.
        RecordDamagedError: it is not such a file.
    """
    try:
        return _decode(path.read_bytes())
    except OSError as error:
        raise HostMemoryError(f"can not be read: {error.strerror}", subject=str(path)) from error
    except MALFORMED as error:
        raise RecordDamagedError(f"is no file of tables: {error}", subject=str(path)) from error
