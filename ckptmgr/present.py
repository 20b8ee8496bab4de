"""How the command line shows things: rich tables for people, plain dicts for --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ckptmgr.types import StepId, StepState

if TYPE_CHECKING:  # `--help` needs no store
    from ckptmgr.repository.catalog import StepEntry
    from ckptmgr.repository.manifest import Manifest

debug = False
"""Whether errors show their traceback; set by --debug."""


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at it; None is what a stream is that was closed before we started."""
    return stream is not None and stream.isatty()


# Nothing that is shown is markup. Off a terminal nothing is cut or folded, so that a line of a
# table stays a line for whoever reads it with grep.
_console = Console(
    markup=False,
    highlight=False,
    emoji=False,
    soft_wrap=True,
    width=None if is_terminal(sys.stdout) else 10_000,
)


def printable(text: str) -> str:
    """One line of text, without the characters that would command a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _print(text: str) -> None:
    _console.print(printable(text))


def size(length: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if length < 1024:
            return f"{length:.0f} {unit}" if unit == "B" else f"{length:.1f} {unit}"
        length /= 1024
    return f"{length:.1f} TiB"


def age(then: float) -> str:
    """Time since a Unix time, for people."""
    seconds = max(0.0, time.time() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def read_mirror(key: str, why: str) -> None:
    """Say, beside whatever is printed, that something came from the mirror."""
    _beside(f"read from the mirror: {key}: {why}")


def refused_mirror() -> None:
    """Say, beside whatever is printed, that the mirror is not read."""
    _beside("the mirror holds another incarnation of this job, and is not read")


def _beside(what: str) -> None:
    line = f"ckptmgr: {what}".partition("\n")[0]
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(printable(line))


@contextmanager
def progress(what: str) -> Iterator[Callable[[int], None]]:
    """A running count of bytes on a terminal; silent elsewhere."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda length: bar.advance(task, length)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal; silent elsewhere."""
    if not is_terminal(sys.stderr):
        yield
        return
    with Console(stderr=True).status(what):
        yield


Ranks = dict[str, list[int]]
"""Steps (`attempt.step`), and the ranks whose part is there."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """What this host holds of a job outside of the store, as its daemon tells."""

    memory: Ranks
    spool: Ranks

    @classmethod
    def of(cls, jobs: list[dict[str, Any]], url: str) -> Tiers:
        """The tiers of one of the jobs in a daemon's state."""
        memory: dict[str, set[int]] = {}
        spool: dict[str, set[int]] = {}
        for job in jobs:
            if job["url"] != url:
                continue
            for buffer in job["buffers"]:
                for snapshot in buffer["snapshots"]:
                    memory.setdefault(snapshot["step"], set()).add(buffer["rank"])
            for part in job["spool"]["parts"] if job["spool"] else ():
                spool.setdefault(part["step"], set()).add(part["rank"])
        memory_ranks = {step: sorted(ranks) for step, ranks in memory.items()}
        return cls(memory_ranks, {step: sorted(ranks) for step, ranks in spool.items()})


def entry_json(entry: StepEntry, tiers: Tiers) -> dict[str, Any]:
    """One step as `ls --json` prints it (docs/cli-json.md)."""
    decision = entry.decision
    return {
        "step": entry.id.step,
        "attempt": entry.id.attempt,
        "id": str(entry.id),
        "state": entry.state.value,
        "world": entry.world or None,
        "ranks_present": len(entry.ranks),
        "ranks_missing": list(entry.missing),
        "ranks_in_memory": tiers.memory.get(str(entry.id), []),
        "ranks_in_spool": tiers.spool.get(str(entry.id), []),
        "raw_bytes": decision.raw_bytes if decision else None,
        "stored_bytes": decision.stored_bytes if decision else None,
        "sealed_at": decision.sealed_at if decision and decision.committed else None,
        "parent": ".".join(map(str, decision.parent)) if decision and decision.committed else None,
        "tags": decision.tags if decision else {},
        "holds": list(entry.holds),
        "why": decision.why if decision else "",
        "damage": entry.damage,
    }


def _state(entry: StepEntry) -> str:
    if entry.damage:
        return f"{entry.state.value} (damaged)"
    if entry.missing and entry.ranks:
        return f"{entry.state.value}, waits for {shown_ranks(entry.missing)}"
    return entry.state.value


RANKS_SHOWN_MAX = 8


def shown_ranks(ranks: Sequence[int]) -> str:
    """Ranks for people, the first few by number."""
    more = "..." if len(ranks) > RANKS_SHOWN_MAX else ""
    return ",".join(map(str, ranks[:RANKS_SHOWN_MAX])) + more


def _tier(entry: StepEntry, tiers: Tiers) -> str:
    found = ["store"] if entry.ranks else []
    for name, of_name in (("spool", tiers.spool), ("memory", tiers.memory)):
        ranks = of_name.get(str(entry.id), [])
        if ranks:
            found.append(f"{name} ({len(ranks)}/{entry.world})" if entry.world > 1 else name)
    return "+".join(found)


