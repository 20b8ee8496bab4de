"""A real Chromium without a window, driven over its debugging pipe; nothing to install but it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from driven import PATIENCE_SECONDS, until

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

OPTIONS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
    *("--no-first-run", "--no-default-browser-check", "--disable-extensions", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--force-color-profile=srgb", "--hide-scrollbars"),
)


def program() -> str:
    """Where Chromium is; the test is skipped, loudly, where it is not."""
    for name in PROGRAMS:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("needs Chromium (Debian: apt-get install chromium)")


class Browser:
    """One page in one browser. `requests` are the URLs it asked for, `complaints` what its console
    said and what it refused.
    """

    def __init__(self) -> None:
        self._profile = Path(tempfile.mkdtemp(prefix="ckptmgr-browser-"))
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        started = [program(), *OPTIONS, f"--user-data-dir={self._profile}", "about:blank"]
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._log = (self._profile / "log").open("wb")
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *started],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "HOME": str(self._profile)},
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._count = 0
        self._session = ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    # -- the protocol -------------------------------------------------------------------------

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Carry a command out and wait for its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = self._next(deadline)
            if found.get("id") == self._count:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result
            self._note(found)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self._in], [], [], left)[0], "the browser does not answer"
            more = os.read(self._in, 1 << 16)
            assert more, f"the browser ended:\n{(self._profile / 'log').read_text()}"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"{given['type']}: {given['args']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(str(given["exceptionDetails"]))
            case "Log.entryAdded":
                entry = given["entry"]
                self.complaints.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")

    # -- what a person does -------------------------------------------------------------------

    def screen(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """The size of the window, and the colours that its user likes."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        self.ask("Emulation.setDeviceMetricsOverride", **size, mobile=width < 500)
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[colours])

    def open(self, url: str) -> None:
        """Go to a page."""
        self.ask("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """What an expression is in the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """What can be read in a part of the page; empty where it is not there."""
        chosen = f"document.querySelector({json.dumps(selector)})"
        return str(self.run(f"{chosen} ? {chosen}.innerText : ''"))

    def await_text(self, words: str, selector: str = "body") -> None:
        """Wait until something can be read."""
        until(lambda: words in self.text(selector), f"{words!r} in\n{self.text(selector)}")

    def press(self, key: str) -> None:
        """Press one key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def shoot(self, path: Path) -> None:
        """A picture of the whole page."""
        taken = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        with contextlib.suppress(OSError, AssertionError):
            self.ask("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._log.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser of one's own."""
    with Browser() as found:
        yield found
