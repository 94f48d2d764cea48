"""The worker: the user's side of everything, and what it consists of."""

from headwater.worker.progress import WorkerStatistics
from headwater.worker.worker import Worker

__all__ = ["Worker", "WorkerStatistics"]
