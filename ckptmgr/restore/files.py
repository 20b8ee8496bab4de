"""A committed step as files for other programs: safetensors, and a host buffer for torch."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiofiles
from safetensors import SafetensorError, safe_open

from ckptmgr.errors import CkptmgrError, HostMemoryFullError, UnsupportedLeafError, UsageError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.joined import Joined, Tensor, join, plan_part
from ckptmgr.restore.slot import capacity_for, fetch_into_slot
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.store.base import Store
from ckptmgr.types import Binding

SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
"""Our dtype names and those of the safetensors format; what is missing there is refused."""

Progress = Callable[[int], None]


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends without an error.

    After an error nothing is left of it, nor of parents of `target` that were not there before.

    Raises:
        UsageError: `target` exists and is not an empty directory, or can not be made or replaced.
        CkptmgrError: there is no room for it, or its disk fails.
    """
    made: list[Path] = []
    temporary: Path | None = None
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError("exists and is not an empty directory", subject=str(target))
        place = Path(os.path.realpath(target))  # a link stays, and what it leads to is made
        _check_replaceable(place, target)
        parent = place.parent
        _make_directories(parent, made)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=parent))
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        os.rename(temporary, place)  # replaces an empty directory, never a full one
        _sync(parent)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for directory in reversed(made):
            with suppress(OSError):  # somebody else has put something there
                directory.rmdir()
        if isinstance(error, OSError):  # of the target: the store has errors of its own
            raise _not_writable(target, error) from error
        raise


def _check_replaceable(place: Path, target: Path) -> None:
    """An empty directory is replaced at the end, which can take hours; these can not be then."""
    hint = "Give --to a new directory below it."
    if place == Path.cwd():
        message = "is the working directory, which can not be replaced"
        raise UsageError(message, subject=str(target), hint=hint)
    if os.path.ismount(place):
        message = "is a mount point, which can not be replaced"
        raise UsageError(message, subject=str(target), hint=hint)


def _make_directories(path: Path, made: list[Path]) -> None:
    """Make `path` and its parents; what was not there is added to `made`, the topmost first."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir()
        made.append(directory)


_ROOM = {errno.ENOSPC, errno.EDQUOT}
_WRONG_PLACE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENXIO, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL),
}


def _not_writable(target: Path, error: OSError) -> CkptmgrError:
    """What to tell of a system call on `target` that failed."""
    message = f"can not be written: {error.strerror}"
    if error.errno in _ROOM:
        hint = "Free space, or give --to a directory on another disk."
        return CkptmgrError(message, subject=str(target), hint=hint)
    if error.errno in _WRONG_PLACE:
        hint = "Give --to a new directory in a place where you may write."
        return UsageError(message, subject=str(target), hint=hint)
    hint = "Look after this disk, or give --to a directory on another one."
    return CkptmgrError(message, subject=str(target), hint=hint)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def safetensors_header(tensors: Sequence[Tensor], notes: dict[str, str]) -> bytes:
    """The header of a safetensors file with `tensors` back to back: 8 bytes of length, then JSON.

    Raises:
        UnsupportedLeafError: a dtype that the format does not have, or a name that it has twice.
    """
    entries: dict[str, Any] = {"__metadata__": notes}
    at = 0
    for one in tensors:
        if one.name in entries:
            raise UnsupportedLeafError(
                "safetensors has one tensor of a name, and none of this one",
                subject=one.name,
                hint="Use --format torch.",
            )
        if one.dtype not in SAFETENSORS_DTYPES:
            raise UnsupportedLeafError(
                f"safetensors has no {one.dtype}", subject=one.name, hint="Use --format torch."
            )
        entries[one.name] = {
            "dtype": SAFETENSORS_DTYPES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


async def write_safetensors(
    store: Store,
    manifests: Sequence[Manifest],
    directory: Path,
    pool: BufferPool,
    progress: Progress,
) -> list[Path]:
    """Write `state.safetensors` with all tensors of all ranks, and everything else as JSON:
    `values.json` of rank 0, `values-<rank>.json` of each other one.

    Bytes go from the store to the file through the memory budget, whatever the state's size.

    Raises:
        DamageError: something of the step does not hold, or is not there.
        UnsupportedLeafError: the format can not hold it.
    """
    joined = join(manifests)
    notes = {"step": str(manifests[0].id), "format": "ckptmgr"}
    header = safetensors_header(joined.tensors, notes)
    path = directory / "state.safetensors"
    with path.open("x+b") as file:
        take_space(file.fileno(), len(header) + joined.nbytes)
        mapped = mmap.mmap(file.fileno(), 0)
        try:
            with memoryview(mapped) as view, view[len(header) :] as target:
                view[: len(header)] = header
                for manifest in manifests:
                    plan = plan_part(manifest, joined)
                    await fetch(store, plan, target, pool, progress)
            mapped.flush()
        finally:
            # A read that was cancelled may hold a piece until its call into the kernel ends.
            with suppress(BufferError):
                mapped.close()
    _check_header(path, joined)
    return [path, *[await _write_values(one, joined, directory) for one in manifests]]


async def _write_values(manifest: Manifest, joined: Joined, directory: Path) -> Path:
    path = directory / (f"values-{manifest.rank}.json" if manifest.rank else "values.json")
    async with aiofiles.open(path, "x") as text:
        await text.write(json.dumps(readable_values(manifest, joined), indent=1))
    return path


def take_space(descriptor: int, nbytes: int) -> None:
    """Give the file its length and its blocks: a disk that is full under a mapping kills us."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, nbytes)


