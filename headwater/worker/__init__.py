"""The worker: the user's side of everything, and what it consists of."""

from headwater.worker.worker import Worker, WorkerStatistics

__all__ = ["Worker", "WorkerStatistics"]
