"""How a node's process logs: as the process that started it was told to.

A record for which no handler was configured in the node's process is printed with the level and the format of
the process that called `run`. What `train` configures itself, with `logging.basicConfig` for example, counts
instead: nothing is attached to the root logger here.
"""

from __future__ import annotations

import logging
import pickle
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logs:
    """Levels by name of logger, "" for the root, and the format of what is printed; None: the message
    alone."""

    levels: dict[str, int] = field(default_factory=dict)
    formatter: bytes | None = None

    @staticmethod
    def here() -> Logs:
        """How this process logs, where it prints its records; else as Python does unless told otherwise."""
        root = logging.getLogger()
        printing = [handler for handler in root.handlers if prints(handler)]
        loggers = {"": root, **logging.root.manager.loggerDict}
        if not printing:  # what Headwater's own loggers were told counts all the same
            loggers = {name: one for name, one in loggers.items() if name.partition(".")[0] == "headwater"}
        levels = {
            name: logger.level
            for name, logger in loggers.items()
            if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
        }
        return Logs(levels, _packed(printing[0].formatter) if printing else None)

    def use(self) -> None:
        """Log so in this process, from now on."""
        for name, level in self.levels.items():
            logging.getLogger(name or None).setLevel(level)
        last = logging.StreamHandler(sys.stderr)
        last.setLevel(logging.NOTSET if self.levels else logging.WARNING)
        if self.formatter is not None:
            last.setFormatter(pickle.loads(self.formatter))
        logging.lastResort = last


def prints(handler: logging.Handler) -> bool:
    """Whether it writes to standard output or error."""
    stream = getattr(handler, "stream", None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _packed(formatter: logging.Formatter | None) -> bytes | None:
    """A formatter of Python's own; one of the user's is code that the node may not have."""
    return pickle.dumps(formatter) if type(formatter) is logging.Formatter else None
