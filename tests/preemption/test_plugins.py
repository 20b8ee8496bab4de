"""The plugins of preemption: their names, their answers, and what they print."""

from __future__ import annotations

import copy
import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import torch
import yaml

from ckptmgr.errors import UsageError
from ckptmgr.preemption import ENTRY_POINT_GROUP, Notice, open_sources
from ckptmgr_hai import SuspendSource, awake, carried_step, checkpoint
from ckptmgr_hai.flag import FLAG_KEY, Flag
from ckptmgr_hai.platform import Platform
from ckptmgr_kubernetes import PodSource, manifest, probe
from ckptmgr_slurm import JobSource, batch_script
from driven import PATIENCE_SECONDS, PYTHON_PATH, TREE, Daemon, until
from preemption.platforms import Flag as PlatformsFlag
from rank.training import command

KUBERNETES = "1.29"
"""The first release whose native sidecars are on by default."""


def test_every_plugin_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry points of its pyproject.toml, as an installer writes them."""
    names = []
    for file in sorted((TREE / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text())["project"]
        found = project.get("entry-points", {}).get(ENTRY_POINT_GROUP, {})
        info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\n")
        lines = [f"{name} = {value}" for name, value in found.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINT_GROUP}]", *lines]))
        names += list(found)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert {"slurm", "kubernetes", "hai"} <= set(names)
    assert [source.name for source in open_sources(names)] == names


# -- Slurm ----------------------------------------------------------------------------------------


def test_slurm_tells_the_time_that_is_left() -> None:
    source = JobSource(environment={"SLURM_JOB_END_TIME": str(time.time() + 90)})
    assert 60 < source.seconds_left(signal.SIGUSR1) <= 90
    assert source.seconds_left(signal.SIGTERM) == 30
    assert JobSource(environment={}).seconds_left(signal.SIGUSR1) == 0
    given = JobSource(environment={"CKPTMGR_SLURM_GRACE_SECONDS": "300"})
    assert given.seconds_left(signal.SIGTERM) == 300


@pytest.mark.parametrize("name", ["SLURM_JOB_END_TIME", "CKPTMGR_SLURM_GRACE_SECONDS"])
@pytest.mark.parametrize("text", ["60s", "-1", "nan", "inf"])
def test_slurm_refuses_at_once_what_is_no_number_of_seconds(name: str, text: str) -> None:
    """As it is made, for who hears a signal has nobody to tell."""
    with pytest.raises(UsageError, match=f"{name}: '{text}' is not a number of seconds"):
        JobSource(environment={name: text})


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that are found first; each writes its arguments to `asked`."""
    found = tmp_path / "bin"
    found.mkdir()
    monkeypatch.setenv("PATH", f"{found}:{os.environ['PATH']}")
    return found


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("rank", "numbers", "asked"),
    [
        (0, [signal.SIGUSR1], "requeue 12"),
        (1, [signal.SIGUSR1], ""),
        (0, [signal.SIGTERM], ""),
        (0, [signal.SIGUSR1, signal.SIGTERM], "requeue 12"),  # committed only after the limit
    ],
)
def test_only_rank_0_queues_again_and_only_when_warned_of_the_limit(
    programs: Path, tmp_path: Path, rank: int, numbers: list[signal.Signals], asked: str
) -> None:
    program(programs / "scontrol", f'echo "$@" >> {tmp_path}/asked')
    heard: list[str] = []
    source = JobSource(requeue=True, environment={"SLURM_JOB_ID": "12"})
    source.listen(lambda notice: heard.append(notice.why), rank)
    try:
        for number in numbers:
            os.kill(os.getpid(), number)
            until(lambda name=number.name: name in heard, f"{number.name} is heard")
        source.committed(700)
    finally:
        source.close()
    found = tmp_path / "asked"
    assert (found.read_text().strip() if found.exists() else "") == asked


@pytest.mark.parametrize("by_shell", [False, True])
def test_the_batch_script_runs_and_hands_the_signal_on(
    programs: Path, tmp_path: Path, by_shell: bool
) -> None:
    """By bash; `srun` runs its command here, `ckptmgr` only says that it was asked."""
    training = (
        f"import signal, sys\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))\n"
        f"open('{tmp_path}/ready', 'w').close()\n"
        f"signal.pause()"
    )
    options = 'while [[ "$1" == --* ]]; do shift; done; '
    program(programs / "srun", f'{options}echo "$@" >> {tmp_path}/asked; exec "$@"')
    program(programs / "ckptmgr", "exit 0")
    (tmp_path / "train.py").write_text(training)
    text = batch_script(f"{sys.executable} {tmp_path}/train.py", seconds=90, by_shell=by_shell)
    assert f"--signal={'B:' if by_shell else ''}USR1@90" in text
    (tmp_path / "job.sh").write_text(text)
    with subprocess.Popen(["bash", tmp_path / "job.sh"], start_new_session=True) as shell:
        until((tmp_path / "ready").exists, "training")
        if by_shell:
            shell.send_signal(signal.SIGUSR1)
        else:
            asked = Path(f"/proc/{shell.pid}/task/{shell.pid}/children")
            for pid in asked.read_text().split():
                os.kill(int(pid), signal.SIGUSR1)
        assert shell.wait(PATIENCE_SECONDS) == 7, "the status of the training"
    lines = (tmp_path / "asked").read_text().splitlines()
    assert lines[-1] == "ckptmgr drain --timeout 600 --stop"
    assert "ckptmgr daemon" in lines


