"""The status page in a real browser, from a real daemon with real jobs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from called import call
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from page.browser import Browser, browser
from rigged import Rig

DAEMON_GONE = re.compile("ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE)")
"""What a browser says of a daemon that has ended, or ends while it answers."""

HOSTILE = '<img src=x onerror="document.title=1"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    """One browser for all tests."""
    with browser() as found:
        yield found


@pytest.fixture(autouse=True)
def quiet_page(page: Browser) -> Iterator[None]:
    """Whatever a test looks at: no complaint of the browser, no request to anybody else."""
    page.requests.clear()
    page.complaints.clear()
    yield
    page.open("about:blank")
    asked = [url for url in page.requests if url != "about:blank"]
    assert asked
    assert all(url.startswith("http://127.0.0.1:") for url in asked), asked
    # A test ends its daemon, and the page may ask it once more before it is left.
    assert not [line for line in page.complaints if not DAEMON_GONE.search(line)]


def look(page: Browser, daemon: Daemon, width: int = 1120, height: int = 900) -> None:
    page.screen(width, height)
    page.open(f"http://127.0.0.1:{daemon.status()['metrics_port']}/")


def cells(page: Browser, step: str) -> dict[str, str]:
    """Tier -> state, of a column of the time line."""
    chosen = f"""[...document.querySelectorAll('button[data-step="{step}"] [data-state]')]"""
    found: dict[str, str] = page.run(
        f"Object.fromEntries({chosen}.map(cell => [cell.dataset.tier, cell.dataset.state]))"
    )
    return found


def overflow(page: Browser) -> int:
    """By how many pixels the page is wider than its window."""
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    return int(page.run(wide))


def test_a_committed_step_is_on_the_time_line(page: Browser, runtime: Path, store_url: str) -> None:
    with Daemon(runtime) as daemon:
        look(page, daemon)
        page.await_text("No job yet")
        with Rank(runtime, store_url) as rank:
            page.await_text("No step is committed yet.", ".verdict")
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
            page.await_text("Commits come as usual.", ".verdict")
            page.await_text("1.1 committed · in memory, store · 1.0 MiB raw", ".chosen")
            assert cells(page, "1.1") == {"memory": "committed", "store": "committed"}
            assert page.text("h2") == "store"
            assert "step 1.1" in page.text(".figures")
            assert "1 of 1 alive" in page.text(".figures")
            assert page.run("document.querySelector('.job').dataset.level") == "good"


def test_what_the_store_alone_knows_is_shown_too(
    page: Browser, runtime: Path, store_url: str
) -> None:
    """Steps of a daemon before this one, verified, held and retired ones: a look into the store."""
    with Daemon(runtime), Rank(runtime, store_url, keep=2) as rank:
        for step in (1, 2, 3, 4):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
            if step == 1:
                assert call("hold", store_url, "1.1").status == 0
        until(lambda: _states(store_url)["1.2"] == "retired", "retention has come to it")
    with Daemon(runtime) as daemon:
        look(page, daemon)
        page.await_text("No trainer runs here.", ".verdict")
        until(lambda: cells(page, "1.2") == {"store": "retired"}, "it has looked into the store")
        states = {step: cells(page, step).get("store") for step in ("1.1", "1.3", "1.4")}
        found = _states(store_url)
        assert states == {step: found[step] for step in states}
        assert page.run("!!document.querySelector('button[data-step=\"1.1\"] .pin')")
        page.run("document.querySelector('summary').click()")
        page.await_text("1.1", "tbody tr:last-child")
        assert "held" in page.text("tbody tr:last-child")


def _states(url: str) -> dict[str, str]:
    return {one["id"]: one["state"] for one in call("ls", url, "--json").document}


def test_a_stuck_store_is_told_in_its_words(
    page: Browser, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    rig.obey(("put_new", "data/", "full"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        look(page, daemon)
        page.await_text("The store does not take snapshots.", ".verdict")
        page.await_text("is full by the test's will", ".troubles")
        page.await_text("Trying again", ".troubles")
        assert "Free space or lower keep=" in page.text(".troubles")
        assert "hint:" not in page.text(".troubles")
        assert cells(page, "1.1") == {"memory": "undecided"}
        until(lambda: page.run("document.title").startswith("(1) "), "the title says it, too")
        rig.obey()
        page.await_text("Commits come as usual.", ".verdict")
        assert page.text(".troubles") == ""


def test_a_rank_that_is_awaited_is_named(page: Browser, runtime: Path, store_url: str) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, store_url, world=2) as rank:
        rank.save(2)
        look(page, daemon)
        page.await_text("A step waits for ranks of other hosts.", ".verdict")
        page.await_text("Step 1.2: waits for rank 1 of 2", ".troubles")


def test_hostile_text_stays_text(
    page: Browser, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """URLs, tags, reasons: whatever comes from a store or a trainer."""
    rig = Rig(tmp_path / HOSTILE)
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.tags = {"note": HOSTILE, HOSTILE[:40]: 1}
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        look(page, daemon)
        page.await_text(HOSTILE, ".chosen")
        assert HOSTILE in page.text(".url")
        page.run("document.querySelector('summary').click()")
        page.await_text(HOSTILE, "tbody")
        assert page.run("document.querySelectorAll('img, body script, iframe').length") == 0
        assert page.run("document.title").startswith("ckptmgr on ")


def test_it_fits_every_window(page: Browser, runtime: Path, tmp_path: Path) -> None:
    """Long words and many steps included; a phone shows the newest."""
    url = f"file://{tmp_path}/{'a-long-name' * 12}"
    with Daemon(runtime) as daemon, Rank(runtime, url, keep=99) as rank:
        for step in range(1, 41):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
        for width, fewest in ((360, 15), (768, 40), (1600, 40)):
            look(page, daemon, width, 740)
            page.await_text("1.40", ".chosen")
            page.run("document.querySelector('summary').click()")
            page.await_text("1.1", "tbody")
            assert overflow(page) == 0
            assert fewest <= page.run("document.querySelectorAll('.steps button').length") <= 40
            seen = "document.querySelector('.steps').getBoundingClientRect().right"
            last = "document.querySelector('.steps').lastElementChild.getBoundingClientRect().right"
            assert page.run(last) <= page.run(seen)


def test_the_time_line_is_walked_by_keyboard_and_read_aloud(
    page: Browser, runtime: Path, store_url: str
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, store_url, keep=9) as rank:
        for step in (1, 2, 3):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
        look(page, daemon)
        page.await_text("1.3", ".chosen")
        page.run("document.querySelector('.steps button[tabindex=\"0\"]').focus()")
        page.press("ArrowLeft")
        page.await_text("1.2", ".chosen b")
        page.press("Home")
        page.await_text("1.1", ".chosen b")
        label = str(page.run("document.activeElement.getAttribute('aria-label')"))
        assert label.startswith("step 1.1, committed")
        names = page.ask("Accessibility.getFullAXTree")["nodes"]
        roles = {_told(node, "role"): _told(node, "name") for node in names}
        assert "heading" in roles
        spoken = [_told(node, "name") for node in names if _told(node, "role") == "button"]
        assert all(name.startswith("step 1.") for name in spoken)
        assert len(spoken) == 3
        rank.save(4)
        assert rank.wait(4).outcome == Outcome.COMMITTED
        until(lambda: cells(page, "1.4"), "a new step comes")
        assert page.text(".chosen b") == "1.1", "what somebody looks at stays"


def _told(node: dict[str, Any], what: str) -> str:
    return str(node.get(what, {}).get("value", ""))


def test_a_daemon_that_is_gone_is_told_and_a_dark_room_is_dark(
    page: Browser, runtime: Path, store_url: str
) -> None:
    with Daemon(runtime) as daemon:
        with Rank(runtime, store_url) as rank:
            rank.save(1)
            look(page, daemon)
            page.await_text("1.1", ".chosen")
        light, dark = (_brightness(page, dark=dark) for dark in (False, True))
        assert dark < 60
        assert light > 200
    page.await_text("The daemon does not answer.", "#fresh")
    assert "1.1" in page.text(".chosen"), "what was known stays"


def _brightness(page: Browser, *, dark: bool) -> int:
    page.screen(1120, 900, dark=dark)
    colour = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")
    return int(json.loads(colour[0]))
