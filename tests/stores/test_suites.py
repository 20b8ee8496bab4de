"""The crash and corruption suites of the local store, on stores that are reached over a network.

The tests are those of tests/crash, tests/peers and tests/rank; only where the objects are is
another place.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from crash.storm import INSIDE
from crash.test_kills import run
from peers.test_holes import (
    test_a_part_that_never_comes_blocks_no_later_step as test_holes_a_part_that_never_comes,
)
from peers.test_holes import (
    test_a_step_that_is_saved_again_is_never_a_mix_of_both as test_holes_a_step_saved_again,
)
from peers.test_holes import (
    test_nothing_is_latest_before_every_rank_has_written_it as test_holes_nothing_is_latest,
)
from peers.test_holes import (
    test_what_more_ranks_left_of_a_step_is_in_no_later_commit as test_holes_more_ranks,
)
from peers.test_zombie import (
    test_a_continued_incarnation_ends_itself_whenever_it_was_stopped as test_zombie_at_random,
)
from peers.test_zombie import (
    test_a_continued_incarnation_ends_itself_wherever_it_was_stopped as test_zombie_aimed,
)
from rank.havoc import Plan
from rank.test_rank_kills import kill
from rigged import Rig
from scale import scaled
from stores.places import EXCLUSIVE, ROWS, Places, on
from stores.product import damage_over, pass_over

pytestmark = [pytest.mark.timeout(3600)]

__all__ = [
    "test_holes_a_part_that_never_comes",
    "test_holes_a_step_saved_again",
    "test_holes_more_ranks",
    "test_holes_nothing_is_latest",
    "test_zombie_aimed",
    "test_zombie_at_random",
]

DAMAGES_OF_A_KIND = scaled(15, 100)
RANKS = Plan("fsdp2", 2, 60)


def lead_to(places: Places, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place in a store, which processes that are started from here on find, too."""
    url, environment = places.make(name)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    return url


@pytest.fixture(params=on(*ROWS))
def url(places: Places, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place in each of the stores."""
    return lead_to(places, request.param, monkeypatch)


@pytest.fixture(params=on(*EXCLUSIVE))
def rig(
    places: Places, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Rig:
    """Rules before a new place in each of the stores of whose writers one wins."""
    found = Rig(tmp_path, lead_to(places, request.param, monkeypatch))
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    return found


@pytest.mark.kill
@pytest.mark.parametrize(
    ("victim", "sample", "full"), [("trainer", 6, 60), ("daemon", 6, 60), ("both", 4, 40)]
)
def test_no_kill_tears_or_loses_anything(
    url: str, victim: str, sample: int, full: int, tmp_path: Path
) -> None:
    kills = scaled(sample, full)
    places, facts = run(victim, kills, tmp_path, url)
    inside = sum(count for (_, place), count in places.items() if place in INSIDE)
    print(f"\n{kills} kills of {victim} over {url}, {inside} inside: {dict(places)} {dict(facts)}")
    assert places.total() == kills


@pytest.mark.kill
def test_killed_ranks_and_daemons_change_no_bit(url: str, tmp_path: Path) -> None:
    kill(RANKS, scaled(5, 30), tmp_path, url)


@pytest.mark.parametrize("url", on("ceph"), indirect=True)
def test_the_whole_product(url: str, runtime: Path, tmp_path: Path) -> None:
    """The other stores have it in files of their own."""
    pass_over(url, runtime, tmp_path)


def test_every_damage_is_found_and_none_comes_back(url: str, tmp_path: Path) -> None:
    damage_over(url, tmp_path, DAMAGES_OF_A_KIND)
    shutil.rmtree(tmp_path / "restored")
