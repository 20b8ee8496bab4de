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


class TablesFile:
    """Tables that other processes of this user can read at `path` until `remove`.

    The file has no name and is on no mount: where /dev/shm is full, a step can still be read.

    Raises:
        HostMemoryError: it can not be written.
    """

    def __init__(self, tables: Tables) -> None:
        self._fd = os.memfd_create("ckptmgr-tables", os.MFD_CLOEXEC)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._fd}")
        try:
            with os.fdopen(os.dup(self._fd), "wb") as file:
                file.write(_encode(tables))
        except OSError as error:
            self.remove()
            raise HostMemoryError(
                f"can not be written: {error.strerror}", subject=str(self.path)
            ) from error

    def remove(self) -> None:
        """Free its memory."""
        os.close(self._fd)


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
