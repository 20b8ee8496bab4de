"""Holds: a reader, or a person, keeps retention away from a step."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from pathlib import Path

from ckptmgr.config import STORE_TIMEOUT_SECONDS
from ckptmgr.errors import (
    DamageError,
    StoreError,
    StoreFullError,
    StorePermissionError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Hold, is_retired
from ckptmgr.repository.commit import put_record
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.types import StepId

_READER = re.compile(
    r"reader\.(?P<host>[A-Za-z0-9._-]*)\.(?P<place>[0-9a-f]{16})\.(?P<pid>\d+)\.[0-9a-f]{16}"
)

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")

_NOWHERE = secrets.token_hex(8)
"""The place of a process that can not tell where it is: nobody else is there."""

_UNRELEASED: deque[str] = deque(maxlen=1000)
"""Ids of this process's holds that could not be released: of the whole process, because whoever
collects has nothing else in common with who read. An id is never used twice, so none need leave;
one that falls out keeps its step until this process ends."""


def host_name() -> str:
    """This host's name as a key segment."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:64] or "host"


def place_of_pids() -> str:
    """Where the ids of processes are those that this process sees: its pid namespace, in 16 hex
    digits. Containers of one pod have one host name, and each a namespace of its own; the inode
    of a namespace is its own until it ends, or the machine is booted again.
    """
    try:
        place = f"{_BOOT.read_text()}{_NAMESPACE.stat().st_ino}"
    except OSError:
        return _NOWHERE
    return blake2b(place.encode(), digest_size=8).hexdigest()


def left_behind(hold_id: str) -> bool:
    """Whether nobody reads behind a hold any more: it is of a process that this one would see, and
    that is dead, or of this process, which could not release it.
    """
    if hold_id in _UNRELEASED:
        return True
    match = _READER.fullmatch(hold_id)
    if match is None or (match["host"], match["place"]) != (host_name(), place_of_pids()):
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


async def put_hold(store: Store, step: StepId, hold_id: str, why: str) -> None:
    """Hold a step until `release_hold`.

    Raises:
        DamageError: the step is retired already; its data may be going away.
    """
    key = keys.hold(step, hold_id)
    await put_record(store, Kind.HOLD, key, Hold(step.attempt, step.step, hold_id, why))
    if await is_retired(store, step):
        await store.delete(key)
        raise DamageError("is retired", subject=str(step))


async def release_hold(store: Store, step: StepId, hold_id: str) -> None:
    """Release a hold; one that is not there is no error."""
    await store.delete(keys.hold(step, hold_id))


async def _let_go(store: Store, step: StepId, hold_id: str) -> None:
    """Release a hold that may or may not be there; left there, it would keep the step's data for
    as long as this process lives. One that can not be released now is known to `left_behind`.
    """
    try:
        async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
            await release_hold(store, step, hold_id)
    except (StoreError, TimeoutError):
        _UNRELEASED.append(hold_id)
    except BaseException:
        _UNRELEASED.append(hold_id)
        raise


@asynccontextmanager
async def held_step(store: Store, step: StepId) -> AsyncIterator[None]:
    """Keep retention away from a step while it is read.

    Raises:
        DamageError: the step is retired already.
    """
    place = f"{host_name()}.{place_of_pids()}"
    hold_id = f"reader.{place}.{os.getpid()}.{secrets.token_hex(8)}"
    held = True
    try:
        await put_hold(store, step, hold_id, "being read")
    except (StorePermissionError, StoreFullError):
        # Reading must not need a store that can be written: it is then that people restore.
        # Without a hold, a step that is retired meanwhile reads as damage.
        held = False
        await _let_go(store, step, hold_id)
    except BaseException:
        await _let_go(store, step, hold_id)
        raise
    try:
        yield
    finally:
        if held:
            await _let_go(store, step, hold_id)
