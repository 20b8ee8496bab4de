"""Every command from outside: exit statuses, one line and a hint, and output for scripts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from called import call, check_error, spoil
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from rigged import Rig

ESCAPE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A store to spoil."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def test_the_version_is_one_line() -> None:
    found = call("--version")
    assert found.status == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", found.out)


# ---- exit statuses ----------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["show"],
        ["show", "2"],
        ["show", "1.2", "--tensors"],
        ["verify"],
        ["verify", "--all"],
        ["verify", "1.3", "--quick"],
        ["gc", "--dry-run"],
    ],
)
def test_0_done(made: Path, arguments: list[str]) -> None:
    command, *rest = arguments
    found = call(command, made, *rest)
    assert (found.status, found.err) == (0, "")
    assert found.out
    assert not ESCAPE.search(found.out)


def test_0_restore(made: Path, tmp_path: Path) -> None:
    found = call("restore", made, "1.2", "--to", tmp_path / "out")
    assert (found.status, found.err) == (0, "")
    assert found.out.startswith("step 1.2 (")
    assert (tmp_path / "out").is_dir()


def test_1_no_daemon(runtime: Path) -> None:
    for command in ("status", "drain"):
        check_error(call(command, runtime=runtime), 1, "no daemon answers", "hint: Run `ckptmgr")


def test_1_not_drained(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    rig.obey(("put_new", "data/", "hold"))
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        rank.save(1)
        until(lambda: rig.asked("put_new", "data/"), "it is being written")
        found = call("drain", "--timeout=0.1", runtime=runtime)
        assert (found.status, found.out) == (1, "1 snapshots undecided\n")
        assert "hint: Look at `ckptmgr status`" in found.err
        assert call("drain", "--timeout=0.1", "--json", runtime=runtime).document == {
            "undecided": 1,
            "superseded": 0,
        }
        rig.obey()
        assert call("drain", runtime=runtime).status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "{store}", "first"], ["'first' is not a step", "3.1200"]),
        (["show", "{store}", "1.2.3"], ["is not a step"]),
        (["verify", "{store}", "2", "--all"], ["a step or --all"]),
        (["restore", "{store}", "--format=pickle"], ["'pickle' is not a format", "hint: Choose"]),
        (["restore", "{store}", "--to={store}"], ["is not an empty directory"]),
        (["restore", "{store}", "--to={store}/format"], ["is not an empty directory"]),
        (["gc", "{store}", "--keep=0"], ["0 is not allowed"]),
        (["gc", "{store}", "--keep=-5"], ["--keep: -5 is not allowed"]),
        (["gc", "{store}", "--keep=--5"], ["'--5' is not allowed", "Write 5, or last=3"]),
        (["gc", "{store}", "--keep=³"], ["'³' is not allowed", "Write 5, or last=3"]),
        (["daemon", "--spool-max-gib=nan"], ["--spool-max-gib: nan is not allowed"]),
        (["daemon", "--idle-seconds=-1"], ["--idle-seconds: -1 is not allowed"]),
        (["daemon", "--metrics-port=65536"], ["--metrics-port: 65536 is not a port"]),
        (["gc", "{store}", "--keep=many"], ["'many' is not allowed", "Write 5, or last=3"]),
        (["gc", "{store}", "--keep-best=loss"], ["'loss' is not allowed", "loss:min:3"]),
        (["gc", "{store}", "--keep=last=2", "--keep-every=5", "--keep-daily=-1"], ["daily"]),
        (["gc", "{store}", "--keep=every=2", "--keep-every=5"], ["not both"]),
        (["release", "{store}", "2", "nonsense"], ["has no hold nonsense"]),
        (
            ["prefetch", "{store}", "--ranks=0,5-2"],
            ["'5-2' goes backwards", "hint: Write it as 2-5"],
        ),
        (
            ["prefetch", "{store}", "--ranks=0-99999999999"],
            ["'0-99999999999' goes beyond the last rank", "hint: It is 999999"],
        ),
        (["prefetch", "{store}", "--ranks=" + 5000 * "9"], ["goes beyond the last rank"]),
        (["drain", "--timeout=nan"], ["--timeout: nan is not a number of seconds"]),
        (["drain", "--timeout=inf"], ["--timeout: inf is not a number of seconds"]),
        (["drain", "--timeout=-1"], ["--timeout: -1.0 is not a number of seconds"]),
        (["ls", "/tmp/" + 300 * "x"], ["/tmp/" + 300 * "x", "305 bytes", "hint: Check the URL"]),
        (["ls", "/tmp/\udcff\udcfe"], ["'/tmp/\\udcff\\udcfe': is not UTF-8", "hint: Rename it"]),
        (["ls", "nosuch://x"], ["no store is installed", "hint: "]),
        (["ls", "zz://bucket/run"], ["no store is installed for this scheme"]),
        (["ls", "file://host/x"], ["needs an absolute path"]),
        (["ls", "s3://key:secret@bucket"], ["carries credentials"]),
    ],
)
def test_2_wrong_arguments(made: Path, arguments: list[str], words: list[str]) -> None:
    found = call(*(one.replace("{store}", str(made)) for one in arguments))
    check_error(found, 2, *words)
    assert "secret" not in found.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["ls"],
        ["ls", "x", "--nonsense"],
        ["ls", "x", "y"],
        ["gc", "x", "--keep-every=many"],
    ],
)
def test_2_what_the_parser_refuses(arguments: list[str]) -> None:
    check_error(call(*arguments), 2, "hint: Run `ckptmgr")


@pytest.mark.parametrize("name", ["CKPTMGR_IDLE_SECONDS", "CKPTMGR_METRICS_PORT"])
def test_2_wrong_environment(runtime: Path, name: str) -> None:
    found = call("daemon", runtime=runtime, **{name: "many"})
    check_error(found, 2, name, "'many' is not a number")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("CKPTMGR_METRICS_PORT", "70000", "70000 is not a port"),
        ("CKPTMGR_METRICS_PORT", "nan", "nan is not a port"),
        ("CKPTMGR_METRICS_PORT", "-inf", "-inf is not a port"),
        ("CKPTMGR_METRICS_PORT", "9464.5", "9464.5 is not a port"),
        ("CKPTMGR_BUDGET_MIB", "inf", "inf is not allowed"),
        ("CKPTMGR_SPOOL_MAX_GIB", "nan", "nan is not allowed"),
        ("CKPTMGR_STORE_TIMEOUT_SECONDS", "nan", "nan is not allowed"),
        ("CKPTMGR_STORE_TIMEOUT_SECONDS", "-1", "-1 is not allowed"),
        ("CKPTMGR_STORE_TIMEOUT_SECONDS", "0", "0 is not allowed"),
        ("CKPTMGR_MAX_STORE_GBPS", "-inf", "-inf is not a limit"),
    ],
)
def test_2_numbers_that_can_not_be_meant(runtime: Path, name: str, text: str, words: str) -> None:
    check_error(call("daemon", runtime=runtime, **{name: text}), 2, f"{name}: {words}")


def test_5_a_store_that_does_not_answer(tmp_path: Path) -> None:
    """A command waits no longer for it than it was told to."""
    rig = Rig(tmp_path)
    rig.obey(("*", "", "hold"))
    found = call("ls", rig.url, CKPTMGR_STORE_TIMEOUT_SECONDS="0.1", PYTHONPATH=rig.python_path)
    check_error(found, 5, "format", "no answer in time")


@pytest.mark.parametrize("kind", ["data", "man", "commit"])
def test_3_damage(store: Path, kind: str) -> None:
    path = spoil(store, 2, 2, kind)
    key = str(path.relative_to(store))
    found = call("verify", store)
    assert (found.status, found.err) == (3, "")
    assert found.out.startswith("2.2 DAMAGED ")
    assert key in found.out
    report = call("verify", store, "--all", "--json")
    assert report.status == 3
    damaged = [one["id"] for one in report.document if one["damage"]]
    assert damaged == ["2.2"]
    assert call("verify", store, "1.3").status == 0


def test_3_show(store: Path) -> None:
    spoil(store, 2, 2, "man")
    check_error(call("show", store), 3, "man/00000002/000000000002/000000", "hint: ")


def test_3_what_a_collection_reads_back_and_does_not_hold(store: Path) -> None:
    for attempt, step in ((2, 2), (1, 3)):
        spoil(store, attempt, step)
    found = call("gc", store, "--keep=2", "--json")
    assert (found.status, [one["id"] for one in found.document]) == (3, ["1.1"])
    *told, error, hint = found.err.splitlines()
    codes = {json.loads(one)["code"] for one in told}
    assert codes == {"CKM1802", "CKM1804"}, "damaged, and retention_blocked for the next step"
    assert error == f"ckptmgr: {store}: read back, these steps do not hold: 2.2, 1.3"
    assert hint.startswith("hint: Run `ckptmgr verify URL --all`")


def test_3_nothing_holds(store: Path, tmp_path: Path) -> None:
    for attempt, step in ((1, 1), (1, 2), (1, 3), (2, 2)):
        spoil(store, attempt, step)
    check_error(call("restore", store, "--to", tmp_path / "out"), 3, "data/00000001/")
    assert not (tmp_path / "out").exists()


def test_3_the_step_that_was_asked_for(store: Path, tmp_path: Path) -> None:
    """No other step takes the place of one that was named."""
    spoil(store, 1, 3)
    check_error(call("restore", store, "1.3", "--to", tmp_path / "out"), 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "99"],
        ["show", "9.2"],
        ["restore", "99"],
        ["hold", "99"],
        ["release", "99", "ab"],
    ],
)
def test_4_no_such_step(made: Path, arguments: list[str], tmp_path: Path) -> None:
    command, *rest = arguments
    check_error(call(command, made, *rest), 4, "no committed step", "hint: Run `ckptmgr ls`")


@pytest.mark.parametrize("command", ["ls", "show", "verify", "restore", "gc"])
def test_4_no_store(tmp_path: Path, command: str) -> None:
    found = call(command, tmp_path / "nothing")
    check_error(found, 4, "is not a ckptmgr store", "hint: Check the URL")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("command", ["ls", "show", "verify", "restore", "gc"])
def test_5_the_store_refuses(made: Path, tmp_path: Path, command: str) -> None:
    rig = Rig(tmp_path)
    rig.obey(("*", "", "refuse"))
    found = call(command, rig.url, PYTHONPATH=rig.python_path)
    check_error(found, 5, "is refused by the test", "hint: Give the user")


def test_6_a_trainer_of_this_host_is_superseded(runtime: Path, tmp_path: Path) -> None:
    """Two hosts, as their daemons see it: the old one was cut off and comes back."""
    other = runtime / "host2"
    other.mkdir(mode=0o700)
    url = f"file://{tmp_path}/store"
    with Daemon(runtime), Daemon(other):
        with Rank(runtime, url) as old:
            with Rank(other, url) as new:
                new.restore()
                new.save(1)
                assert new.wait(1).outcome == Outcome.COMMITTED
            assert call("drain", runtime=runtime).status == 0, "it has not met the newer one yet"
            old.save(2)
            assert old.wait(2).outcome == Outcome.ABORTED
            found = call("drain", runtime=runtime)
            assert (found.status, found.out) == (6, "0 snapshots undecided\n")
            first, second = found.err.splitlines()
            assert first == f"ckptmgr: {url}: attempt 2 has taken over from rank 0 here"
            assert second.startswith("hint: Stop this process")
            report = call("drain", "--json", runtime=runtime)
            assert (report.status, report.document) == (6, {"undecided": 0, "superseded": 1})
            assert "SUPERSEDED by attempt 2" in call("status", runtime=runtime).out
        assert call("drain", runtime=runtime).status == 0, "the trainer has ended"
        with Rank(runtime, url) as newest:  # the buffer that was marked serves again
            newest.restore()
            assert call("drain", runtime=runtime).status == 0
        assert call("drain", runtime=other).status == 0


@pytest.mark.parametrize("how", [["--json"], []])
def test_7_an_older_step_was_restored(store: Path, tmp_path: Path, how: list[str]) -> None:
    spoil(store, 2, 2)
    found = call("restore", store, "--to", tmp_path / "out", *how)
    assert (found.status, found.err) == (7, "")
    if how:
        assert found.document["id"] == "1.3"
        assert [one["id"] for one in found.document["skipped"]] == ["2.2"]
    else:
        assert found.out.startswith("skipped 2.2: data/00000002/")
        assert "step 1.3 (" in found.out


def test_7_an_object_that_can_not_be_read(made: Path, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    shutil.copytree(made, rig.path)
    rig.obey(("get", "data/00000002/", "unreadable"))
    found = call("restore", rig.url, "--to", tmp_path / "out", PYTHONPATH=rig.python_path)
    assert found.status == 7
    assert found.out.startswith("skipped 2.2: data/00000002/")
    assert "can not be read by the test's will" in found.out
    assert call("verify", rig.url, PYTHONPATH=rig.python_path).status == 3


# ---- what is printed --------------------------------------------------------


def test_ls_of_a_long_job_has_the_newest_retired_steps(store: Path) -> None:
    """Their registers stay for ever, and one that is gone is a row as well."""
    (store / "retired/00000001").mkdir(parents=True)
    for step in range(1000, 1120):
        (store / f"retired/00000001/{step:012d}").touch()
    shown = call("ls", store, "--json").document
    assert [row["step"] for row in shown if row["state"] == "retired"] == [*range(1119, 1019, -1)]
    assert sum(row["state"] == "committed" for row in shown) == 4
    table = call("ls", store).out.splitlines()
    assert table[-1] == "Of retired steps the newest 100; --all shows the others."
    whole = call("ls", store, "--all", "--json").document
    assert sum(row["state"] == "retired" for row in whole) == 120
    assert len(call("ls", store, "--all").out.splitlines()) == len(whole) + 1


def test_ls_is_one_line_per_step_for_grep(made: Path) -> None:
    header, *rows = call("ls", made).out.splitlines()
    assert header.split() == [
        "step",
        "state",
        "age",
        "raw",
        "stored",
        "ranks",
        "tier",
        "held",
        "tags",
    ]
    assert [row.split()[0] for row in rows] == ["2.2", "1.3", "1.2", "1.1"]
    assert all("attempt=" in row and "step=" in row for row in rows)
    assert all(row == row.rstrip() or len(row) < 300 for row in rows)


def test_long_and_hostile_tags_stay_on_their_line(runtime: Path, tmp_path: Path) -> None:
    """No markup, no emoji, no escape reaches the terminal of whoever looks at a store."""
    from ckptmgr import present
    from ckptmgr.repository.catalog import StepEntry
    from ckptmgr.repository.commit import Decision
    from ckptmgr.types import StepId, StepState

    tags = {"a": "[bold]x[/bold] [/]", "b": ":smile:", "c": "\x1b]0;owned\x07\n2.2 verified"}
    tags["d"] = "long" * 200
    decision = Decision("COMMIT", 1, 1, world=1, tags=dict(tags))
    entry = StepEntry(StepId(1, 1), StepState.COMMITTED, decision)
    with present._console.capture() as capture:
        present.entries([entry], present.Tiers({}, {}), retired_max=None)
    _, row = capture.get().splitlines()
    assert not ESCAPE.search(row)
    assert "a=[bold]x[/bold] [/] b=:smile: c=\\x1b]0;owned\\x07\\x0a2.2 verified" in row
    assert "long" * 200 in row


def test_show_names_every_tensor(made: Path) -> None:
    lines = call("show", made, "1.2", "--tensors").out.splitlines()
    assert "words uint64 [65536]" in lines
    assert "floats float32 [131072]" in lines


def test_hold_and_release(store: Path) -> None:
    held = call("hold", store, "1.1", "--why", "for the paper").out.strip()
    assert re.fullmatch(r"[0-9a-f]{16}", held)
    (row,) = (one for one in call("ls", store, "--json").document if one["id"] == "1.1")
    assert row["holds"] == [held]
    done = call("gc", store, "--keep=1", "--json").document
    assert {one["id"] for one in done} == {"1.2"}
    assert call("release", store, "1.1", held).out == f"released {held}\n"
    assert call("gc", store, "--keep=1").out.startswith("1.1 retire: ")
    assert call("gc", store, "--keep=1").out == "nothing to do\n"
    check_error(call("hold", store, "1.1"), 4, "no committed step 1.1")


def test_a_dry_run_changes_nothing(store: Path) -> None:
    before = sorted(store.rglob("*"))
    found = call("gc", store, "--keep=1", "--dry-run")
    assert [line.split(":")[0] for line in found.out.splitlines()] == [
        "1.3 keep",
        "2.2 keep",
        "1.1 would retire",
        "1.2 would retire",
    ]
    assert "1.3 keep: one of the newest 2; attempt 2 resumed from it" in found.out
    assert sorted(store.rglob("*")) == before


def test_status_and_drain_of_a_running_daemon(runtime: Path, tmp_path: Path) -> None:
    with Daemon(runtime) as daemon:
        with Rank(runtime, f"file://{tmp_path}/store") as rank:
            rank.save(1)
            rank.wait(1)
            lines = call("status", runtime=runtime).out.splitlines()
            assert lines[0].startswith(
                f"daemon {daemon.process.pid}, page and metrics on http://127."
            )
            assert lines[1].startswith(f"file://{tmp_path}/store: last commit 1.1, store ")
            assert lines[2].endswith("trainer alive")
            assert lines[3].startswith("    1.1 committed, 1.0 MiB, sealed ")
        assert call("drain", "--stop", runtime=runtime).out == "0 snapshots undecided\n"
        assert daemon.process.wait(60) == 0


# ---- surprises --------------------------------------------------------------


def test_an_error_that_nobody_expected_is_two_lines(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.obey(("*", "", "surprise"))
    found = call("ls", rig.url, PYTHONPATH=rig.python_path)
    check_error(found, 1, "RuntimeError: nobody", "hint: Run it again with `ckptmgr --debug`")
    debugged = call("--debug", "ls", rig.url, PYTHONPATH=rig.python_path)
    assert debugged.status == 1
    assert "Traceback (most recent call last)" in debugged.err


def test_debug_shows_where_an_error_came_from(made: Path) -> None:
    found = call("--debug", "show", made, "99")
    assert "Traceback (most recent call last)" in found.err
    assert "NothingToRestoreError" in found.err


def test_a_store_of_a_newer_version_is_refused(store: Path) -> None:
    record = bytearray((store / "format").read_bytes())
    record[9] = 2
    (store / "format").write_bytes(record)
    found = call("ls", store)
    assert found.status == 3
    assert "Traceback" not in found.err
