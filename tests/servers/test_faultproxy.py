"""The fault proxy does what it says, and nothing else."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from servers.faultproxy import Fault, FaultProxy, Kind

CONTENT = bytes(range(256)) * 1000
BROKEN = (OSError, http.client.HTTPException)


class Shelf(BaseHTTPRequestHandler):
    """Keeps what is put; says it in chunks where the path ends with 'chunked'."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if len(content) == int(self.headers["Content-Length"]):
            self.objects[self.path] = content
            self._answer(b"")

    def do_GET(self) -> None:
        content = self.objects[self.path.removesuffix("?chunked")]
        if self.path.endswith("chunked"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))
        else:
            self._answer(content)

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shelf() -> dict[str, bytes]:
    return {"/old": CONTENT}


@pytest.fixture
def proxy(shelf: dict[str, bytes]) -> Iterator[FaultProxy]:
    kind = type("ShelfOfTest", (Shelf,), {"objects": shelf})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with FaultProxy(server.server_port) as made:
            yield made
        server.shutdown()
        thread.join()


def ask(proxy: FaultProxy, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    try:
        connection.request(method, path, body, {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_without_a_plan_everything_passes_unchanged(
    proxy: FaultProxy, shelf: dict[str, bytes]
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
    for path in ("/old", "/old?chunked", "/old"):  # on one connection: lengths are kept to
        connection.request("GET", path)
        assert connection.getresponse().read() == CONTENT
    connection.close()
    assert ask(proxy, "PUT", "/new", CONTENT) == (200, b"")
    assert shelf["/new"] == CONTENT
    assert not proxy.struck


def test_a_reset_leaves_the_server_with_a_part(proxy: FaultProxy, shelf: dict[str, bytes]) -> None:
    proxy.plan(Fault(Kind.RESET, "PUT"))
    with pytest.raises(BROKEN):
        ask(proxy, "PUT", "/new", CONTENT)
    assert "/new" not in shelf
    assert ask(proxy, "GET", "/old") == (200, CONTENT)


def test_an_answer_of_its_own_and_a_lost_one(proxy: FaultProxy, shelf: dict[str, bytes]) -> None:
    proxy.plan(Fault(Kind.STATUS, status=503, times=1), Fault(Kind.LOST, times=1))
    assert ask(proxy, "PUT", "/new", b"x") == (503, b"")
    assert "/new" not in shelf
    with pytest.raises(BROKEN):
        ask(proxy, "PUT", "/new", b"x")
    assert shelf["/new"] == b"x"
    assert ask(proxy, "PUT", "/newer", b"y") == (200, b"")
    assert proxy.struck == {Kind.STATUS: 1, Kind.LOST: 1}


def test_a_stalled_request_ends_when_the_proxy_heals(
    proxy: FaultProxy, shelf: dict[str, bytes]
) -> None:
    proxy.plan(Fault(Kind.STALL))
    failed: list[type[Exception]] = []

    def put() -> None:
        try:
            ask(proxy, "PUT", "/new", b"x")
        except BROKEN as error:
            failed.append(type(error))

    thread = threading.Thread(target=put)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    proxy.plan()
    thread.join(5)
    assert failed
    assert failed != [TimeoutError]
    assert "/new" not in shelf


def test_slow_and_late_requests_arrive_whole(proxy: FaultProxy, shelf: dict[str, bytes]) -> None:
    for kind in (Kind.SLOW, Kind.LATE):
        proxy.plan(Fault(kind))
        assert ask(proxy, "PUT", f"/{kind.name}", CONTENT) == (200, b"")
        assert ask(proxy, "GET", f"/{kind.name}") == (200, CONTENT)
        assert proxy.struck[kind] == 2


def test_answers_are_cut_and_shrunk(proxy: FaultProxy) -> None:
    proxy.plan(Fault(Kind.CUT))
    with pytest.raises(BROKEN):
        ask(proxy, "GET", "/old")
    proxy.plan(Fault(Kind.SHRUNK))
    assert ask(proxy, "GET", "/old") == (200, CONTENT[: len(CONTENT) // 2])


def test_one_byte_is_another_and_no_more(proxy: FaultProxy, shelf: dict[str, bytes]) -> None:
    proxy.plan(Fault(Kind.FLIP_UP, "PUT"), Fault(Kind.FLIP_DOWN, "GET"))
    ask(proxy, "PUT", "/new", CONTENT)
    for found in (shelf["/new"], ask(proxy, "GET", "/old")[1]):
        assert len(found) == len(CONTENT)
        assert sum(a != b for a, b in zip(found, CONTENT, strict=True)) == 1
