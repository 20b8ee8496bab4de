"""Writer and watch are killed at random instants: never an incomplete one, never one twice."""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from functools import partial
from pathlib import Path

import pytest

from nursery import Forked, nursery
from scale import scaled
from watch.trainer_writer import files_of
from watch.watching import Pair, commits_of, patiently, restored, tree_of

KIB = 96
LIMIT = 3


class Writer:
    """trainer_writer.py, as it is killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.generation = 0
        self.first = 10
        self.process: Forked | None = None

    def start(self) -> None:
        self.generation += 1
        self.process = nursery().start(
            [
                str(Path(__file__).parent / "trainer_writer.py"),
                *(f"--root={self.root}", f"--first={self.first}", "--count=1000"),
                *(f"--generation={self.generation}", f"--kib={KIB}", f"--limit={LIMIT}"),
                *("--pause=0.002", "--between=0.5"),
            ],
            env=os.environ,
        )

    def kill(self, chance: random.Random) -> None:
        """Kill it, and let it go back by up to two steps, as a run does that resumes."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        numbers = [int(path.name.split("-")[1]) for path in self.root.glob("checkpoint-*")]
        self.first = max(10, max(numbers, default=10) - 10 * chance.randrange(3))


def expected(step: int, generation: int) -> dict[str, str]:
    name = f"checkpoint-{step}"
    files = files_of(step, generation, KIB)
    return {f"{name}/{one}": hashlib.sha256(c).hexdigest() for one, c in sorted(files.items())}


def without_leftovers(tree: dict[str, str]) -> dict[str, str]:
    """Without what a killed save left under a temporary name; later saves do not remove it."""
    return {path: digest for path, digest in tree.items() if "/.tmp" not in path}


def generation_of(tree: dict[str, str], step: int, generations: int) -> int | None:
    """Which save of a step a restored tree is, all of it; None for no single one."""
    for generation in range(1, generations + 1):
        if without_leftovers(tree) == expected(step, generation):
            return generation
    return None


@pytest.mark.kill
@pytest.mark.reliability
def test_no_kill_makes_it_adopt_an_incomplete_one_or_one_twice(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "writer")
    chance, store = pair.chance, pair.store
    writer = Writer(pair.root)
    writer.start()

    def writer_again() -> None:
        writer.kill(chance)
        writer.start()

    try:
        for number in range(scaled(4, 50)):
            watch = pair.watch
            if chance.random() < 0.9:
                watch.await_event("watching")
            if chance.random() < 0.5 and not number % 2:
                patiently(partial(watch.events, "watch_adopting"), "it adopts")  # kill amid this
            time.sleep(chance.random() * 0.5)
            pair.kill(pair.whose_turn(number), writer_again)
        writer.kill(chance)
        last = [path for path in pair.root.iterdir() if (path / "trainer_state.json").is_file()]
        whole = [path for path in last if is_whole(path, writer.generation)]
        names = {path.name for path in whole}
        patiently(lambda: names <= names_of(store), f"{names} are adopted, seed {pair.seed}")
    finally:
        pair.watch.kill()
        assert writer.process is not None
        writer.process.kill()
        writer.process.wait()
    judge(pair, writer.generation)


def is_whole(path: Path, generations: int) -> bool:
    tree = {f"{path.name}/{name}": digest for name, digest in tree_of(path).items()}
    return generation_of(tree, int(path.name.split("-")[1]), generations) is not None


def names_of(store: Path) -> set[str]:
    if not store.exists():
        return set()
    return {str(e.decision.tags["watch.source"]) for e in commits_of(store) if e.decision}


def judge(pair: Pair, generations: int) -> None:
    """Every step is one save, whole, and no save is two steps."""
    store, seed, kills = pair.store, pair.seed, pair.kills
    found: dict[tuple[str, int], str] = {}
    for entry in commits_of(store):
        assert entry.decision is not None
        name = str(entry.decision.tags["watch.source"])
        assert re.fullmatch(r"checkpoint-\d+", name)
        step = int(name.split("-")[1])
        assert step == entry.id.step
        generation = generation_of(restored(store, entry.id), step, generations)
        assert generation is not None, f"{entry.id} is no whole save, seed {seed}"
        assert (name, generation) not in found, f"{entry.id} again, seed {seed}"
        found[name, generation] = str(entry.id)
    assert found, f"nothing was adopted, seed {seed}"
    print(
        f"\nwatch: {sum(kills.values())} kills {kills}, {generations} generations, "
        f"{len(found)} adopted and restored byte by byte, seed {seed}"
    )
