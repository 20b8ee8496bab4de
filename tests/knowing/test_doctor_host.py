"""`doctor` finds what on a host costs a snapshot, each found by making it so."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from called import call
from ckptmgr.config import GIB, MIB
from ckptmgr.doctor import lifetime, memory, versions
from ckptmgr.doctor.load import Load
from ckptmgr.store.finding import Health
from driven import PYTHON_PATH, Daemon, Rank, until
from rigged import Rig


def looked(runtime: Path, *arguments: str, prefix: list[str] | None = None) -> dict[str, Any]:
    """What `doctor` finds on this host, by check."""
    if prefix is None:
        called = call("doctor", "--json", *arguments, runtime=runtime)
        return rows_of(called.status, called.out, called.err)
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "ckptmgr.cli", "doctor", "--json", *arguments],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH, "CKPTMGR_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
        check=False,
    )
    return rows_of(done.returncode, done.stdout, done.stderr)


def rows_of(status: int, out: str, err: str) -> dict[str, Any]:
    assert err == ""
    rows = json.loads(out)
    assert status == int(any(row["state"] == "failure" for row in rows))
    return {row["check"]: row for row in rows}


def test_a_host_with_a_daemon_that_works(runtime: Path, store_url: str) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        rank.save(1)
        rank.wait(1)
        found = looked(runtime, "--state-gib=0.001")
        for check in ("versions", "runtime directory", "socket", "daemon", "shared memory"):
            assert found[check]["state"] == "ok", found[check]
        assert f"pid {daemon.process.pid}" in found["daemon"]["evidence"]
        shown = call("doctor", "--state-gib=0.001", runtime=runtime)
        assert "[  ok  ] daemon: answers" in shown.out
        assert shown.out.splitlines()[-1].startswith("1")


def test_a_runtime_directory_that_others_may_enter(runtime: Path) -> None:
    runtime.chmod(0o755)
    row = looked(runtime)["runtime directory"]
    assert (row["state"], row["evidence"]) == ("failure", f"{runtime} has mode 0755")
    assert row["fix"].startswith(f"Run `chmod 700 {runtime}`")


def test_a_runtime_directory_that_is_a_link(runtime: Path) -> None:
    (runtime / "there").symlink_to(runtime)
    assert looked(runtime / "there")["runtime directory"]["state"] == "failure"


@pytest.mark.root
def test_a_runtime_directory_of_another_user(runtime: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: another user's directory is not checked in this run")
    os.chown(runtime, 65534, 65534)
    assert "belongs to user 65534" in looked(runtime)["runtime directory"]["evidence"]


def test_a_socket_that_others_may_use(runtime: Path) -> None:
    with Daemon(runtime):
        (runtime / "control.sock").chmod(0o666)
        row = looked(runtime)["socket"]
    assert row["state"] == "failure"
    assert row["evidence"].endswith("has mode 0666")


def test_a_daemon_whose_store_is_full(runtime: Path, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.obey(("put_new", "data/", "full"))
    with (
        Daemon(runtime, environment=rig.environment()) as daemon,
        Rank(runtime, rig.url) as rank,
    ):
        rank.save(1)
        until(lambda: daemon.events("write_failed"), "a write fails")
        row = looked(runtime)["daemon"]
        rig.obey()
    assert row["state"] == "warning"
    assert "is full by the test's will" in row["what"]


def test_a_daemon_that_speaks_otherwise(runtime: Path) -> None:
    """Whoever listens there answers with a frame of an unknown kind."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(runtime / "control.sock"))
    listener.listen()

    def answer() -> None:
        connection, _ = listener.accept()
        connection.recv(100)
        connection.sendall((5).to_bytes(4, "little") + b"\x81\xa2op\x01")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    (runtime / "control.sock").chmod(0o600)
    row = looked(runtime)["daemon"]
    thread.join()
    listener.close()
    assert row["state"] == "failure"
    assert "ckptmgr drain --stop" in row["fix"]


# ---- memory -----------------------------------------------------------------


def with_shm(options: str) -> list[str]:
    """What runs a command in a mount namespace with a /dev/shm of its own."""
    script = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


