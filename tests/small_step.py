"""Small committed steps in any store, made without torch by the real pipeline.

A step has every codec: trained-looking floats (planes), counters (zstd), noise (none). The host
buffer is a real one on /dev/shm; pipeline, manifest and register are the daemon's own code.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ckptmgr.config import BUDGET_BYTES, CHUNK_BYTES
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.daemon.resume import (
    claim_attempt,
    decide_resume,
    parent_of,
    publish_have,
    put_active,
)
from ckptmgr.daemon.retain import collect
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision, abort_step, commit_step, put_witness
from ckptmgr.repository.hold import host_name, put_hold
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.plan import Move, Plan, plan_moves
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import HostBuffer, round_up, table_bytes_needed
from ckptmgr.staging.layout import encode_layout
from ckptmgr.staging.tree import Seams, encode_tree, flatten
from ckptmgr.staging.values import encode_values
from ckptmgr.store.base import Store
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import PAGE_BYTES, Binding, Group, Layout, Leaf, StepId

HOST = "testhost"
TABLE_BYTES = 1 << 14
STEPS = (10, 20)

Objects = dict[str, bytes]
"""A store as a dict: what a sweep damages and puts back."""

_SEAMS = Seams(
    leaf_types=frozenset({np.ndarray}),
    is_leaf=lambda _: True,
    expands=lambda _: False,
    expand=lambda item: item,
    externalize=lambda _item, _trail: None,
)


def small_state(seed: int) -> dict[str, Any]:
    """Arrays of several dtypes and shapes, and plain values; another seed, other bits."""
    rng = np.random.default_rng(seed)
    return {
        "net": {
            "weight": (rng.standard_normal((30, 50)) * 0.02).astype(np.float32),
            "bias": (rng.standard_normal(7) * 0.02).astype(np.float16),
            "empty": np.zeros((0, 3), np.float32),
        },
        "counts": rng.integers(0, 1000, 900, np.int64),
        "noise": rng.integers(0, 256, 4096, np.uint8),
        "scale": np.array(float(seed)),
        "step": seed,
        "note": "plain values come back too",
    }


def smallest_state(seed: int) -> dict[str, Any]:
    """For sweeps over every bit: each page of a pack is 32,768 of them.

    Step 30 has a chunk of one page for each codec, and everything else that a manifest holds; the
    others, which are there to fall back to, have one chunk.
    """
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((20, 40)) * 0.02).astype(np.float32)
    if seed != 30:
        return {"weight": weight, "step": seed}
    return {
        "net": {"weight": weight, "empty": np.zeros((0, 3), np.float32)},
        "counts": rng.integers(0, 1000, 400, np.int64),
        "noise": rng.integers(0, 256, PAGE_BYTES, np.uint8),
        "scale": np.array(float(seed), np.float32),
        "step": seed,
        "note": "plain values come back too",
    }


@dataclass(frozen=True, slots=True)
class Encoded:
    """A state as a slot holds it."""

    layout: Layout
    layout_bytes: bytes
    values: bytes
    data: bytes


def arrays_of(state: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Every leaf of a state by its path."""
    flat = flatten(state, _SEAMS)
    return dict(zip(flat.paths(), flat.leaves, strict=True))


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A committed step and what was saved: the oracle of a test."""

    id: StepId
    state: dict[str, Any]
    encoded: Encoded
    decision: Decision

    @property
    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every leaf by its path."""
        return arrays_of(self.state)


