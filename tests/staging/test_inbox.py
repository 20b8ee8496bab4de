"""Tickets wake the daemon; the directories around them belong to one user, or are refused."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptmgr.errors import HostMemoryError
from ckptmgr.staging.inbox import BUFFERS, INBOX, InboxWatch, drop_ticket, prepare, take_tickets
from driven import until
from processes import needs_root

IDS = ["ab" * 16, "cd" * 16]


@pytest.fixture
def inbox(runtime: Path) -> Path:
    prepare(runtime)
    return runtime / INBOX


def test_tickets_name_their_buffers_and_are_taken_once(runtime: Path, inbox: Path) -> None:
    assert take_tickets(runtime) == set()
    for buffer_id in (*IDS, IDS[0]):
        drop_ticket(runtime, buffer_id)
    assert len(list(inbox.iterdir())) == 3
    assert take_tickets(runtime) == set(IDS)
    assert list(inbox.iterdir()) == []


def test_a_ticket_in_the_making_is_left_alone(runtime: Path, inbox: Path) -> None:
    """Its writer was killed before the rename, or will rename it in a moment."""
    (inbox / f".{IDS[0]}.12345678").touch()
    assert take_tickets(runtime) == set()
    assert len(list(inbox.iterdir())) == 1


def test_a_missing_inbox_is_an_error_that_names_it(runtime: Path, inbox: Path) -> None:
    shutil.rmtree(inbox)
    with pytest.raises(HostMemoryError, match="ticket can not be dropped") as caught:
        drop_ticket(runtime, IDS[0])
    assert caught.value.subject == str(inbox)


def test_every_ticket_wakes(runtime: Path, inbox: Path) -> None:
    woken = threading.Semaphore(0)
    watch = InboxWatch(runtime, woken.release)
    try:
        for _ in range(20):
            drop_ticket(runtime, IDS[0])
            assert woken.acquire(timeout=60)
            assert take_tickets(runtime) == {IDS[0]}
    finally:
        watch.close()


def test_many_tickets_from_many_threads_are_all_seen(runtime: Path, inbox: Path) -> None:
    found: set[str] = set()
    wanted = {f"{n:032x}" for n in range(400)}
    watch = InboxWatch(runtime, lambda: found.update(take_tickets(runtime)))
    pieces = [sorted(wanted)[n::4] for n in range(4)]

    def drop(ids: list[str]) -> None:
        for one in ids:
            drop_ticket(runtime, one)

    threads = [threading.Thread(target=drop, args=[ids]) for ids in pieces]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: found == wanted, "every ticket is seen")
    finally:
        watch.close()


def test_nothing_wakes_after_close(runtime: Path, inbox: Path) -> None:
    woken = threading.Event()
    InboxWatch(runtime, woken.set).close()
    drop_ticket(runtime, IDS[0])
    assert not woken.wait(0.2)
    assert take_tickets(runtime) == {IDS[0]}  # the directory is the truth


# ---- whose directories ------------------------------------------------------


def test_directories_are_made_private_and_taken_as_they_are(runtime: Path) -> None:
    shutil.rmtree(runtime)
    old = os.umask(0)
    try:
        prepare(runtime)
        prepare(runtime)
    finally:
        os.umask(old)
    for path in (runtime, runtime / INBOX, runtime / BUFFERS):
        assert path.stat().st_mode & 0o7777 == 0o700


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


def readable(path: Path) -> None:
    path.mkdir(mode=0o700)
    path.chmod(0o750)


def a_file(path: Path) -> None:
    path.touch(mode=0o700)


def foreign(path: Path) -> None:
    needs_root()
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)


@pytest.mark.parametrize("spoil", [link, readable, a_file, foreign])
@pytest.mark.parametrize("name", [".", INBOX, BUFFERS])
def test_what_somebody_else_made_is_refused(
    runtime: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    inner = runtime / "run"
    path = inner / name
    if name != ".":
        inner.mkdir(mode=0o700)
    spoil(path)
    with pytest.raises(HostMemoryError) as caught:
        prepare(inner)
    assert caught.value.subject == str(path)
    assert caught.value.hint


def test_a_path_too_long_for_a_socket_is_refused_by_name(runtime: Path) -> None:
    deep = runtime / ("x" * 100)
    with pytest.raises(HostMemoryError, match="too long") as caught:
        prepare(deep)
    assert "CKPTMGR_RUNTIME_DIR" in caught.value.hint
    assert not deep.exists()
