"""Structured events: one JSON line each, or one human line where the output is a terminal."""

from __future__ import annotations

import json
import logging
import sys
import time
from hashlib import blake2b
from typing import Any, TextIO

from ckptmgr.daemon.codes import code_of

_LOGGER = logging.getLogger("ckptmgr")

LOGGERS = (_LOGGER, logging.getLogger("asyncio"))
"""Whose records are events; asyncio tells of tasks that failed."""


def label_of(url: str) -> str:
    """Short name of a job in events and metrics: no path and no bucket name leaves the host."""
    return blake2b(url.encode(), digest_size=4).hexdigest()


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log the event `name` with its fields; names and fields are stable (docs/events.md)."""
    _LOGGER.log(level, name, extra={"fields": fields})


def warning(name: str, **fields: Any) -> None:
    """An event that somebody should look at some day."""
    event(name, logging.WARNING, **fields)


def fault(error: BaseException, **fields: Any) -> None:
    """A fault of our own, with its traceback."""
    _LOGGER.error("fault", extra={"fields": {**fields, "why": repr(error)}}, exc_info=error)


def name_and_fields(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """What a record tells; those of other libraries are faults."""
    if record.name == _LOGGER.name:
        return record.getMessage(), getattr(record, "fields", {})
    return "fault", {"why": record.getMessage()}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        name, fields = name_and_fields(record)
        line = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": name,
            "code": code_of(name),
            **fields,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _HumanLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name, fields = name_and_fields(record)
        text = " ".join(f"{field}={value}" for field, value in fields.items())
        line = f"{clock} {name:<18} {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(stream: TextIO = sys.stderr, *, level: int = logging.INFO) -> None:
    """Send the events of this process to `stream`, from `level` on."""
    target = logging.StreamHandler(stream)
    target.setFormatter(_HumanLines() if stream.isatty() else _JsonLines())
    for logger in LOGGERS:
        logger.handlers[:] = [target]
    _LOGGER.setLevel(level)
    _LOGGER.propagate = False
