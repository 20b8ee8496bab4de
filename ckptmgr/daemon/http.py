"""Prometheus metrics over HTTP, on loopback only."""

from __future__ import annotations

import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server

from ckptmgr.metrics import Metrics

ADDRESS = "127.0.0.1"


class MetricsServer:
    """Serves /metrics from a thread of its own until `close`."""

    def __init__(self, metrics: Metrics, port: int) -> None:
        started = start_http_server(port, addr=ADDRESS, registry=metrics.registry)
        self._server: WSGIServer = started[0]
        self._thread: threading.Thread = started[1]
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