def encode_state(state: Mapping[str, Any]) -> Encoded:
    """Lay a state out as the rank does: one page-aligned group per kind of element."""
    flat = flatten(state, _SEAMS)
    kinds = [(leaf.itemsize, leaf.dtype.kind == "f") for leaf in flat.leaves]
    order = sorted(range(len(kinds)), key=lambda at: (kinds[at], at))
    index = {at: leaf for leaf, at in enumerate(order)}
    leaves, groups, data = [], [], bytearray()
    for kind in dict.fromkeys(kinds[at] for at in order):
        start = len(data)
        for at in (at for at in order if kinds[at] == kind):
            data += bytes(-len(data) % 16)
            array = np.ascontiguousarray(flat.leaves[at])
            path, dtype = flat.paths()[at], str(array.dtype)
            leaves.append(Leaf(path, dtype, flat.leaves[at].shape, len(data), array.nbytes))
            data += array.tobytes()
        data += bytes(-len(data) % PAGE_BYTES)
        if len(data) > start:
            groups.append(Group(start, len(data) - start, *kind))
    tree = encode_tree(flat, [(index[at], 0) for at in range(len(kinds))], _SEAMS.externalize)
    layout = Layout(tuple(leaves), tuple(groups), len(data), tree)
    places = list(zip(flat.values, flat.value_trails, strict=True))
    values = encode_values(places, _SEAMS.externalize)
    return Encoded(layout, encode_layout(layout), values, bytes(data))


@contextmanager
def host_buffer(url: str, data_bytes: int, slots: int = 2) -> Iterator[HostBuffer]:
    """A real host buffer on tmpfs, gone at the end."""
    directory = Path("/dev/shm") / f"ckptmgr-test-{secrets.token_hex(6)}"
    directory.mkdir(mode=0o700)
    capacity = Capacity(slots, TABLE_BYTES, round_up(max(data_bytes, 1), PAGE_BYTES))
    try:
        binding = Binding(url, 0, 1, codec="planes", keep=2)
        with HostBuffer.create(directory, binding, capacity) as buffer:
            yield buffer
    finally:
        shutil.rmtree(directory)


def fill_slot(
    buffer: HostBuffer,
    slot: int,
    encoded: Encoded,
    *,
    attempt: int,
    nonce: str,
    step: int,
    rank: int = 0,
    world: int = 1,
) -> Any:
    """Write and seal a slot as the rank does; returns the snapshot."""
    assert table_bytes_needed(len(encoded.layout_bytes), len(encoded.values)) <= TABLE_BYTES
    writer = buffer.begin(slot)
    with writer.data as view:
        view[: len(encoded.data)] = encoded.data
    return writer.seal(
        attempt=attempt,
        nonce=nonce,
        rank=rank,
        world=world,
        step=step,
        layout=encoded.layout_bytes,
        layout_hash=xxhash.xxh3_128_digest(encoded.layout_bytes),
        values=encoded.values,
        tags={"loss": 1.0 / step, "seed": step},
        data_bytes=len(encoded.data),
        stall_seconds=0.0,
        sealed_at=1.75e9,
    )


async def save_step(
    store: Store,
    attempt: int,
    nonce: str,
    step: int,
    state: dict[str, Any],
    codec: str = "planes",
    keyring: Keyring = NO_KEYS,
) -> SavedStep:
    """One snapshot through the real pipeline to its commit."""
    encoded = encode_state(state)
    decision = await commit_ranks(store, attempt, nonce, step, [encoded], codec, keyring)
    return SavedStep(decision.id, state, encoded, decision)


async def commit_encoded(
    store: Store, attempt: int, nonce: str, step: int, encoded: Encoded, codec: str = "planes"
) -> Decision:
    """What a slot would hold, through the real pipeline to its commit."""
    return await commit_ranks(store, attempt, nonce, step, [encoded], codec)


async def commit_ranks(
    store: Store,
    attempt: int,
    nonce: str,
    step: int,
    ranks: Sequence[Encoded],
    codec: str = "planes",
    keyring: Keyring = NO_KEYS,
) -> Decision:
    """What the slots of all ranks would hold; committed whether it is a whole step or not."""
    await put_active(store, attempt, nonce)
    pipeline, manifests = Pipeline(BufferPool(BUDGET_BYTES)), []
    for rank, encoded in enumerate(ranks):
        with host_buffer(store.url, len(encoded.data)) as buffer:
            of_step: Any = {"attempt": attempt, "nonce": nonce, "step": step}
            snapshot = fill_slot(buffer, 0, encoded, **of_step, rank=rank, world=len(ranks))
            source = Source(buffer, snapshot, store, HOST, keyring)
            manifests.append(await pipeline.write(source, codec, lambda _raw, _stored: None))
    parent = await parent_of(Catalog(store), StepId(attempt, step))
    decision = await commit_step(store, manifests, parent, keyring)
    await put_witness(store, decision)
    return decision


