"""Child of powercut.py: a disk as a FUSE file that logs every write and flush, in order.

Usage: powercut_disk.py IMAGE LOG MOUNT_POINT

Speaks the kernel's FUSE protocol (7.31 and later) itself: a dozen requests need no library. The
file `disk` is IMAGE. A write to the file `mark` goes into the log as a mark. Records of the log:
kind (1 byte: W, F or M), offset (8), length (4), bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from typing import BinaryIO

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE = 1, 2, 3, 4, 14, 15, 16
STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR = 17, 18, 20, 25, 26, 27
RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 29, 36, 38, 42
ROOT, DISK, MARK = 1, 2, 3
NODES = {b"disk": DISK, b"mark": MARK}
WRITE_BYTES_MAX = 1 << 20
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
FOR_EVER = 1 << 30


class Disk:
    """Answers the kernel until the file system is unmounted."""

    def __init__(self, image: str, log: BinaryIO, kernel: int) -> None:
        self.image = os.open(image, os.O_RDWR)
        self.size = os.fstat(self.image).st_size
        self.log = log
        self.kernel = kernel

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.kernel, WRITE_BYTES_MAX + 8192)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            if operation in {FORGET, BATCH_FORGET, INTERRUPT}:
                continue
            body = memoryview(request)[40:]
            try:
                code, answer = 0, self.answer(operation, node, body)
            except OSError as error:
                code, answer = -(error.errno or errno.EIO), b""
            header = struct.pack("<IiQ", 16 + len(answer), code, unique)
            os.writev(self.kernel, [header, answer])

    def answer(self, operation: int, node: int, body: memoryview) -> bytes:
        if operation == INIT:
            flags = BIG_WRITES | MAX_PAGES
            return struct.pack(
                "<IIIIHHIIHHI28x", 7, 31, 0, flags, 1, 1, WRITE_BYTES_MAX, 1, 256, 0, 0
            )
        if operation == LOOKUP:
            found = NODES.get(bytes(body).rstrip(b"\0"))
            if found is None:
                raise OSError(errno.ENOENT, "")
            return struct.pack("<QQQQII", found, 0, FOR_EVER, FOR_EVER, 0, 0) + self.attr(found)
        if operation in {GETATTR, SETATTR}:
            return struct.pack("<QII", FOR_EVER, 0, 0) + self.attr(node)
        if operation in {OPEN, OPENDIR}:
            return struct.pack("<QII", 0, 0, 0)
        if operation == STATFS:
            return struct.pack("<QQQQQIIII24x", 1, 0, 0, 2, 0, 4096, 255, 4096, 0)
        if operation in {READ, WRITE, FSYNC}:
            return self.transfer(operation, node, body)
        if operation in {RELEASE, RELEASEDIR, FLUSH, DESTROY}:
            return b""  # FLUSH is close(2), not a flush of the disk
        raise OSError(errno.ENOSYS, "")

    def transfer(self, operation: int, node: int, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body) if operation != FSYNC else (0, 0, 0)
        if operation == READ:
            return os.pread(self.image, size, offset) if node == DISK else b""
        if operation == FSYNC:
            self.record(b"F", 0, b"")
            return b""
        content = body[40 : 40 + size]
        self.record(b"W" if node == DISK else b"M", offset, content)
        if node == DISK:
            os.pwrite(self.image, content, offset)
        return struct.pack("<II", size, 0)

    def record(self, kind: bytes, offset: int, content: memoryview | bytes) -> None:
        self.log.write(struct.pack("<cQI", kind, offset, len(content)))
        self.log.write(content)

    def attr(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o700 if node == ROOT else stat.S_IFREG | 0o600
        size = self.size if node == DISK else 0
        times = (0,) * 6
        return struct.pack(
            "<QQQQQQIIIIIIIIII", node, size, size // 512, *times, mode, 1, 0, 0, 0, 4096, 0
        )


def mount(kernel: int, mount_point: str) -> None:
    options = f"fd={kernel},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"powercut", mount_point.encode(), b"fuse", 0, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mount_point)


def main(image: str, log_path: str, mount_point: str) -> None:
    kernel = os.open("/dev/fuse", os.O_RDWR)
    mount(kernel, mount_point)
    print("ready", flush=True)
    with open(log_path, "wb") as log:
        Disk(image, log, kernel).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