# -- Kubernetes -----------------------------------------------------------------------------------


def documents(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)
    return found


@pytest.mark.parametrize("version", [KUBERNETES, kubernetes_validate.latest_version()])
def test_the_manifest_is_what_kubernetes_takes(version: str) -> None:
    found = documents(manifest("registry/training:7", ["python", "train.py"]))
    kubernetes_validate.validate(found, version, strict=True)
    found["spec"]["template"]["spec"]["initContainers"][0]["restartPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found, version, strict=True)


def test_the_manifest_shares_the_memory_and_leaves_the_time() -> None:
    odd = ["sh", "-c", 'echo "$HOME: #1" {a: b}\n']
    found = documents(manifest("i", odd, name="n", grace_seconds=90, memory="3Gi", uid=7))
    pod = found["spec"]["template"]["spec"]
    (sidecar,), (trainer,) = pod["initContainers"], pod["containers"]
    assert trainer["command"] == odd, "whatever it holds, it is one value"
    assert sidecar["restartPolicy"] == "Always", "a native sidecar: it is stopped after the trainer"
    assert sidecar["volumeMounts"] == trainer["volumeMounts"]
    assert sidecar["env"] == trainer["env"]
    environment = {entry["name"]: entry["value"] for entry in trainer["env"]}
    mount = trainer["volumeMounts"][0]["mountPath"]
    assert Path(environment["CKPTMGR_RUNTIME_DIR"]).parent == Path(mount)
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}
    assert pod["terminationGracePeriodSeconds"] == 90
    assert environment["CKPTMGR_GRACE_SECONDS"] == "90"
    drain = sidecar["lifecycle"]["preStop"]["exec"]["command"]
    assert drain[:2] == ["ckptmgr", "drain"]
    assert int(drain[-1]) < 90
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = sidecar[kind]["exec"]["command"]
        assert asked[:3] == ["python", "-m", "ckptmgr_kubernetes.probe"]
        assert asked[-1] == sidecar["command"][-1], "the port that the daemon listens on"
    with pytest.raises(UsageError):
        manifest("i", [], grace_seconds=90)


