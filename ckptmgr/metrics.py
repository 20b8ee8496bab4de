"""Every metric's name, unit and help text, in one place."""

from __future__ import annotations

import contextlib

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

REASONS = (
    *("rank_missing", "decider_silent", "parts_missing", "newer_attempt"),
    *("newer_snapshot", "failure"),
)
"""Why a step is given up, as `ckptmgr_aborts_total` says it."""

DROPPED = ("waiting", "writing", "damaged")
"""How a snapshot was lost, as `ckptmgr_dropped_snapshots_total` says it: a newer one took its slot
while it waited to be written, or while it was; or what its slot held did not hold."""

STORE_OPERATIONS = ("put_new", "get", "get_many", "list", "delete", "make_durable")
STORE_ERRORS = (
    *("StoreUnreachableError", "StoreFullError", "StorePermissionError", "MediumError"),
    *("TimeoutError", "ChunkDamagedError", "RecordDamagedError"),
)
TIERS = ("memory", "store")
SOURCES = ("memory", "store")
STATES = ("committed", "verified")
"""Of a commit that stands, as `ls` shows it: verified was read back whole."""


def remove(gauge: Gauge, *labels: str) -> None:
    """Drop one job's value of a gauge, if it has one."""
    with contextlib.suppress(KeyError):  # of older prometheus_clients
        gauge.remove(*labels)


