"""What a rank asks of the store does not depend on how many ranks there are."""

from __future__ import annotations

from functools import cache

import pytest

from bench.simulate import KINDS, Phase, simulate, table

WORLDS = (16, 32, 64)


@cache
def phases(world: int) -> dict[str, Phase]:
    return {phase.name: phase for phase in simulate(world)}


@pytest.mark.parametrize("name", phases(16))
def test_requests_per_rank_do_not_grow(name: str) -> None:
    small, large = phases(16)[name], phases(64)[name]
    assert large.requests() / 64 < 1.5 * small.requests() / 16


@pytest.mark.parametrize("world", WORLDS)
def test_a_save_puts_two_objects_for_each_rank_and_two_for_all(world: int) -> None:
    assert phases(world)["save"].requests("put") == 2 * world + 2
    assert phases(world)["save"].requests("delete") == 0


@pytest.mark.parametrize("world", WORLDS)
def test_a_save_lists_the_manifests_of_its_step_and_nothing_else(world: int) -> None:
    """Once for every time that ranks were missing; at most half of the rest come at each."""
    assert phases(world)["save"].asked["keys listed"] <= 4 * world


def test_a_late_rank_is_asked_for_alone() -> None:
    late = phases(64)["save, one rank 30 s late"]
    assert late.asked["keys listed"] <= 8 * 64
    assert late.seconds < 2.0


def test_the_same_seed_gives_the_same_numbers() -> None:
    """Not of bytes: the names of packs are random, and manifests are compressed."""
    for one, again in zip(phases(16).values(), simulate(16), strict=True):
        assert [one.asked[kind] for kind in KINDS] == [again.asked[kind] for kind in KINDS]
        assert one.seconds == again.seconds


def test_a_table_has_a_row_for_each_world() -> None:
    rows = table([phases(world)["save"] for world in WORLDS]).splitlines()
    assert len(rows) == 2 + len(WORLDS)
    assert rows[2].startswith("| 16 |")
