"""Who has the last commit of which fragment, counted from the entries of a log."""

from __future__ import annotations

from headwater import messages as m
from headwater.log.state import tickets_of


class FragmentCommits:
    """Commits of each fragment in a mode that leaves workers out; in others there are none."""

    def __init__(self) -> None:
        self._commits: dict[int, int] = {}
        self._has: dict[int, dict[int, int]] = {}

    def missed(self, member: int, fragment: int) -> int:
        """Commits of a fragment that the member has not; 0 of what is none."""
        return self._commits.get(fragment, 0) - self._has.get(member, {}).get(fragment, 0)

    def read(self, entry: m.AnyEntry) -> None:
        """Take the next entry."""
        if isinstance(entry, m.Committed):
            of = fragments_of(entry)
            for fragment in set(of.values()) - {-1}:
                self._commits[fragment] = self._commits.get(fragment, 0) + 1
            for ticket in entry.answered:
                self._answered(ticket.member, of[ticket])
        elif isinstance(entry, m.Late):
            self._answered(entry.ticket.member, entry.fragment)
        else:
            members = entry.members if isinstance(entry, m.Activated) else ()
            for member in (*members, *(ticket.member for ticket in tickets_of(entry))):
                self._answered(member, -1)

    def _answered(self, member: int, fragment: int) -> None:
        """What is no outer step brings the values of all models."""
        if fragment >= 0:
            self._has.setdefault(member, {})[fragment] = self._commits.get(fragment, 0)
        else:
            self._has[member] = dict(self._commits)


def fragments_of(entry: m.Committed) -> dict[m.ExchangeId, int]:
    """The fragment of each update, -1 for none."""
    return dict(zip(entry.updates, entry.fragments or (-1,) * len(entry.updates), strict=True))
