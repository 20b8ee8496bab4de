"""The daemon's side of USRBIO: registered memory, rings, and the semaphores that wake it.

Everything here is known from the description of 3FS: a ring of E = entries + 1 slots is int32 marks
(sqe head, sqe tail, cqe head, cqe tail), E arguments of 56 bytes, E completions of 24, E
submissions of 16, a semaphore of 32, and 4096 bytes to spare.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import stat
import struct
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emulator import Mount

DEV_SHM = "/dev/shm"
FORBID_READ_HOLES = 2
WORKERS = 2
SCAN_SECONDS = 0.01
"""The daemon also looks by itself, whether it was woken or not."""

ARGS, CQE, SQE = struct.Struct("<16s5Q"), struct.Struct("<2iqQ"), struct.Struct("<2iQ")
MARKS, SEMAPHORE, SPARE = 16, 32, 4096

libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
for name in ("sem_post", "sem_unlink"):
    getattr(libc, name).argtypes = [ctypes.c_char_p if name == "sem_unlink" else ctypes.c_void_p]


class Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class RefusedError(Exception):
    """A name or a file that can not be registered."""


class Submissions:
    """The three semaphores of the mount, by priority, and the links that name them."""

    def __init__(self) -> None:
        self._names = [f"hf3fs-submit-ios.{uuid.uuid4()}" for _ in range(3)]
        links = ("submit-ios", "submit-ios.ph", "submit-ios.pl")
        self.links = {
            link: f"{DEV_SHM}/sem.{name}" for link, name in zip(links, self._names, strict=True)
        }
        self._pointers = []
        for name in self._names:
            pointer = libc.sem_open(f"/{name}".encode(), os.O_CREAT, 0o666, 0)
            assert pointer, os.strerror(ctypes.get_errno())
            os.chmod(f"{DEV_SHM}/sem.{name}", 0o666)
            self._pointers.append(ctypes.c_void_p(pointer))

    def wait(self) -> None:
        until = time.time() + SCAN_SECONDS
        limit = Timespec(int(until), int(until % 1 * 1e9))
        libc.sem_timedwait(self._pointers[0], ctypes.byref(limit))

    def unlink(self) -> None:
        for name in self._names:
            libc.sem_unlink(f"/{name}".encode())


@dataclass
class Attributes:
    """What the name of registered memory says: <uuid>[.b<bytes>][.r|w<depth>][.t<ms>][.f<flags>]"""

    identity: bytes
    ring: str = ""
    depth: int = 0
    flags: int = 0
    block: int = 0


def attributes_of(name: str) -> Attributes:
    identity, *rest = name.split(".")
    try:
        found = Attributes(uuid.UUID(identity).bytes)
        for part in rest:
            match part[:1]:
                case "r" | "w":
                    found.ring, found.depth = part[0], int(part[1:])
                case "f":
                    found.flags = int(part[1:], 2)
                case "b":
                    found.block = int(part[1:])
                case "t":
                    int(part[1:])
                case "p" if part[1:] in ("", "h", "l", "n"):
                    pass
                case _:
                    raise RefusedError(part)
    except ValueError as error:
        raise RefusedError(name) from error
    return found


@dataclass
class Memory:
    """Shared memory that a process has registered."""

    target: str
    attributes: Attributes
    uid: int
    pid: int
    mapped: mmap.mmap
    ring: Ring | None = None


class Memories:
    """All registered memory of the mount, and the workers that serve its rings."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._lock = threading.Lock()
        self._by_name: dict[str, Memory] = {}
        self._by_id: dict[bytes, Memory] = {}

    def start(self) -> None:
        for _ in range(WORKERS):
            threading.Thread(target=self._work, daemon=True).start()

    def names(self) -> list[str]:
        with self._lock:
            return list(self._by_name)

    def target(self, name: str, uid: int) -> str:
        return self._owned(name, uid).target

    def add(self, name: str, target: str, uid: int, pid: int) -> None:
        attributes = attributes_of(name)
        # shm_open takes a name directly in /dev/shm, and no other.
        if os.path.dirname(target) != DEV_SHM or not stat.S_ISREG(os.stat(target).st_mode):
            raise RefusedError(target)
        descriptor = os.open(target, os.O_RDWR | os.O_NOFOLLOW)
        try:
            size = os.fstat(descriptor).st_size
            memory = Memory(target, attributes, uid, pid, mmap.mmap(descriptor, size))
        finally:
            os.close(descriptor)
        if attributes.ring:
            memory.ring = Ring(memory.mapped, attributes)
        with self._lock:
            if name in self._by_name or attributes.identity in self._by_id:
                raise RefusedError(name)
            self._by_name[name] = self._by_id[attributes.identity] = memory

    def remove(self, name: str, uid: int) -> None:
        memory = self._owned(name, uid)
        with self._lock:
            del self._by_name[name], self._by_id[memory.attributes.identity]

    def reap(self, pid: int) -> None:
        """Take away what a process registered that is gone, or let go of the directory."""
        with self._lock:
            for name, memory in list(self._by_name.items()):
                if memory.pid == pid:
                    del self._by_name[name], self._by_id[memory.attributes.identity]

    def _owned(self, name: str, uid: int) -> Memory:
        with self._lock:
            memory = self._by_name.get(name)
        if memory is None:
            raise OSError(errno.ENOENT, name)
        if memory.uid != uid:
            raise OSError(errno.EPERM, name)
        return memory

    def _work(self) -> None:
        while True:
            self._mount.submissions.wait()
            with self._lock:
                rings = [memory.ring for memory in self._by_name.values() if memory.ring]
            if not self._mount.faults.active("ring-hold"):
                for ring in rings:
                    ring.serve(self)

    # -- one transfer -------------------------------------------------------------------------

    def transfer(self, ring: Ring, arguments: tuple[bytes, int, int, int, int, int]) -> int:
        """Bytes moved, or -errno."""
        identity, at, inode, file_at, length, _ = arguments
        number = self._mount.faults.take("ring-error")
        if number is not None:
            return -number
        with self._lock:
            memory = self._by_id.get(identity)
        with self._mount.guard:
            descriptors = self._mount.opened.get(inode, [])
            descriptor = os.dup(descriptors[0]) if descriptors else -1
        try:
            if descriptor < 0:
                return -errno.EBADF
            if memory is None:
                return -errno.EACCES
            if at + length > len(memory.mapped):
                return -errno.EINVAL
            most = self._mount.faults.take("ring-short")
            view = memoryview(memory.mapped)[at : at + (length if most is None else most)]
            return self._move(ring, descriptor, view, file_at)
        except OSError as error:
            return -(error.errno or errno.EIO)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _move(self, ring: Ring, descriptor: int, view: memoryview, at: int) -> int:
        if not ring.for_read:
            if self._mount.faults.active("dryrun"):
                return len(view)
            return os.pwritev(descriptor, [view], at)
        if ring.flags & FORBID_READ_HOLES and has_hole(descriptor, at, len(view)):
            return -errno.ENODATA
        return os.preadv(descriptor, [view], at)


