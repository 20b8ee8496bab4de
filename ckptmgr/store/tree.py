"""The directories of a store below its root: opened without links, made durable before use."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from ckptmgr.errors import StoreError, StoreUnreachableError, UsageError
from ckptmgr.store.base import check_key
from ckptmgr.store.posix import DIRECTORY_FLAGS, is_link, opened, store_error

Identity = tuple[int, int]
"""(device, inode)."""

_NO_MATTER = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL}
"""A directory above the root that this user can not open or sync was not made by this user."""

DURABLE_MAX = 4096
"""Directories known to be durable; each step has three. One that is forgotten is synced once more,
and without a bound a daemon took 2.6 MiB more for every thousand steps."""


class Tree:
    """Directories below `root`, for threads of one process.

    The root is opened for each use, so that a file system that was mounted again works and an
    unmounted one can be unmounted. The path of the root may lead through links; below it a link
    is an error. Errors are OSError, save where a docstring says otherwise.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._root_identity: Identity | None = None
        self._durable: dict[tuple[str, ...], Identity] = {}

    @contextmanager
    def directory(
        self, parts: Sequence[str], *, durable: bool, make: bool = False
    ) -> Iterator[int]:
        """A descriptor of the directory `parts` below the root, by one component after the other.

        With `make`, what is missing is made (0700). With `durable`, the names of the whole chain
        are on stable storage before it is given out; each is synced once by this process.

        Raises:
            FileNotFoundError: it does not exist.
            NotADirectoryError: a component is an object.
            StoreError: a component is a link, or the root can not be made.
            StoreUnreachableError: the root is not what it was.
        """
        with ExitStack() as stack:
            here = stack.enter_context(self._open_root(durable=durable, make=make))
            for depth, name in enumerate(parts, start=1):
                parent = here
                here = stack.enter_context(_subdirectory(name, parent, make=make))
                if durable:
                    self._sync_name_once(tuple(parts[:depth]), here, parent)
            yield here

    def prune(self, parts: Sequence[str], before_each: Callable[[], None]) -> None:
        """Remove the directory `parts` and those below it, as far as they are empty."""
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            self.directory(parts[:-1], durable=False) as parent,
        ):
            self._remove_empty(tuple(parts), parent, before_each)

    def _remove_empty(
        self, path: tuple[str, ...], parent: int, before_each: Callable[[], None]
    ) -> None:
        before_each()
        with opened(path[-1], DIRECTORY_FLAGS, parent) as here:
            with os.scandir(here) as entries:
                below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            for one in below:
                with suppress(FileNotFoundError, NotADirectoryError):
                    self._remove_empty((*path, one), here, before_each)
        try:
            with self._lock:  # one that is made anew may get the same inode
                os.rmdir(path[-1], dir_fd=parent)
                self._durable.pop(path, None)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # POSIX allows both
                raise

    def _sync_name_once(self, path: tuple[str, ...], here: int, parent: int) -> None:
        found = _identity(here)
        with self._lock:
            if self._durable.get(path) == found:
                return
        os.fsync(parent)
        with self._lock:
            if not os.fstat(here).st_nlink:
                return  # removed meanwhile: nothing can be put into it
            self._durable[path] = found
            while len(self._durable) > DURABLE_MAX:
                del self._durable[next(iter(self._durable))]

    @contextmanager
    def _open_root(self, *, durable: bool, make: bool) -> Iterator[int]:
        try:
            descriptor = self._root_descriptor(make=make)
        except FileNotFoundError:
            if self._is_unmounted():
                raise self._gone() from None
            raise
        try:
            self._recognise(_identity(descriptor))
            if durable:
                self._sync_root_once(_identity(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def _root_descriptor(self, *, make: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(self.root, flags)
        except FileNotFoundError:
            if not make or self._is_unmounted():
                raise
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise _too_long(self.root) from error
            raise
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
        except OSError as error:
            if self._root_identity is None:
                raise self._never_made(error) from error
            raise
        return os.open(self.root, flags)

    def _never_made(self, error: OSError) -> StoreError:
        """What to tell of a root that was never there. Of one that was, ENOENT may be the time
        between two mounts; here it is a place where nothing can be made (/proc), and to try again
        only keeps the user waiting for his answer.
        """
        found = store_error(error, self.root)
        passes = error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        return (type(found) if passes else StoreError)(
            f"the directory of the store can not be made: {found.message}",
            subject=self.root,
            hint="Give a URL where this user can make a directory, or mount its file system first.",
        )

    def _is_unmounted(self) -> bool:
        """Whether a root that was there is missing with its file system, not just deleted."""
        if self._root_identity is None:
            return False
        path = self.root
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        return os.stat(path).st_dev != self._root_identity[0]

    def _recognise(self, found: Identity) -> None:
        """Refuse the empty directory that an unmounted file system leaves at its mount point.

        The same inode on another device is the file system mounted again; another inode on the
        same device is a root made anew. Either way nothing is known to be durable any more.
        """
        with self._lock:
            known = self._root_identity
            if known is not None and known[0] != found[0] and known[1] != found[1]:
                raise self._gone()
            if known != found:
                self._durable.clear()
            self._root_identity = found

    def _gone(self) -> StoreUnreachableError:
        return StoreUnreachableError(
            "the directory of the store is gone",
            subject=self.root,
            hint="Mount its file system again; saves resume by themselves.",
        )

    def _sync_root_once(self, found: Identity) -> None:
        """Make the name of the root durable, and those of its parents up to the mount point."""
        if self._durable.get(()) == found:
            return
        path = os.path.realpath(self.root)
        while not os.path.ismount(path):
            path = os.path.dirname(path)
            try:
                with opened(path, os.O_RDONLY | os.O_DIRECTORY) as parent:
                    os.fsync(parent)
            except OSError as error:
                if error.errno not in _NO_MATTER:
                    raise
        self._durable[()] = found


def _identity(descriptor: int) -> Identity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


@contextmanager
def _subdirectory(name: str, parent: int, *, make: bool) -> Iterator[int]:
    try:
        descriptor = _open_directory(name, parent, make=make)
    except NotADirectoryError:
        if is_link(name, parent):
            raise StoreError("is a symbolic link; a store has none", subject=name) from None
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(name: str, parent: int, *, make: bool) -> int:
    try:
        return os.open(name, DIRECTORY_FLAGS, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another writer was faster: its directory is as good
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, DIRECTORY_FLAGS, dir_fd=parent)


def walk(directory: int, prefix: str, before_each: Callable[[], None]) -> Iterator[str]:
    """The keys of all objects below `directory`, whose own keys start with `prefix`.

    Whatever no key can name (temporary files, links, files of others) is passed over, and so is
    what vanishes meanwhile. `before_each` is called per directory and may raise to give up.
    """
    before_each()
    with os.scandir(directory) as entries:
        for entry in entries:
            key = prefix + entry.name
            if not _is_key(key):
                continue
            if entry.is_file(follow_symlinks=False):
                yield key
            elif entry.is_dir(follow_symlinks=False):
                yield from _walk_below(entry.name, directory, key + "/", before_each)


def _walk_below(
    name: str, parent: int, prefix: str, before_each: Callable[[], None]
) -> Iterator[str]:
    with ExitStack() as stack:
        try:
            here = stack.enter_context(opened(name, DIRECTORY_FLAGS, parent))
        except (FileNotFoundError, NotADirectoryError):
            return
        yield from walk(here, prefix, before_each)


def _is_key(key: str) -> bool:
    try:
        check_key(key)
    except UsageError:
        return False
    return True


def _too_long(root: str) -> UsageError:
    return UsageError(
        f"is no name that its file system can have: it has {len(os.fsencode(root))} bytes",
        subject=root,
        hint="Check the URL; a name may have 255 bytes on most file systems, a path 4,095.",
    )
