"""Preemption of Slurm jobs: the signals of `--signal` and of a preemption, and the requeue."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from string import Template

from ckptmgr.errors import UsageError
from ckptmgr.preemption import Notice, Signals, Told

REQUEUE_VARIABLE = "CKPTMGR_SLURM_REQUEUE"
GRACE_VARIABLE = "CKPTMGR_SLURM_GRACE_SECONDS"

KILL_WAIT_SECONDS = 30.0
"""Slurm's KillWait, from SIGTERM to SIGKILL, where the site has not changed it. A preemption may
leave more (GraceTime of the partition or QOS), which no job is told."""

SCONTROL_SECONDS_MAX = 60.0
LIMIT_SIGNAL = signal.SIGUSR1
"""What `--signal=USR1@120` sends some time before the time limit."""


class JobSource(Signals):
    """SIGUSR1 before the time limit, SIGTERM at a preemption, a cancellation or the limit itself.

    SIGCONT, which Slurm sends before SIGTERM, needs no answer. After SIGUSR1 nobody queues the job
    again: with `requeue`, rank 0 does so once the last step is committed, also if that is after the
    SIGTERM of the limit. After SIGTERM alone Slurm does it, if it was a preemption, or somebody has
    cancelled the job and does not want it back.

    Args:
        requeue: ask `scontrol requeue` after SIGUSR1; None is CKPTMGR_SLURM_REQUEUE=1.
        environment: of the job.

    Raises:
        UsageError: a variable that has seconds in it has something else.
    """

    name = "slurm"

    def __init__(
        self, *, requeue: bool | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__((LIMIT_SIGNAL, signal.SIGTERM))
        self._environment = os.environ if environment is None else environment
        wanted = self._environment.get(REQUEUE_VARIABLE) == "1"
        self._requeue = wanted if requeue is None else requeue
        # Now, for the thread that hears a signal has nobody to tell that it is no number.
        self._end = _number(self._environment, "SLURM_JOB_END_TIME", 0.0)
        self._grace = _number(self._environment, GRACE_VARIABLE, KILL_WAIT_SECONDS)
        self._leads = False
        self._warned = False

    def listen(self, told: Told, rank: int) -> None:
        """As promised by Source."""
        self._leads = rank == 0

        def heard(notice: Notice) -> None:
            # It stands though SIGTERM follows before the last commit: the job is at its limit.
            self._warned |= notice.why == LIMIT_SIGNAL.name
            told(notice)

        super().listen(heard, rank)

    def seconds_left(self, number: int) -> float:
        """As promised by Signals: by the end of the job that Slurm tells, or by KillWait."""
        if number == LIMIT_SIGNAL:
            return max(self._end - time.time(), 0.0)
        return self._grace

    def committed(self, step: int) -> None:  # noqa: ARG002
        """As promised by Source: the job may end now, and come back."""
        job = self._environment.get("SLURM_JOB_ID", "")
        if self._requeue and self._leads and job and self._warned:
            subprocess.run(
                ["scontrol", "requeue", job],  # noqa: S607 - where it is, the site knows
                check=False,  # it says itself why not, to the job's output
                timeout=SCONTROL_SECONDS_MAX,
            )


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        number = float(text) if text else default
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"{text!r} is not a number of seconds", subject=name)
    return number


_SCRIPT = Template("""\
#!/bin/bash
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --requeue                # a job that is preempted comes back
#SBATCH --open-mode=append       # and goes on writing its output
#SBATCH --signal=$signal    # so many seconds before the time limit

export CKPTMGR_PREEMPTION=slurm  # every Checkpointer hears the signals
export CKPTMGR_SLURM_REQUEUE=1   # and rank 0 queues the job again before the limit
# SLURM_RESTART_COUNT is no attempt: ckptmgr claims its attempts in the store.

# A daemon on every node, in a step of its own: it finishes what a dead trainer has sealed. One
# that is a service of the node (systemd) is better still: it outlives the job, and needs none here.
srun --overlap --ntasks-per-node=1 ckptmgr daemon &
daemons=$$!

$train

srun --overlap --ntasks-per-node=1 ckptmgr drain --timeout 600 --stop
wait "$$daemons"
exit "$$status"
""")

_TRAIN = """\
srun {command}
status=$?"""

_TRAIN_BY_SHELL = """\
# With B: only this shell gets the signal; srun hands it on to its tasks.
srun {command} &
training=$!
trap 'kill -USR1 "$training"' USR1
wait "$training"  # a trapped signal ends it, and not the training
wait "$training"
status=$?"""


def batch_script(
    command: str, *, nodes: int = 1, tasks: int = 1, seconds: int = 120, by_shell: bool = False
) -> str:
    """A batch script that trains by `command` and comes back after preemptions and time limits.

    Args:
        command: what `srun` runs in each task.
        nodes: number of nodes.
        tasks: tasks on each node.
        seconds: how long before the time limit the signal comes.
        by_shell: `--signal=B:...`: Slurm tells the shell only.
    """
    train = (_TRAIN_BY_SHELL if by_shell else _TRAIN).format(command=command)
    told = f"{'B:' if by_shell else ''}{LIMIT_SIGNAL.name.removeprefix('SIG')}@{seconds}"
    return _SCRIPT.substitute(nodes=nodes, tasks=tasks, signal=told, train=train)
