"""Write a host buffer's snapshot as torch files; run by `ckptmgr restore` in a process of its own.

`python -m ckptmgr.rank.export BUFFER FORMAT TARGET`, where FORMAT is torch or dcp.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout


def export(buffer_path: Path, form: str, target: Path) -> None:
    """Rebuild the nested state with its tensors and write it with torch's own functions."""
    with HostBuffer.open(buffer_path) as buffer:
        (snapshot,) = buffer.snapshots()
        table = buffer.table(snapshot)
        layout = decode_layout(table.layout, subject=str(buffer_path))
        state = rebuild(Saved(layout, table.values, buffer.data(snapshot.slot)))
    if form == "torch":
        torch.save(state, target / "state.pt")
    else:
        save_dcp(state, checkpoint_id=str(target / "dcp"), no_dist=True)


if __name__ == "__main__":
    # The command that started us takes these in a thread, and we have inherited its mask.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
