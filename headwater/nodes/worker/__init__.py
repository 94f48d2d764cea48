"""The worker: the user's side of everything, and what it consists of."""

from headwater.nodes.worker.worker import Worker, WorkerStatistics

__all__ = ["Worker", "WorkerStatistics"]
