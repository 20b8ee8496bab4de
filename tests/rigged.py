"""A store that tests rig from outside the daemon: a local store, or any other, that obeys rules.

The rules are a JSON file beside the store, read before every operation; every operation is written
to a log beside it before it is carried out. A daemon finds it as it finds any plugin: by an entry
point of an installed distribution.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from ckptmgr.errors import MediumError, StoreFullError, StorePermissionError, StoreUnreachableError
from ckptmgr.store.base import Buffers, PutResult, Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.registry import open_store

T = TypeVar("T")

LOOK_SECONDS = 0.005


class RiggedStore(Store):
    """A store; `refuse`, `full`, `dead`, `unreadable` and `fault` fail, `hold` waits, `hang`
    never ends.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._path = Path(url.removeprefix("rigged://"))
        if rule_for(self._path, "open", "") == "fault":
            raise ZeroDivisionError("a fault by the test's will")
        self._inner = inner_of(self._path)
        self.durable_on_return = self._inner.durable_on_return
        self.visibility_lag_seconds = self._inner.visibility_lag_seconds
        self.exclusive = self._inner.exclusive

    @property
    def url(self) -> str:
        return self._url

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        return await self._obey("put_new", key, lambda: self._inner.put_new(key, buffers))

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        return await self._obey("get", key, lambda: self._inner.get(key, offset, length, into))

    async def list(self, prefix: str) -> list[str]:
        return await self._obey("list", prefix, lambda: self._inner.list(prefix))

    async def delete(self, key: str) -> None:
        await self._obey("delete", key, lambda: self._inner.delete(key))

    async def make_durable(self, key: str) -> None:
        await self._obey("make_durable", key, lambda: self._inner.make_durable(key))

    async def prune(self, prefix: str) -> None:
        await self._inner.prune(prefix)

    async def aclose(self) -> None:
        log(self._path, "aclose")
        await self._inner.aclose()

    async def _obey(self, operation: str, key: str, work: Callable[[], Awaitable[T]]) -> T:
        log(self._path, f"{operation} {key}")
        while (rule := rule_for(self._path, operation, key)) is not None:
            if rule == "refuse":
                raise StorePermissionError("is refused by the test", subject=key)
            if rule == "unreadable":
                raise MediumError("can not be read by the test's will", subject=key)
            if rule == "fault once":
                Path(f"{self._path}.rules").unlink()
            if rule in ("fault", "fault once"):
                raise ZeroDivisionError("a fault by the test's will")
            if rule == "dead":
                raise StoreUnreachableError("is dead by the test's will", subject=key)
            if rule == "full":
                raise StoreFullError("is full by the test's will", subject=key)
            if rule == "surprise":
                raise RuntimeError("nobody expected this")
            if rule == "hang":  # in a thread that nobody can end, as in the kernel
                await asyncio.to_thread(time.sleep, 3600)
            await asyncio.sleep(LOOK_SECONDS)
        return await work()


class SloppyStore(RiggedStore):
    """Create-exclusive without exclusion, as OpenStack Swift has it: whoever does not see the key
    when it looks puts its own, and the last one stays.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url.replace("sloppy://", "rigged://"))
        self.exclusive = None
        self._url = url

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        return await self._obey("put_new", key, lambda: self._put(key, buffers))

    async def _put(self, key: str, buffers: Buffers) -> PutResult:
        path = self._path / key
        if path.exists():
            return PutResult.CONFLICT
        await asyncio.sleep(LOOK_SECONDS)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}")
        temporary.write_bytes(b"".join(buffers))
        temporary.replace(path)
        return PutResult.OK


def inner_of(path: Path) -> Store:
    """Where the objects are: in the store that a file beside `path` names, or at `path`."""
    try:
        return open_store(Path(f"{path}.inner").read_text())
    except FileNotFoundError:
        return LocalStore(str(path))


def log(store: Path, line: str) -> None:
    fd = os.open(f"{store}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, line.encode() + b"\n")
    os.close(fd)


def rule_for(store: Path, operation: str, key: str) -> str | None:
    """What to do with an operation; None to carry it out."""
    try:
        rules = json.loads(Path(f"{store}.rules").read_bytes())
    except FileNotFoundError:
        return None
    for found, prefix, action in rules:
        if found in (operation, "*") and key.startswith(prefix):
            return str(action)
    return None


class Rig:
    """The test's end: rules to set, a log to read, and what a process needs to find the plugin."""

    def __init__(self, directory: Path, inner: str = "") -> None:
        self.path = directory / "store"
        self.url = f"rigged://{self.path}"
        self.sloppy_url = f"sloppy://{self.path}"
        self.file_url = inner or f"file://{self.path}"  # the objects, past the rules
        if inner:
            Path(f"{self.path}.inner").write_text(inner)
        self._site = directory / "site"
        info = self._site / "rigged-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rigged\nVersion: 1.0\n")
        stores = "rigged = rigged:RiggedStore\nsloppy = rigged:SloppyStore\n"
        (info / "entry_points.txt").write_text(f"[ckptmgr.stores]\n{stores}")

    @property
    def python_path(self) -> str:
        """Where a process finds the distribution, this module, and the tree."""
        here = Path(__file__).parent
        plugins = map(str, (here.parent / "plugins").iterdir())
        return os.pathsep.join([str(self._site), str(here), str(here.parent), *plugins])

    def obey(self, *rules: tuple[str, str, str]) -> None:
        """Replace the rules: (operation or '*', key prefix, what to do)."""
        temporary = Path(f"{self.path}.rules.new")
        temporary.write_text(json.dumps(rules))
        temporary.rename(f"{self.path}.rules")

    def operations(self) -> list[tuple[str, str]]:
        """Every operation so far, those that were refused too."""
        try:
            lines = Path(f"{self.path}.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]

    def asked(self, operation: str, prefix: str) -> int:
        """How often an operation on keys of a prefix was asked for."""
        return sum(op == operation and key.startswith(prefix) for op, key in self.operations())

    def environment(self, **more: Any) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": self.python_path, **more}
