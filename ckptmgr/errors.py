"""Every error ckptmgr raises: what failed, on which object, and what to do next.

CkptmgrError                     exit 1
+- UsageError                    exit 2   a wrong argument, URL, key or configuration
|  +- StepOrderError                      steps must strictly increase within an attempt
|  +- LockedError                         what is stored is encrypted, and no key was given
|     +- WrongKeyError                    it was encrypted with another key than those given
+- StateError                    exit 1   the training state itself
|  +- UnsupportedLeafError                a leaf that can not be stored exactly, with its path
|  +- StateMismatchError                  saved and live leaves, shapes or dtypes differ
+- HostMemoryError               exit 1   shared host memory can not be had or is not ours
|  +- HostMemoryFullError                 not enough of it
|  +- HostBufferDamagedError              a host buffer whose own description does not hold
|  +- TornSnapshotError                   a leaf changed while it was being copied
+- DaemonError                   exit 1   the sidecar can not be reached or answered with a fault
|  +- DaemonUnreachableError
|  +- ControlProtocolError                a control frame that is too long, cut or of unknown type
+- DamageError                   exit 3   stored bytes are not what was written
|  +- RecordDamagedError                  a small record: bad magic, length or digest
|  +- ChunkDamagedError                   a chunk: bad hash, frame or length
|  +- MissingObjectError                  an object that a commit names is gone
|  +- UnsupportedFormatError              written by a newer ckptmgr, or not by ckptmgr
|  +- UntrustedError                      not signed, or not encrypted, with a key that was given
+- NothingToRestoreError         exit 4   no committed step, or not the one asked for
+- StoreError                    exit 1   a store operation failed
|  +- StoreUnreachableError      exit 5   it may work later: timeout, ESTALE, connection lost
|  |  +- StoreFullError          exit 5   ENOSPC or EDQUOT
|  |  +- StorePermissionError    exit 5   EACCES, EPERM, EROFS
|  |  +- MediumError             exit 5   EIO: of one object, or of all the store
|  +- ObjectNotFoundError                 `get` of a key that does not exist
|  +- ObjectUnreadableError       exit 3   EIO of one object that stays, while others can be read
+- RanksError                    exit 1   the ranks of the job can not act together
|  +- RankFailedError                     another rank failed with an error of another kind
|  +- RanksMissingError                   ranks that did not answer in time, named
|  +- RendezvousError                     the job's rendezvous key-value store does not answer
+- SupersededError               exit 6   a newer attempt of the job is active
+- RegisterConflictError         exit 1   a register holds what no correct writer puts there
"""

from __future__ import annotations

from typing import ClassVar

EXIT_OK = 0
EXIT_FELL_BACK = 7
"""Exit status of a restore that worked, but from an older step than the newest committed one."""


class CkptmgrError(Exception):
    """Base of all errors of ckptmgr.

    Args:
        message: what failed, in one line, without a full stop.
        subject: the object it failed on (a key, a path, a leaf), shown in front of the message.
        hint: the next thing to do, as an imperative sentence.
    """

    exit_status: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, subject: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.subject = subject
        self.hint = hint or self.default_hint

    def __str__(self) -> str:
        text = f"{self.subject}: {self.message}" if self.subject else self.message
        return f"{text}\nhint: {self.hint}" if self.hint else text


class UsageError(CkptmgrError):
    """A wrong argument, URL, key or configuration value."""

    exit_status = 2


class StepOrderError(UsageError):
    """A step that is not greater than the last one of this attempt."""

    default_hint = "Pass strictly increasing steps; start at restore() + 1."


class LockedError(UsageError):
    """What is stored is encrypted, and no key was given."""

    default_hint = "Set CKPTMGR_KEY_FILE or CKPTMGR_KEY_COMMAND (docs/encryption.md)."


class WrongKeyError(LockedError):
    """It was encrypted with another key than those that were given."""

    default_hint = "Add that key to the key file, behind the one that encrypts."


class StateError(CkptmgrError):
    """The training state can not be captured or put back."""


class UnsupportedLeafError(StateError):
    """A leaf that can not be stored exactly; `subject` is its path in the state."""

    default_hint = (
        "Leave it out of `state`, or give the object state_dict/load_state_dict that return "
        "tensors and plain Python."
    )


