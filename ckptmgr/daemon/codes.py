"""Every event's code and level, in one place. A code never changes its meaning, and is not reused.

CKM10xx the daemon's life, 11 host memory, 12 ranks and attempts, 13 snapshots and commits,
14 spool, 15 mirror, 16 store, 17 the way back, 18 keeping. docs/events.md has the fields and the
meaning of each, docs/runbook.md what to do about every warning and error.
"""

from __future__ import annotations

CODES: dict[str, tuple[str, str]] = {
    "started": ("CKM1001", "info"),
    "metrics_off": ("CKM1002", "warning"),
    "killed_before": ("CKM1003", "warning"),
    "clock_jumped": ("CKM1004", "warning"),
    "idle": ("CKM1005", "info"),
    "draining": ("CKM1006", "info"),
    "drained": ("CKM1007", "info"),
    "drain_incomplete": ("CKM1008", "warning"),
    "ended": ("CKM1009", "info"),
    "fault": ("CKM1010", "error"),
    "inbox_deaf": ("CKM1011", "warning"),
    "notify_failed": ("CKM1012", "warning"),
    "adopted": ("CKM1101", "info"),
    "buffer_refused": ("CKM1102", "warning"),
    "buffer_stranded": ("CKM1103", "warning"),
    "shared_memory_small": ("CKM1104", "warning"),
    "freed": ("CKM1105", "info"),
    "buffer_vanished": ("CKM1106", "warning"),
    "slot_damaged": ("CKM1107", "warning"),
    "attached": ("CKM1201", "info"),
    "trainer_died": ("CKM1202", "info"),
    "request_failed": ("CKM1203", "info"),
    "connection_refused": ("CKM1204", "warning"),
    "attempt_superseded": ("CKM1205", "warning"),
    "active_ignored": ("CKM1206", "warning"),
    "single_decider": ("CKM1207", "info"),
    "preempted": ("CKM1208", "info"),
    "preemption_saved": ("CKM1209", "info"),
    "writing": ("CKM1301", "info"),
    "committed": ("CKM1302", "info"),
    "witness_failed": ("CKM1303", "warning"),
    "superseded": ("CKM1304", "info"),
    "aborted": ("CKM1305", "info"),
    "given_up": ("CKM1306", "warning"),
    "give_up_failed": ("CKM1307", "warning"),
    "write_failed": ("CKM1308", "warning"),
    "spool_found": ("CKM1401", "info"),
    "spool_off": ("CKM1402", "warning"),
    "spool_refused": ("CKM1403", "warning"),
    "spooling": ("CKM1404", "info"),
    "spooled": ("CKM1405", "info"),
    "spool_full": ("CKM1406", "warning"),
    "spool_stranded": ("CKM1407", "warning"),
    "spool_behind": ("CKM1408", "warning"),
    "spool_dropped": ("CKM1409", "warning"),
    "draining_step": ("CKM1410", "info"),
    "drained_step": ("CKM1411", "info"),
    "drain_failed": ("CKM1412", "warning"),
    "mirrored": ("CKM1501", "info"),
    "mirror_off": ("CKM1502", "warning"),
    "mirror_failed": ("CKM1503", "warning"),
    "mirror_skipped": ("CKM1504", "warning"),
    "mirror_read": ("CKM1505", "warning"),
    "store_failed": ("CKM1601", "warning"),
    "prefetched": ("CKM1701", "info"),
    "prefetch_failed": ("CKM1702", "info"),
    "restored": ("CKM1703", "info"),
    "restore_skipped": ("CKM1704", "warning"),
    "verified": ("CKM1801", "info"),
    "damaged": ("CKM1802", "warning"),
    "retired": ("CKM1803", "info"),
    "retention_blocked": ("CKM1804", "warning"),
    "retention_failed": ("CKM1805", "warning"),
}
"""Name of an event -> its code and its level."""


def code_of(name: str) -> str:
    """The code of an event; '' for a name that has none, which a test refuses."""
    return CODES[name][0] if name in CODES else ""
