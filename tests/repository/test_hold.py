"""A hold keeps retention away from a step for as long as its reader reads, and no longer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import (
    DamageError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)
from ckptmgr.repository import hold, keys
from ckptmgr.repository.catalog import list_steps
from ckptmgr.repository.commit import Retired, put_record
from ckptmgr.repository.hold import (
    held_step,
    host_name,
    left_behind,
    place_of_pids,
    put_hold,
    release_hold,
)
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import check_key
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import StepId
from processes import needs_root
from small_step import memory_store

STEP = StepId(1, 10)


def test_a_hold_lasts_as_long_as_the_block() -> None:
    async def main() -> None:
        store = memory_store({})
        async with held_step(store, STEP), held_step(store, STEP):
            assert len((await list_steps(store)).holds[STEP]) == 2
        assert (await list_steps(store)).holds == {}
        with pytest.raises(ZeroDivisionError):
            async with held_step(store, STEP):
                raise ZeroDivisionError
        assert await store.list("") == []

    asyncio.run(main())


def test_a_hold_by_a_person() -> None:
    async def main() -> None:
        store = memory_store({})
        await put_hold(store, STEP, "abc", "for the paper")
        assert (await list_steps(store)).holds == {STEP: ("abc",)}
        await release_hold(store, STEP, "abc")
        await release_hold(store, STEP, "abc")
        assert await store.list("") == []

    asyncio.run(main())


def test_a_retired_step_can_not_be_held() -> None:
    async def main() -> None:
        store = memory_store({})
        await put_record(store, Kind.RETIRED, keys.retired(STEP), Retired(1, 10))
        with pytest.raises(DamageError, match="is retired"):
            await put_hold(store, STEP, "abc", "")
        with pytest.raises(DamageError, match="is retired"):
            async with held_step(store, STEP):
                pytest.fail("entered")
        assert await store.list("holds/") == []

    asyncio.run(main())


@pytest.mark.parametrize("error", [StorePermissionError, StoreFullError])
def test_a_store_that_takes_no_hold_can_be_read(error: Any) -> None:
    async def main() -> None:
        store = FaultyStore(
            memory_store({}), [Fault(error("no"), operation="put_new", and_later=True)]
        )
        async with held_step(store, STEP):
            pass

    asyncio.run(main())


@pytest.mark.parametrize(("at", "when"), [(1, "before"), (1, "after"), (2, "before")])
def test_a_hold_that_may_have_been_put_is_not_left_behind(at: int, when: Any) -> None:
    async def main() -> None:
        inner = memory_store({})
        store = FaultyStore(inner, [Fault(StoreUnreachableError("no"), at=at, when=when)])
        with pytest.raises(StoreUnreachableError):
            async with held_step(store, STEP):
                pytest.fail("entered")
        assert await inner.list("") == []

    asyncio.run(main())


def hold_id_of(key: str) -> str:
    return key.rsplit("/", 1)[1]


@pytest.mark.parametrize("failure", [StoreUnreachableError("no"), asyncio.CancelledError()])
def test_a_hold_that_could_not_be_released_is_known_as_left_behind(failure: Any) -> None:
    """Its process lives on, and nobody else may tell that it does not read any more."""

    async def main() -> None:
        inner = memory_store({})
        refused = Fault(failure, operation="delete", key="holds/", and_later=True)
        with contextlib.suppress(asyncio.CancelledError):
            async with held_step(FaultyStore(inner, [refused]), STEP):
                (key,) = await inner.list("holds/")
                assert not left_behind(hold_id_of(key))
        assert await inner.list("holds/") == [key]
        assert left_behind(hold_id_of(key))

    asyncio.run(main())


def test_a_hold_that_can_not_be_released_hides_no_damage() -> None:
    async def main() -> None:
        gone = Fault(StoreUnreachableError("no"), operation="delete", and_later=True)
        with pytest.raises(DamageError, match="found by the test"):
            async with held_step(FaultyStore(memory_store({}), [gone]), STEP):
                raise DamageError("found by the test")

    asyncio.run(main())


def test_only_a_dead_reader_of_this_host_left_its_hold_behind() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    tail = "0123456789abcdef"
    here = f"{host_name()}.{place_of_pids()}"
    assert left_behind(f"reader.{here}.{dead.pid}.{tail}")
    assert not left_behind(f"reader.{here}.{os.getpid()}.{tail}")
    assert not left_behind(f"reader.{here}.1.{tail}")
    assert not left_behind(f"reader.another-host.{place_of_pids()}.{dead.pid}.{tail}")
    assert not left_behind(f"reader.{host_name()}.{tail}.{dead.pid}.{tail}")
    for person in ("abc", "reader", f"reader.{here}.{dead.pid}", f"reader..x.{tail}", ""):
        assert not left_behind(person)


def test_a_collector_in_another_container_leaves_a_reader_its_hold() -> None:
    """Both have one host name, and the id of the reader is nobody's where the other looks."""
    needs_root()

    async def main() -> str:
        store = memory_store({})
        async with held_step(store, STEP):
            return hold_id_of((await store.list("holds/"))[0])

    hold_id = asyncio.run(main())
    code = "import os, sys; from ckptmgr.repository.hold import left_behind; "
    code += "print(os.getpid(), left_behind(sys.argv[1]))"
    container = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, hold_id]
    told = subprocess.run(container, capture_output=True, text=True, check=True).stdout
    assert told == "1 False\n"


def test_who_can_not_tell_where_he_is_has_a_place_of_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place_of_pids()
    monkeypatch.setattr(hold, "_NAMESPACE", tmp_path / "ns")
    assert place_of_pids() == place_of_pids() != here


def test_the_name_of_the_host_is_a_segment_of_a_key() -> None:
    assert check_key(host_name())
