"""A committed step as files for other programs: safetensors, and a host buffer for torch."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiofiles
from safetensors import SafetensorError, safe_open

from ckptmgr.errors import CkptmgrError, HostMemoryFullError, UnsupportedLeafError, UsageError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_leaves
from ckptmgr.restore.slot import capacity_for, fetch_into_slot
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.store.base import Store
from ckptmgr.types import Binding, Leaf

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
        UsageError: `target` exists and is not an empty directory, or can not be made.
        CkptmgrError: there is no room for it, or its disk fails.
    """
    made: list[Path] = []
    temporary: Path | None = None
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError("exists and is not an empty directory", subject=str(target))
        parent = target.absolute().parent
        _make_directories(parent, made)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        os.rename(temporary, target)  # replaces an empty directory, never a full one
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


def safetensors_header(leaves: tuple[Leaf, ...], notes: dict[str, str]) -> bytes:
    """The header of a safetensors file with `leaves` back to back: 8 bytes of length, then JSON.

    Raises:
        UnsupportedLeafError: a dtype that the format does not have, or the shard of a tensor.
    """
    entries: dict[str, Any] = {"__metadata__": notes}
    at = 0
    for leaf in leaves:
        if leaf.path in entries:
            raise UnsupportedLeafError(
                "safetensors has one tensor of a name, and none of this one",
                subject=leaf.path,
                hint="Use --format torch.",
            )
        if leaf.dtype not in SAFETENSORS_DTYPES or leaf.global_shape is not None:
            raise UnsupportedLeafError(
                f"safetensors has no {leaf.dtype}", subject=leaf.path, hint="Use --format torch."
            )
        entries[leaf.path] = {
            "dtype": SAFETENSORS_DTYPES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [at, at + leaf.nbytes],
        }
        at += leaf.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


async def write_safetensors(
    store: Store, manifest: Manifest, directory: Path, pool: BufferPool, progress: Progress
) -> list[Path]:
    """Write `state.safetensors` with all tensors and `values.json` with everything else.

    Bytes go from the store to the file through the memory budget, whatever the state's size.
    """
    leaves = manifest.read_layout().leaves
    notes = {"step": str(manifest.id), "format": "ckptmgr"}
    header = safetensors_header(leaves, notes)
    plan = plan_leaves(manifest, leaves)
    path = directory / "state.safetensors"
    with path.open("x+b") as file:
        _take_space(file.fileno(), len(header) + plan.target_bytes)
        mapped = mmap.mmap(file.fileno(), 0)
        try:
            with memoryview(mapped) as view, view[len(header) :] as target:
                view[: len(header)] = header
                await fetch(store, plan, target, pool, progress)
            mapped.flush()
        finally:
            # A read that was cancelled may hold a piece until its call into the kernel ends.
            with suppress(BufferError):
                mapped.close()
    _check_header(path, leaves)
    values = directory / "values.json"
    async with aiofiles.open(values, "x") as text:
        await text.write(json.dumps(readable_values(manifest), indent=1))
    return [path, values]


def _take_space(descriptor: int, nbytes: int) -> None:
    """Give the file its length and its blocks: a disk that is full under a mapping kills us."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, nbytes)


def _check_header(path: Path, leaves: tuple[Leaf, ...]) -> None:
    """Let the library that others will read the file with have the last word on its header."""
    try:
        with safe_open(path, framework="numpy") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise CkptmgrError(f"safetensors does not read it: {error}", subject=str(path)) from error
    if names != {leaf.path for leaf in leaves}:
        raise CkptmgrError("safetensors reads other names than were written", subject=str(path))


def readable_values(manifest: Manifest) -> Any:
    """The saved containers as JSON, with tensors as their paths and odd values as their repr."""
    leaves = manifest.read_layout().leaves
    tree = decode_tree(
        manifest.read_layout().tree,
        decode_values(manifest.values),
        lambda index, _flags: {"tensor": leaves[index].path},
    )
    return _as_json(tree)


def _as_json(item: Any) -> Any:
    if isinstance(item, dict):
        return {str(key): _as_json(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_as_json(value) for value in item]
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    return repr(item)


async def write_hostbuffer(
    store: Store, manifest: Manifest, directory: Path, pool: BufferPool, progress: Progress
) -> Path:
    """Write the step as a host buffer file in `directory`, for a process that has torch."""
    binding = Binding(store.url, manifest.rank, manifest.world)
    try:
        buffer = HostBuffer.create(directory, binding, capacity_for(manifest))
    except HostMemoryFullError as error:  # here it is a disk, which nobody can tell from its text
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    with buffer:
        with buffer.path.open("r+b") as file:
            _take_space(file.fileno(), buffer.capacity.file_bytes)
        await fetch_into_slot(store, manifest, buffer, 0, pool, progress)
        return buffer.path
