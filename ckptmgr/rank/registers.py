"""The job's rendezvous key-value store, as registers and counts under the nonce of one attempt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from ckptmgr.errors import RendezvousError

if TYPE_CHECKING:  # a torch without distributed still serves one rank
    from torch.distributed.distributed_c10d import Store


class Registers(Protocol):
    """What ranks tell each other. None of it waits for a key; each may wait for the server.

    Every method raises RendezvousError where the server can not be reached. One thread at a time
    uses an object; another thread takes a `twin`.
    """

    def decide(self, key: str, record: str) -> bytes:
        """Put `record` if the register is empty; what it holds, which never changes again."""

    def read(self, key: str) -> bytes | None:
        """What a register holds, or None."""

    def count(self, key: str, more: int = 0) -> int:
        """Add to a count that starts at 0; the sum."""

    def forget(self, key: str) -> None:
        """Remove a register that nobody will ask for again, where the store can."""

    def twin(self) -> Registers:
        """The same registers over a connection of its own."""


class StoreRegisters:
    """Registers in a store of torch.distributed: TCPStore, FileStore or any other."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def under(cls, nonce: str, store: Store) -> StoreRegisters:
        """The registers of one attempt: nothing of another incarnation can be read in them."""
        from torch.distributed.distributed_c10d import PrefixStore

        return cls(PrefixStore(f"ckptmgr/{nonce}", store)).twin()

    def decide(self, key: str, record: str) -> bytes:
        """As promised by Registers."""
        with _told(key):
            return bytes(self._store.compare_set(key, "", record))

    def read(self, key: str) -> bytes | None:
        """As promised by Registers. `get` alone would wait for the key, with the client locked."""
        with _told(key):
            return bytes(self._store.get(key)) if self._store.check([key]) else None

    def count(self, key: str, more: int = 0) -> int:
        """As promised by Registers."""
        with _told(key):
            return int(self._store.add(key, more))

    def forget(self, key: str) -> None:
        """As promised by Registers."""
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a FileStore may not forget
            self._store.delete_key(key)

    def twin(self) -> StoreRegisters:
        """As promised by Registers; older torch can not clone, and shares one locked client."""
        with _told("clone"):
            clone = getattr(self._store, "clone", None)
            return StoreRegisters(self._store if clone is None else clone())


@contextlib.contextmanager
def _told(key: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistStoreError and DistNetworkError, where torch has them
        raise RendezvousError(str(error).partition("\n")[0], subject=key) from error
