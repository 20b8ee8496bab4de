"""Every metric's name, unit and help text, in one place."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


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
        self.aborts = Counter("ckptmgr_aborts", "Steps given up.", job, registry=r)
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
        self.restores = Counter(
            "ckptmgr_restores", "Restores by source: memory or store.", [*job, "source"], registry=r
        )
        self.fallbacks = Counter(
            "ckptmgr_restore_fallbacks",
            "Restores that fell back to an older step.",
            job,
            registry=r,
        )
        self.trainers = Gauge("ckptmgr_trainers", "Trainers attached.", registry=r)
        self._of_spool_and_mirror(r, job)
        self._of_goodput(r, job)
        self._of_preemption(r, job)

    def _of_preemption(self, r: CollectorRegistry, job: list[str]) -> None:
        self.preemption_signals = Counter(
            "ckptmgr_preemption_signals", "Preemptions that ranks have told of.", job, registry=r
        )
        self.preemption_saves = Counter(
            "ckptmgr_preemption_saves",
            "Preemptions whose last snapshot was committed; fewer than signals: work was lost.",
            job,
            registry=r,
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
