"""The host buffer that a daemon lends to a rank: opened for writing, and what was left in it."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

from ckptmgr.errors import HostBufferDamagedError, HostMemoryError
from ckptmgr.staging.control import Attached
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.types import Snapshot


def left_in(buffer: HostBuffer) -> list[Snapshot]:
    """What a restore may read, newest first; of a damaged record the daemon tells."""
    found = []
    for slot in range(buffer.capacity.slots):
        with contextlib.suppress(HostBufferDamagedError):
            found.append(buffer.snapshot(slot))
    sealed = [snapshot for snapshot in found if snapshot is not None]
    return sorted(sealed, key=lambda one: one.generation, reverse=True)


def open_locked(attached: Attached) -> HostBuffer:
    """The buffer that the daemon lends, with this process as its writer.

    Raises:
        HostMemoryError: it has another one.
    """
    if attached.note:
        warnings.warn(f"ckptmgr: {attached.note}", RuntimeWarning, stacklevel=2)
    buffer = HostBuffer.open(Path(attached.path))
    if not buffer.lock_for_writing():
        buffer.close()
        raise HostMemoryError("has another writer", subject=attached.path)
    return buffer