def test_the_sidecars_commands_work(runtime: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Those of the manifest, on a daemon with the arguments of the manifest but a free port."""
    line = ["-m", "ckptmgr_kubernetes", "--image", "i", "--", "python", "train.py"]
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    text = subprocess.check_output([sys.executable, *line], env=environment, text=True)
    sidecar = documents(text)["spec"]["template"]["spec"]["initContainers"][0]
    assert sidecar["command"][:2] == ["ckptmgr", "daemon"]
    with Daemon(runtime, "--metrics-port", "0") as daemon:
        port = daemon.status()["metrics_port"]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = sidecar[kind]["exec"]["command"][3]
            assert probe.main(path, port) == 0, path
        assert probe.main("/nothing", port) == 1
        command(*sidecar["lifecycle"]["preStop"]["exec"]["command"][1:])
        assert daemon.end() == 0
    assert probe.main("/readyz", port) == 1, "nobody is there"
    assert "refused" in capfd.readouterr().err


def test_the_probes_ask_no_proxy(runtime: Path) -> None:
    """Of a cluster whose pods are given HTTP_PROXY and no NO_PROXY; it would be a healthy sidecar
    that is killed.
    """
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "http_proxy": "http://127.0.0.1:9"}
    with Daemon(runtime, "--metrics-port", "0") as daemon:
        port = str(daemon.status()["metrics_port"])
        probing = [sys.executable, "-m", "ckptmgr_kubernetes.probe", "/healthz", port]
        subprocess.run(probing, env=environment, check=True)


def test_a_pod_has_the_grace_of_its_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PodSource().seconds_left(signal.SIGTERM) == 30
    monkeypatch.setenv("CKPTMGR_GRACE_SECONDS", "90")
    assert PodSource().seconds_left(signal.SIGTERM) == 90
    for text in ("long", "nan", "inf", "-1"):
        monkeypatch.setenv("CKPTMGR_GRACE_SECONDS", text)
        with pytest.raises(UsageError, match="is not a number of seconds"):
            PodSource()


# -- HAI ------------------------------------------------------------------------------------------


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in of hfai.client; the file is what it has said."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "hfai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(TREE / "tests/preemption/hfai_site"))
    monkeypatch.setenv("HFAI_SAID", str(tmp_path / "hfai"))
    return tmp_path / "hfai"


def said(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_flag_is_a_byte_of_the_platforms_shared_memory() -> None:
    assert FLAG_KEY & 0xFFFFFFFF == 0xA896216F
    key = secrets.randbits(30) | 1
    flag = Flag(key)
    assert not flag.is_set(), "there is none yet"
    platform = PlatformsFlag(key)
    try:
        assert not flag.is_set()
        platform.write(b"1")
        assert flag.is_set()
        platform.write(b"0")
        assert not flag.is_set()
        platform.write(b"1")
    finally:
        platform.remove()
    assert not flag.is_set(), "it was removed"


def test_a_suspension_is_told_acknowledged_carried_over_and_answered(client: Path) -> None:
    is_up = threading.Event()
    heard: list[Notice] = []
    source = SuspendSource(is_up.is_set)
    source.listen(heard.append, 0)
    try:
        source.committed(3)
        assert said(client) == [], "nobody has asked"
        is_up.set()
        until(lambda: said(client), "acknowledged")
        assert heard == [Notice("suspend flag", 5.0)]
        source.committed(1 << 33)
        source.committed(700)
    finally:
        source.close()
    events = [(line["event"], line.get("step")) for line in said(client)]
    answered = ("suspended", None)
    assert events == [("acknowledged", None), answered, ("carried", 700), answered]


def test_another_rank_hears_and_does_not_answer(client: Path) -> None:
    heard = threading.Event()
    source = SuspendSource(lambda: True)
    source.listen(lambda _: heard.set(), 1)
    assert heard.wait(PATIENCE_SECONDS)
    source.committed(700)
    source.close()
    assert said(client) == []


def test_without_hfai_the_flag_is_seen_and_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hfai.client", None)
    platform = Platform()
    assert not platform.acknowledge()
    platform.carry(3)
    platform.suspend()


def test_a_carried_step_is_a_hint() -> None:
    assert carried_step({}) == 0
    assert carried_step({"MARSV2_WHOLE_LIFE_STATE": "1200"}) == 1200
    assert carried_step({"MARSV2_WHOLE_LIFE_STATE": "-1"}) == 0
    assert carried_step({"MARSV2_WHOLE_LIFE_STATE": str(1 << 40)}) == 0


def test_the_watchdog_sees_a_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    seen = ""

    def more() -> bool:
        nonlocal seen
        seen += capfd.readouterr().out
        return seen.count("ckptmgr: restoring") >= 2

    with awake(seconds=0.01):
        until(more, "two lines")
    threads = [thread.name for thread in threading.enumerate()]
    assert "ckptmgr watchdog" not in threads


def test_the_idiom_of_hfai_saves_and_resumes(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(until_step: int) -> tuple[Any, Any]:
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 3)
        optimizer = torch.optim.Adam(model.parameters())
        start = checkpoint.init(
            model,
            optimizer,
            ckpt_path=store_url,
            every=None,
            source=SuspendSource(lambda: False),
        )
        saving: Any = model.try_save
        for step in range(start[1], until_step):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            last = step + 1 == until_step
            assert saving(2, step + 1, others={"best": step}, force=last) == last
        saving.close()
        return start, model.weight.detach().clone()

    assert train(3)[0] == (0, 0, None)
    monkeypatch.setenv("MARSV2_WHOLE_LIFE_STATE", "1000")
    with pytest.warns(RuntimeWarning, match="was carried over"):
        start, _ = train(5)
    assert start == (2, 3, {"best": 2})
    monkeypatch.delenv("MARSV2_WHOLE_LIFE_STATE")
    start, resumed = train(5)
    assert start == (2, 5, {"best": 4})
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(5):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(resumed, model.weight)


def test_a_model_with_its_saver_can_be_copied(runtime: Path, store_url: str) -> None:
    """As every running average of one is."""
    model: Any = torch.nn.Linear(3, 3)
    given = model, torch.optim.SGD(model.parameters())
    checkpoint.init(*given, ckpt_path=store_url, source=SuspendSource(lambda: False))
    assert copy.deepcopy(model).try_save is None
    assert torch.optim.swa_utils.AveragedModel(model).module.try_save is None
    model.try_save.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_that_fails_is_not_held_up_by_its_saver(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """As a block is left by the exception, though the process ends by it alone."""
    left: list[object] = []
    model = torch.nn.Linear(3, 3)
    given = model, torch.optim.SGD(model.parameters())
    checkpoint.init(*given, ckpt_path=store_url, source=SuspendSource(lambda: False))
    saving: Any = model.try_save
    error = RuntimeError("the loss is nan") if fails else None
    leave = saving._checkpointer.__exit__
    monkeypatch.setattr(
        type(saving._checkpointer), "__exit__", lambda _, *how: (left.extend(how), leave(*how))[1]
    )
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    saving._at_exit()
    assert left == [RuntimeError if fails else None, error, None]