def entries(found: list[StepEntry], tiers: Tiers, *, retired_max: int | None) -> None:
    """The table of `ls`, which has at most so many retired steps."""
    columns = ("step", "state", "age", "raw", "stored", "ranks", "tier", "held", "tags")
    table = Table(*columns, box=None)
    for entry in found:
        decision = entry.decision
        done = decision is not None and decision.committed
        cells = (
            str(entry.id),
            _state(entry),
            age(decision.sealed_at) if decision and done else "",
            size(decision.raw_bytes) if decision and done else "",
            size(decision.stored_bytes) if decision and done else "",
            f"{len(entry.ranks)}/{entry.world or '?'}",
            _tier(entry, tiers),
            str(len(entry.holds) or ""),
            " ".join(f"{k}={v}" for k, v in (decision.tags if decision else {}).items()),
        )
        table.add_row(*map(printable, cells))
    _console.print(table)
    if retired_max is not None and sum(map(_is_retired, found)) >= retired_max:
        _console.print(f"Of retired steps the newest {retired_max}; --all shows the others.")


def _is_retired(entry: StepEntry) -> bool:
    return entry.state is StepState.RETIRED


def with_tiers(found: list[StepEntry], tiers: Tiers) -> list[StepEntry]:
    """The steps of a store, and those of which it has nothing yet, newest first."""
    known = {str(entry.id) for entry in found}
    ids = [
        StepId(*map(int, text.split(".")))
        for text in {**tiers.memory, **tiers.spool}
        if text not in known
    ]
    from ckptmgr.repository.catalog import StepEntry

    added = [StepEntry(step, StepState.UNDECIDED, None) for step in ids]
    return sorted([*found, *added], key=lambda entry: entry.id, reverse=True)


def step_json(
    entry: StepEntry, tiers: Tiers, manifests: list[Manifest], *, tensors: bool
) -> dict[str, Any]:
    """One step as `show --json` prints it (docs/cli-json.md)."""
    document = entry_json(entry, tiers)
    document |= {"nonce": entry.decision.nonce if entry.decision else "", "ranks": []}
    digests = entry.decision.manifests if entry.decision else ()
    for manifest, digest in zip(manifests, digests, strict=True):
        leaves = manifest.read_layout().leaves
        rank: dict[str, Any] = {
            "rank": manifest.rank,
            "host": manifest.host,
            "digest": digest,
            "raw_bytes": manifest.raw_bytes,
            "stored_bytes": manifest.stored_bytes,
            "packs": len(manifest.packs),
            "chunks": len(manifest.chunks),
            "leaves": len(leaves),
        }
        if tensors:
            rank["tensors"] = [
                {"path": f.path, "dtype": f.dtype, "shape": list(f.shape), "bytes": f.nbytes}
                for f in leaves
            ]
        document["ranks"].append(rank)
    return document


def step(document: dict[str, Any]) -> None:
    """The tables of `show`."""
    for name in ("id", "state", "parent", "nonce", "world", "tags", "holds", "why"):
        if document[name]:
            _print(f"{name:<8} {document[name]}")
    if document["ranks_missing"]:
        _print(f"{'missing':<8} rank {shown_ranks(document['ranks_missing'])}")
    if document["ranks_in_memory"]:
        _print(f"{'memory':<8} rank {shown_ranks(document['ranks_in_memory'])} on this host")
    if document["ranks_in_spool"]:
        _print(f"{'spool':<8} rank {shown_ranks(document['ranks_in_spool'])} on this host")
    for name in ("raw", "stored"):
        if document[f"{name}_bytes"] is not None:
            _print(f"{name:<8} {size(document[f'{name}_bytes'])}")
    table = Table("rank", "host", "leaves", "chunks", "packs", "raw", "stored", box=None)
    for rank in document["ranks"]:
        counts = (str(rank[name]) for name in ("leaves", "chunks", "packs"))
        sizes = (size(rank["raw_bytes"]), size(rank["stored_bytes"]))
        table.add_row(str(rank["rank"]), printable(rank["host"]), *counts, *sizes)
    _console.print(table)
    for rank in document["ranks"]:
        for tensor in rank.get("tensors", ()):
            _print(f"{tensor['path']} {tensor['dtype']} {tensor['shape']}")


NOT_COMMITTED = "is not committed: its save was cut short, or its commit record is gone"


def reports(found: list[dict[str, Any]]) -> None:
    """The lines of `verify`."""
    for report in found:
        step = report["id"] or "attempts"
        if not report["damage"]:
            how = "holds" if report["committed"] else NOT_COMMITTED
            _print(f"{step} {how}")
        for damage in report["damage"]:
            where = f"{damage['key']} at {damage['offset']}"
            _print(f"{step} DAMAGED {where}: {damage['what']}")

    for line in dict.fromkeys(_not_checked(one) for one in found if one["not_checked"]):
        _print(line)


