"""What the daemon serves over HTTP, to whom, and what it tells of its jobs."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import DaemonSettings
from ckptmgr.daemon import http as web
from ckptmgr.daemon.glance import Glance, Shown
from ckptmgr.daemon.history import LATELY_SECONDS, PASSAGES_MAX, History, Passage
from ckptmgr.daemon.page import merged, usual_interval, without_homes
from ckptmgr.daemon.peer import uid_in
from ckptmgr.daemon.service import Service
from ckptmgr.errors import StoreUnreachableError
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import Outcome, StepId, StepState
from driven import Daemon, Rank, until
from processes import needs_root
from rigged import Rig


def ask(
    daemon: Daemon, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case, body."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.status()["metrics_port"])
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return (
            reply.status,
            {key.lower(): value for key, value in reply.getheaders()},
            reply.read(),
        )
    finally:
        connection.close()


# ---- probes -----------------------------------------------------------------


def test_a_daemon_is_ready_while_its_stores_are(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon:
        until(lambda: ask(daemon, "/readyz")[0] == 200, "it is ready")
        assert json.loads(ask(daemon, "/healthz")[2]) == {"healthy": True}
        rig.obey(("put_new", "data/", "dead"))
        with Rank(runtime, rig.url) as rank:
            rank.save(1)
            until(lambda: ask(daemon, "/readyz")[0] == 503, "its store is dead")
            _, _, body = ask(daemon, "/readyz")
            (why,) = json.loads(body)["why"]
            assert why.endswith(" fails: StoreUnreachableError")
            assert b"rigged" not in body, "probes tell no names"
            assert ask(daemon, "/healthz")[0] == 200, "which is no reason to kill it"
            rig.obey()
            until(lambda: ask(daemon, "/readyz")[0] == 200, "the store is back")
            assert rank.wait(1).outcome == Outcome.COMMITTED


async def test_an_event_loop_that_hangs_is_told(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "LOOP_SECONDS_MAX", 0.1)
    service = Service(DaemonSettings(runtime))
    server = web.WebServer(service, 0)
    environ = {"PATH_INFO": "/healthz", "REQUEST_METHOD": "GET", "HTTP_HOST": "localhost"}
    try:
        answered = await asyncio.to_thread(server._answer, environ)
        assert answered.status == 200
        asking = asyncio.get_running_loop().run_in_executor(None, server._answer, environ)
        time.sleep(0.5)  # noqa: ASYNC251 - the loop hangs meanwhile
        assert (await asking).status == 503
    finally:
        server.close()


# ---- who gets what ----------------------------------------------------------


def test_what_is_served(runtime: Path, store_url: str) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        for path in ("/", "/page.css", "/page.js", "/icon.svg", "/page.json", "/status.json"):
            status, headers, body = ask(daemon, path)
            assert (status, len(body) > 100) == (200, True), path
            assert ask(daemon, path, "HEAD")[0] == 200
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert not [name for name in headers if name.startswith("access-control")]
        told = json.loads(ask(daemon, "/status.json")[2])
        assert told.keys() == daemon.status().keys()
        assert told["jobs"][0]["last_commit"] == "1.1"
        assert ask(daemon, "/metrics")[0] == 200
        assert ask(daemon, "/nothing")[0] == 404
        assert ask(daemon, "/../status.json")[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(daemon, "/status.json", method)[0] == 405


@pytest.mark.parametrize(
    "host", ["rebound.example", "127.0.0.1.example", "localhost.", "127.0.0.1:x", "", "[::2]"]
)
def test_a_page_of_another_name_gets_nothing(runtime: Path, host: str) -> None:
    with Daemon(runtime) as daemon:
        for path in ("/", "/status.json", "/page.json", "/readyz"):
            assert ask(daemon, path, Host=host)[0] == 421
        for ours in ("localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:9"):
            assert ask(daemon, "/status.json", Host=ours)[0] == 200


AS_NOBODY = """
import encodings.idna, http.client, json, os, sys  # all of it, while its files may be read
os.setgroups([]); os.setgid(65534); os.setuid(65534)

def status(path):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("GET", path)
    return connection.getresponse().status

