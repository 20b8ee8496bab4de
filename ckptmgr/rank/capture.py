"""A live training state becomes the bytes of a slot, at one instant."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ckptmgr.bucket import Bucket, bytes_per_second
from ckptmgr.errors import CkptmgrError, UnsupportedLeafError
from ckptmgr.rank.externals import externalize
from ckptmgr.rank.frame import Frame, Sources, make_frame, sources_again, sources_of
from ckptmgr.rank.gates import Gates, can_wait
from ckptmgr.rank.gpuclones import cloned
from ckptmgr.rank.latch import Latch
from ckptmgr.rank.objects import Objects, find_objects
from ckptmgr.rank.optimizers import by_name, held_state
from ckptmgr.rank.overlap import CopyThread, Job, Turn
from ckptmgr.rank.pagelocks import cuda_in_use
from ckptmgr.rank.parallel import Parallel, look_around, ranks_of_job
from ckptmgr.rank.parts import PLAIN_TYPES, leaf_types, local_tensor
from ckptmgr.rank.quiet import LOOK_SECONDS_MAX
from ckptmgr.rank.randomness import RNG_KEY, Generators, check_names
from ckptmgr.rank.tensors import is_leaf
from ckptmgr.rank.twins import predicted_state_dict
from ckptmgr.rank.views import ViewCache
from ckptmgr.staging.hostbuffer import table_bytes_needed
from ckptmgr.staging.tree import Flat, Seams, StructureChangedError, flatten
from ckptmgr.staging.values import LeafInValueError, encode_values, refuse
from ckptmgr.types import PAGE_BYTES, Layout

Done = Callable[[BaseException | None], None]
"""Called once per copy, with None when every byte is in place, else with the reason."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A state that is ready to be copied: its layout, its values, and where its tensors are.

    `table_bytes` and `data_bytes` are what a slot needs.
    """

    layout: Layout
    layout_bytes: bytes
    layout_hash: bytes
    values: bytes
    sources: Sources
    data_bytes: int
    table_bytes: int


class Copy:
    """A copy into a slot that was started; finished when `done` was called."""

    def __init__(self, done: Done, settle: Callable[[float | None], None]) -> None:
        self.turn: Turn | None = None
        self._done = done
        self._settle = settle
        self._trainer = threading.get_ident()
        self._told = threading.Lock()
        self._finished = Latch()
        self._failure: Exception | None = None

    def finish(self, error: BaseException | None) -> bool:
        """Tell the owner, then whoever waits; False if another call did that."""
        if not self._told.acquire(blocking=False):  # one instruction: only one caller gets it
            return False
        try:
            self._done(error)
        except Exception as failure:  # noqa: BLE001 - raised in the thread that waits
            self._failure = failure
        finally:
            self._finished.set()
        return True

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until `done` was called; False if it was not within the time.

        If the copying thread has ended without it, `done` hears that now.

        Raises:
            Exception: what `done` raised; only once, as it may be raised in a later step.
        """
        end = time.monotonic() + (math.inf if timeout_seconds is None else timeout_seconds)
        trains = threading.get_ident() == self._trainer
        if trains:
            self._settle(timeout_seconds)
        while not self._finished.is_set and (left := end - time.monotonic()) > 0:
            if self.turn is not None:
                self.turn.awaited |= not trains
            if self.turn is not None and not self.turn.at_work:
                self.finish(CkptmgrError("has ended before the copy", subject="copying thread"))
            else:
                self._finished.wait(min(left, LOOK_SECONDS_MAX))
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return self._finished.is_set