class Metrics:
    """The daemon's metrics on a registry of their own; `job` is a short hash of the store URL."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        job = ["job"]
        self.last_commit_step = Gauge(
            "ckptmgr_last_commit_step", "Step of the newest commit.", job, registry=r
        )
        self.last_commit_timestamp = Gauge(
            "ckptmgr_last_commit_timestamp_seconds",
            "Unix time of the newest commit; its age is time() minus this.",
            job,
            registry=r,
        )
        self.commits = Counter("ckptmgr_commits", "Steps committed.", job, registry=r)
        self.aborts = Counter(
            "ckptmgr_aborts", "Steps given up, by reason.", [*job, "reason"], registry=r
        )
        self.stall = Histogram(
            "ckptmgr_stall_seconds",
            "Time the training thread was blocked by a snapshot.",
            job,
            registry=r,
            buckets=SECONDS_BUCKETS,
        )
        self.commit_duration = Histogram(
            "ckptmgr_commit_duration_seconds",
            "Time from the start of writing a snapshot to its commit.",
            job,
            registry=r,
            buckets=SECONDS_BUCKETS,
        )
        self.raw_bytes = Counter(
            "ckptmgr_raw_bytes", "Snapshot bytes written, before the codec.", job, registry=r
        )
        self.stored_bytes = Counter(
            "ckptmgr_stored_bytes", "Snapshot bytes written, after the codec.", job, registry=r
        )
        self.queue = Gauge(
            "ckptmgr_queue_snapshots", "Sealed snapshots not decided yet.", job, registry=r
        )
        self.failures = Counter(
            "ckptmgr_failures", "Failures by kind of error.", [*job, "kind"], registry=r
        )
        self.trainers = Gauge("ckptmgr_trainers", "Trainers attached.", registry=r)
        self._of_progress(r, job)
        self._of_store(r, job)
        self._of_trust(r, job)
        self._of_spool_and_mirror(r, job)
        self._of_goodput(r, job)
        self._of_preemption(r, job)
        self._of_daemon(r)
        self._of_keeping(r, job)

    def _of_preemption(self, r: CollectorRegistry, job: list[str]) -> None:
        self.preemption_signals = Counter(
            "ckptmgr_preemption_signals", "Preemptions that ranks have told of.", job, registry=r
        )
        self.preemption_saves = Counter(
            "ckptmgr_preemption_saves",
            "Preemptions after which all that the rank sealed is committed; fewer: work was lost.",
            job,
            registry=r,
        )

    def open_job(self, label: str) -> None:
        """Start the counters of a job at 0: what appears at 1 has not grown, for Prometheus."""
        for counter in (
            *(self.commits, self.fallbacks, self.superseded_attempts),
            *(self.preemption_signals, self.preemption_saves, self.copied_bytes),
        ):
            counter.labels(label)
        for counter, values in (
            (self.aborts, REASONS),
            (self.dropped, DROPPED),
            (self.corruption, TIERS),
            (self.restores, SOURCES),
            (self.store_retries, STORE_OPERATIONS),
        ):
            for value in values:
                counter.labels(label, value)
        for operation in STORE_OPERATIONS:
            self.store_seconds.labels(label, operation)
            for kind in STORE_ERRORS:
                self.store_errors.labels(label, operation, kind)

    def close_job(self, label: str) -> None:
        """Drop what is only true of a job that somebody runs; its counters stay."""
        for gauge in (
            *(self.attempt, self.attached, self.current_step, self.last_snapshot_step),
            *(self.interval, self.commit_awaited),
            *(self.backlog_bytes, self.oldest_undecided, self.unnamed_buffers, self.queue),
            *(self.spool_parts, self.spool_bytes, self.spool_full, self.mirror_behind),
            self.pinned_bytes,
        ):
            remove(gauge, label)
        for state in STATES:
            remove(self.store_bytes, label, state)

    def _of_progress(self, r: CollectorRegistry, job: list[str]) -> None:
        self.attempt = Gauge(
            "ckptmgr_attempt", "Newest attempt that was attached.", job, registry=r
        )
        self.attached = Gauge(
            "ckptmgr_attached_ranks", "Ranks of this host whose trainer lives.", job, registry=r
        )
        self.last_snapshot_step = Gauge(
            "ckptmgr_last_snapshot_step", "Step of the newest snapshot.", job, registry=r
        )
        self.interval = Gauge(
            "ckptmgr_snapshot_interval_seconds",
            "Time between the newest two snapshots of an attempt; 0 until there are two.",
            job,
            registry=r,
        )
        self.commit_awaited = Gauge(
            "ckptmgr_commit_awaited_timestamp_seconds",
            "Unix time of the newest commit, or of the newest attach if that is later.",
            job,
            registry=r,
        )
        self.backlog_bytes = Gauge(
            "ckptmgr_upload_backlog_bytes",
            "Bytes of snapshots that are not decided yet, in host memory and in the spool.",
            job,
            registry=r,
        )
        self.oldest_undecided = Gauge(
            "ckptmgr_oldest_undecided_timestamp_seconds",
            "Unix time of the oldest snapshot that is not decided yet; absent without one.",
            job,
            registry=r,
        )
        self.copied_bytes = Counter(
            "ckptmgr_d2h_bytes",
            "Bytes of snapshots that trainers copied into host memory.",
            job,
            registry=r,
        )
        self.dropped = Counter(
            "ckptmgr_dropped_snapshots",
            "Snapshots that were lost before they were stored, by reason.",
            [*job, "reason"],
            registry=r,
        )
        self.superseded_attempts = Counter(
            "ckptmgr_superseded_attempts",
            "Attempts that went on here though a newer one was active.",
            job,
            registry=r,
        )
        self.unnamed_buffers = Gauge(
            "ckptmgr_unnamed_buffers",
            "Host buffers outside of /dev/shm, which will not survive the daemon.",
            job,
            registry=r,
        )

    def _of_store(self, r: CollectorRegistry, job: list[str]) -> None:
        self.store_seconds = Histogram(
            "ckptmgr_store_op_seconds",
            "Time of one try of a store operation that worked.",
            [*job, "op"],
            registry=r,
            buckets=SECONDS_BUCKETS,
        )
        self.store_errors = Counter(
            "ckptmgr_store_errors",
            "Tries of store operations that failed, by operation and class of error.",
            [*job, "op", "class"],
            registry=r,
        )
        self.store_retries = Counter(
            "ckptmgr_store_retries",
            "Tries of store operations after one that failed.",
            [*job, "op"],
            registry=r,
        )

    def _of_trust(self, r: CollectorRegistry, job: list[str]) -> None:
        self.last_verified = Gauge(
            "ckptmgr_last_verified_timestamp_seconds",
            "Unix time at which a commit was read back whole the last time.",
            job,
            registry=r,
        )
        self.corruption = Counter(
            "ckptmgr_corruption_detected",
            "Damage that was met, by tier: memory or store.",
            [*job, "tier"],
            registry=r,
        )
        self.restores = Counter(
            "ckptmgr_restores", "Restores by source: memory or store.", [*job, "source"], registry=r
        )
        self.fallbacks = Counter(
            "ckptmgr_restore_fallbacks",
            "Restores that fell back to an older step.",
            job,
            registry=r,
        )
        self.restore_seconds = Histogram(
            "ckptmgr_restore_seconds",
            "Time from asking for a step to its first bytes in host memory.",
            [*job, "source"],
            registry=r,
            buckets=SECONDS_BUCKETS,
        )
        self.gc_deleted_bytes = Counter(
            "ckptmgr_gc_deleted_bytes", "Stored bytes of retired steps.", job, registry=r
        )

    def _of_spool_and_mirror(self, r: CollectorRegistry, job: list[str]) -> None:
        self.spooled = Counter(
            "ckptmgr_spooled", "Snapshots written to the spool of this host.", job, registry=r
        )
        self.drained = Counter(
            "ckptmgr_drained", "Snapshots of the spool that became commits.", job, registry=r
        )
        self.spool_parts = Gauge(
            "ckptmgr_spool_snapshots", "Snapshots in the spool, not decided yet.", job, registry=r
        )
        self.spool_bytes = Gauge("ckptmgr_spool_bytes", "Bytes in the spool.", job, registry=r)
        self.spool_full = Gauge(
            "ckptmgr_spool_full", "1 while the spool has no room for a snapshot.", job, registry=r
        )
        self.mirrored = Counter(
            "ckptmgr_mirrored", "Commits copied to the mirror.", job, registry=r
        )
        self.mirror_behind = Gauge(
            "ckptmgr_mirror_behind_commits", "Commits the mirror lacks.", job, registry=r
        )
        self.mirror_reads = Counter(
            "ckptmgr_mirror_reads", "Objects read from the mirror.", job, registry=r
        )

    def _of_daemon(self, r: CollectorRegistry) -> None:
        self.build = Gauge(
            "ckptmgr_build_info", "1, with the version of the daemon.", ["version"], registry=r
        )
        self.events = Counter(
            "ckptmgr_events",
            "Events logged, by code (docs/events.md).",
            ["code", "event", "level"],
            registry=r,
        )
        self.adopted = Gauge(
            "ckptmgr_adopted_snapshots",
            "Sealed snapshots that this daemon found when it started.",
            registry=r,
        )
        self.fdstore_recovered = Counter(
            "ckptmgr_fdstore_recovered",
            "Host buffers without a name that systemd kept for this daemon.",
            registry=r,
        )
        self.after_kill = Gauge(
            "ckptmgr_started_after_kill",
            "1 if the daemon before this one was killed, and did not end by itself.",
            registry=r,
        )
        self.daemon_restarts = Counter(
            "ckptmgr_daemon_restarts",
            "Daemons on this runtime directory before this one, for as long as its memory lasts.",
            registry=r,
        )
        self.clock_jumps = Counter(
            "ckptmgr_clock_jumps", "Jumps of this host's clock by a second or more.", registry=r
        )
        self.spool_free_bytes = Gauge(
            "ckptmgr_spool_free_bytes", "Bytes that the spool may still take.", registry=r
        )
        self.spool_capacity = Gauge(
            "ckptmgr_spool_capacity_bytes",
            "Bytes that the spool may take altogether; 0 without a spool.",
            registry=r,
        )
        ProcessCollector(registry=r)

    def _of_keeping(self, r: CollectorRegistry, job: list[str]) -> None:
        self.verified = Counter(
            "ckptmgr_verified", "Commits that were read back whole.", job, registry=r
        )
        self.readback_bytes = Counter(
            "ckptmgr_readback_bytes", "Bytes of commits that were read back.", job, registry=r
        )
        self.readback_damage = Counter(
            "ckptmgr_readback_damage", "Commits that did not hold when read back.", job, registry=r
        )
        self.retired = Counter(
            "ckptmgr_retired", "Commits that retention gave up.", job, registry=r
        )
        self.store_bytes = Gauge(
            "ckptmgr_store_bytes",
            "Stored bytes of the commits that this daemon's last collection left, by state.",
            [*job, "state"],
            registry=r,
        )
        self.pinned_bytes = Gauge(
            "ckptmgr_pinned_bytes",
            "Stored bytes of the commits among them that somebody holds.",
            job,
            registry=r,
        )

    def _of_goodput(self, r: CollectorRegistry, job: list[str]) -> None:
        """Of jobs whose rank 0 is on this host; docs/knowing.md defines them."""
        self.current_step = Gauge(
            "ckptmgr_current_step", "Last step that the trainers told of.", job, registry=r
        )
        self.ettr = Gauge(
            "ckptmgr_ettr_ratio",
            "Part of the time since the first attempt that was training that counts.",
            job,
            registry=r,
        )
        self.productive_seconds = Gauge(
            "ckptmgr_productive_seconds", "Time of training that counts.", job, registry=r
        )
        self.down_seconds = Gauge(
            "ckptmgr_down_seconds",
            "Time that was neither training nor stall: start-up, restore, waiting, unknown.",
            job,
            registry=r,
        )
        self.restarts = Counter(
            "ckptmgr_restarts", "Attempts that went on from an older one.", job, registry=r
        )
        self.lost_steps = Counter(
            "ckptmgr_lost_steps",
            "Steps trained in vain; known: exact, or at_least where no host could tell.",
            [*job, "known"],
            registry=r,
        )
        self.lost_seconds = Counter(
            "ckptmgr_lost_seconds",
            "Time of steps trained in vain; known: exact, or at_most where no host could tell.",
            [*job, "known"],
            registry=r,
        )
