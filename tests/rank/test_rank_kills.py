"""kill -9 of ranks and daemons of jobs of many ranks: bit for bit as if nobody had killed them."""

from __future__ import annotations

import json
import random
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import open_private_dir
from crash.storm import INSIDE, BrokenPromiseError, Storm
from processes import end_processes_of
from rank.havoc import Judge, KilledJob, Plan, truth_of
from scale import scaled

pytestmark = [pytest.mark.kill, pytest.mark.reliability]

KINDS = ["one rank", "all ranks", "one daemon", "all daemons", "everything"]

PLANS = {
    "ddp": (Plan("ddp", 2, 100), 7, 70),
    "fsdp2": (Plan("fsdp2", 2, 60), 5, 70),
    "tp_fsdp2": (Plan("tp_fsdp2", 4, 30), 1, 60),
    "pipeline": (Plan("pipeline", 2, 100), 7, 70),
    "ddp_eight": (Plan("ddp", 8, 24), 0, 20),
    "fsdp2_eight": (Plan("fsdp2", 8, 24), 0, 20),
    "tp_fsdp2_eight": (Plan("tp_fsdp2", 8, 24), 0, 20),
}
"""Parallelism, kills in the sample, kills in `make reliability`: 20 and 330."""

CHAIN = 5
"""Kills over one store, each followed by a resume that is judged; then another store."""

COPY_SECONDS, PERSIST_SECONDS, RESTORE_SECONDS, ANY_SECONDS = 0.003, 0.08, 0.1, 0.3
"""Spans in which an aimed kill falls at random; about as long as what is aimed at."""


@dataclass(slots=True)
class Table:
    """What was done and what came of it, by kind of kill."""

    runs: Counter[str] = field(default_factory=Counter)
    places: Counter[tuple[str, str]] = field(default_factory=Counter)
    facts: dict[str, Counter[str]] = field(default_factory=dict)

    def show(self, plan: Plan) -> None:
        """Print it; the three sources are counted by rank, resumes after the last kill included."""
        print("| parallelism | killed | runs | inside | memory | store | fresh | lost | faults |")
        for kind, runs in self.runs.items():
            found = {p: n for (k, p), n in sorted(self.places.items()) if k == kind}
            inside = sum(n for place, n in found.items() if place in INSIDE)
            where = ", ".join(f"{place} {n}" for place, n in found.items())
            facts = self.facts[kind]
            print(
                f"| {plan} | {kind} | {runs} | {inside} | {facts['from memory']} "
                f"| {facts['from store']} | {facts['from nothing']} | {facts['lost']} | 0 | {where}"
            )


@contextmanager
def hosts_of(plan: Plan, root: Path, chance: random.Random, url: str) -> Iterator[list[Storm]]:
    """A runtime directory for each host of the job, and one store."""
    name = secrets.token_hex(4)
    runtimes = [Path(f"/dev/shm/ckptmgr-havoc-{name}-{at}") for at in range(plan.hosts)]
    for runtime in runtimes:
        open_private_dir(runtime)
    try:
        yield [Storm(root, runtime, chance, url=url) for runtime in runtimes]
    finally:
        for runtime in runtimes:
            end_processes_of(runtime)
            shutil.rmtree(runtime, ignore_errors=True)


def aim(one: KilledJob) -> None:
    """Bring the job to the aimed moment; a kill follows at once."""
    chance = one.random
    if one.is_fresh():
        event = chance.choice(["begun", "restoring", "restoring", "step", "step", "step"])
        one.await_event(event)
        if event != "step":
            time.sleep(chance.uniform(0, RESTORE_SECONDS if event == "restoring" else ANY_SECONDS))
            return
    target = chance.choice(["copy", "persist", "any"])
    one.await_event("step", chance.randint(1, 8))
    if target == "copy":
        one.await_event("due")
        time.sleep(chance.uniform(0, COPY_SECONDS))
    elif target == "persist":
        one.await_event("taken")
        time.sleep(chance.uniform(0, PERSIST_SECONDS))
    else:
        time.sleep(chance.uniform(0, ANY_SECONDS))


def strike(one: KilledJob, kind: str, facts: Counter[str]) -> str:
    """One kill and the next start; where it landed, or nothing if the job had ended."""
    aim(one)
    if one.ended():
        return ""
    chance, one.judge.facts = one.random, facts
    if kind in ("one daemon", "all daemons"):
        hosts = one.hosts if kind == "all daemons" else [chance.choice(one.hosts)]
        if not one.kill_daemons(hosts):
            return ""
        place = one.place_of_kill()
        one.await_event("acked")  # the ranks go on with the next daemon
        return place
    victims: list[Any] = list(one.children)
    chance.shuffle(victims)
    for child in victims[:1] if kind == "one rank" else victims:
        child.kill()
    if kind == "everything":
        one.kill_daemons(one.hosts)
    place = one.place_of_kill()
    if kind == "one rank":
        time.sleep(chance.choice([0, chance.uniform(0, 0.4)]))  # until the launcher has noticed
    one.bury()
    if kind == "everything" and chance.random() < 0.5:
        for host in chance.choice([one.hosts, one.hosts[:1], one.hosts[1:]]):
            host.wipe_memory()
        one.judge.floor = max([(0, 0), *one.judge.acked])
    one.start()
    return place