class Capture:
    """Flattens and copies one training state, again and again.

    Args:
        state: names and live objects; looked at anew by every `prepare`.
        rng: also capture the generators of the process, under the name `rng`.
        overlap: True copies the parameters and the state of the optimizers in `state` while
            training goes on; their steps wait for it. They must be changed by nothing else until
            then: a change is found by its version counter and spoils that snapshot. False copies
            everything before `copy` returns. None is True if a tensor is on a GPU, for optimizers
            that were seen to step since the snapshot before, as those in CUDA graphs are not.
        replicated: patterns (`*` for anything) of paths of tensors that every rank has alike; each
            rank saves a share of them. Parameters of DistributedDataParallel modules, with what
            optimizers keep of them, and DTensors are known and need none.
        group: the ranks that save together; None is all of the process group, if there is one.
        max_d2h_gbps: limit on overlapped copies in gigabits (10^9 bits) per second; 0 is none.

    `prepare`, `copy`, `close` and the optimizers' steps belong to one thread, the one that trains.
    """

    def __init__(
        self,
        state: MutableMapping[str, Any],
        *,
        rng: bool = True,
        overlap: bool | None = None,
        replicated: Sequence[str] = (),
        group: dist.ProcessGroup | None = None,
        max_d2h_gbps: float = 0.0,
    ) -> None:
        if rng:
            check_names(state)
        self._state = state
        self._rng = rng
        self._overlap = overlap
        self._replicated = tuple(replicated)
        self._group = group
        self._limit = Bucket(bytes_per_second(max_d2h_gbps)) if max_d2h_gbps else None
        self._frame: Frame | None = None
        self._around: Parallel | None = None
        self._of_one: frozenset[str] | None = None
        self._objects = Objects()
        self._optimizers: list[Optimizer] = []
        self._written_by_hand: set[str] = set()
        self._views = ViewCache()
        self._thread = CopyThread()
        self._gates = Gates(self._thread.settle)
        self._seams = replace(SEAMS, expand=self._expand)

    # -- prepare ------------------------------------------------------------------------------

    def prepare(self) -> Prepared:
        """Flatten the live state as it is now; no copy is going on when it returns.

        Raises:
            UnsupportedLeafError: a leaf that can not be stored exactly, with its path.
            UsageError: the name of the generators has come into the state.
        """
        self._thread.drain()  # one whose `copy` was interrupted has no Copy to wait for
        self._optimizers.clear()
        with collection_paused():
            live = live_state(self._state, rng=self._rng)
            sources, values = self._again(live) or self._anew(live)
        frame = self._frame
        assert frame is not None
        return Prepared(
            layout=frame.layout,
            layout_bytes=frame.layout_bytes,
            layout_hash=frame.layout_hash,
            values=values,
            sources=sources,
            data_bytes=frame.layout.data_bytes,
            table_bytes=table_bytes_needed(len(frame.layout_bytes), len(values)),
        )

    def _expand(self, item: Any) -> Any:
        if isinstance(item, Optimizer):
            self._optimizers.append(item)
        return self._objects.state_of(item)

    def _again(self, live: dict[str, Any]) -> tuple[Sources, bytes] | None:
        if self._frame is None or self._around is None:
            return None
        try:
            sources, values = sources_again(self._frame, live, self._seams)
            # Only now: what FSDP gathers for a forward, each state_dict has put back in its place.
            self._objects.check(live)
            self._around.check()
            places = zip(values, self._frame.value_trails, strict=True)
            return sources, encode_values(list(places), externalize)
        except (StructureChangedError, LeafInValueError, UnsupportedLeafError):
            return None  # looked at with care below, which also finds the path of what is wrong

    def _anew(self, live: dict[str, Any]) -> tuple[Sources, bytes]:
        self._optimizers.clear()
        self._objects = find_objects(live)
        seams = replace(self._seams, leaf_types=leaf_types())
        flat = flatten(live, seams)
        values = encode_flat_values(flat)
        self._around = self._look_around(self._objects)
        self._frame = frame = make_frame(flat, seams, self._around)
        tensors = list(map(local_tensor, flat.leaves))
        return sources_of(frame, flat.leaves, tensors, frame.pointers), values

    def _look_around(self, objects: Objects) -> Parallel:
        return look_around(objects, self._replicated, ranks_of_job(self._group), self._of_one)

    def tell_parties(self, count: Callable[[str, int], int]) -> None:
        """Count, with those of all ranks, the groups of ranks that share out a module of a path;
        after `predict`, and before all ranks call `heed_parties`.
        """
        for path, led in self._parties().items():
            if led:
                count(path, led)

    def heed_parties(self, count: Callable[[str, int], int]) -> None:
        """Share out no module of which another group has one with the same path: as the parts of
        a tensor that was cut by hand, they may be different tensors.
        """
        parties = self._parties()
        self._of_one = frozenset(path for path in parties if count(path, 0) == 1)
        if len(self._of_one) < len(parties):
            self._frame = None

    def _parties(self) -> dict[str, int]:
        return {} if self._around is None else self._around.parties()

    def predict(self) -> tuple[int, int]:
        """Bytes of the table and of the data of a snapshot after the first optimizer step.

        A forecast to make and populate the host buffer with; snapshots that outgrow it are told
        by the sizes of `prepare`.

        Raises:
            UnsupportedLeafError: a leaf that can not be stored exactly, with its path.
        """
        prepared = self.prepare()  # refuses now what could not be saved later
        self._gates.hang(self._optimizers if self._overlaps(prepared.sources) else [])
        frame, values = self._frame, prepared.values
        if self._optimizers:
            with collection_paused():
                frame, values = self._predicted()
        assert frame is not None
        table_bytes = table_bytes_needed(len(frame.layout_bytes), len(values) * 2 + PAGE_BYTES)
        return table_bytes, frame.layout.data_bytes

    def _predicted(self) -> tuple[Frame, bytes]:
        """The frame and the values after the first step of the optimizers."""
        live = live_state(self._state, rng=self._rng)
        objects = find_objects(live)
        expand = partial(_predicted, objects)
        seams = replace(SEAMS, leaf_types=leaf_types(), expand=expand)
        flat = flatten(live, seams)
        frame = make_frame(flat, seams, self._look_around(objects), with_meta=True)
        return frame, encode_flat_values(flat)

    # -- copy ---------------------------------------------------------------------------------

    def copy(self, prepared: Prepared, data: memoryview, done: Done) -> Copy:
        """Copy every source into a slot's data region and call `done`.

        A copy that is still going on is waited for.

        Args:
            prepared: the newest result of `prepare`; nothing was changed since.
            data: the data region, writable, at least `prepared.data_bytes` long.
            done: called once: before this returns, or later from the copying thread. It hears
                TornSnapshotError if somebody wrote into what was being copied.

        Raises:
            Exception: what `done` raised, if it was called before this returned.
        """
        self._thread.drain()
        copy = Copy(done, self._thread.settle)
        try:
            views, sources = self._views.of(prepared.layout, data).leaves, prepared.sources.tensors
            later = self._sources_for_later(prepared)
            if later:
                now = sorted(set(range(len(views))).difference(later))
                self._thread.copy([views[at] for at in now], [sources[at] for at in now])
                copy.turn = self._thread.start(self._job(prepared, views, later, copy))
                return copy
            self._thread.copy(views, sources)
        except Exception as failure:  # handed to the owner of the snapshot
            if not copy.finish(failure):
                raise  # a signal handler's, after the copying thread has told the owner
        else:
            copy.finish(None)
        copy.wait()
        return copy

    def _job(
        self, prepared: Prepared, views: list[Tensor], later: dict[int, Tensor], copy: Copy
    ) -> Job:
        live, counted = prepared.sources.tensors, prepared.sources.counted
        return Job(
            targets=[views[at] for at in later],
            sources=list(later.values()),
            counted=[counted[at] if one is live[at] else one for at, one in later.items()],
            paths=[prepared.layout.leaves[at].path for at in later],
            finish=copy.finish,
            torn=self._written_by_hand.update,
            limit=self._limit,
        )

    def _sources_for_later(self, prepared: Prepared) -> dict[int, Tensor]:
        """What may be copied behind training: leaves that only an optimizer at a gate changes, and
        clones of others that are on a GPU.
        """
        if not self._overlaps(prepared.sources):
            self._gates.hang([])
            return {}
        self._gates.hang(self._optimizers)
        passed = self._gates.passed()
        gated = [one for one in self._optimizers if can_wait(one)]
        tensors = prepared.sources.tensors
        later = self._leaves_of(passed if self._overlap is None else gated, prepared)
        others = {at: tensors[at] for at in set(range(len(tensors))).difference(later)}
        return {at: tensors[at] for at in later} | cloned(others)

    def _overlaps(self, sources: Sources) -> bool:
        if self._overlap is None:
            return cuda_in_use() and any(source.is_cuda for source in sources.tensors)
        return self._overlap

    def _leaves_of(self, optimizers: list[Optimizer], prepared: Prepared) -> list[int]:
        owned = {local_tensor(item).data_ptr() for item in _tensors_of(optimizers)}
        owned.discard(0)
        leaves, sources = prepared.layout.leaves, prepared.sources
        return [
            at
            for at, pointer in enumerate(sources.pointers)
            if pointer in owned
            and not sources.tensors[at].is_inference()
            and leaves[at].path not in self._written_by_hand
        ]

    # -- end ----------------------------------------------------------------------------------

    def forget_slots(self) -> None:
        """Let go of the slots' memory, so that it can be unmapped."""
        self._thread.drain()
        self._views.clear()

    def close(self) -> None:
        """Finish what is going on, remove the hooks, and let go of slots and state."""
        self._thread.close()
        self._gates.hang([])
        self._views.clear()
        self._optimizers.clear()
        self._objects = Objects()
        self._around = None
        self._frame = None


