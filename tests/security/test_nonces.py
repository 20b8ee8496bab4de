"""No two messages are ever encrypted with one key and one nonce, whatever goes wrong meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial

import pytest

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon import flow, pipeline
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.errors import StoreUnreachableError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.chunk import CHUNK_BYTES
from ckptmgr.repository.envelope import DataKey, What
from ckptmgr.store.base import Buffers, PutResult
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import Group, Layout
from security.forged import RING
from small_step import HOST, Encoded, encode_layout, encode_state, fill_slot, host_buffer

Message = tuple[bytes, int, int]


class FailingStore(MemoryStore):
    """Refuses the third put of each write, twice."""

    puts = 0

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        type(self).puts += 1
        if self.puts in (3, 6):
            raise StoreUnreachableError("is refused by the test", subject=key)
        return await super().put_new(key, buffers)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Counter[Message]:
    """How often each (data key, nonce) has sealed something."""
    seen: Counter[Message] = Counter()
    seal = DataKey.seal

    def counted(self: DataKey, what: What, number: int, *rest: object) -> bytes:
        seen[self._secret, what, number] += 1
        return seal(self, what, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(DataKey, "seal", counted)
    return seen


def large_state() -> Encoded:
    """Nine chunks in two groups."""
    encoded = encode_state({"x": 1})
    half = 4 * CHUNK_BYTES
    groups = (Group(0, half + 4096, 4, True), Group(half + 4096, half, 1, False))
    data_bytes = 2 * half + 4096
    layout = Layout((), groups, data_bytes, encoded.layout.tree)
    return Encoded(layout, encode_layout(layout), encoded.values, bytes(data_bytes))


@pytest.mark.parametrize("codec", ["none", "zstd", "auto"])
def test_no_nonce_is_used_twice(
    codec: str, messages: Counter[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs side by side, probes of the codec, writes that fail and are begun again."""
    few = partial(pipeline.packs_of, pack_bytes=2 * CHUNK_BYTES)
    monkeypatch.setattr(pipeline, "packs_of", few)
    encoded = large_state()

    async def main() -> int:
        pipe, failed = Pipeline(BufferPool(BUDGET_BYTES)), 0
        FailingStore.puts = 0
        store = FailingStore(f"nonces-{codec}")
        with host_buffer(store.url, len(encoded.data)) as buffer:
            for step in (1, 2):
                of_step = {"attempt": 1, "nonce": "5a" * 16, "step": step}
                snapshot = fill_slot(buffer, step - 1, encoded, **of_step)  # type: ignore[arg-type]
                source = Source(buffer, snapshot, store, HOST, RING)
                while True:
                    try:
                        await pipe.write(source, codec, lambda _raw, _stored: None)
                        break
                    except StoreUnreachableError:
                        failed += 1
        return failed

    assert asyncio.run(main()) == 2
    assert messages.most_common(1)[0][1] == 1
    chunks = [message for message in messages if message[1] == What.CHUNK]
    assert len(chunks) >= 2 * 9
    assert len({secret for secret, what, _ in chunks}) >= 3, "a write used the key of another"


def test_what_is_written_again_is_other_bytes(messages: Counter[Message]) -> None:
    """The same state, step and place, written twice: nobody can tell that it is the same."""
    state = encode_state({"x": 1, "noise": __import__("numpy").zeros(4096, "uint8")})

    async def stored(name: str) -> bytes:
        store = MemoryStore(name)
        with host_buffer(store.url, len(state.data)) as buffer:
            snapshot = fill_slot(buffer, 0, state, attempt=1, nonce="5a" * 16, step=1)
            pipe = Pipeline(BufferPool(BUDGET_BYTES))
            source = Source(buffer, snapshot, store, HOST, RING)
            sealed = await pipe.write(source, "none", lambda _raw, _stored: None)
        (name_of_pack, nbytes), *_ = sealed.manifest.packs
        return bytes(await store.get(name_of_pack, 4096, nbytes - 4096))

    one, other = asyncio.run(stored("once")), asyncio.run(stored("again"))
    assert one != other
    assert sum(a == b for a, b in zip(one, other, strict=True)) < len(one) / 64


def test_flow_puts_no_pack_of_an_encrypted_snapshot_as_it_is() -> None:
    """Nothing but `copied` and `compressed` is called, with any codec."""
    from ckptmgr.daemon.route import Route

    called: Counter[str] = Counter()

    class Packs:
        def spare(self) -> bool:
            return True

        async def raw(self, index: int) -> None:
            called["raw"] += 1

        async def copied(self, index: int, encoded: object) -> None:
            called["copied"] += 1
            await asyncio.sleep(0)

        compressed = copied

        async def probe(self) -> None:
            called["probe"] += 1

    async def main() -> None:
        for codec in ("none", "auto", "zstd"):
            async with asyncio.timeout(60):
                await flow.flow(Route(2), [1 << 20] * 40, codec, Packs(), copied=True)

    asyncio.run(main())
    assert (called["raw"], called["copied"]) == (0, 120)
