"""The end of a worker whose work is done: it waits for the others, as training may yet begin anew."""

from __future__ import annotations

import logging

from headwater import messages as m
from headwater.errors import ConnectionLostError, FinishedError
from headwater.runtime.session import Session

_log = logging.getLogger("headwater.worker")

_LOOK_S = 0.5
"""How often it is looked whether the worker was dismissed, in seconds."""


def wait_for_others(session: Session) -> None:
    """Block until every declared worker has finished; this one has left the log.

    Raises:
        RewoundError: training begins anew.
        ConnectionLostError: the cluster was closed before, or its coordinator is away for too long.
        SystemExit: the worker was dismissed.
    """
    membership, own = session.membership, session.welcome.member
    _log.info("worker %d waits until every declared worker has finished", own.index)
    membership.tell(m.Finished(own.id))
    while True:
        try:
            message = membership.next_message(_LOOK_S)
        except FinishedError as error:
            _log.info("worker %d: %s", own.index, error)
            return
        except TimeoutError:
            if session.dismissed is not None:
                membership.tell(m.Departed(own.id))
                raise SystemExit(session.dismissed) from None
            if membership.away_s > session.welcome.deadline:
                raise ConnectionLostError(
                    f"worker {own.index} has finished, but its coordinator has been away for "
                    f"{membership.away_s:.0f} s: whether its work is safe nobody can tell"
                ) from None
            continue
        if isinstance(message, m.Welcome):  # the coordinator is back, and may never have read it
            membership.tell(m.Finished(own.id))