_CHECKS = {
    "hashes": "that stored bytes have the hashes they were stored with",
    "authentic": "that they were encrypted with this key, for this place",
    "decoded": "that they decode to what was saved",
}


def _not_checked(report: dict[str, Any]) -> str:
    """What a `verify` says nothing of, and what would make it."""
    key, names = report["key"], report["not_checked"]
    where = f" in what key {key} encrypts" if key else ""
    how = "leave --quick away" if "hashes" in names else "no key is given: set CKPTMGR_KEY_FILE"
    return f"not checked{where}: {'; '.join(_CHECKS[name] for name in names)} ({how})"


def restored(document: dict[str, Any]) -> None:
    """The lines of `restore`."""
    for skipped in document["skipped"]:
        _print(f"skipped {skipped['id']}: {skipped['why']}")
    for step in document["not_committed"]:
        _print(f"{step} {NOT_COMMITTED}")
    if document["broke_out"]:
        _print(f"back to before {document['broke_out']}")
    _print(
        f"step {document['id']} ({size(document['bytes'])}) is in {document['to']}: "
        + ", ".join(document["files"]),
    )


def prefetching(document: dict[str, Any]) -> None:
    """The line of `prefetch`."""
    if document["step"] is None:
        _print("nothing to prefetch: the job has no committed step")
    elif not document["ranks"]:
        _print("nothing to prefetch: this host's memory holds snapshots of these ranks")
    else:
        ranks = shown_ranks(document["ranks"])
        _print(
            f"step {document['step']} of ranks {ranks} ({size(document['bytes'])}) "
            "is on its way into host memory"
        )


def collected(done: list[dict[str, Any]], *, dry_run: bool) -> None:
    """The lines of `gc`."""
    for one in done:
        action = one["action"]
        verb = f"would {action}" if dry_run and action != "keep" else action
        _print(f"{one['id']} {verb}: {one['why']}")
    if not done:
        _print("nothing to do")


def _writing(seen: dict[str, Any]) -> str:
    """What was measured while writing, if anything was."""
    if not seen["store_bytes_per_second"]:
        return ""
    return (
        f", store {size(int(seen['store_bytes_per_second']))}/s"
        f" with {seen['packs_at_once']} packs at once"
    )


def _spool(spool: dict[str, Any]) -> str:
    parts = spool["parts"]
    line = f"  spool: {len(parts)} snapshots, {size(sum(part['bytes'] for part in parts))}"
    line += f", from {parts[0]['step']} to {parts[-1]['step']}" if parts else ""
    line += ", FULL" if spool["full"] else ""
    why = spool["last_failure"].partition(chr(10))[0]
    return line + (f"; failing: {why}" if why else "")


def _mirror(mirror: dict[str, Any]) -> str:
    line = f"  mirror {mirror['url']}: {mirror['behind']} commits behind"
    line += f", {mirror['reads']} reads from it" if mirror["reads"] else ""
    why = mirror["last_failure"].partition(chr(10))[0]
    return line + (f"; failing: {why}" if why else "")


def status(state: dict[str, Any]) -> None:
    """The lines of `status`."""
    for line in status_lines(state):
        _print(line)


def status_lines(state: dict[str, Any]) -> Iterator[str]:
    """What `status` says, line by line."""
    port = state["metrics_port"]
    web = f"page and metrics on http://127.0.0.1:{port}/" if port >= 0 else "no page or metrics"
    yield (
        f"daemon {state['pid']}, {web}, "
        f"{state['trainers']} trainers, {state['undecided']} snapshots undecided"
    )
    if state["max_store_gbps"]:
        yield f"at most {state['max_store_gbps']:g} Gbit/s to and from all stores"
    for job in state["jobs"]:
        with_key = f", encrypted with key {job['key']}" if job["key"] else ""
        yield (
            f"{job['url']}: last commit {job['last_commit'] or '-'}{with_key}"
            f"{_writing(job['writing'])}"
        )
        if job["spool"] and (job["spool"]["parts"] or job["spool"]["full"]):
            yield _spool(job["spool"])
        if job["mirror"]:
            yield _mirror(job["mirror"])
        for buffer in job["buffers"]:
            alive = "alive" if buffer["trainer_alive"] else "gone"
            line = f"  rank {buffer['rank']} {size(buffer['bytes'])}, trainer {alive}"
            if buffer["max_d2h_gbps"]:
                line += f", at most {buffer['max_d2h_gbps']:g} Gbit/s from its tensors"
            if buffer["superseded_by"]:
                line += f", SUPERSEDED by attempt {buffer['superseded_by']}"
            if buffer["writing"]:
                line += f", writing {buffer['writing']}"
            yield line
            for snapshot in buffer["snapshots"]:
                yield (
                    f"    {snapshot['step']} {snapshot['outcome']}, {size(snapshot['bytes'])}, "
                    f"sealed {age(snapshot['sealed_at'])} ago"
                )
            if buffer["last_failure"]:
                yield f"    failing: {buffer['last_failure'].partition(chr(10))[0]}"
