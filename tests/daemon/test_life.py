"""The daemon's life: one per directory, drains when asked, ends when idle, costs nothing idle."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from called import call
from ckptmgr.errors import HostMemoryFullError
from ckptmgr.metrics import Metrics
from ckptmgr.staging.control import Done, Load, Release, Restored
from ckptmgr.staging.inbox import BUFFERS, SOCKET
from ckptmgr.staging.launch import connect
from ckptmgr.types import Outcome
from crash.peek import slots_below
from driven import Daemon, Rank, Trainer, until
from rigged import Rig

STEP_ONE = "data/00000001/000000000001/"


def commit_of(rig: Rig, step: int, attempt: int = 1) -> Path:
    return rig.path / f"commit/{attempt:08d}/{step:012d}"


def buffers(runtime: Path) -> list[str]:
    return sorted(os.listdir(runtime / BUFFERS))


def test_a_daemon_that_is_ended_with_snapshots_left_says_where_they_are(
    runtime: Path, rig: Rig
) -> None:
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        rig.obey(("*", "", "dead"))
        rank.save(1)
        ended = call("drain", "--timeout", "0", "--stop", runtime=runtime)
        assert ended.status == 1
        assert "finds them in host memory" in ended.err
        rig.obey()


# ---- one daemon -------------------------------------------------------------


def test_a_second_daemon_is_refused_and_says_what_to_do(runtime: Path) -> None:
    with Daemon(runtime) as first:
        second = Daemon(runtime, wait=False)
        assert second.process.wait(60) == 1
        auto = Daemon(runtime, program=["ckptmgr.daemon"], wait=False)
        assert auto.process.wait(60) == 0  # a rank that lost the race to start one
        assert first.status()["pid"] == first.process.pid
        lines = [line for line in first.log.read_text().splitlines() if line[0] != "{"]
    assert lines == [
        f"ckptmgr: {runtime}: another daemon serves this runtime directory",
        "hint: Use that one (`ckptmgr status`), or set another CKPTMGR_RUNTIME_DIR.",
    ]


def test_a_dead_daemons_lock_is_free(runtime: Path) -> None:
    with Daemon(runtime) as first:
        first.end(signal.SIGKILL)
        with Daemon(runtime) as second:
            assert second.status()["pid"] == second.process.pid


# ---- the end ----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_first(runtime: Path, rig: Rig, number: int) -> None:
    rig.obey(("put_new", STEP_ONE, "hold"))
    with Daemon(runtime) as daemon, Trainer.of(runtime, rig, steps=1) as trainer:
        trainer.await_event("finished")
        until(lambda: rig.asked("put_new", STEP_ONE), "the write began")
        trainer.kill()
        daemon.process.send_signal(number)
        assert daemon.await_event("draining")["undecided"] == 1
        assert not commit_of(rig, 1).exists()
        rig.obey()
        assert daemon.process.wait(60) == 0
        assert commit_of(rig, 1).exists()
        names = [e["event"] for e in daemon.events()]
        assert names.index("committed") < names.index("drained") < names.index("ended")
        assert "Traceback" not in daemon.log.read_text()
        assert not (runtime / SOCKET).exists()


def test_it_does_not_end_while_something_is_undecided(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", STEP_ONE, "hold"))
    with Daemon(runtime, "--idle-seconds=2") as daemon:
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
        daemon.await_event("trainer_died")
        time.sleep(3.0)
        assert not daemon.gone(), daemon.log.read_text()
        rig.obey()
        assert daemon.process.wait(60) == 0
        names = [e["event"] for e in daemon.events()]
        assert names.index("committed") < names.index("idle")


def test_it_does_not_end_while_a_trainer_is_there(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime, "--idle-seconds=2") as daemon, Rank(runtime, rig.url):
        time.sleep(3.0)
        assert not daemon.gone()


# ---- idle -------------------------------------------------------------------


def wakes(pid: int) -> int:
    """How often the threads of a process went to sleep by themselves, which is to be woken."""
    lines = [
        line
        for status in Path(f"/proc/{pid}/task").glob("*/status")
        for line in status.read_text().splitlines()
    ]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


def ticks(pid: int) -> int:
    """CPU time of a process in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_an_idle_daemon_uses_no_cpu(runtime: Path, rig: Rig) -> None:
    """With a trainer attached and everything committed, as between two snapshots."""
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        time.sleep(1.0)
        pid, seconds = daemon.process.pid, 5.0
        before, slept = ticks(pid), wakes(pid)
        time.sleep(seconds)
        used, woken = ticks(pid) - before, wakes(pid) - slept
        print(f"idle for {seconds} s: {used * 10} ms of CPU, woken {woken} times")
        assert used <= 3
        assert woken <= 2 * seconds  # two threads that look at most once a second


