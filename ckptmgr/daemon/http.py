"""Prometheus metrics over HTTP, on loopback only."""

from __future__ import annotations

import asyncio
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

from ckptmgr.metrics import Metrics

ADDRESS = "127.0.0.1"


class _Scrape(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A scrape is no event."""


class MetricsServer:
    """Serves /metrics, each request in a thread of its own, until `close`.

    The event loop waits for connections, so that an idle daemon sleeps; `serve_forever` would
    wake it twice a second.
    """

    def __init__(self, metrics: Metrics, port: int) -> None:
        app = make_wsgi_app(metrics.registry)
        self._server = make_server(ADDRESS, port, app, ThreadingWSGIServer, _Scrape)
        self._server.timeout = 0  # `handle_request` is only called when somebody has connected
        self.port = int(self._server.server_port)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._server.fileno(), self._server.handle_request)

    def close(self) -> None:
        """Stop serving."""
        self._loop.remove_reader(self._server.fileno())
        self._server.server_close()
