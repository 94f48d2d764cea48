"""How long a round may stay open for stragglers without making anybody wait: from what workers report.

A worker that sends `overlap` local steps before it must have the answer has overlap · step_s seconds for
it. Of these the quorum has taken some, and synchronising takes some; of what is left, the slack, a round is
held open for a part (Decoupled DiLoCo, arXiv 2604.21428).

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from headwater.messages import Pace

SHARE = 0.8
"""Part of the slack for which a round is held open: less than all of it, as the times are estimates."""


def slack(pace: Pace, quorum_s: float) -> float:
    """Seconds for which a worker of this pace can spare the answer still, `quorum_s` after it has sent;
    below 0 where it waits already.
    """
    return pace.overlap * pace.step_s - quorum_s - pace.sync_s


def grace(paces: Iterable[tuple[Pace | None, float]], cap_s: float) -> tuple[float, str]:
    """For how many seconds a round stays open once its quorum is there, and why, in words.

    Args:
        paces: of each worker of the quorum that has reported one, else None; and how long it has waited.
        cap_s: the longest grace, and that of a round of which nobody has reported a pace.
    """
    known = [(slack(pace, waited), pace, waited) for pace, waited in paces if pace is not None]
    if not known:
        return cap_s, f"nobody has said how long a local step takes, so for all of cap={cap_s:g} s"
    least, pace, waited = min(known, key=lambda one: one[0])
    seconds = min(max(SHARE * least, 0.0), cap_s)
    why = (
        f"{SHARE:g} of the slack {least:.3g} s = {pace.overlap} local steps of {pace.step_s:.3g} s − "
        f"{waited:.3g} s for the quorum − {pace.sync_s:.3g} s to synchronise"
    )
    return seconds, why
