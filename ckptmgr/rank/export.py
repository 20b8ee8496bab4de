"""Write a step as torch files; run by `ckptmgr restore` in a process of its own.

`python -m ckptmgr.rank.export FORMAT TARGET BUFFER...`, where FORMAT is torch or dcp and each
buffer holds the snapshot of one rank of the step. The state of all ranks together goes into TARGET,
with what rank 0 has for itself; what another rank has for itself goes into TARGET/ranks/<rank>.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from ckptmgr.rank.externals import OPTIMIZER
from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.rank.regions import Clones, Regions, SavedLeaf
from ckptmgr.rank.saved import fresh, has_shared, leaves_in, like_mapping, read_state
from ckptmgr.rank.sources import Sources
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.values import MAPPING_TAGS, External


def export(form: str, target: Path, buffers: Sequence[Path]) -> None:
    """Rebuild the nested state with its tensors and write it with torch's own functions.

    Raises:
        StateMismatchError: nobody saved some part of a tensor.
        DamageError: what was saved can not be read.
    """
    with ExitStack() as stack:
        saved = [_read(stack.enter_context(HostBuffer.open(path))) for path in buffers]
        _write(form, target, rebuild(*saved))
        for rank, own in private_states(saved).items():
            place = target / "ranks" / str(rank)
            place.mkdir(parents=True)
            _write(form, place, own)


def private_states(saved: Sequence[Saved]) -> dict[int, Any]:
    """What each rank but the first has for itself: tensors that are no shards, and plain Python.

    What the state of all ranks together took from it, as only that rank has it, is left out.

    Raises:
        RecordDamagedError, HostBufferDamagedError: what was saved can not be read.
    """
    regions = Regions({one.rank: one.data for one in saved})
    first, *others = sorted(one.rank for one in saved)
    tables = [one.table for one in saved]
    together = leaves_in(read_state(Sources(tables, first)).all)
    taken = {(rank, leaf.path) for one in together for rank, leaf in one.whole.leaves}
    found = {}
    for rank in others:
        own = _private(read_state(Sources(tables, rank)).own, rank, taken)
        if own is not None:
            found[rank] = fresh(own, Clones(regions))
    return found


def _private(item: Any, rank: int, taken: set[tuple[int, str]]) -> Any:
    """A saved state without its shards and without what is taken; None if nothing is left."""
    kind = type(item)
    if kind is SavedLeaf:
        return None if has_shared(item) or (rank, item.whole.path) in taken else item
    if kind is External:
        if item.kind == OPTIMIZER:
            return _private(item.children["state"], rank, taken)
        left = [_private(child, rank, taken) for child in item.children.values()]
        return None if None in left else item
    if kind in MAPPING_TAGS:
        items = {key: _private(part, rank, taken) for key, part in item.items()}
        items = {key: part for key, part in items.items() if part is not None}
        return like_mapping(item, items) if items else None
    if kind in (list, tuple):
        parts = [_private(part, rank, taken) for part in item]
        return None if all(part is None for part in parts) else kind(parts)
    return item


def _read(buffer: HostBuffer) -> Saved:
    (snapshot,) = buffer.snapshots()
    table = buffer.table(snapshot)
    layout = decode_layout(table.layout, subject=str(buffer.path))
    return Saved(layout, table.values, buffer.data(snapshot.slot), snapshot.rank)


def _write(form: str, place: Path, state: Any) -> None:
    if form == "torch":
        torch.save(state, place / "state.pt")
    else:
        save_dcp(state, checkpoint_id=str(place / "dcp"), no_dist=True)


if __name__ == "__main__":
    # The command that started us takes these in a thread, and we have inherited its mask.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    export(sys.argv[1], Path(sys.argv[2]), [Path(path) for path in sys.argv[3:]])