@pytest.mark.root
def test_a_container_s_shared_memory_is_too_small(runtime: Path) -> None:
    """A mount namespace with the 64 MiB that Docker gives."""
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: a small /dev/shm is not checked in this run")
    prefix = with_shm("size=64m")
    row = looked(runtime, "--state-gib=0.1", prefix=prefix)["shared memory"]
    assert row["state"] == "failure"
    assert row["evidence"].startswith("64.0 MiB of tmpfs, ")
    assert row["evidence"].endswith("2 slots of 102.4 MiB are 204.8 MiB")
    assert "--shm-size" in row["fix"]
    assert looked(runtime, prefix=prefix)["shared memory"]["state"] == "warning"


@pytest.mark.root
@pytest.mark.parametrize(
    ("option", "state"),
    [("", "warning"), (",huge=never", "warning"), (",huge=advise", "ok"), (",huge=always", "ok")],
)
def test_whether_the_mount_allows_huge_pages(runtime: Path, option: str, state: str) -> None:
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: mounts with huge pages are not checked in this run")
    row = looked(runtime, prefix=with_shm(f"size=64m{option}"))["huge pages"]
    assert row["state"] == state
    assert row["evidence"] == f"/dev/shm is mounted with {option[1:] or 'huge=never'}"
    assert ("mount -o remount,huge=advise /dev/shm" in row["fix"]) == (state == "warning")


@pytest.mark.parametrize(
    ("ruling", "state"),
    [
        ("always within_size advise never [deny] force", "warning"),
        ("always within_size advise never deny [force]", "ok"),
        (None, "not checked"),
    ],
)
def test_what_the_kernel_says_of_huge_pages_for_all(
    runtime: Path, tmp_path: Path, ruling: str | None, state: str
) -> None:
    setting = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
    finding = memory.huge_pages(runtime, tree(tmp_path, {setting: ruling} if ruling else {}))
    assert finding.health.value == state
    assert ("shmem_enabled" in finding.fix) == (state == "warning")


def test_a_runtime_directory_on_a_disk(tmp_path: Path) -> None:
    place = Path("/dev/shm") if tmp_path.is_relative_to("/dev/shm") else tmp_path
    if place != tmp_path:
        pytest.skip("NEEDS A DISK: the temporary directory of this run is in memory")
    row = looked(tmp_path / "runtime")["shared memory"]
    assert (row["state"], "CKPTMGR_RUNTIME_DIR" in row["fix"]) == ("failure", True)


def test_a_small_limit_on_page_locked_memory(runtime: Path) -> None:
    prefix = ["sh", "-c", 'ulimit -l 64 && exec "$@"', "sh"]
    row = looked(runtime, prefix=prefix)["memlock"]
    assert (row["state"], row["evidence"]) == ("warning", "RLIMIT_MEMLOCK is 64.0 KiB")