def has_hole(descriptor: int, at: int, length: int) -> bool:
    """Whether a chunk that was never written lies in the range, before the end of the file."""
    found = os.fstat(descriptor)
    if found.st_blocks * 512 >= found.st_size:  # a search for holes walks to the end of the file
        return False
    end = min(at + length, found.st_size)
    return at < end and os.lseek(descriptor, at, os.SEEK_HOLE) < end


@dataclass
class Batch:
    start: int
    count: int
    after: int


@dataclass
class Ring:
    """The daemon's side of one ring. Several workers may serve it, each a batch of its own."""

    memory: mmap.mmap
    attributes: Attributes
    lock: threading.Lock = field(default_factory=threading.Lock)
    claimed: int = 0
    processing: int = 0
    batches: list[Batch] = field(default_factory=list)
    done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        each = ARGS.size + CQE.size + SQE.size
        self.slots = (len(self.memory) - SPARE - MARKS - SEMAPHORE) // each
        if self.slots < 2 or self.attributes.depth >= self.slots:
            raise RefusedError("no ring of this size")
        self.cqes = MARKS + ARGS.size * self.slots
        self.sqes = self.cqes + CQE.size * self.slots
        self.marks = memoryview(self.memory)[:MARKS].cast("i")
        anchor = ctypes.c_char.from_buffer(self.memory, self.sqes + SQE.size * self.slots)
        self.semaphore = ctypes.c_void_p(ctypes.addressof(anchor))
        self.anchor = anchor
        libc.sem_init(self.semaphore, 1, 0)

    @property
    def for_read(self) -> bool:
        return self.attributes.ring == "r"

    @property
    def flags(self) -> int:
        return self.attributes.flags

    def serve(self, memories: Memories) -> None:
        """Claim what is submitted and has room for its completion, and carry it out."""
        batch = self._claim()
        if batch is None:
            return
        done = []
        for number in range(batch.count):
            at = self.sqes + SQE.size * ((batch.start + number) % self.slots)
            slot, _, token = SQE.unpack_from(self.memory, at)
            arguments = ARGS.unpack_from(self.memory, MARKS + ARGS.size * slot)
            done.append((slot, memories.transfer(self, arguments), token))
        random.shuffle(done)  # completions come in no order
        with self.lock:
            self._move_tail(batch)
            head = self.marks[2]
            for slot, result, token in done:
                CQE.pack_into(self.memory, self.cqes + CQE.size * head, slot, 0, result, token)
                head = (head + 1) % self.slots
            self.marks[2] = head
            self.processing -= batch.count
        libc.sem_post(self.semaphore)

    def _claim(self) -> Batch | None:
        with self.lock:
            waiting = (self.marks[0] - self.claimed) % self.slots
            unread = (self.marks[2] - self.marks[3]) % self.slots
            count = min(waiting, self.slots - 1 - self.processing - unread)
            if count <= 0:
                return None
            batch = Batch(self.claimed, count, (self.claimed + count) % self.slots)
            self.claimed = batch.after
            self.processing += count
            self.batches.append(batch)
            return batch

    def _move_tail(self, batch: Batch) -> None:
        """The tail moves over batches in the order in which they were claimed."""
        self.done.add(id(batch))
        while self.batches and id(self.batches[0]) in self.done:
            first = self.batches.pop(0)
            self.done.discard(id(first))
            self.marks[1] = first.after