def _check_header(path: Path, joined: Joined) -> None:
    """Let the library that others will read the file with have the last word on its header."""
    try:
        with safe_open(path, framework="numpy") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise CkptmgrError(f"safetensors does not read it: {error}", subject=str(path)) from error
    if names != {tensor.name for tensor in joined.tensors}:
        raise CkptmgrError("safetensors reads other names than were written", subject=str(path))


def readable_values(manifest: Manifest, joined: Joined) -> Any:
    """The saved containers of a rank as JSON, with tensors as their names in the file and odd
    values, as numbers that are not finite, as their repr.

    Raises:
        UnsupportedLeafError: a mapping has keys that are one and the same as text.
    """
    layout = manifest.read_layout()

    def named(index: int, _flags: int) -> dict[str, str]:
        path = layout.leaves[index].path
        return {"tensor": joined.names.get((manifest.rank, path), path)}

    return _as_json(decode_tree(layout.tree, decode_values(manifest.values), named), "state")


def _as_json(item: Any, path: str) -> Any:
    if isinstance(item, dict):
        found = {str(key): _as_json(value, f"{path}/{key}") for key, value in item.items()}
        if len(found) < len(item):
            raise UnsupportedLeafError(
                "has keys that JSON can not tell apart, as 1 and '1'",
                subject=path,
                hint="Use --format torch.",
            )
        return found
    if isinstance(item, (list, tuple)):
        return [_as_json(value, f"{path}/{at}") for at, value in enumerate(item)]
    if item is None or isinstance(item, (bool, int, str)):
        return item
    return item if isinstance(item, float) and math.isfinite(item) else repr(item)


async def write_hostbuffer(
    store: Store, manifest: Manifest, directory: Path, pool: BufferPool, progress: Progress
) -> Path:
    """Write a rank's part as a host buffer file in `directory`, for a process that has torch."""
    binding = Binding(store.url, manifest.rank, manifest.world)
    try:
        buffer = HostBuffer.create(directory, binding, capacity_for(manifest))
    except HostMemoryFullError as error:  # here it is a disk, which nobody can tell from its text
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    with buffer:
        with buffer.path.open("r+b") as file:
            take_space(file.fileno(), buffer.capacity.file_bytes)
        await fetch_into_slot(store, manifest, buffer, 0, pool, progress)
        return buffer.path