print(json.dumps({path: status(path) for path in sys.argv[2:]}))
"""


def test_another_user_of_the_host_gets_no_names(runtime: Path) -> None:
    needs_root()
    closed = ("/", "/page.js", "/page.json", "/status.json")
    open_to_all = ("/metrics", "/healthz", "/readyz")
    with Daemon(runtime) as daemon:
        port = str(daemon.status()["metrics_port"])
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, port, *closed, *open_to_all],
            capture_output=True,
            check=True,
        )
    found = json.loads(done.stdout)
    assert {path: found[path] for path in closed} == dict.fromkeys(closed, 403)
    assert {path: found[path] for path in open_to_all} == dict.fromkeys(open_to_all, 200)


def test_the_kernel_says_who_is_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, peer = server.accept()
        with accepted:
            own = accepted.getsockname()
            table = Path("/proc/self/net/tcp").read_text()
            assert uid_in(table, peer, own) == os.getuid()
            assert uid_in(table, peer, ("127.0.0.1", own[1] ^ 1)) is None
            client.close()
            gone = Path("/proc/self/net/tcp").read_text()
            assert uid_in(gone, peer, own) is None, "what is closed is nobody's, and not root's"


def test_silent_connections_are_few_and_end_no_daemon(runtime: Path) -> None:
    with Daemon(runtime) as daemon:
        port = daemon.status()["metrics_port"]
        many = 3 * web.REQUESTS_AT_ONCE_MAX
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(many)]
        threads = Path(f"/proc/{daemon.process.pid}/task")
        assert len(list(threads.iterdir())) < web.REQUESTS_AT_ONCE_MAX + 30
        for one in silent:
            one.close()
        until(lambda: _answers(daemon), "it answers again")
        assert not daemon.events("fault")


async def test_a_connection_that_says_a_byte_from_time_to_time_is_closed(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that hold a place there are few, and any user of the host may connect."""
    monkeypatch.setattr(web, "REQUEST_SECONDS_MAX", 0.1)
    server = web.WebServer(Service(DaemonSettings(runtime)), 0)
    try:
        assert await asyncio.to_thread(_closed_amid, b"GET /metrics HTTP/1.1\r\nX: ", server.port)
        assert await asyncio.to_thread(_closed_amid, b"GET /met", server.port)
    finally:
        server.close()


def _closed_amid(request: bytes, port: int) -> bool:
    """Whether a request is closed that goes on a byte at a time."""
    with socket.create_connection(("127.0.0.1", port)) as drip:
        drip.sendall(request)
        drip.settimeout(0.02)  # between two bytes
        for _ in range(200):
            try:
                drip.sendall(b"a")
                return drip.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                return True
    return False


def _answers(daemon: Daemon) -> bool:
    try:
        return ask(daemon, "/healthz")[0] == 200
    except (ConnectionError, http.client.HTTPException):
        return False


# ---- what is told -----------------------------------------------------------


def test_an_outage_with_a_spool_and_a_newer_attempt_are_told(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    environment = rig.environment(CKPTMGR_SPOOL_SECONDS="0.3")
    with (
        Daemon(runtime, f"--spool={tmp_path}/spool", environment=environment) as daemon,
        Rank(runtime, rig.url) as rank,
    ):
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("put_new", "data/", "dead"))
        rank.save(2)
        spooled = "The store takes nothing; the spool keeps everything."
        until(lambda: page_of(daemon)["verdict"]["text"] == spooled, "it is spooled, and said")
        shown = page_of(daemon)
        assert "spool" in shown["steps"][-1]["tiers"]
        assert "is dead by the test's will" in shown["troubles"][0]["why"]
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED
        until(lambda: page_of(daemon)["verdict"]["level"] == "good", "it is over")
        (runtime / "host2").mkdir(mode=0o700)
        with Daemon(runtime / "host2", environment=environment):
            with Rank(runtime / "host2", rig.url) as newer:
                newer.save(1)
                assert newer.wait(1).outcome == Outcome.COMMITTED
            rank.save(3)
            assert rank.wait(3).outcome == Outcome.ABORTED
            shown = page_of(daemon)
            assert shown["verdict"]["text"] == "A newer attempt of this job has taken over."
            assert shown["troubles"][0]["where"] == "rank 0"
            (given_up,) = (one for one in shown["steps"] if one["step"] == "1.3")
            assert (given_up["state"], given_up["tiers"]) == ("aborted", ["memory"])
            assert "attempt 2 is active" in given_up["why"]


