"""A 3FS store for ckptmgr."""

from __future__ import annotations

import os
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from ckptmgr.errors import UsageError
from ckptmgr.store.base import Store
from ckptmgr_hf3fs.client import Client
from ckptmgr_hf3fs.own import OwnClient
from ckptmgr_hf3fs.store import Hf3fsStore

IO_VARIABLE = "CKPTMGR_HF3FS_IO"
"""How bytes move: auto, native (3FS's own library), python (the client in own.py), posix."""


def open_store(url: str) -> Store:
    """The store of an hf3fs:// URL, or of a file:// URL whose path is on a 3FS mount.

    Raises:
        UsageError: no absolute path, a host, a query or a fragment; or a wrong CKPTMGR_HF3FS_IO.
    """
    parts = urlsplit(url)
    if parts.netloc or parts.query or parts.fragment or not parts.path.startswith("/"):
        raise UsageError(
            "is not the URL of a directory on a 3FS mount",
            subject=repr(url),
            hint="Write three slashes and the path, as in hf3fs:///mnt/3fs/run7.",
        )
    return Hf3fsStore(unquote(parts.path), url, client_of(os.environ.get(IO_VARIABLE, "auto")))


def client_of(choice: str) -> Callable[[str], Client] | None:
    """The ring client for a value of CKPTMGR_HF3FS_IO; None is to do without rings.

    Raises:
        UsageError: no such choice, or the library that was asked for is not there.
    """
    if choice == "posix":
        return None
    if choice == "python":
        return OwnClient
    if choice not in ("auto", "native"):
        raise UsageError(
            "is none of auto, native, python, posix", subject=f"{IO_VARIABLE}={choice}"
        )
    try:
        from ckptmgr_hf3fs.native import NativeClient
    except ImportError as error:
        if choice == "auto":
            return OwnClient
        raise UsageError(
            f"the library of 3FS can not be imported: {error}",
            subject=f"{IO_VARIABLE}={choice}",
            hint="Install hf3fs_py_usrbio as the mount's release has it, or choose auto.",
        ) from error
    return NativeClient
