"""From a URL to its store: two built-in schemes, and plugins by entry point."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.mounts import mount_of

ENTRY_POINT_GROUP = "ckptmgr.stores"
"""A plugin names its scheme here; the value is a callable from URL to Store."""

_PLUGIN_OF_SCHEME = {
    "s3": "ckptmgr-objectstore",
    "gs": "ckptmgr-objectstore",
    "az": "ckptmgr-objectstore",
    "hf3fs": "ckptmgr-hf3fs",
}

_SCHEME_OF_FILE_SYSTEM = {"fuse.hf3fs": "hf3fs"}
"""File systems, as /proc/self/mountinfo names them, with rules that LocalStore does not know. A
path on one is given, as file:// URL, to the plugin of a scheme that does."""

OF_PATHS = frozenset({"file", *_SCHEME_OF_FILE_SYSTEM.values()})
"""Schemes whose URLs spell a path: in them "%20" stands for a character."""

_SECRET_PARAMETER = re.compile(
    r"^sig$|signature|secret|token|password|passwd|credential|access.?key|account.?key|api.?key",
    re.IGNORECASE,
)


def open_store(url: str) -> Store:
    """Open the store that `url` (or a plain path) names. It creates and checks nothing yet.

    Raises:
        UsageError: not a URL, an unknown scheme, one that carries credentials, a path on a file
            system whose plugin is not installed, or a plugin that fails.
        StoreError: what the plugin says of the store.
    """
    url = normalise_url(url)
    scheme = url.partition("://")[0]
    if scheme == "file":
        path = path_of_file_url(url)
        ruled_by = _SCHEME_OF_FILE_SYSTEM.get(mount_of(path).kind)
        return _by_plugin(ruled_by, url) if ruled_by else LocalStore(path)
    if scheme == "memory":
        return MemoryStore(url.removeprefix("memory://"))
    return _by_plugin(scheme, url)


def normalise_url(url: str) -> str:
    """The one spelling of `url`: lower-case scheme, no trailing '/', a path as file:// URL.

    A relative path is taken from the working directory of this process.

    Raises:
        UsageError: not a URL, or one that carries credentials; they are not in the message.
    """
    if "://" not in url:
        return _url_of_path(url)
    parts = _split(url)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme):
        raise UsageError("is not a URL", subject=repr(url))
    if parts.scheme == "file":
        return _url_of_path(path_of_file_url(url))
    rest = url.partition("://")[2].rstrip("/")
    if not rest:
        raise UsageError(f"names no place; write {parts.scheme}://name", subject=repr(url))
    return f"{parts.scheme}://{rest}"


def path_of_file_url(url: str) -> str:
    """The absolute path that a file:// URL names.

    Raises:
        UsageError: a host, a query or a fragment.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise UsageError(
            "a file URL needs an absolute path",
            subject=repr(url),
            hint="Write three slashes, as in file:///data/run7, or a plain path.",
        )
    if parts.query or parts.fragment:
        raise UsageError(
            "a file URL has no '?' and no '#'",
            subject=repr(url),
            hint="Write %3F and %23 if they are in the path, or pass a plain path.",
        )
    return unquote(parts.path)


def _url_of_path(path: str) -> str:
    if not path or "\0" in path or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise UsageError(
            "is neither a URL nor a path",
            subject=repr(path.partition(":")[0] + ":..." if ":" in path else path),
            hint="Write file:///data/run7, s3://bucket/run7, or a path such as ./run7.",
        )
    try:
        path.encode()
    except UnicodeEncodeError:  # Python's stand-ins for bytes that are no text
        raise UsageError(
            "is not UTF-8, which the URL of a store is", subject=repr(path), hint="Rename it."
        ) from None
    # abspath keeps two leading slashes (POSIX lets them differ); on Linux they are one.
    absolute = "/" + os.path.abspath(os.path.expanduser(path)).lstrip("/")
    return "file://" + quote(absolute)


def _split(url: str) -> SplitResult:
    """The parts of a URL that carries no credentials; before that, no message may show it."""
    scheme = url.partition("://")[0]
    try:
        parts = urlsplit(url)
        names = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError:
        raise UsageError("is not a URL", subject=f"{scheme}://...") from None
    # A secret may hold a '/', which moves its '@' from the authority into the path.
    place = parts.netloc if parts.scheme == "file" else parts.netloc + parts.path
    if "@" in place or any(_SECRET_PARAMETER.search(name) for name in names):
        raise UsageError(
            "carries credentials; URLs end up in logs, records and process lists",
            subject=f"{scheme}://...",
            hint="Give credentials by the environment or the configuration of the store's client.",
        )
    return parts


def _by_plugin(scheme: str, url: str) -> Store:
    """A store of a plugin, which is the code of others: whatever it raises is an error of this one
    store, and ends no daemon that has others.
    """
    point = _plugin(scheme)
    opened = _loaded(point)
    try:
        return opened(url)
    except CkptmgrError:
        raise
    except Exception as error:  # noqa: BLE001 - the code of others, raised as an error of ours
        raise UsageError(
            f"its plugin fails to open the store: {type(error).__name__}",
            subject=f"{scheme}://",
            hint=f"Call {point.value} with the URL in Python; it is not told here what the error "
            "says, because that may hold a secret.",
        ) from None


def _plugin(scheme: str) -> EntryPoint:
    found: dict[str, EntryPoint] = {
        point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)
    }
    if scheme not in found:
        known = ", ".join(sorted({"file", "memory", *found}))
        plugin = _PLUGIN_OF_SCHEME.get(scheme)
        raise UsageError(
            f"no store is installed for this scheme; there are: {known}",
            subject=f"{scheme}://",
            hint=f"Run `pip install {plugin}`." if plugin else "Use one of these, or a plugin.",
        )
    return found[scheme]


def _loaded(point: EntryPoint) -> Callable[[str], Store]:
    try:
        return cast("Callable[[str], Store]", point.load())
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"its plugin can not be imported: {error}",
            subject=f"{point.name}://",
            hint=f"Install {point.value.partition(':')[0]} again, with what it needs.",
        ) from error
