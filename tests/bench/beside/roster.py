"""Who takes part: names, adapters, where each runs, and what must be said of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table.

    `requires` is what its environment needs for it; without, it runs beside the product.
    """

    name: str
    adapter: str
    distribution: str
    requires: str = ""
    ranks_max: int = 2
    memory: bool = False
    remark: str = ""
    before_restore: tuple[str, ...] = ()
    """Arguments of an interpreter that is started with each process that restores."""


FLOOR = "floor"

ENTRIES = (
    Entry(
        FLOOR,
        "bench.beside.floor:Floor",
        "torch",
        remark="not a library: one copy into memory that is present, and a process that writes it "
        "and syncs it, with or without O_DIRECT, as is faster; no checks",
    ),
    Entry(
        "ckptmgr",
        "bench.beside.ours:Ours",
        "ckptmgr",
        memory=True,
        remark="overlap=False; each restore starts a daemon",
    ),
    Entry(
        "ckptmgr, daemon running",
        "bench.beside.ours:Served",
        "ckptmgr",
        memory=True,
        remark="overlap=False; the daemon was there before, as under systemd",
    ),
    Entry(
        "ckptmgr, prefetched",
        "bench.beside.ours:Served",
        "ckptmgr",
        memory=True,
        remark="as the row above, and `ckptmgr prefetch` was called when the process that restores "
        "was started, before it imported torch",
        before_restore=("-m", "ckptmgr.cli", "prefetch", "{directory}/store"),
    ),
    Entry(
        "ckptmgr, overlapped",
        "bench.beside.ours:Overlapped",
        "ckptmgr",
        memory=True,
        remark="overlap=True: the state as the parameters of a module with its optimizer",
    ),
    Entry("torch.save", "bench.beside.plain:TorchSave", "torch"),
    Entry("safetensors", "bench.beside.plain:Safetensors", "safetensors"),
    Entry("DCP", "bench.beside.dcp:Dcp", "torch"),
    Entry("DCP async, thread", "bench.beside.dcp:DcpThread", "torch"),
    Entry(
        "DCP async, process",
        "bench.beside.dcp:DcpProcess",
        "torch",
        remark="with a stager that is kept, in shared memory, which fills it in the background",
    ),
    Entry(
        "torch_checkpointing",
        "bench.beside.staged:TorchCheckpointing",
        "torch_checkpointing",
        requires="torch_checkpointing",
        remark="use_direct_io=False: its default fails on ext4",
    ),
    Entry(
        "torchsnapshot",
        "bench.beside.staged:Torchsnapshot",
        "torchsnapshot",
        requires="torchsnapshot",
        remark="async_take",
    ),
    Entry(
        "nvidia-resiliency-ext",
        "bench.beside.agents:Resiliency",
        "nvidia-resiliency-ext",
        requires="nvidia-resiliency-ext",
        remark="TorchAsyncCheckpoint; without a GPU, so that a clone stands for its copy to host",
    ),
    Entry(
        "DLRover",
        "bench.beside.agents:DLRover",
        "dlrover",
        requires="dlrover[k8s,torch]",
        ranks_max=1,  # DdpCheckpointer saves what all ranks have alike
        remark="DdpCheckpointer, to the disk; polls for its commit every 5 s",
    ),
    Entry(
        "Lightning AsyncCheckpointIO",
        "bench.beside.plain:LightningAsync",
        "lightning",
        requires="lightning",
    ),
    Entry(
        "Orbax",
        "bench.beside.arrays:Orbax",
        "orbax-checkpoint",
        requires="orbax-checkpoint",
        ranks_max=1,  # wants jax.distributed for more
        remark="AsyncCheckpointer, on NumPy views",
    ),
)

BY_NAME = {entry.name: entry for entry in ENTRIES}
