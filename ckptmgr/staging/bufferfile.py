"""The file behind a host buffer: its header page, making it with or without a name, opening it."""

from __future__ import annotations

import os
import re
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from ckptmgr.errors import HostBufferDamagedError, HostMemoryError, HostMemoryFullError
from ckptmgr.types import PAGE_BYTES, Binding

MAGIC = b"CKPTHB\r\n"
VERSION = 1
SLOTS_MIN, SLOTS_MAX = 1, 3  # one slot: a buffer lent to a reader, never written by a rank
BINDING_AT = 128
SLOTS_AT = 2 * PAGE_BYTES

_HEADER = struct.Struct("<8sIIQQ16sI12x")
_HEADER_HASH_AT = 64
_UNNAMED = re.compile(r"/proc/\d+/fd/\d+")


@dataclass(frozen=True, slots=True)
class Capacity:
    """Size of a buffer: slots, and bytes of each slot's table and data region (page multiples)."""

    slots: int
    table_bytes: int
    data_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot with its header page."""
        return PAGE_BYTES + self.table_bytes + self.data_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return SLOTS_AT + self.slots * self.slot_bytes

    def holds(self, table_bytes: int, data_bytes: int) -> bool:
        """Whether a snapshot of this size fits into a slot."""
        return table_bytes <= self.table_bytes and data_bytes <= self.data_bytes


def is_unnamed(path: Path) -> bool:
    """Whether `path` is a descriptor of a process and not a name in a directory."""
    return _UNNAMED.fullmatch(str(path)) is not None


def make_named(directory: Path, binding: Binding, capacity: Capacity) -> Path:
    """Make a buffer file in `directory`; its name appears only when its header is whole.

    Raises:
        HostMemoryFullError: no space in `directory`.
        HostMemoryError: a binding or capacity that can not be described.
    """
    buffer_id = secrets.token_bytes(16)
    pages = _first_pages(buffer_id, binding, capacity)
    _check_space(directory, capacity.file_bytes)
    path = directory / f"{buffer_id.hex()}.buf"
    temporary = directory / f".{buffer_id.hex()}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        _fill(fd, pages, capacity)
    except OSError as error:
        os.unlink(temporary)
        raise HostMemoryFullError(
            f"can not be made: {error.strerror}", subject=str(temporary)
        ) from error
    finally:
        os.close(fd)
    os.rename(temporary, path)
    return path


def make_unnamed(binding: Binding, capacity: Capacity) -> int:
    """Make a buffer as a memfd, which no mount limits; returns its descriptor.

    Raises:
        HostMemoryFullError: the machine has not that much memory left.
    """
    pages = _first_pages(secrets.token_bytes(16), binding, capacity)
    left = _available_bytes()
    if left < capacity.file_bytes:
        raise HostMemoryFullError(
            f"needs {capacity.file_bytes >> 20} MiB of memory, {left >> 20} MiB are available"
        )
    fd = os.memfd_create("ckptmgr", os.MFD_CLOEXEC)
    try:
        _fill(fd, pages, capacity)
    except OSError as error:
        os.close(fd)
        raise HostMemoryFullError(f"memfd can not be made: {error.strerror}") from error
    return fd


def open_buffer(path: Path) -> int:
    """Open a buffer, following no link but the kernel's own to an unnamed one.

    Raises:
        HostMemoryError: it is not there, or a link.
    """
    follow = 0 if is_unnamed(path) else os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | follow | os.O_CLOEXEC)
    except OSError as error:
        raise HostMemoryError(f"can not be opened: {error.strerror}", subject=str(path)) from error


def read_header(fd: int, path: Path) -> Capacity:
    """The capacity that a buffer's header tells, after checking that header.

    Raises:
        HostMemoryError: the file belongs to another user.
        HostBufferDamagedError: its magic, version, hash or size does not hold.
    """
    found = os.fstat(fd)
    if found.st_uid != os.getuid():
        raise HostMemoryError("belongs to another user", subject=str(path))
    page = os.pread(fd, PAGE_BYTES, 0)
    if len(page) < PAGE_BYTES or page[:8] != MAGIC:
        raise HostBufferDamagedError("is not a host buffer", subject=str(path))
    _, version, slots, table_bytes, data_bytes, _, length = _HEADER.unpack_from(page)
    if version != VERSION:
        raise HostBufferDamagedError(f"has version {version}, not {VERSION}", subject=str(path))
    binding = page[BINDING_AT : BINDING_AT + min(length, PAGE_BYTES)]
    hashed = page[:_HEADER_HASH_AT] + binding
    reserved = page[_HEADER_HASH_AT + 16 : BINDING_AT]
    digest = page[_HEADER_HASH_AT : _HEADER_HASH_AT + 16]
    if xxhash.xxh3_128_digest(hashed) != digest or any(reserved):
        raise HostBufferDamagedError("has a damaged header", subject=str(path))
    capacity = Capacity(slots, table_bytes, data_bytes)
    if found.st_size != capacity.file_bytes:
        raise HostBufferDamagedError("has the wrong size", subject=str(path))
    return capacity


def _first_pages(buffer_id: bytes, binding: Binding, capacity: Capacity) -> bytes:
    encoded = msgspec.msgpack.encode(binding)
    if len(encoded) > PAGE_BYTES - BINDING_AT:
        raise HostMemoryError("URL is too long for a host buffer", subject=binding.url)
    if not SLOTS_MIN <= capacity.slots <= SLOTS_MAX:
        raise HostMemoryError(f"a host buffer has 1 to 3 slots, not {capacity.slots}")
    for length in (capacity.table_bytes, capacity.data_bytes):
        if length < 0 or length % PAGE_BYTES:
            raise HostMemoryError(f"a region has whole pages, not {length} bytes")
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        capacity.slots,
        capacity.table_bytes,
        capacity.data_bytes,
        buffer_id,
        len(encoded),
    )
    page = head + xxhash.xxh3_128_digest(head + encoded) + bytes(48) + encoded
    return page.ljust(SLOTS_AT, b"\0")


def _fill(fd: int, pages: bytes, capacity: Capacity) -> None:
    os.ftruncate(fd, capacity.file_bytes)
    # The daemon's page too: a store into a hole of a full tmpfs would kill the daemon.
    os.pwrite(fd, pages, 0)


def _check_space(directory: Path, file_bytes: int) -> None:
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < file_bytes:
        raise HostMemoryFullError(
            f"needs {file_bytes >> 20} MiB of shared memory, {free >> 20} MiB are free",
            subject=str(directory),
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
