"""A fetched part is freed when the last of its readers has left, however their fetches ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptmgr.daemon import parts
from ckptmgr.daemon.parts import FetchedPart, Lending
from ckptmgr.errors import StoreUnreachableError
from ckptmgr.types import StepId


class Buffer:
    """Host memory that says whether it was given back."""

    path = Path("buffer")

    def __init__(self) -> None:
        self.freed = False

    def unlink(self) -> None:
        self.freed = True

    def close(self) -> None:
        pass


class Slot(Buffer):
    """One in which a rank may have written something else meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.written = False

    def unchanged(self, _: Any) -> bool:
        return not self.written


def test_one_who_leaves_while_the_fetch_of_another_fails_is_no_reader_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        fails, gate = False, asyncio.Event()

        async def bring(_job: Any, part: FetchedPart, _wanted: Any) -> None:
            part.snapshot = SimpleNamespace(generation=1)  # type: ignore[assignment]
            if fails:
                await gate.wait()
                raise StoreUnreachableError("no answer")

        buffer: Any = Buffer()
        manifest: Any = SimpleNamespace(id=StepId(1, 5), rank=0, nonce="n", chunks=[0])
        job: Any = SimpleNamespace(url="memory://job")
        lending = Lending(Path("nowhere"))
        monkeypatch.setattr(parts, "_bring", bring)
        monkeypatch.setattr(parts, "chunks_of", lambda *_: [0])
        monkeypatch.setattr(lending, "_make", lambda *_: FetchedPart(manifest, buffer, 0, None))
        await lending.fetch("first", job, manifest, (), None)
        fails = True
        second = asyncio.create_task(lending.fetch("second", job, manifest, (), None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        lending.release("first")
        assert not buffer.freed, "the second is still a reader"
        gate.set()
        with pytest.raises(StoreUnreachableError):
            await second
        assert buffer.freed

    asyncio.run(main())


def test_a_part_in_the_buffer_of_a_rank_is_not_lent_once_the_rank_has_written_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank may write there as soon as it has what it wanted, though others still read."""

    async def bring(_job: Any, part: FetchedPart, _wanted: Any) -> None:
        part.snapshot = SimpleNamespace(generation=1)  # type: ignore[assignment]

    async def main() -> None:
        manifest: Any = SimpleNamespace(id=StepId(1, 5), rank=0, nonce="n", chunks=[0])
        job: Any = SimpleNamespace(url="memory://job")
        own: Any = Slot()
        made: list[Any] = []

        def make(*_: Any) -> FetchedPart:
            buffer: Any = Slot() if made else own
            part = FetchedPart(manifest, buffer, 0, None if made else own)
            made.append(part)
            return part

        lending = Lending(Path("nowhere"))
        monkeypatch.setattr(parts, "_bring", bring)
        monkeypatch.setattr(parts, "chunks_of", lambda *_: [0])
        monkeypatch.setattr(lending, "_make", make)
        for reader in ("trainer", "first"):
            await lending.fetch(reader, job, manifest, (), own)
        assert len(made) == 1, "it is lent to both"
        lending.release("trainer")
        own.written = True
        await lending.fetch("second", job, manifest, (), None)
        assert len(made) == 2
        lending.release("first")
        lending.release("second")
        assert (own.freed, made[1].buffer.freed) == (False, True)

    asyncio.run(main())