def tree(root: Path, files: dict[str, str]) -> Path:
    """The files of a host, as far as `doctor` reads them."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/system.slice/job.scope\n",
    "sys/fs/cgroup/system.slice/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/job.scope/memory.max": f"{GIB}\n",
    "sys/fs/cgroup/system.slice/job.scope/memory.current": f"{600 * MIB}\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{600 * MIB}\n",
}
CONTAINER = {
    "proc/self/cgroup": "0::/../../kubepods/pod1\n",
    "sys/fs/cgroup/memory.max": f"{GIB}\n",
    "sys/fs/cgroup/memory.current": f"{600 * MIB}\n",
}


@pytest.mark.parametrize("files", [V2, V1, CONTAINER], ids=["v2", "v1", "container"])
def test_a_limit_of_a_cgroup(tmp_path: Path, files: dict[str, str]) -> None:
    root = tree(tmp_path, files)
    states = {
        state_mib: memory.cgroup_memory(root, Load(state_mib * MIB)).health
        for state_mib in (0, 100, 300, 600)
    }
    assert states == {
        0: Health.NOT_CHECKED,
        100: Health.OK,
        300: Health.WARNING,  # 600 MiB of snapshots, 424 MiB are left
        600: Health.FAILURE,  # 1200 MiB, the limit is 1024 MiB
    }
    assert "600.0 MiB of 1.0 GiB used" in memory.cgroup_memory(root, Load(MIB)).evidence


def test_no_limit_of_a_cgroup(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}
    finding = memory.cgroup_memory(tree(tmp_path, files), Load(GIB))
    assert finding.health is Health.OK


# ---- the daemon outlives the job --------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/system.slice/slurmstepd.scope/job_123/step_0/user/task_0", "Slurm"),
        ("/slurm/uid_1000/job_123/step_batch", "Slurm"),
        ("/kubepods.slice/kubepods-pod1.slice/cri-containerd-ab.scope", "kubelet"),
        ("/docker/0123456789ab", "container"),
        ("/user.slice/user-1000.slice/session-3.scope", "logind"),
    ],
)
def test_a_daemon_in_the_cgroup_of_a_job(tmp_path: Path, path: str, words: str) -> None:
    root = tree(tmp_path, {"proc/7/cgroup": f"0::{path}\n"})
    finding = lifetime.job_cgroup(root, 7)
    assert finding.health is Health.WARNING
    assert words in finding.what
    assert path in finding.evidence


def test_a_daemon_in_a_unit_of_its_own(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/7/cgroup": "0::/system.slice/ckptmgr.service\n"})
    assert lifetime.job_cgroup(root, 7).health is Health.OK


def test_a_cgroup_that_is_killed_as_a_whole(tmp_path: Path) -> None:
    files = {
        "proc/7/cgroup": "0::/pod/main\n",
        "sys/fs/cgroup/pod/memory.oom.group": "1\n",
        "sys/fs/cgroup/pod/main/memory.oom.group": "0\n",
    }
    root = tree(tmp_path, files)
    finding = lifetime.oom_group(root, 7)
    assert finding.health is Health.WARNING
    assert finding.evidence == "memory.oom.group is 1 in /sys/fs/cgroup/pod"
    (root / "sys/fs/cgroup/pod/memory.oom.group").write_text("0\n")
    assert lifetime.oom_group(root, 7).health is Health.OK


def test_what_logind_ends_at_logout(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/7/cgroup": "0::/user.slice/user-4242.slice/session-3.scope\n"})
    uid = 4242
    assert lifetime.logind(root, 7, uid).health is Health.OK, "there is none"
    (root / "run/systemd/seats").mkdir(parents=True)
    finding = lifetime.logind(root, 7, uid)
    assert finding.health is Health.WARNING
    assert "RemoveIPC deletes host memory" in finding.what
    assert "KillUserProcesses" not in finding.what
    tree(root, {"etc/systemd/logind.conf": "[Login]\n#RemoveIPC=no\nKillUserProcesses=yes\n"})
    assert "KillUserProcesses kills the daemon" in lifetime.logind(root, 7, uid).what
    tree(root, {"usr/lib/systemd/logind.conf.d/a.conf": "[Login]\nRemoveIPC=no\n"})
    assert "RemoveIPC deletes" not in lifetime.logind(root, 7, uid).what
    tree(root, {f"var/lib/systemd/linger/{uid}": ""})
    assert lifetime.logind(root, 7, uid).health is Health.OK, "this user lingers"
    shutil.rmtree(root / "var")
    assert lifetime.logind(root, 7, 0).health is Health.OK, "system users are left alone"


@pytest.mark.root
def test_a_daemon_in_a_container(runtime: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: a pid namespace is not checked in this run")
    prefix = ["unshare", "--pid", "--fork", "--mount-proc"]
    row = looked(runtime, prefix=prefix)["pid namespace"]
    assert row["state"] == "warning"
    assert "which is not the host's" in row["evidence"]


# ---- versions ---------------------------------------------------------------


def test_a_package_that_is_missing_or_too_old() -> None:
    def version_of(name: str) -> str:
        if name == "missing":
            raise PackageNotFoundError
        return "0.9.10"

    needed = ["missing>=1", "old>=1.0", "new>=0.9.2", 'other>=9; extra == "torch"']
    finding = versions.installed(needed, version_of)
    assert finding.health is Health.FAILURE
    assert finding.evidence == "missing is not installed; old is 0.9.10, needed is 1.0"
    assert versions.installed(["new>=0.9.2"], version_of).health is Health.OK
