"""torch_checkpointing and torchsnapshot: libraries that stage and write in the background."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bench.beside.peer import Peer


class TorchCheckpointing(Peer):
    """Its asynchronous default, but for O_DIRECT, which fails on ext4: the last block of a file is
    not aligned.
    """

    def load(self) -> None:
        self.library = import_module("torch_checkpointing")
        self.storage = import_module("torch_checkpointing.storage.filesystem")

    def open(self) -> None:
        config = self.library.CheckpointManager.Config.with_async_save()
        config.storage_config = self.storage.LocalFileSystemStorageConfig(use_direct_io=False)
        self.keeper = self.library.CheckpointManager(config)

    def save(self, step: int) -> None:
        self.future = self.keeper.save(str(self.path(step)), {"model": dict(self.state)})

    def mutable(self) -> None:
        with self.keeper.lock():
            pass

    def wait(self) -> None:
        self.future.result()

    def open_reader(self) -> None:
        config = self.library.CheckpointManager.Config.with_sync_save()
        self.keeper = self.library.CheckpointManager(config)

    def restore(self, step: int) -> None:
        self.keeper.load(str(self.path(step)), into={"model": self.state}, strict=True)


class Torchsnapshot(Peer):
    """Snapshot.async_take and restore."""

    def load(self) -> None:
        self.library = import_module("torchsnapshot")

    def wrapped(self) -> dict[str, Any]:
        held = self.library.StateDict()
        held.update(self.state)
        return {"state": held}

    def save(self, step: int) -> None:
        self.pending = self.library.Snapshot.async_take(str(self.path(step)), self.wrapped())

    def wait(self) -> None:
        self.pending.wait()

    def restore(self, step: int) -> None:
        wrapped = self.wrapped()
        self.library.Snapshot(str(self.path(step))).restore(wrapped)
        for name, tensor in self.state.items():
            if wrapped["state"][name].data_ptr() != tensor.data_ptr():
                tensor.copy_(wrapped["state"][name])
