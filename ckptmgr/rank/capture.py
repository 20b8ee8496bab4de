"""A live training state becomes the bytes of a slot, at one instant."""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ckptmgr.errors import UnsupportedLeafError, UsageError
from ckptmgr.rank.externals import externalize
from ckptmgr.rank.frame import Frame, make_frame, sources_again
from ckptmgr.rank.randomness import RNG_KEY, read_generators
from ckptmgr.rank.tensors import LEAF_TYPES, carried, carrier, dtype_of, is_leaf, local_part
from ckptmgr.rank.twins import predicted_state_dict
from ckptmgr.staging.hostbuffer import table_bytes_needed
from ckptmgr.staging.tree import Flat, Seams, StructureChangedError, flatten
from ckptmgr.staging.values import LeafInValueError, encode_values, refuse
from ckptmgr.types import PAGE_BYTES, Layout

Done = Callable[[BaseException | None], None]
"""Called once per copy, with None when every byte is in place, else with the reason."""

SLOT_VIEWS_MAX = 3
"""Slots whose views are kept; a host buffer has at most three."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A state that is ready to be copied: its layout, its values, and where its tensors are.

    `sources` are live tensors in leaf order; `table_bytes` and `data_bytes` are what a slot needs.
    """

    layout: Layout
    layout_bytes: bytes
    layout_hash: bytes
    values: bytes
    sources: list[Tensor]
    data_bytes: int
    table_bytes: int


class Copy:
    """A copy into a slot that was started; finished when `done` was called."""

    def __init__(self, done: Done) -> None:
        self._done = done
        self._finished = threading.Event()

    def finish(self, error: BaseException | None) -> None:
        """Tell the owner, then whoever waits."""
        try:
            self._done(error)
        finally:
            self._finished.set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until `done` was called; False if it was not within the time."""
        return self._finished.wait(timeout_seconds)


class Capture:
    """Flattens and copies one training state, again and again.

    Args:
        state: names and live objects; looked at anew by every `prepare`.
        rng: also capture the generators of the process, under the name `rng`.
        overlap: copy parameters and optimizer state in the background.
    """

    def __init__(
        self, state: MutableMapping[str, Any], *, rng: bool = True, overlap: bool | None = None
    ) -> None:
        if rng and RNG_KEY in state:
            raise UsageError("is reserved for the generators of the process", subject=RNG_KEY)
        self._state = state
        self._rng = rng
        self._frame: Frame | None = None
        self._views: dict[int, SlotViews] = {}

    def prepare(self) -> Prepared:
        """Flatten the live state as it is now.

        Raises:
            UnsupportedLeafError: a leaf that can not be stored exactly, with its path.
        """
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

    def _again(self, live: dict[str, Any]) -> tuple[list[Tensor], bytes] | None:
        if self._frame is None:
            return None
        try:
            sources, values = sources_again(self._frame, live, SEAMS)
            places = zip(values, self._frame.value_trails, strict=True)
            return sources, encode_values(list(places), externalize)
        except (StructureChangedError, LeafInValueError, UnsupportedLeafError):
            return None  # looked at with care below, which also finds the path of what is wrong

    def _anew(self, live: dict[str, Any]) -> tuple[list[Tensor], bytes]:
        flat = flatten(live, SEAMS)
        values = encode_flat_values(flat)
        frame = make_frame(flat, SEAMS)
        self._views.clear()
        self._frame = frame
        tensors = [local_part(leaf).tensor for leaf in flat.leaves]
        return [tensors[at] for at in frame.order], values

    def copy(self, prepared: Prepared, data: memoryview, done: Done) -> Copy:
        """Copy every source into a slot's data region and call `done`.

        Args:
            prepared: the newest result of `prepare`.
            data: the data region, writable, at least `prepared.data_bytes` long.
            done: called once, from this thread or from the copying one.
        """
        copy = Copy(done)
        error: BaseException | None = None
        try:
            views = self._views_of(prepared, data)
            copy_tensors(views.leaves, prepared.sources)
        except Exception as failure:  # noqa: BLE001 - handed to the owner of the snapshot
            error = failure
        copy.finish(error)
        return copy

    def _views_of(self, prepared: Prepared, data: memoryview) -> SlotViews:
        base = torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0)
        found = self._views.get(base.data_ptr())
        if found is None or found.layout is not prepared.layout:
            if len(self._views) >= SLOT_VIEWS_MAX:
                self._views.clear()
            clear_gaps(prepared.layout, data)
            found = SlotViews(prepared.layout, slot_tensors(prepared.layout, base))
            self._views[base.data_ptr()] = found
        return found

    def forget_slots(self) -> None:
        """Let go of the slots' memory: the host buffer is about to be exchanged."""
        self._views.clear()

    def predict(self) -> tuple[int, int]:
        """Bytes of the table and of the data of a snapshot after the first optimizer step.

        A forecast to make and populate the host buffer with; snapshots that outgrow it are told
        by the sizes of `prepare`.

        Raises:
            UnsupportedLeafError: a leaf that can not be stored exactly, with its path.
        """
        seams = replace(SEAMS, expand=_predicted)
        flat = flatten(live_state(self._state, rng=self._rng), seams)
        values = encode_flat_values(flat)
        frame = make_frame(flat, seams, with_meta=True)
        table_bytes = table_bytes_needed(len(frame.layout_bytes), len(values) * 2 + PAGE_BYTES)
        return table_bytes, frame.layout.data_bytes

    def close(self) -> None:
        """Let go of the slots and of the state."""
        self.forget_slots()
        self._frame = None


