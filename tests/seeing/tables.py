"""Tables of the docs that are generated; `python tests/seeing/tables.py` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from ckptmgr.metrics import Metrics
from driven import TREE

METRICS = TREE / "docs/metrics.md"
HEAD = "| metric | kind | labels | what it is |\n|---|---|---|---|\n"
KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}


def registered() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name as it is scraped, kind, labels and help of every metric of ckptmgr's own."""
    own: list[Any] = [one for one in vars(Metrics()).values() if type(one) in KINDS]
    for metric in own:
        (family,) = metric.describe()
        suffix = "_total" if isinstance(metric, Counter) else ""
        yield family.name + suffix, KINDS[type(metric)], metric._labelnames, family.documentation


def metrics_table() -> str:
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text} |\n"
        for name, kind, labels, text in sorted(registered())
    ]
    return HEAD + "".join(rows)


def found_table(text: str) -> str:
    """The table of metrics in the page."""
    match = re.search(re.escape(HEAD) + r"(?:\|.*\n)*", text)
    assert match, "docs/metrics.md has no table of metrics"
    return match[0]


if __name__ == "__main__":
    page = METRICS.read_text()
    METRICS.write_text(page.replace(found_table(page), metrics_table()))
