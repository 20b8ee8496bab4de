"""torch.distributed.checkpoint: synchronous, in a thread, in a process."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from bench.beside.peer import Peer


class Dcp(Peer):
    """dcp.save with its defaults."""

    def save(self, step: int) -> None:
        dcp.save(dict(self.state), checkpoint_id=self.path(step), no_dist=self.world == 1)

    def restore(self, step: int) -> None:
        dcp.load(self.state, checkpoint_id=self.path(step), no_dist=self.world == 1)


class DcpThread(Dcp):
    """dcp.async_save with its defaults: a fresh copy, then a thread."""

    kind = AsyncCheckpointerType.THREAD
    alone = True

    def open(self) -> None:
        self.stager: DefaultStager | None = None

    def save(self, step: int) -> None:
        self.response: Any = dcp.async_save(
            dict(self.state),
            checkpoint_id=self.path(step),
            no_dist=self.alone and self.world == 1,
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
        )

    def mutable(self) -> None:
        staged = getattr(self.response, "staging_completion", None)
        if staged is not None:
            staged.result()

    def wait(self) -> None:
        getattr(self.response, "upload_completion", self.response).result()


class DcpProcess(DcpThread):
    """dcp.async_save in a process, with a stager that is kept, in shared memory (pinned on CUDA),
    and fills it in the background.
    """

    kind = AsyncCheckpointerType.PROCESS
    alone = False
    needs_group = True

    def open(self) -> None:
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )
