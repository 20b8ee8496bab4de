"""kill -9 at random instants: nothing torn is restored, nothing acknowledged is lost."""

from __future__ import annotations

import random
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptmgr.config import open_private_dir
from crash.storm import INSIDE, Storm
from processes import end_processes_of
from scale import FULL, scaled

pytestmark = [pytest.mark.kill, pytest.mark.reliability]

CHAIN = 25
"""Kills over one store; then another store, codec and size."""

KILLS_TO_COUNT = 6
"""Of fewer kills it is chance where they land."""

COPY_SECONDS, SEAL_SECONDS = 0.006, 0.0015
PERSIST_SECONDS, RESTORE_SECONDS = 0.06, 0.04
"""Spans in which an aimed kill falls at random; about as long as what is aimed at."""

AIMS = {
    "trainer": {"copy": 40, "seal": 15, "persist": 15, "restore": 20, "any": 10},
    "daemon": {"persist": 60, "restore": 20, "copy": 10, "any": 10},
    "both": {"persist": 40, "copy": 25, "restore": 25, "any": 10},
}


@contextmanager
def storm(tmp_path: Path, chance: random.Random, url: str, *, encrypt: bool) -> Iterator[Storm]:
    name = secrets.token_hex(4)
    runtime = Path(f"/dev/shm/ckptmgr-storm-{name}")
    root = tmp_path / name
    root.mkdir()
    open_private_dir(runtime)
    codec = chance.choice(["auto", "none", "zstd", "planes"])
    mib = chance.choice([4, 12, 12, 24, *([72] if FULL else [])])
    keep = chance.choice([2, 3, 5])
    where = url and f"{url}/{name}"
    found = Storm(root, runtime, chance, codec, mib, keep, url=where, encrypt=encrypt)
    try:
        yield found
    finally:
        found.close()
        end_processes_of(runtime)
        shutil.rmtree(runtime, ignore_errors=True)


def pause(seconds: float) -> None:
    """Wait a random part of a span, without the coarse end of a sleep."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def aim(one: Storm, victim: str) -> None:
    """Bring the trainer to the aimed moment; a kill follows at once."""
    chance = one.random
    weights = AIMS[victim]
    target = chance.choices(list(weights), list(weights.values()))[0]
    if target == "restore":
        bring_to_restore(one)
        pause(chance.uniform(0, RESTORE_SECONDS))
        return
    if one.trainer is None:
        begin(one)
    one.await_event("sealed", count=chance.randint(1, 3))
    if target == "copy":
        one.await_event("copy")
        pause(chance.uniform(0, COPY_SECONDS * one.mib / 12))
    elif target == "seal":
        one.await_event("seal")
        pause(chance.uniform(0, SEAL_SECONDS))
    elif target == "persist":
        one.await_event("sealed")
        pause(chance.uniform(0, PERSIST_SECONDS * one.mib / 12))
    else:
        time.sleep(chance.uniform(0, 0.3))


def bring_to_restore(one: Storm) -> None:
    """A fresh incarnation that asks for its state; half of the time only the store has it."""
    if one.trainer is not None:
        one.kill_trainer()
    if one.random.random() < 0.5:
        one.kill_daemon()
        one.wipe_memory()
    begin(one)
    one.await_event("restore")


def begin(one: Storm) -> None:
    """Start the next incarnation; what it must resume from is known before it starts."""
    one.audit()
    expected = one.expected()
    if not one.daemon_pid() and one.random.random() < 0.5:
        one.start_daemon()
    one.start_trainer(expected)


def strike(one: Storm, victim: str) -> None:
    """One kill, the look at where it landed, and the judgement."""
    aim(one, victim)
    trainer = one.running()
    if victim == "trainer":
        one.kill_trainer()
        last = trainer.last
        places = [one.trainer_place(last)]
        if places == ["training"]:
            places.append(one.daemon_place(last).replace("idle", "training"))
    elif victim == "daemon":
        if not one.kill_daemon():
            return
        while trainer.read(0):
            pass
        places = [one.daemon_place(trainer.last)]
        if places == ["mid-restore"]:
            one.await_event("restored")
        one.await_event("acked", count=2)  # the trainer goes on with the next daemon
    else:
        first, second = one.kill_trainer, one.kill_daemon
        if one.random.random() < 0.5:
            first, second = second, first
        first()
        second()
        places = [one.daemon_place(trainer.last), one.trainer_place(trainer.last)]
        if one.random.random() < 0.3:
            one.wipe_memory()
            one.facts["host memory lost"] += 1
    one.note(victim, *places)
    one.audit()


def run(
    victim: str, kills: int, tmp_path: Path, url: str = "", *, encrypt: bool = False
) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Where so many kills landed, and what was counted; stores are made below `url`."""
    places: Counter[tuple[str, str]] = Counter()
    facts: Counter[str] = Counter()
    seed = random.SystemRandom().getrandbits(32)
    print(f"{victim}: seed {seed}")
    chance = random.Random(seed)
    while places.total() < kills:
        with storm(tmp_path, chance, url, encrypt=encrypt) as one:
            goal = min(CHAIN, kills - places.total())
            while one.kills < goal:
                strike(one, victim)
            if one.trainer is None:
                begin(one)
                one.await_event("restored")
            one.await_event("acked")
            one.kill_trainer()
            one.audit()
            places += one.places
            facts += one.facts
            facts["commits acknowledged"] += len(one.acked)
    return places, facts


@pytest.mark.timeout(scaled(600, 14400))
@pytest.mark.parametrize(
    ("victim", "sample", "full"), [("trainer", 8, 200), ("daemon", 8, 200), ("both", 4, 100)]
)
def test_no_kill_tears_or_loses_anything(
    victim: str, sample: int, full: int, tmp_path: Path
) -> None:
    judge(victim, scaled(sample, full), tmp_path, encrypt=False)


@pytest.mark.timeout(scaled(600, 14400))
@pytest.mark.parametrize("victim", ["daemon", "both"])
def test_no_kill_tears_or_loses_anything_that_is_encrypted(victim: str, tmp_path: Path) -> None:
    judge(victim, scaled(3, 50), tmp_path, encrypt=True)


def judge(victim: str, kills: int, tmp_path: Path, *, encrypt: bool) -> None:
    begun = time.monotonic()
    places, facts = run(victim, kills, tmp_path, encrypt=encrypt)
    inside = sum(count for (_, place), count in places.items() if place in INSIDE)
    print(f"{victim}: {kills} kills in {time.monotonic() - begun:.0f} s, {inside} inside a write")
    for (_, place), count in sorted(places.items(), key=lambda item: -item[1]):
        print(f"  {place:<20} {count:>5}")
    for fact, count in sorted(facts.items()):
        print(f"  {fact:<30} {count:>5}")
    assert places.total() == kills
    if kills >= KILLS_TO_COUNT:
        assert inside * 3 >= kills, "too few kills landed inside a copy or a write"
