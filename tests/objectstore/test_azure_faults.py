"""Azure's emulator behind a connection that fails.

Not among the faults: a byte of an upload that is another when it comes. Nothing of the request
covers the body, so that over http it is stored as it came; the hash of its chunk tells, as of any
damage.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from called import call
from ckptmgr.errors import EXIT_FELL_BACK
from ckptmgr.types import Outcome
from driven import Daemon, Rank
from objectstore.oracle import exact_commits
from objectstore.test_daemon import FAULTS as OF_SAVING
from objectstore.test_daemon import save_through
from objectstore.test_faults import FAULTS, meet
from servers.azurite import make_container, start_or_skip
from servers.buckets import Container
from servers.faultproxy import Fault, FaultProxy, Kind
from stores.rows import row

pytestmark = [pytest.mark.timeout(1800), *row("az:// on Azurite behind a fault proxy")]


@pytest.fixture(scope="module")
def azurite() -> Iterator[dict[str, str]]:
    """One emulator for all tests of this file."""
    with start_or_skip() as environment:
        yield environment


@pytest.fixture
def container(azurite: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Container:
    """A new container; the bare client reaches it directly."""
    for name, value in azurite.items():
        monkeypatch.setenv(name, value)
    name = f"test-{secrets.token_hex(6)}"
    make_container(azurite["AZURE_STORAGE_ENDPOINT"], name)
    return Container(name, azurite["AZURE_STORAGE_ENDPOINT"])


@pytest.fixture
def proxy(
    azurite: dict[str, str], container: Container, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """The environment leads through it."""
    host, account = azurite["AZURE_STORAGE_ENDPOINT"].rsplit("/", 1)
    with FaultProxy(int(host.rsplit(":", 1)[1])) as made:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{made.endpoint}/{account}")
        monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
        yield made


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "flip_up"])
async def test_whatever_fails_the_result_is_right(
    name: str, container: Container, proxy: FaultProxy
) -> None:
    await meet(name, f"az://{container.name}/run", container, proxy)


async def test_a_daemon_saves_through_every_fault_and_commits_nothing_wrong(
    runtime: Path, container: Container, proxy: FaultProxy, tmp_path: Path
) -> None:
    faults = [fault for fault in OF_SAVING.values() if fault.kind is not Kind.FLIP_UP]
    step = save_through(faults, runtime, f"az://{container.name}/run", proxy)
    found = await exact_commits(container, "run", tmp_path / "copy")
    assert found == [(1, number + 1) for number in range(step)]


def test_an_upload_of_which_a_byte_is_another_is_found_before_it_is_used(
    runtime: Path, container: Container, proxy: FaultProxy, tmp_path: Path
) -> None:
    url = f"az://{container.name}/run"
    with Daemon(runtime), Rank(runtime, url) as rank:
        for step in (1, 2):
            proxy.plan(*[Fault(Kind.FLIP_UP, "PUT", "/data/", times=1)] * (step == 2))
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
    assert proxy.struck == {Kind.FLIP_UP: 1}
    done = call("restore", url, "--to", tmp_path / "out", "--json")
    assert (done.status, done.document["id"]) == (EXIT_FELL_BACK, "1.1"), done.err
