"""Every error Headwater raises on purpose, in three branches by whose fault it is.

HeadwaterError
├── UsageError                  the caller's fault: fix the call, nothing changed
│   ├── ConfigurationError      an impossible setting                       (also ValueError)
│   ├── RegistrationError       a model declared differently than before    (also ValueError)
│   ├── GradientError           wrong names, shapes or dtypes in a push     (also ValueError)
│   │   └── NonFiniteError      NaN or infinity in a gradient
│   ├── MeetingError            a program that runs again comes to another meeting than the first time
│   └── ClosedError             the worker has left, or the cluster is closed
├── PeerError                   the other side's fault
│   ├── ProtocolError           bytes or messages that break the protocol
│   ├── RefusedError            a node refused this one, and said why
│   │   ├── UnreachableError    it advertises an address where nobody reaches it
│   │   ├── OtherClusterError   it belongs to another cluster than the node it speaks to
│   │   └── DeclaredDeadError   it was not heard of for its lease; it may join again
│   └── WorkerError             `train` raised, or its process ended, in a worker of `run`
└── EnvironmentFailure          nobody's fault: the machine, the network, time
    ├── ConnectionLostError     a connection closed or could not be made    (also ConnectionError)
    │   └── ClusterEndedError   the coordinator has ended the cluster
    │       └── FinishedError   training has finished: nothing is left to do
    ├── RewoundError            everything began anew from a checkpoint; make a new Worker
    ├── DataError               a file cannot be read, or not as it was described
    ├── StalledError            a wait passed its deadline, or could never end (also TimeoutError)
    │   └── DeadlockError       waits that wait for each other; names all of them
    ├── EngineError             a node could not be started or ended unasked
    ├── CheckpointError         a checkpoint is damaged, or cannot be read or written
    ├── WeightsError            a published version is damaged, or does not follow the one before
    └── JournalError            the coordinator's journal is damaged, or cannot be read or written
"""

from __future__ import annotations


class HeadwaterError(Exception):
    """Root of the tree."""


class UsageError(HeadwaterError):
    """The call is wrong; nothing was sent and nothing changed."""


class ConfigurationError(UsageError, ValueError):
    """A setting that cannot be."""


class RegistrationError(UsageError, ValueError):
    """A model that cannot be registered, or was registered differently before."""


class GradientError(UsageError, ValueError):
    """Pushed or assigned arrays that do not fit the model."""


class NonFiniteError(GradientError):
    """A gradient holds NaN or infinity; it was not sent and the turn was not taken."""


class MeetingError(UsageError):
    """A meeting whose result a program asks for again, and that was another one, or is kept no more."""


class ClosedError(UsageError):
    """A call on a worker that has left or a cluster that is closed."""


class PeerError(HeadwaterError):
    """The other side is to blame."""


class ProtocolError(PeerError):
    """Bytes or messages that break the protocol; the connection they came over is closed."""


class RefusedError(PeerError):
    """A node refused this one; the text is the node's reason."""


class UnreachableError(RefusedError):
    """A node advertises an address at which the others do not reach it."""


class OtherClusterError(RefusedError):
    """A node of one cluster spoke to a node of another, which a later job runs at the same address."""


class DeclaredDeadError(RefusedError):
    """The coordinator declared this node dead, and took it out of the roster; it may join again as a new
    one."""


class WorkerError(PeerError):
    """`train` failed in a worker started by `run`.

    Attributes:
        rank: the worker's rank.
        remote_traceback: the traceback in the worker, as text ("" where its process died without one).
    """

    def __init__(self, rank: int, summary: str, remote_traceback: str = "") -> None:
        text = f"worker {rank}: {summary}"
        super().__init__(f"{text}\n\n{remote_traceback.rstrip()}" if remote_traceback else text)
        self.rank = rank
        self.remote_traceback = remote_traceback


class EnvironmentFailure(HeadwaterError):
    """The machine, the network or time is to blame."""


class ConnectionLostError(EnvironmentFailure, ConnectionError):
    """A connection closed, or could not be made."""


class ClusterEndedError(ConnectionLostError):
    """The coordinator has ended the cluster; the text says why. Calling again will not help."""


class FinishedError(ClusterEndedError):
    """Training has finished, so nothing is left to do for whoever comes or waits."""


class RewoundError(EnvironmentFailure):
    """A shard was lost with all its copies: this worker ends, training begins anew from a checkpoint."""


class DataError(EnvironmentFailure):
    """A file of a data set cannot be read, or holds what its reader does not expect; names file and row."""


class StalledError(EnvironmentFailure, TimeoutError):
    """A wait passed its deadline, or could never have ended; the text says for whom."""


class DeadlockError(StalledError):
    """Waits that wait for each other, so that none of them could ever have ended; the text names all."""


class EngineError(EnvironmentFailure):
    """A node could not be started, or ended without being asked to."""


class CheckpointError(EnvironmentFailure):
    """A checkpoint is damaged or incomplete, or its files cannot be read or written."""


class WeightsError(EnvironmentFailure):
    """A published version is damaged, does not apply to what a reader holds, or cannot be written."""


class JournalError(EnvironmentFailure):
    """The coordinator's journal is damaged, or its file cannot be read or written."""


def named(name: str, reason: str, default: type[HeadwaterError]) -> HeadwaterError:
    """The error a peer named, or `default` where the name is none of this tree's one-text classes."""
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, HeadwaterError) and found is not WorkerError:
        return found(reason)
    return default(reason)
