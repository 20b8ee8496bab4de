"""A real Trainer of Hugging Face and `watch` are killed at random instants (hf_trainer.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from functools import cache, partial
from pathlib import Path

import pytest

from nursery import Forked, Nursery
from scale import scaled
from watch.watching import Pair, Watch, commits_of, patiently, restored, tree_of

PINNED = "transformers==5.24.0 accelerate==1.15.0"
SAVE_STEPS, LIMIT, PAUSE_SECONDS = 5, 3, 0.05

pytestmark = [
    pytest.mark.kill,
    pytest.mark.reliability,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("transformers", "accelerate"))),
        reason=f"the real Trainer is not installed: pip install {PINNED}",
    ),
]

Tree = frozenset[tuple[str, str]]
"""The files of one save with the digests of their bytes."""


def of_checkpoint(name: str, files: dict[str, str]) -> Tree:
    return frozenset((f"{name}/{file}", digest) for file, digest in files.items())


@cache
def trainers() -> Nursery:
    return Nursery("watch.hf_trainer")


class Training:
    """hf_trainer.py as it is killed and started again, and every save that it has finished."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ledger = root.parent / "ledger"
        self.ledger.touch()
        self.generation = self.cut_short = self.untold = 0
        self._untold: dict[Tree, str] = {}
        self._begun = 0.0
        self._process: Forked | None = None

    def start(self, back: int) -> None:
        self.generation += 1
        self._begun = time.time()
        with (self.root.parent / "trainer.log").open("ab") as log:
            self._process = trainers().start(
                [
                    *("watch.hf_trainer", f"--root={self.root}", f"--ledger={self.ledger}"),
                    *(f"--generation={self.generation}", f"--save-steps={SAVE_STEPS}"),
                    *(f"--limit={LIMIT}", f"--back={back}", f"--pause={PAUSE_SECONDS}"),
                ],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """Kill it; what it has left is judged by loading it, unless it is in the ledger."""
        from watch.hf_trainer import whole

        self.assert_lives()
        self.end()
        told = self.saves()
        for path in self.root.glob("checkpoint-*"):
            tree = of_checkpoint(path.name, tree_of(path))
            if tree in told:
                continue
            own = all(file.stat().st_mtime >= self._begun for file in path.iterdir())
            if own and whole(path):  # it died between the end of the save and its line
                self.untold += 1
                self._untold[tree] = path.name
            else:
                self.cut_short += 1

    def assert_lives(self) -> None:
        log = self.root.parent / "trainer.log"
        assert self._process is not None
        assert self._process.poll() is None, log.read_text()[-3000:]

    def end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def saves(self) -> dict[Tree, str]:
        """Every finished save of every generation, with the name of its directory."""
        lines = self.ledger.read_text().split("\n")[:-1]  # the last may be cut short
        found = [json.loads(line) for line in lines]
        return {of_checkpoint(one["name"], one["files"]): one["name"] for one in found} | (
            self._untold
        )

    def await_save(self, *, amid: bool) -> None:
        """Wait for one more save: until it is finished, or only until it has begun."""
        before, seen = len(self.saves()), {path.name for path in self.root.iterdir()}

        def saved() -> bool:
            self.assert_lives()
            begun = {path.name for path in self.root.iterdir()} - seen
            return len(self.saves()) > before or (amid and bool(begun))

        patiently(saved, "the Trainer saves")


def test_no_kill_makes_it_adopt_an_incomplete_one_of_a_real_trainer(tmp_path: Path) -> None:
    pair = Pair(tmp_path, "trainer")
    chance, store, root = pair.chance, pair.store, pair.root
    training = Training(root)
    training.start(0)

    def training_again() -> None:
        training.kill()
        training.start(chance.randrange(3))

    try:
        for number in range(scaled(4, 50)):
            who, watch = pair.whose_turn(number), pair.watch
            if chance.random() < 0.9:
                watch.await_event("watching")
                training.await_save(amid=False)
            if who != "trainer" and chance.random() < 0.7:
                before = len(watch.events("watch_adopting"))
                patiently(partial(more_than, before, watch), "it adopts")  # kill amid this
            elif who != "watch" and chance.random() < 0.7:
                training.await_save(amid=True)
            time.sleep(chance.random() * 0.15)
            pair.kill(who, training_again)
        training.await_save(amid=False)
        training.kill()
        finished = training.saves()
        trees = [of_checkpoint(path.name, tree_of(path)) for path in root.iterdir()]
        last = {tree for tree in trees if tree in finished}
        assert last
        found = dict[str, Tree]()
        patiently(lambda: last <= adopted(store, found), f"all are adopted, seed {pair.seed}")
    finally:
        pair.watch.kill()
        training.end()
    adopted(store, found)
    judge(found, training, pair)


def more_than(before: int, watch: Watch) -> bool:
    assert watch.process.poll() is None, watch.log.read_text()[-3000:]
    return len(watch.events("watch_adopting")) > before


def adopted(store: Path, found: dict[str, Tree]) -> set[Tree]:
    """Restore each committed step that is not in `found` yet; returns all that are."""
    for entry in commits_of(store) if store.exists() else ():
        if str(entry.id) not in found:
            found[str(entry.id)] = frozenset(restored(store, entry.id).items())
    return set(found.values())


def judge(found: dict[str, Tree], training: Training, pair: Pair) -> None:
    """Every step is one save that the Trainer has finished, byte for byte, and none twice."""
    seed, kills = pair.seed, pair.kills
    finished = training.saves()
    for step, tree in found.items():
        assert tree in finished, f"{step} is no finished save, seed {seed}: {sorted(tree)}"
        assert step.split(".")[1] == finished[tree].split("-")[1]
    assert len(set(found.values())) == len(found), f"one is there twice, seed {seed}"
    print(
        f"\nwatch beside a Trainer: {sum(kills.values())} kills {kills}, {training.generation} "
        f"generations, {len(finished)} saves finished, {training.untold} of them found after a "
        f"kill, {training.cut_short} left unfinished; {len(found)} adopted and restored byte by "
        f"byte, seed {seed}"
    )
