"""What a person sees of a cluster: the roster, the servers' reports and the workers' own, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import msgspec

from headwater import messages as m
from headwater.machines.splits import unvisited_parts


def overview(
    *,
    roster: m.Roster,
    pid: int,
    address: str,
    sync: str,
    reports: Sequence[m.ServerStatistics],
    ranks: Set[int],
    progress: Mapping[int, m.Progress],
    silence: Mapping[int, float],
    absent: Set[int],
    unreplicated: Sequence[int],
    unvisited: Sequence[m.Unvisited],
    spares: int,
    servers: int,
    finished: Sequence[int],
    joining: Sequence[str],
    totals: Sequence[m.WorkerTotals],
    counts: m.MemberCounts,
    checkpoints: m.CheckpointCounts,
    traffic: m.Traffic,
    uptime: float,
    followers: Sequence[m.FollowerProgress],
) -> m.ClusterStatistics:
    """The answer to Ask.

    `pid`, `address`: of the coordinator. `ranks`: of the workers when the servers were asked for `reports`.
    `progress`: by rank. `silence`: by member, seconds since it was heard of. `absent`: members that have not
    come back since the coordinator started again. `joining`: who waits to join, and for whom. `totals`,
    `counts`, `checkpoints`, `traffic`, `uptime`, `followers`: as of `ClusterStatistics`.
    """
    following = {told.member: told for told in followers}
    of_server = {report.member: report for report in reports}
    first = next((report for report in reports if report.index == 0 and report.role == "server"), None)
    version = max((report.version for report in reports), default=0)
    waits = first.waits if first is not None else {}

    def away(member: m.Member) -> str | None:
        return "has not come back to the coordinator yet" if member.id in absent else None

    def silent(member: m.Member) -> float:
        return silence.get(member.id, 0.0)

    def node(member: m.Member) -> m.NodeStatistics:
        place = member.addresses[-1] if member.addresses else member.host  # as the farthest dial it
        if member.role in ("server", "standby"):
            own = of_server.get(member.id)
            term, seen = (own.term, own.version) if own is not None else (0, 0)
            why = None if own is not None else _unheard(silent(member))
            why = why or away(member)
            return m.NodeStatistics(
                member.role, member.pid, place, term, seen, why, index=member.index, silence=silent(member)
            )
        if member.id in following:
            own_follower = following[member.id]
            reason = own_follower.reason or away(member)
            return m.NodeStatistics(
                "follower",
                member.pid,
                place,
                roster.term,
                own_follower.version,
                reason,
                rank=member.index,
                silence=silent(member),
            )
        told = progress.get(member.index)
        seen = told.version if told is not None and told.member == member.id else 0
        reason = waits.get(member.id) or away(member)
        return m.NodeStatistics(
            member.role,
            member.pid,
            place,
            roster.term,
            seen,
            reason,
            rank=member.index,
            silence=silent(member),
        )

    coordinator = m.NodeStatistics("coordinator", pid, address, roster.term, version, None, index=0)
    ordered = sorted(roster.members, key=lambda member: (member.role, member.index))
    return m.ClusterStatistics(
        term=roster.term,
        generation=roster.generation,
        version=version,
        workers=roster.workers,
        sync=sync,
        nodes=(coordinator, *map(node, ordered)),
        models=first.models if first is not None else (),
        tables=_in_all([report.tables for report in reports if report.role == "server"]),
        progress=tuple(progress[rank] for rank in sorted(progress)),
        unreplicated=tuple(unreplicated),
        unvisited=(*unvisited, *_unvisited_parts(first, roster, ranks)),
        spares=spares,
        servers=servers,
        finished=tuple(finished),
        joining=tuple(joining),
        reports=tuple(
            msgspec.structs.replace(report, recorded=m.DataProgress(), waits={})
            for report in sorted(reports, key=lambda one: (one.role, one.index))
        ),
        totals=tuple(totals),
        members=counts,
        checkpoints=checkpoints,
        traffic=traffic,
        uptime=uptime,
        followers=tuple(followers),
    )


def _unvisited_parts(
    first: m.ServerStatistics | None, roster: m.Roster, before: Set[int]
) -> Sequence[m.Unvisited]:
    """Of one that has left since the server was asked, the server's answer may be too old to tell."""
    ranks = {member.index for member in roster.members if member.role == "worker"} | before
    return unvisited_parts(first.recorded, ranks) if first is not None else ()


def _unheard(seconds: float) -> str:
    return f"does not answer, last heard of {seconds:.1f} s ago"


def _in_all(parts: list[tuple[m.TableStatistics, ...]]) -> tuple[m.TableStatistics, ...]:
    """Each table over all servers; those that not every server told of yet are left out."""
    counted = ("rows", "resident", "refused", "expired", "pulled", "hits", "begun")
    return tuple(
        msgspec.structs.replace(
            tables[0], **{name: sum(getattr(table, name) for table in tables) for name in counted}
        )
        for tables in zip(*parts, strict=False)
    )
