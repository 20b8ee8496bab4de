"""The daemon's small web server, on loopback only: metrics, probes and the status page.

Every request has a thread of its own, which asks the event loop for what it tells. `/metrics` and
the probes tell no names and are for everybody on this host; the rest is for the user of the daemon
and root, as the control socket is.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from importlib import resources
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

from ckptmgr.daemon.log import fault
from ckptmgr.daemon.page import page_document
from ckptmgr.daemon.peer import peer_uid
from ckptmgr.daemon.ready import readiness

if TYPE_CHECKING:
    from ckptmgr.daemon.service import Service

ADDRESS = "127.0.0.1"

LOOP_SECONDS_MAX = 5.0
"""How long a request waits for the event loop; half of the timeout of a patient probe."""

REQUESTS_AT_ONCE_MAX = 16
REQUEST_SECONDS_MAX = 10.0
"""A connection that has not said all of its request in so long is closed: it holds one of few
threads."""

_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""What a browser on this host, or at the end of a tunnel to it, has in its address bar. A page of
somebody else, whose name has come to mean 127.0.0.1 meanwhile, has another."""

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_JSON = "application/json"
_PROBES = ("/healthz", "/readyz")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    ("Content-Security-Policy", _POLICY),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK

    @classmethod
    def refusal(cls, status: HTTPStatus, why: str) -> Answer:
        """Nothing, and why."""
        return cls(f"{why}\n".encode(), status=status)

    @classmethod
    def document(cls, found: Any, status: HTTPStatus = HTTPStatus.OK) -> Answer:
        """A JSON document."""
        return cls(json.dumps(found).encode() + b"\n", _JSON, status)


class _Request(io.RawIOBase):
    """What a connection says in REQUEST_SECONDS_MAX; a timeout of each read would never end one
    that says a byte from time to time.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ends_at = time.monotonic() + REQUEST_SECONDS_MAX

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError("has not said all of its request in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(into)


class _Exchange(WSGIRequestHandler):
    timeout = REQUEST_SECONDS_MAX

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection))

    def get_environ(self) -> WSGIEnvironment:
        own = self.request.getsockname()
        return {**super().get_environ(), "ckptmgr.ends": (self.client_address, own)}

    def log_message(self, *_: object) -> None:
        """A request is no event."""


class _Threads(ThreadingWSGIServer):
    """A thread for each request, as long as there are few."""

    def __init__(self, *arguments: Any) -> None:
        self._places = threading.BoundedSemaphore(REQUESTS_AT_ONCE_MAX)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Whoever leaves, or never says anything, is no event; all else is a fault of ours."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            fault(error)


class WebServer:
    """Serves until `close`.

    The event loop waits for connections, so that an idle daemon sleeps; `serve_forever` would
    wake it twice a second.
    """

    def __init__(self, service: Service, port: int) -> None:
        self._service = service
        self._metrics = make_wsgi_app(service.metrics.registry)
        self._documents: dict[str, Callable[[], Answer]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/status.json": lambda: Answer.document(self._ask(service.state)),
            "/page.json": lambda: Answer.document(self._ask(partial(page_document, service))),
        }
        self._server = make_server(ADDRESS, port, self._app, _Threads, _Exchange)
        self._server.timeout = 0  # `handle_request` is only called when somebody has connected
        self.port = int(self._server.server_port)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._server.fileno(), self._server.handle_request)

    def close(self) -> None:
        """Stop serving."""
        self._loop.remove_reader(self._server.fileno())
        self._server.server_close()

    def _app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            found: Iterable[bytes] = self._metrics(environ, start_response)
            return found
        answer = self._answer(environ)
        length = ("Content-Length", str(len(answer.body)))
        status = f"{answer.status.value} {answer.status.phrase}"
        start_response(status, [("Content-Type", answer.kind), length, *_HEADERS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _answer(self, environ: WSGIEnvironment) -> Answer:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return Answer.refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET only")
        if not _HOST.fullmatch(environ.get("HTTP_HOST", "")):
            return Answer.refusal(HTTPStatus.MISDIRECTED_REQUEST, "ask 127.0.0.1 or localhost")
        if path not in _PROBES and not _is_ours(*environ["ckptmgr.ends"]):
            return Answer.refusal(HTTPStatus.FORBIDDEN, "only for the user of this daemon")
        if path in _FILES:
            name, kind = _FILES[path]
            page = resources.files("ckptmgr.daemon") / "web" / name
            return Answer(page.read_bytes(), kind)
        if path in self._documents:
            try:
                return self._documents[path]()
            except TimeoutError:
                why = f"the event loop has not answered for {LOOP_SECONDS_MAX:g} s"
                return Answer.refusal(HTTPStatus.SERVICE_UNAVAILABLE, why)
        return Answer.refusal(HTTPStatus.NOT_FOUND, "there is /, /status.json and /metrics")

    def _healthz(self) -> Answer:
        return Answer.document({"healthy": self._ask(lambda: True)})

    def _readyz(self) -> Answer:
        found = self._ask(partial(readiness, self._service))
        return Answer.document(
            found, HTTPStatus.OK if found["ready"] else HTTPStatus.SERVICE_UNAVAILABLE
        )

    def _ask(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in the event loop, whose state no other thread may look at.

        Raises:
            TimeoutError: the loop does not come to it.
        """

        async def in_loop() -> Any:
            return work()

        asked = asyncio.run_coroutine_threadsafe(in_loop(), self._loop)
        try:
            return asked.result(LOOP_SECONDS_MAX)
        except TimeoutError:
            asked.cancel()
            raise


def _is_ours(peer: tuple[str, int], own: tuple[str, int]) -> bool:
    """Whether the other end is a process of this user, or of root."""
    return peer_uid(peer, own) in (0, os.getuid())
