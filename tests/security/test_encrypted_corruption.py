"""The sweeps of tests/crash/test_corruption.py, over steps that are encrypted and signed."""

from __future__ import annotations

import random
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.restore.check import verify_store
from ckptmgr.types import PAGE_BYTES
from crash.damaged import KINDS, Rig, make_cheap, run_at_once
from scale import scaled
from security.forged import RING
from security.test_signed_commits import SIGNER
from small_step import (
    Objects,
    SavedStep,
    made_in_memory,
    memory_store,
    save_every_kind,
    shelf_of,
    smallest_state,
)

pytestmark = pytest.mark.reliability

BOTH = replace(RING, signer=SIGNER, trusted={SIGNER.id: SIGNER.public})


@pytest.fixture(scope="module")
def made() -> tuple[list[SavedStep], Objects]:
    return made_in_memory(lambda store: save_every_kind(store, smallest_state, BOTH))


@pytest.fixture
def rig(made: tuple[list[SavedStep], Objects], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    make_cheap(monkeypatch)
    directory = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    directory.mkdir()
    saved, objects = made
    yield Rig(saved, objects, memory_store(objects), directory, keyring=BOTH)
    shutil.rmtree(directory)


def test_the_store_is_whole_before_anything_is_damaged(rig: Rig) -> None:
    assert run_at_once(rig.verify()) == []
    assert run_at_once(rig.restore()) == str(rig.newest.id)
    assert isinstance(rig.keyring, Keyring)


@pytest.mark.parametrize(
    ("keyring", "quick", "not_checked"),
    [
        (BOTH, False, []),
        (BOTH, True, ["hashes", "authentic", "decoded"]),
        (NO_KEYS, False, ["authentic", "decoded"]),
    ],
)
def test_verify_says_what_it_does_not_check(
    rig: Rig, keyring: Keyring, quick: bool, not_checked: list[str]
) -> None:
    catalog = Catalog(rig.store, keyring)
    reports = run_at_once(
        verify_store(catalog, None, every=True, quick=quick, progress=lambda _: None)
    )
    steps = [report for report in reports if report["committed"]]
    assert steps
    for report in steps:
        assert not report["damage"]
        assert report["key"] == next(iter(RING.known))
        assert report["not_checked"] == not_checked


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found_and_none_comes_back(rig: Rig, kind: str) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        bits = [
            (key, at, bit)
            for key in rig.keys_of(kind)
            for at in range(len(rig.objects[key]))
            for bit in range(8)
        ]
        bits = random.sample(bits, min(len(bits), scaled(100, 20_000)))
        for key, at, bit in bits:
            shelf[key][at] ^= 1 << bit
            await rig.judge(key)
            shelf[key][at] ^= 1 << bit
        rig.counts["flips"] = len(bits)

    run_at_once(main())
    rig.tell(f"bits of {kind}, encrypted")


@pytest.mark.parametrize("kind", ["manifests", "packs"])
def test_every_cut_is_found_and_none_comes_back(rig: Rig, kind: str) -> None:
    async def main() -> None:
        shelf = shelf_of(rig.store)
        for key in rig.keys_of(kind):
            whole = rig.objects[key]
            edges = {n + d for n in range(0, len(whole), PAGE_BYTES) for d in (-1, 0, 1)}
            lengths = {length for length in edges if 0 <= length < len(whole)}
            lengths |= set(random.sample(range(len(whole)), scaled(10, 200)))
            for length in lengths:
                shelf[key] = bytearray(whole[:length])
                await rig.judge(key)
                rig.counts["cuts"] += 1
            shelf[key] = bytearray(whole)

    run_at_once(main())
    rig.tell(f"lengths of {kind}, encrypted")
