"""A real Prometheus that scrapes real daemons under the shipped rules, and a clock for drills.

In a drill a minute lasts MINUTE_SECONDS, and an hour, which only thresholds name, HOUR_SECONDS:
windows, patience and thresholds of the rule file are shortened by that, and nothing else changes.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest

from driven import PATIENCE_SECONDS, TREE, until

RULES = TREE / "docs/observability/ckptmgr.rules.yml"
MINUTE_SECONDS = 0.4
HOUR_SECONDS = 0.5
LOOK_SECONDS = 0.2

CONFIGURATION = """\
global: {scrape_interval: 400ms, scrape_timeout: 400ms, evaluation_interval: 200ms}
rule_files: [rules.yml]
scrape_configs:
  - job_name: ckptmgr
    file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]
"""


def in_drill_time(rules: str) -> str:
    """The rules with shorter minutes and hours."""
    milliseconds = int(1000 * MINUTE_SECONDS)
    rules = re.sub(
        r"(\[|for: |offset )(\d+)m\b",
        lambda m: f"{m[1]}{int(m[2]) * milliseconds}ms",
        rules,
    )
    return rules.replace("* 3600", f"* {HOUR_SECONDS}").replace("* 60", f"* {MINUTE_SECONDS}")


def needs_prometheus(program: str = "prometheus") -> None:
    """Skip the calling test, with the reason in the summary, where Prometheus is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"NEEDS {program}: not checked in this run; install the package `prometheus`")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Prometheus:
    """`prometheus` as a child, with the shipped rules in drill time."""

    def __init__(self, directory: Path) -> None:
        self._targets = directory / "targets.json"
        self._ports: list[int] = []
        self._write_targets()
        (directory / "prometheus.yml").write_text(CONFIGURATION)
        (directory / "rules.yml").write_text(in_drill_time(RULES.read_text()))
        self.port = free_port()
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={directory}/prometheus.yml",
                    f"--storage.tsdb.path={directory}/data",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )
        until(self._ready, "Prometheus is ready", LOOK_SECONDS)

    def _ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with self._open("/-/ready"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False

    def _open(self, path: str) -> Any:
        return urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_SECONDS
        )

    def ask(self, path: str, **arguments: str) -> Any:
        """What its API answers."""
        with self._open(f"/api/v1/{path}?{urllib.parse.urlencode(arguments)}") as reply:
            return json.load(reply)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return found

    def watch(self, port: int) -> Watch:
        """Scrape a daemon from now on."""
        self._ports.append(port)
        self._write_targets()
        watch = Watch(self, f"127.0.0.1:{port}")
        up = f'up{{instance="{watch.instance}"}} == 1'
        until(lambda: self.query(up), "the daemon is scraped", LOOK_SECONDS)
        return watch

    def forget(self, watch: Watch) -> None:
        self._ports.remove(int(watch.instance.rpartition(":")[2]))
        self._write_targets()

    def _write_targets(self) -> None:
        temporary = self._targets.with_suffix(".new")
        targets = [f"127.0.0.1:{port}" for port in self._ports]
        temporary.write_text(json.dumps([{"targets": targets}]))
        temporary.rename(self._targets)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_SECONDS)


class Watch:
    """The alerts of one daemon."""

    def __init__(self, prometheus: Prometheus, instance: str) -> None:
        self._prometheus = prometheus
        self.instance = instance

    def firing(self) -> set[str]:
        """Names of the alerts that fire for this daemon now."""
        return {
            alert["labels"]["alertname"]
            for alert in self._prometheus.ask("alerts")["alerts"]
            if alert["state"] == "firing" and alert["labels"].get("instance") == self.instance
        }

    def fires(self, *names: str) -> None:
        until(lambda: set(names) <= self.firing(), f"{names} fire; {self.state()}", LOOK_SECONDS)

    def ends(self, *names: str) -> None:
        until(lambda: not set(names) & self.firing(), f"{names} end; {self.state()}", LOOK_SECONDS)

    def is_quiet(self) -> None:
        """Nothing fires, and all that counts is scraped: what appears at 1 has not grown."""
        since = time.time()
        until(lambda: self._scraped_at() > since, "it is scraped", LOOK_SECONDS)
        assert self.firing() == set(), self.firing()

    def _scraped_at(self) -> float:
        found = self._prometheus.query(
            f'max(timestamp(ckptmgr_build_info{{instance="{self.instance}"}}))'
        )
        return float(found[0]["value"][1]) if found else 0.0

    def value(self, name: str, **labels: str) -> float:
        """The value of a metric of this daemon, over all labels not named; NaN without any."""
        chosen = "".join(f',{label}="{value}"' for label, value in labels.items())
        found = self._prometheus.query(f'sum({name}{{instance="{self.instance}"{chosen}}})')
        return float(found[0]["value"][1]) if found else float("nan")

    def state(self) -> str:
        """For the message of a failure."""
        return json.dumps(self._prometheus.ask("alerts")["alerts"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._prometheus.forget(self)