def test_a_dead_trainer_whose_worker_keeps_the_socket_costs_nothing(
    runtime: Path, rig: Rig
) -> None:
    """A forked data loader worker holds the connection open; the trainer itself is gone."""
    with Daemon(runtime) as daemon, Trainer.of(runtime, rig, steps=1, fork=True) as trainer:
        trainer.await_event("finished")
        children = Path(f"/proc/{trainer.process.pid}/task/{trainer.process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()]
        assert workers
        trainer.kill()
        try:
            daemon.await_event("trainer_died")
            assert daemon.status()["trainers"] == 0
            daemon.await_event("committed")  # to store it is no idleness
            before = ticks(daemon.process.pid)
            time.sleep(2.0)
            assert ticks(daemon.process.pid) - before <= 3
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGKILL)


# ---- memory -----------------------------------------------------------------


def test_a_clean_end_frees_the_memory(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon:
        rank = Rank(runtime, rig.url)
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rank.close(clean=True)
        daemon.await_event("freed")
        assert buffers(runtime) == []


def test_a_crash_keeps_the_memory_until_it_is_due(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime, environment=rig.environment(CKPTMGR_MEMORY_SECONDS="3")) as daemon:
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
        daemon.await_event("committed")
        assert len(buffers(runtime)) == 1
        daemon.await_event("freed")
        assert buffers(runtime) == []


def test_undecided_memory_is_not_freed(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", STEP_ONE, "hold"))
    with Daemon(runtime, environment=rig.environment(CKPTMGR_MEMORY_SECONDS="0.1")) as daemon:
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
        daemon.await_event("trainer_died")
        time.sleep(3.0)
        assert len(buffers(runtime)) == 1
        rig.obey()
        daemon.await_event("committed")
        daemon.await_event("freed")


def is_stopped(pid: int) -> bool:
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}


def test_a_trainer_that_dies_without_a_connection_is_noticed(runtime: Path, rig: Rig) -> None:
    """It had not yet attached to the daemon that followed a killed one."""
    environment = rig.environment(CKPTMGR_MEMORY_SECONDS="0.1")
    # The daemon comes first: a trainer that finds none starts one of its own, which would take the
    # place of the second.
    first = Daemon(runtime, environment=environment)
    with first, Trainer.of(runtime, rig, steps=1) as trainer:
        trainer.await_event("finished")
        first.await_event("committed")
        trainer.process.send_signal(signal.SIGSTOP)
        until(lambda: is_stopped(trainer.process.pid), "every thread of the trainer stops")
        first.end(signal.SIGKILL)
        with Daemon(runtime, environment=environment) as second:
            second.await_event("adopted")
            assert second.status()["trainers"] == 1
            trainer.kill()
            second.await_event("trainer_died")
            second.await_event("freed")


def test_a_larger_buffer_that_can_not_be_had_leaves_the_old_one(runtime: Path, rig: Rig) -> None:
    """A PiB fits into no machine and no address space, so nothing of it is ever allocated."""
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        before = buffers(runtime)
        with pytest.raises(HostMemoryFullError, match="are available"):
            rank.link.grow(1 << 20, 1 << 50)
        time.sleep(3.0)  # longer than the daemon's look for buffers to free
        assert buffers(runtime) == before
        rank.save(2)
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert daemon.status()["trainers"] == 1


def jobs(daemon: Daemon) -> list[str]:
    return [job["url"] for job in daemon.status()["jobs"]]


def save_and_leave(runtime: Path, rig: Rig, step: int) -> None:
    rank = Rank(runtime, rig.url)
    rank.link.ask(Release(), Done)  # else a prefetch may be in the slot
    rank.save(step)
    assert rank.wait(step).outcome == Outcome.COMMITTED
    rank.close(clean=True)


def test_a_store_that_nobody_uses_any_more_is_closed(runtime: Path, rig: Rig) -> None:
    """A daemon of many jobs does not keep the threads and connections of all of them."""
    with Daemon(runtime) as daemon:
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
        daemon.await_event("committed")
        time.sleep(3.0)  # longer than the daemon's look
        assert jobs(daemon) == [rig.url], "the buffer of the dead trainer is still there"
        assert not rig.asked("aclose", "")
        save_and_leave(runtime, rig, 2)  # takes that buffer
        until(lambda: not jobs(daemon), "the job is closed")
        until(lambda: rig.asked("aclose", "") == 1, "and its store")
        save_and_leave(runtime, rig, 3)


def test_a_reader_keeps_its_store_open_as_long_as_it_is_there(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon:
        save_and_leave(runtime, rig, 1)
        until(lambda: not jobs(daemon), "the job is closed")
        with connect(runtime) as client:
            assert client.ask(Load(url=rig.url), Restored).step == 1
            time.sleep(3.0)
            assert jobs(daemon) == [rig.url]
        until(lambda: not jobs(daemon), "the job is closed again")


# ---- metrics ----------------------------------------------------------------


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        return str(reply.read().decode())


def test_every_metric_is_served(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        text = scrape(daemon.status()["metrics_port"])
    names = {family.name for family in Metrics().registry.collect()}
    assert len(names) >= 13
    missing = {name for name in names if f"# HELP {name}" not in text}
    assert not missing
    lines = re.sub(r'job="[0-9a-f]{8}"', 'job=""', text).splitlines()
    assert 'ckptmgr_last_commit_step{job=""} 1.0' in lines
    assert 'ckptmgr_raw_bytes_total{job=""} 1.048576e+06' in lines
    assert "ckptmgr_trainers 1.0" in lines
    assert rig.url not in text


def test_the_queue_and_the_failures_are_counted(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", "data/", "full"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        rank.save(2)
        port = daemon.status()["metrics_port"]
        queue = re.compile(r'ckptmgr_queue_snapshots\{job="\w+"\} 2\.0\n')
        until(lambda: queue.search(scrape(port)), "both snapshots are in the queue")
        failed = re.compile(r'ckptmgr_failures_total\{job="\w+",kind="StoreFullError"\}')
        until(lambda: failed.search(scrape(port)), "the failure is counted by kind")
        rig.obey()
        empty = re.compile(r'ckptmgr_queue_snapshots\{job="\w+"\} 0\.0\n')
        until(lambda: empty.search(scrape(port)), "the queue is empty")


def test_metrics_are_on_loopback_only(runtime: Path) -> None:
    with Daemon(runtime) as daemon:
        port = daemon.status()["metrics_port"]
        listening = f":{port:04X} "
        tables = [Path("/proc/net/tcp").read_text(), Path("/proc/net/tcp6").read_text()]
        lines = [line for text in tables for line in text.splitlines() if listening in line[:25]]
        assert [line.split()[1] for line in lines if line.split()[3] == "0A"] == [
            f"0100007F:{port:04X}"
        ]


def test_a_taken_metrics_port_stops_nothing(runtime: Path) -> None:
    with Daemon(runtime) as first:
        other = runtime / "other"
        other.mkdir(mode=0o700)
        port = first.status()["metrics_port"]
        with Daemon(other, f"--metrics-port={port}") as second:
            assert second.await_event("metrics_off")["port"] == port
            assert second.status()["metrics_port"] == -1


def test_metrics_can_be_switched_off(runtime: Path) -> None:
    with Daemon(runtime, "--metrics-port=-1") as daemon:
        assert daemon.status()["metrics_port"] == -1
        assert not daemon.events("metrics_off")


def test_undecided_snapshots_outlive_a_daemon_that_can_not_drain(runtime: Path, rig: Rig) -> None:
    """Its patience is bounded; what is left stays in host memory for the next daemon."""
    rig.obey(("put_new", STEP_ONE, "hold"))
    with Daemon(runtime) as daemon:
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
        daemon.end(signal.SIGKILL)
    assert [s.id for s in slots_below(runtime) if s.undecided] == [(1, 1)]
    rig.obey()
    with Daemon(runtime):
        until(lambda: commit_of(rig, 1).exists(), "the next daemon commits it")