class StateMismatchError(StateError):
    """The saved step and the live state do not have the same leaves, shapes or dtypes."""

    default_hint = "Build the same model and optimizer as the run that saved, then restore again."


class HostMemoryError(CkptmgrError):
    """Shared host memory can not be created, mapped or trusted."""


class HostMemoryFullError(HostMemoryError):
    """There is not enough shared memory for a host buffer."""

    default_hint = (
        "Enlarge /dev/shm (docker: --shm-size, Kubernetes: a memory-medium emptyDir) or set "
        "CKPTMGR_RUNTIME_DIR to a larger tmpfs."
    )


class HostBufferDamagedError(HostMemoryError):
    """A host buffer file whose magic, version or digest does not hold; it is not used."""


class TornSnapshotError(HostMemoryError):
    """A leaf changed while it was copied; the snapshot was not sealed."""

    default_hint = (
        "Pass overlap=False, or change tensors only through the optimizers given in `state`."
    )


class DaemonError(CkptmgrError):
    """The daemon answered with a fault that is not one of the other errors."""


class DaemonUnreachableError(DaemonError):
    """No daemon answers on the control socket."""

    default_hint = "Run `ckptmgr daemon`, or look at daemon.log in the runtime directory."


class ControlProtocolError(DaemonError):
    """A control frame that is too long, cut short or of an unknown type."""


class DamageError(CkptmgrError):
    """Stored bytes are not the bytes that were written."""

    exit_status = 3
    default_hint = "Run `ckptmgr verify`; restore falls back to the newest undamaged step."


class RecordDamagedError(DamageError):
    """A record with a wrong magic, kind, length or digest."""


class ChunkDamagedError(DamageError):
    """A chunk whose stored or raw bytes do not have the recorded hash or length."""


class MissingObjectError(DamageError):
    """An object that a manifest or commit names does not exist."""


class UnsupportedFormatError(DamageError):
    """An object written by a newer ckptmgr, or not by ckptmgr at all."""

    default_hint = "Read it with the ckptmgr version that wrote it, or a newer one."


class UntrustedError(DamageError):
    """Not signed, or not encrypted, with one of the keys that were given."""


class NothingToRestoreError(CkptmgrError):
    """There is no committed step to restore, or not the one that was asked for."""

    exit_status = 4
    default_hint = "Run `ckptmgr ls` to see the committed steps."


class StoreError(CkptmgrError):
    """A store operation failed for good; `subject` is the key."""


class StoreUnreachableError(StoreError):
    """A store operation failed in a way that may pass: timeout, ESTALE, EIO, connection lost."""

    exit_status = 5
    default_hint = "Check that the store is mounted or reachable; saves resume by themselves."


class StoreFullError(StoreUnreachableError):
    """No space or quota left in the store."""

    default_hint = "Free space or lower keep=; saves resume by themselves."


class StorePermissionError(StoreUnreachableError):
    """The store refuses access."""

    default_hint = "Give the user that runs the daemon write access to the store."


class MediumError(StoreUnreachableError):
    """The medium failed (EIO); whether below this object only, one answer does not tell."""


class ObjectNotFoundError(StoreError):
    """`get` of a key that the store does not hold."""


class ObjectUnreadableError(StoreError):
    """One object can not be read, again and again, though the store answers: it is damaged."""

    exit_status = 3
    default_hint = DamageError.default_hint


class RanksError(CkptmgrError):
    """The ranks of the job can not act together."""


class RankFailedError(RanksError):
    """Another rank failed with an error that is not of this tree; `subject` is the rank."""

    default_hint = "Look at the log of that rank: it has the first error."


class RanksMissingError(RanksError):
    """Ranks that did not answer in time; `subject` names them."""

    default_hint = "Look whether these ranks run, and call the same methods as the others."


class RendezvousError(RanksError):
    """The job's rendezvous key-value store does not answer."""

    default_hint = "It lives in rank 0 or in torchrun's agent: look whether that process runs."


class SupersededError(CkptmgrError):
    """A newer attempt of this job is active; this one must end."""

    exit_status = 6
    default_hint = "Stop this process: a newer incarnation of the job has taken over."


class RegisterConflictError(CkptmgrError):
    """A decide-once register holds bytes that no correct writer puts there."""

    default_hint = "Two jobs share this URL; give each job a URL of its own."