def _predicted(item: Any) -> Any:
    return predicted_state_dict(item) if isinstance(item, Optimizer) else item.state_dict()


def live_state(state: MutableMapping[str, Any], *, rng: bool) -> dict[str, Any]:
    """The mapping to flatten: the user's, and the generators of the process."""
    return {**state, RNG_KEY: read_generators()} if rng else dict(state)


def keeps_own_state(item: Any) -> bool:
    """Whether an object gives its state by state_dict and takes it by load_state_dict."""
    return (
        not isinstance(item, type)
        and callable(getattr(item, "state_dict", None))
        and callable(getattr(item, "load_state_dict", None))
    )


SEAMS = Seams(
    leaf_types=LEAF_TYPES,
    is_leaf=is_leaf,
    expands=keeps_own_state,
    expand=lambda item: item.state_dict(),
    externalize=externalize,
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


@dataclass(frozen=True, slots=True)
class SlotViews:
    """Tensors over a slot's memory, one per leaf, in the carrier dtypes."""

    layout: Layout
    leaves: list[Tensor]


def slot_tensors(layout: Layout, base: Tensor) -> list[Tensor]:
    """Views of the leaves in the data region `base` (uint8), in their carrier dtypes."""
    bases: dict[torch.dtype, Tensor] = {}
    views = []
    for leaf in layout.leaves:
        dtype = carrier(dtype_of(leaf.dtype))
        if leaf.nbytes == 0:
            views.append(torch.empty(leaf.shape, dtype=dtype))
            continue
        if dtype not in bases:
            bases[dtype] = base[: layout.data_bytes].view(dtype)
        stride = contiguous_stride(leaf.shape)
        views.append(bases[dtype].as_strided(leaf.shape, stride, leaf.offset // dtype.itemsize))
    return views


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    stride = [1] * len(shape)
    for at in range(len(shape) - 2, -1, -1):
        stride[at] = stride[at + 1] * shape[at + 1]
    return tuple(stride)


def clear_gaps(layout: Layout, data: memoryview) -> None:
    """Zero the bytes between leaves, so that what a slot held before is never stored."""
    end = 0
    for leaf in layout.leaves:
        if leaf.offset > end:
            data[end : leaf.offset] = bytes(leaf.offset - end)
        end = leaf.offset + leaf.nbytes
    data[end : layout.data_bytes] = bytes(layout.data_bytes - end)


def copy_tensors(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy logical values, bit by bit; one call for all, which halves the cost of tiny tensors."""
    with torch.no_grad():
        torch._foreach_copy_(targets, [carried(source) for source in sources])