def plan_leaves(manifest: Manifest, leaves: Iterable[Leaf]) -> Plan:
    """The reads that bring leaves back to back, in their order."""
    moves, at = [], 0
    for leaf in leaves:
        moves += [Move(leaf.offset, at, leaf.nbytes)] if leaf.nbytes else []
        at += leaf.nbytes
    return plan_moves(manifest, moves, at)


async def save_steps(
    store: Store,
    steps: tuple[int, ...] = STEPS,
    codec: str = "planes",
    state: Callable[[int], dict[str, Any]] = small_state,
    keyring: Keyring = NO_KEYS,
) -> list[SavedStep]:
    """Claim an attempt and commit `steps` under it, oldest first."""
    attempt, nonce = await claim_attempt(store, 1, "")
    await publish_have(store, attempt, host_name(), [])
    return [
        await save_step(store, attempt, nonce, step, state(step), codec, keyring) for step in steps
    ]


async def save_every_kind(
    store: Store,
    state: Callable[[int], dict[str, Any]] = small_state,
    keyring: Keyring = NO_KEYS,
) -> list[SavedStep]:
    """A store with every kind of object; returns the two steps that stand, older first.

    Of attempt 1, step 10 is retired, 20 held, 25 aborted, 30 verified; attempt 2 has resumed.
    """
    saved = await save_steps(store, (10, 20, 30), state=state, keyring=keyring)
    await collect(Catalog(store, keyring), BufferPool(BUDGET_BYTES), 2)
    await abort_step(store, StepId(1, 25), "given up by the test")
    await put_hold(store, saved[1].id, "test", "for the test")
    attempt, _ = await claim_attempt(store, 1, "")
    await decide_resume(store, attempt, 0, saved[2].id)
    return saved[1:]


async def objects_of(store: Store) -> Objects:
    """Every object of a store."""
    return {key: bytes(await store.get(key)) for key in await store.list("")}


def shelf_of(store: MemoryStore) -> dict[str, bytearray]:
    """The objects of a memory store themselves: what is changed there is changed in the store."""
    return store._shelf


def memory_store(objects: Mapping[str, bytes | bytearray]) -> MemoryStore:
    """A memory store of its own that holds copies of `objects`."""
    store = MemoryStore(secrets.token_hex(8))
    shelf_of(store).update({key: bytearray(blob) for key, blob in objects.items()})
    return store


def made_in_memory(
    make: Callable[[Store], Awaitable[list[SavedStep]]] = save_steps,
) -> tuple[list[SavedStep], Objects]:
    """What `make` saves into a memory store, and all objects of the store."""

    async def main() -> tuple[list[SavedStep], Objects]:
        store = memory_store({})
        return await make(store), await objects_of(store)

    return asyncio.run(main())


def write_tree(root: Path, objects: Mapping[str, bytes]) -> str:
    """Lay `objects` out as a local store; returns its URL."""
    for key, blob in objects.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
    return f"file://{root}"


def read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes by name, read by hand so that the oracle shares no code."""
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    head = json.loads(blob[8 : 8 + length])
    body = blob[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in head.items()
        if name != "__metadata__"
    }


def same_bits(directory: Path, saved: SavedStep) -> bool:
    """Whether `restore --format safetensors` wrote exactly what was saved."""
    found = read_safetensors(directory / "state.safetensors")
    expected = {path: (array.shape, array.tobytes()) for path, array in saved.arrays.items()}
    return {name: entry[1:] for name, entry in found.items()} == expected


assert CHUNK_BYTES >= 1 << 20, "small steps count on one chunk per group"