def page_of(daemon: Daemon) -> dict[str, Any]:
    """What the page shows of the only job."""
    (job,) = json.loads(ask(daemon, "/page.json")[2])["jobs"]
    return dict(job)


def test_no_home_directory_is_shown(runtime: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / "alice"
    environment = {**os.environ, "HOME": str(home)}
    with (
        Daemon(runtime, environment=environment) as daemon,
        Rank(runtime, f"file://{home}/run7") as rank,
    ):
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        page = json.loads(ask(daemon, "/page.json")[2])
    assert page["jobs"][0]["url"] == "file://~/run7"
    assert str(home) not in json.dumps(page)
    told = without_homes({"/root/a": ["/home/bob/x: is full", "/rooted", "/srv/home"]}, "/")
    assert told == {"~/a": ["~/x: is full", "/rooted", "/srv/home"]}


def committed(step: int, attempt: int = 1, **more: Any) -> Decision:
    return Decision(
        "COMMIT", attempt, step, world=1, manifests=("00" * 32,), sealed_at=10.0 * step, **more
    )


def test_the_history_is_bounded_and_a_failure_passes() -> None:
    now = [1000.0]
    history = History(lambda: now[0])
    for step in range(2 * PASSAGES_MAX):
        history.committed(committed(step))
    assert [p.id.step for p in history.passages] == list(range(PASSAGES_MAX, 2 * PASSAGES_MAX))
    history.failed("StoreFullError", "full")
    now[0] += 60
    history.failed("StoreUnreachableError", "dead")
    assert history.failure is not None
    assert (history.failure.why, history.failure.since) == ("dead", 1000.0)
    history.moved()
    assert history.failure is None
    history.failed("StoreFullError", "full")
    now[0] += LATELY_SECONDS
    assert history.failure is None


def test_what_was_seen_is_completed_by_the_store() -> None:
    seen = Passage(StepId(1, 3), StepState.COMMITTED, raw_bytes=7)
    step = [StepId(1, number) for number in range(6)]
    shown = Shown(
        1.0,
        retired=frozenset(step[:2]),
        verified=frozenset({step[1], step[3]}),
        decisions={
            step[1]: committed(1),
            step[2]: Decision("ABORT", 1, 2, why="gone"),
            step[3]: committed(3, raw_bytes=9),
        },
    )
    found = merged([seen, Passage(step[5])], shown, {}, [step[4]])
    assert [(p.id.step, p.state.value) for p in found] == [
        (1, "retired"),
        (2, "aborted"),
        (3, "verified"),
        (4, "undecided"),
        (5, "undecided"),
    ]
    assert found[2].raw_bytes == 7, "what the daemon has seen is not overwritten"
    assert seen.state is StepState.COMMITTED, "and stays as it was"


def test_the_usual_interval_is_a_median_of_one_attempt() -> None:
    def steps(attempt: int, times: list[float]) -> list[dict[str, Any]]:
        return [{"step": f"{attempt}.{n}", "sealed_at": at} for n, at in enumerate(times)]

    assert usual_interval([]) is None
    assert usual_interval(steps(1, [0.0, 300.0])) is None
    late = [0.0, 300.0, 600.0, 900.0, 5000.0]
    assert usual_interval(steps(1, late)) == 300.0
    assert usual_interval([*steps(1, late), *steps(2, [6000.0, 6010.0, 6020.0])]) == 10.0


class _CountingStore(MemoryStore):
    dead = False
    asked = 0

    async def list(self, prefix: str) -> list[str]:
        self.asked += 1
        if self.dead:
            raise StoreUnreachableError("dead", subject=prefix)
        return await super().list(prefix)


async def test_the_store_is_looked_into_seldom_and_never_while_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, history = _CountingStore("memory://glance"), History()
    glance = Glance(Catalog(store), history)
    for _ in range(50):
        glance.soon()
    assert glance._task is not None
    await glance._task
    assert (store.asked, glance.shown.at > 0) == (5, True)
    glance.soon()
    await asyncio.sleep(0)
    assert store.asked == 5, "not before it is due"
    glance._due_at = 0.0
    history.failed("StoreUnreachableError", "dead")
    glance.soon()
    await asyncio.sleep(0)
    assert store.asked == 5, "nor while saving fails"
    history.moved()
    store.dead = True
    glance.soon()
    await glance._task
    assert glance.why.startswith("commit/: dead")
    assert glance.shown.at > 0, "what was known stays"
    await glance.aclose()
