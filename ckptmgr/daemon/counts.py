"""What is counted where it happens: calls of a store, why steps are given up, and every event."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator

from ckptmgr.daemon.codes import CODES, code_of
from ckptmgr.daemon.log import LOGGERS, name_and_fields, warning
from ckptmgr.metrics import Metrics

_REASONS = (
    ("no manifest of rank", "rank_missing"),
    ("the daemon of rank 0", "decider_silent"),
    ("superseded by a newer snapshot", "newer_snapshot"),
    ("superseded", "newer_attempt"),
)
"""How the `why` of an ABORT begins -> its reason."""


def reason_of(why: str) -> str:
    """Why a step was given up, in one word of `metrics.REASONS`."""
    for beginning, reason in _REASONS:
        if why.startswith(beginning):
            return reason
    return "failure" if re.match(r"\w+Error: ", why) else "parts_missing"


class StoreCounts:
    """Counts the calls of one job's store, as RetryingStore tells of them."""

    def __init__(self, metrics: Metrics, label: str) -> None:
        self._metrics = metrics
        self._label = label
        metrics.open_job(label)

    def answered(self, operation: str, seconds: float) -> None:
        """A try that worked."""
        self._metrics.store_seconds.labels(self._label, operation).observe(seconds)

    def failed(self, operation: str, error: Exception) -> None:
        """A try that failed."""
        kind = type(error).__name__
        self._metrics.failures.labels(self._label, kind).inc()
        self._metrics.store_errors.labels(self._label, operation, kind).inc()
        warning("store_failed", job=self._label, operation=operation, kind=kind, why=str(error))

    def retried(self, operation: str) -> None:
        """A try after one that failed."""
        self._metrics.store_retries.labels(self._label, operation).inc()


class _Listener(logging.Handler):
    """Counts every event by its code, and what some of them tell."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler.emit`; runs in whatever thread logs."""
        name, fields = name_and_fields(record)
        metrics = self._metrics
        metrics.events.labels(code_of(name), name, record.levelname.lower()).inc()
        job = fields.get("job", "")
        match name:
            case "verified":
                metrics.last_verified.labels(job).set(time.time())
            case "retired":
                metrics.gc_deleted_bytes.labels(job).inc(fields["bytes"])
            case "damaged" | "mirror_skipped" | "restore_skipped":
                metrics.corruption.labels(job, "store").inc()
            case "slot_damaged":
                metrics.corruption.labels(job, "memory").inc()
            case "adopted":
                metrics.adopted.inc(fields["snapshots"])
                metrics.fdstore_recovered.inc(fields["unnamed"])
            case "killed_before":
                metrics.after_kill.set(1)
            case "clock_jumped":
                metrics.clock_jumps.inc()


@contextlib.contextmanager
def counted(metrics: Metrics) -> Iterator[None]:
    """Count every event of this process while the block lasts."""
    for name, (code, level) in CODES.items():
        if level != "info":  # so that the first one is a growth
            metrics.events.labels(code, name, level)
    listener = _Listener(metrics)
    for logger in LOGGERS:
        logger.addHandler(listener)
    try:
        yield
    finally:
        for logger in LOGGERS:
            logger.removeHandler(listener)