@contextmanager
def collection_paused() -> Iterator[None]:
    """No cyclic garbage collection: 100,000 new objects start several, which find nothing."""
    was_enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_enabled:
            gc.enable()


def live_state(state: MutableMapping[str, Any], *, rng: bool) -> dict[str, Any]:
    """The mapping to flatten: the user's, and the generators of the process.

    Raises:
        UsageError: their name is taken.
    """
    if not rng:
        return dict(state)
    check_names(state)  # again: names may come into the mapping at any time
    return {**state, RNG_KEY: Generators()}


def keeps_own_state(item: Any) -> bool:
    """Whether an object gives its state by state_dict and takes it by load_state_dict."""
    return (
        not isinstance(item, type)
        and callable(getattr(item, "state_dict", None))
        and callable(getattr(item, "load_state_dict", None))
    )


SEAMS = Seams(
    leaf_types=PLAIN_TYPES,
    is_leaf=is_leaf,
    expands=keeps_own_state,
    expand=lambda item: item.state_dict(),
    externalize=externalize,
)


def _predicted(objects: Objects, item: Any) -> Any:
    if isinstance(item, Optimizer):
        return by_name(predicted_state_dict(item), objects.names(item))
    return objects.state_of(item)


def _tensors_of(optimizers: list[Optimizer]) -> Iterator[Tensor]:
    """Parameters and state tensors that the steps of these optimizers change."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (param for param in group["params"] if param.layout == torch.strided)
        for state in held_state(optimizer).values():
            if isinstance(state, dict):
                yield from (
                    item
                    for item in state.values()
                    if isinstance(item, Tensor) and item.layout == torch.strided
                )


def encode_flat_values(flat: Flat) -> bytes:
    """The values of a freshly flattened state.

    Raises:
        UnsupportedLeafError: one of them has no exact encoding.
    """
    places = list(zip(flat.values, flat.value_trails, strict=True))
    try:
        return encode_values(places, externalize)
    except LeafInValueError as error:
        raise refuse(error.trail, "is a tensor in a set, a key or an attribute") from error