def chain(
    plan: Plan,
    truth: list[list[dict[str, Any]]],
    root: Path,
    chance: random.Random,
    kills: list[str],
    table: Table,
    url: str,
) -> None:
    """Kill one job until `kills` is empty or CHAIN is reached, then let it end well."""
    root.mkdir()
    plan = replace(plan, hosts=chance.choice([1, 2, 2]))
    with hosts_of(plan, root, chance, url) as hosts:
        one = KilledJob(plan, chance, hosts, Judge(truth, root, Counter()))
        try:
            one.start()
            for _ in range(min(CHAIN, len(kills))):
                kind = kills[-1]
                place = strike(one, kind, table.facts.setdefault(kind, Counter()))
                if not place:
                    break
                kills.pop()
                table.runs[kind] += 1
                table.places[kind, place] += 1
            one.finish()
        finally:
            one.close()


@pytest.mark.timeout(scaled(600, 14400))
@pytest.mark.parametrize("name", PLANS)
def test_killed_ranks_and_daemons_change_no_bit(name: str, tmp_path: Path) -> None:
    plan, sample, full = PLANS[name]
    count = scaled(sample, full)
    if not count:
        pytest.skip("only with CKPTMGR_RELIABILITY=1")
    kill(plan, count, tmp_path)


def kill(plan: Plan, count: int, tmp_path: Path, url: str = "") -> None:
    """So many kills, over stores below `url`."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"{plan}: seed {seed}")
    chance = random.Random(seed)
    kills = [KINDS[at % len(KINDS)] for at in range(count)]
    chance.shuffle(kills)
    table, begun = Table(), time.monotonic()
    truth = truth_of(plan, tmp_path / "truth")
    at = 0
    while kills:
        place = url and f"{url}/{at}"
        chain(plan, truth, tmp_path / f"{at}", chance, kills, table, place)
        shutil.rmtree(tmp_path / f"{at}")
        at += 1
    print(f"{plan}: {count} kills over {at} stores in {time.monotonic() - begun:.0f} s")
    table.show(plan)
    assert table.runs.total() == count


STEP = {"event": "step", "step": 1, "ids": [3], "loss": "0x1p-1", "digest": "one"}
FRESH = {"event": "resumed", "id": [0, 0], "attempt": 1, "source": "", "skipped": []}
AGAIN = {"event": "resumed", "id": [1, 1], "attempt": 2, "source": "store", "skipped": []}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ([{**STEP, "ids": [4]}], "and not"),
        ([{**STEP, "digest": "other"}], "and not"),
        ([STEP, STEP], "and not"),
        ([STEP, {**AGAIN, "digest": "other"}], "with other bits"),
        ([STEP, {**AGAIN, "digest": "one", "skipped": [["1.1", "damaged"]]}], "skipped"),
        ([STEP, {**AGAIN, "digest": "none", "id": [1, 0]}], "another from"),
        ([STEP, {"event": "acked", "id": [1, 1]}, {**FRESH, "attempt": 3}], "was there"),
        ([STEP, {"event": "ended", "digest": "other"}], "ended with other bits"),
    ],
)
def test_the_oracle_has_teeth(tmp_path: Path, fault: list[dict[str, Any]], told: str) -> None:
    second = {"event": "step", "step": 2, "ids": [5], "loss": "0x1p-2", "digest": "two"}
    truth = [[{"event": "resumed", "digest": "none"}, STEP, second]] * 2
    judge = Judge(truth, tmp_path, Counter())
    begun = [{**FRESH, "digest": "none"}]
    other = [*begun, STEP, {**AGAIN, "digest": "one"}, second]
    (tmp_path / "0.said").write_text("".join(json.dumps(one) + "\n" for one in other))
    judge.read()
    lines = [*begun, *fault]
    (tmp_path / "1.said").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(BrokenPromiseError, match=told):
        judge.read()


@pytest.mark.parametrize("leaving", [False, True])
def test_what_ranks_that_leave_have_held_may_come_from_the_store(
    tmp_path: Path, leaving: bool
) -> None:
    """They give their memory back, and the last of them may be killed before all have ended."""
    begun = {"event": "begun", "pid": 1}
    judge = Judge([[{"event": "resumed", "digest": "none"}, STEP]], tmp_path, Counter())
    lines = [begun, {**FRESH, "digest": "none"}, STEP, *[{"event": "leaving"}] * leaving]
    lines += [{"event": "acked", "id": [1, 1]}]
    said = tmp_path / "0.said"
    said.write_text("".join(json.dumps(one) + "\n" for one in lines))
    judge.read()
    judge.hold({(1, 1)})
    with said.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in [begun, {**AGAIN, "digest": "one"}])
    with nullcontext() if leaving else pytest.raises(BrokenPromiseError, match="memory holds"):
        judge.read()
