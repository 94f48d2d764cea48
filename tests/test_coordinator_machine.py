"""What a coordinator decides, event by event: no process, no thread, no clock."""

import pytest
from desks import IDENTITY, Desk

from headwater.errors import CheckpointError, ProtocolError, UnreachableError
from headwater.machines.coordinator import AllFinished, Ended, Identity, WriteCheckpoint
from headwater.machines.roster import Departure
from headwater.messages import (
    Acknowledged,
    Ask,
    CaughtUp,
    CheckpointTaken,
    ClusterStatistics,
    DataProgress,
    Departed,
    Finish,
    Finished,
    GetServers,
    Heartbeat,
    Join,
    Lease,
    Leased,
    Position,
    Progress,
    Refused,
    Rejoin,
    RequestSlot,
    ServerAddresses,
    ServerStatistics,
    Span,
    StandbyLost,
    StaticProgress,
    TakeCheckpoint,
    Unleased,
    Unvisited,
    Visited,
    Welcome,
)


def refusal(node):
    """With what a node was sent away."""
    assert node.closed
    refused = node.said[-1]
    assert isinstance(refused, Refused), refused
    return refused.error, refused.reason


# ── forming ─────────────────────────────────────────────────────────────────────────────────────


def test_servers_are_welcomed_together_and_nothing_is_kept_before():
    desk = Desk(servers=2)
    first = desk.joins("server", 1)
    assert first.welcome is None
    assert desk.kept == []
    second = desk.joins("server", 0)
    assert [node.member.index for node in (first, second)] == [1, 0]
    assert [server.index for server in first.welcome.servers] == [0, 1]
    assert len(desk.kept) == 1
    assert {desk.roster(node.member.id).term for node in (first, second)} == {2}


def test_the_lease_of_a_server_that_waits_for_the_others_has_not_begun():
    desk = Desk(servers=2, lease=0.2)
    first = desk.joins("server", 0)
    desk.passes(5.0, beating=False)
    second = desk.joins("server", 1)
    assert first.welcome is not None
    assert second.welcome is not None
    assert not first.closed


def test_a_lease_begins_with_the_welcome_whether_the_member_ever_says_something_or_not():
    desk = Desk(lease=3.0)
    server, worker = desk.running("worker")
    for _ in range(4):
        desk.passes(1.0, beating=False)
        server.say(Heartbeat())
    assert worker.closed
    assert refusal(worker) == (
        "DeclaredDeadError",
        "worker 0 (pid 7) was declared dead: nothing was heard of it for 3 s",
    )
    assert not server.closed


def test_a_server_that_goes_while_the_cluster_forms_leaves_its_slot_and_nothing_else():
    desk = Desk(servers=2)
    desk.joins("server", 0).hangs_up()
    first, second = desk.running()
    assert [node.member.id for node in (first, second)] == [2, 3]
    assert desk.told == []


def test_a_join_that_waits_for_servers_is_told_for_which_and_fails_after_the_deadline():
    desk = Desk(servers=3, workers=2)
    desk.joins("server", 1)
    first, second = desk.joins("worker"), desk.joins("worker", 1)
    reason = "waits for servers 0, 2: 1 of 3 have joined"
    for node in (first, second):
        (waits,) = node.said
        assert (waits.reason, waits.patience, waits.deadline) == (reason, 10.0, 60.0)
    assert desk.notes == ["server 1 (pid 7) on there has joined"]
    desk.passes(10.5)
    told = f"server 1 (pid 7), worker (pid 7 on there), worker 1 (pid 7 on there) cannot join yet: {reason}"
    assert desk.notes[-1] == told
    desk.joins("server", 2)
    assert first.waits == "waits for server 0: 2 of 3 have joined"
    desk.passes(50.0)
    expected = "could not join within 60 s: waits for servers 0, 1: 1 of 3 have joined"
    assert refusal(first) == refusal(second) == ("StalledError", expected), "server 1 has waited as long"
    assert f"worker 1 (pid 7 on there) has not joined within 60 s: {expected[28:]}" in desk.notes


def test_a_server_too_waits_for_the_others_no_longer_than_the_deadline():
    desk = Desk(servers=2)
    early = desk.joins("server", 0)
    desk.passes(30.0)
    late = desk.joins("worker")
    desk.passes(31.0)
    assert refusal(early) == (
        "StalledError",
        "could not join within 60 s: waits for server 1: 1 of 2 have joined",
    )
    assert not late.closed
    assert late.waits == "waits for servers 0, 1: 0 of 2 have joined", "its slot is free"
    assert [node.member.index for node in desk.running()] == [0, 1]


def test_who_waits_to_join_is_in_the_status():
    desk = Desk(servers=2)
    desk.joins("observer")
    statistics = desk.connect().say(Ask()).last(ClusterStatistics)
    assert statistics.joining == ("observer (pid 7 on there) waits for servers 0, 1: 0 of 2 have joined",)


def test_many_that_wait_for_the_same_take_one_line():
    desk = Desk(workers=20)
    for _ in range(20):
        desk.joins("worker")
    desk.passes(10.5)
    (line,) = desk.notes
    assert line.count("worker (pid 7") == 8
    assert "and 12 others cannot join yet: waits for server 0: 0 of 1 have joined" in line


# ── joining ─────────────────────────────────────────────────────────────────────────────────────


def test_whoever_joined_early_is_taken_in_once_the_last_server_has_joined():
    desk = Desk()
    waiting = [desk.joins(role) for role in ("worker", "observer")]
    desk.joins("server", 0)
    assert [node.member.role for node in waiting] == ["worker", "observer"]


def test_every_server_knows_a_worker_before_it_is_welcomed():
    desk = Desk(servers=2)
    first, second = desk.running()
    desk.deaf.add(second.member.id)
    worker = desk.joins("worker")
    assert worker.welcome is None
    joined = {member.id for member in desk.roster(first.member.id).members}
    assert max(joined) not in {first.member.id, second.member.id}
    desk.passes(1.0)
    assert worker.welcome is None
    desk.passes(2.0)
    assert worker.welcome is not None, "a host that does not answer in time is left behind"


def test_a_host_that_missed_a_roster_is_told_again():
    desk = Desk(servers=2)
    first, second = desk.running()
    desk.deaf.add(second.member.id)
    desk.joins("worker")
    desk.passes(3.0)
    former = [conn for conn, id in desk.hosts.items() if id == second.member.id]
    desk.deaf.clear()
    desk.passes(3.0)
    again = [conn for conn, id in desk.hosts.items() if id == second.member.id and conn not in former]
    assert len(again) == 1
    assert desk.roster(second.member.id) == desk.roster(first.member.id) == desk.book.view()
    desk.passes(10.0)
    assert len([conn for conn, id in desk.hosts.items() if id == second.member.id]) == len(former) + 1


def test_a_host_that_cannot_be_dialled_is_left_behind_and_told_again():
    desk = Desk(servers=2)
    desk.unreachable[2] = False
    _, second = desk.running()
    assert desk.joins("worker").welcome is not None
    assert "server 1 (pid 7) does not answer: connection refused" in desk.notes
    assert not second.closed, "its membership says that it lives"
    desk.unreachable.clear()
    desk.passes(2.0)
    assert desk.roster(2) == desk.book.view()


def test_a_connection_to_a_host_that_comes_late_is_used():
    desk = Desk()
    dials = []
    desk._dial = dials.append
    desk.joins("server", 0)
    worker = desk.joins("observer")
    desk.passes(5.0)
    assert worker.welcome is not None, "the host was left behind"
    assert len(dials) == 1, "one dial at a time"
    conn = desk._number()
    desk.hosts[conn] = 1
    desk.does(lambda machine, now: machine.opened(conn, dials[0].tag, now))
    assert desk.roster(1) == desk.book.view()


def test_a_worker_is_told_where_the_log_recorded_its_rank():
    position = Position(1, 0, (StaticProgress(1, 2, 3, 4, 5),))
    desk = Desk(workers=2)
    desk.recorded = DataProgress((position,))
    desk.running()
    first, second = desk.joins("worker", 0), desk.joins("worker", 1)
    assert (first.welcome.position, second.welcome.position) == (None, position)


def test_a_worker_waits_until_server_0_says_where_its_rank_is():
    desk = Desk(workers=2)
    (server,) = desk.running()
    position = Position(0, 0, (StaticProgress(1, 2, 3, 4, 5),))
    desk.deaf.add(server.member.id)
    worker = desk.joins("worker")
    desk.passes(12.0)
    assert worker.welcome is None
    assert worker.waits == "waits until server 0 says where rank 0 is"
    assert "worker 0 (pid 7) cannot join yet: waits until server 0 says where rank 0 is" in desk.notes
    desk.deaf.clear()
    desk.recorded = DataProgress((position,))
    desk.passes(3.0)
    assert worker.welcome.position == position


def test_nobody_goes_on_in_the_place_of_a_worker_whose_last_step_may_still_be_applied():
    """A standby is slow, so what the dead one has in the log is not recorded yet."""
    desk = Desk(workers=1)
    _, first = desk.running("worker")
    desk.enrolled = (first.member.id,)
    desk.recorded = DataProgress((Position(0, 0, (StaticProgress(1, 1, 9, 0, 1),)),))
    first.hangs_up()
    again = desk.joins("worker")
    desk.passes(12.0)
    assert again.welcome is None
    assert again.waits == "waits until server 0 says where rank 0 is"
    desk.enrolled = ()
    position = Position(0, 0, (StaticProgress(1, 1, 9, 0, 2),))
    desk.recorded = DataProgress((position,))
    desk.passes(1.0)
    assert again.welcome.position == position


def test_an_entered_worker_that_waits_too_long_is_sent_away_and_its_rank_is_free():
    desk = Desk()
    (server,) = desk.running()
    desk.deaf.add(server.member.id)
    worker = desk.joins("worker")
    desk.passes(61.0)
    assert refusal(worker) == (
        "StalledError",
        "could not join within 60 s: waits until server 0 says where rank 0 is",
    )
    assert desk.book.of("worker") == ()


def test_a_standby_is_welcomed_at_once_and_then_takes_part_in_rosters():
    desk = Desk(replicas=1)
    (server,) = desk.running()
    desk.deaf.add(server.member.id)
    standby = desk.joins("standby", 0)
    assert standby.welcome is not None
    assert desk.roster(standby.member.id) == desk.book.view()


def test_a_taken_rank_is_refused_and_reserved_ones_go_to_those_who_name_them():
    desk = Desk(workers=2)
    desk.running()
    desk.does(lambda machine, now: machine.reserve(range(2)))
    assert desk.joins("worker").member.index == 2
    assert desk.joins("worker", 0).member.index == 0
    assert "rank 0 is taken by a living worker" in refusal(desk.joins("worker", 0))[1]
    assert desk.joins("worker").member.index == 3


def test_a_server_that_others_do_not_reach_is_refused():
    desk = Desk()
    desk.reachable = False
    node = desk.joins("server", 0)
    (task,) = desk.tasks
    assert task.task.join.index == 0
    desk.passes(10.5)
    assert node.waits == "waits until it is known whether others reach it"
    desk.performs(task, UnreachableError("it is reached nowhere"))
    assert refusal(node) == ("UnreachableError", "it is reached nowhere")
    assert "refused: it is reached nowhere" in desk.notes
    gone = desk.joins("server", 0)
    gone.hangs_up()
    desk.performs(desk.tasks[-1], None)
    assert desk.book.view().members == ()


def test_a_node_of_another_cluster_is_told_so_whatever_it_wants():
    desk = Desk(enlists=True)
    server = desk.joins("server", 0)
    for message in (
        Join("worker", None, 1, "there", cluster="c0"),
        Rejoin(1, server.welcome.key, 0, "c0"),
        RequestSlot(None, None, "c0"),
    ):
        error, reason = refusal(desk.connect().say(message))
        assert error == "OtherClusterError"
        assert "this node belongs to cluster c0, and the coordinator that listens here now to c1" in reason
    assert {server.welcome.cluster, desk.roster(1).cluster} == {"c1"}


# ── members ─────────────────────────────────────────────────────────────────────────────────────


def test_a_member_that_comes_back_is_who_it_was_and_its_first_connection_does_not_count_any_more():
    desk = Desk()
    _, worker = desk.running("worker")
    again = desk.rejoins(worker.welcome)
    assert again.member == worker.member
    assert worker.closed
    assert desk.book.of("worker") == (worker.member,)
    again.hangs_up()
    assert desk.book.of("worker") == ()


def test_only_the_member_itself_comes_back_and_only_in_its_generation():
    desk = Desk()
    _, worker = desk.running("worker")
    for changed in ({"key": ""}, {"key": "0" * 64}, {"key": "kéy"}):
        error, reason = refusal(desk.rejoins(worker.welcome, **changed))
        assert error == "RefusedError"
        assert "did not show its key" in reason
    assert refusal(desk.rejoins(worker.welcome, generation=1))[0] == "RewoundError"
    worker.hangs_up()
    error, reason = refusal(desk.rejoins(worker.welcome))
    assert error == "DeclaredDeadError"
    assert "worker 0 (pid 7) was declared dead: its connection to the coordinator ended" in reason


def test_whoever_leaves_has_not_died():
    desk = Desk()
    _, worker, observer = desk.running("worker", "observer")
    worker.say(Departed(worker.member.id, finished=False))
    observer.say(Departed(observer.member.id))
    assert worker.closed
    assert not isinstance(worker.said[-1], Refused)
    assert desk.told == []
    assert not any("without leaving" in note for note in desk.notes)
    assert refusal(desk.rejoins(worker.welcome))[1].endswith("it has left; join again as a new one")


def test_a_worker_that_dies_is_told_of_and_out_of_the_roster():
    desk = Desk()
    server, worker, observer = desk.running("worker", "observer")
    worker.hangs_up()
    observer.hangs_up()
    assert desk.told == [Departure(worker.member)], "an observer is nobody's loss"
    assert desk.roster(server.member.id).members == (server.member,)


def test_members_are_told_where_servers_are():
    desk = Desk()
    server, worker = desk.running("worker")
    worker.say(GetServers())
    assert worker.last() == ServerAddresses(desk.book.term, (server.member,))


def test_a_caught_up_standby_takes_over_and_one_that_is_not_does_not():
    desk = Desk(replicas=1)
    server, standby = desk.running("standby")
    server.say(CaughtUp(standby.member.id))
    assert desk.roster(standby.member.id).caught_up == (standby.member.id,)
    server.hangs_up()
    (departure,) = desk.told
    assert departure.heir.id == standby.member.id
    assert [(one.id, one.role) for one in desk.roster(standby.member.id).members] == [(2, "server")]
    assert "its standby (pid 7) takes over" in desk.notes[-1]
    late = desk.joins("standby", 0)
    standby.hangs_up()
    assert desk.machine.stage == "ended"
    assert refusal(late)[0] == "ClusterEndedError"


def test_news_of_a_standby_is_told_once():
    desk = Desk(replicas=1)
    server, standby = desk.running("standby")
    for _ in range(2):
        server.say(CaughtUp(standby.member.id))
    assert desk.book.term == 3
    for _ in range(2):
        server.say(StandbyLost(standby.member.id))
    assert refusal(standby)[1].endswith("its server lost the connection to it")
    assert desk.told == [Departure(standby.member)]
    assert not server.closed
    server.say(StandbyLost(server.member.id))
    assert not server.closed


def test_a_lost_shard_ends_a_cluster_without_checkpoints():
    desk = Desk(servers=2, enlists=True)
    first, second, worker = desk.running("worker")
    spare, stranger = desk.connect().say(RequestSlot(None, None)), desk.connect()
    second.hangs_up()
    for node in (first, worker, spare):
        error, reason = refusal(node)
        assert error == "ClusterEndedError"
        assert reason.startswith("server 1 (pid 7) is gone, and nobody else has its shard: its connection")
    assert desk.told == [Ended(worker.said[-1]), Departure(second.member)]
    assert desk.kept[-1].ended == worker.said[-1].reason
    assert refusal(stranger.say(Join("worker", None, 1, "there")))[0] == "ClusterEndedError"
    desk.passes(100.0)
    assert len(desk.told) == 2


def test_a_lost_shard_begins_the_next_generation_where_there_are_checkpoints():
    desk = Desk(servers=2, rewinds=True)
    first, second, worker = desk.running("worker")
    waiting = desk.joins("server", 5)
    assert refusal(waiting)[1] == "there can be no server with index 5"
    second.hangs_up()
    for node in (first, worker):
        error, reason = refusal(node)
        assert error == "RewoundError"
        assert "training begins anew from the last checkpoint" in reason
    assert desk.told == [Departure(second.member)]
    assert (desk.kept[-1].roster.generation, desk.kept[-1].roster.members) == (1, ())
    early = desk.joins("worker")
    assert early.welcome is None
    desk.running()
    assert early.welcome.generation == 1
    assert refusal(desk.rejoins(worker.welcome))[0] == "RewoundError"


# ── its own time ────────────────────────────────────────────────────────────────────────────────


def test_a_coordinator_that_stood_still_declares_nobody_dead_who_speaks_afterwards():
    desk = Desk(lease=15.0)
    _, worker = desk.running("worker")
    desk.passes(4.0)
    for _ in range(3):
        desk.stands_still(100.0)
        assert desk.book.of("worker") == (worker.member,)
        desk.passes(2.0)
    assert "this coordinator stood still for 96.2 s, in which nobody's silence counts" in desk.notes
    desk.passes(20.0, beating=False)
    assert refusal(worker)[0] == "ClusterEndedError", "the server's lease has ended too"


def test_a_join_does_not_time_out_while_the_coordinator_stands_still():
    desk = Desk(servers=2)
    node = desk.joins("server", 0)
    desk.stands_still(1000.0)
    assert not node.closed
    desk.passes(61.0)
    assert refusal(node)[0] == "StalledError"


# ── splits ──────────────────────────────────────────────────────────────────────────────────────


def lease(number, pending=0, call=1, epochs=1):
    return Lease(number, call, epochs, 64, False, 0, 4, pending)


def test_splits_are_leased_once_server_0_has_said_what_is_recorded():
    desk = Desk()
    server, worker = desk.running("worker")
    desk.deaf.add(server.member.id)
    worker.say(lease(1))
    desk.passes(3.0)
    assert worker.last(Leased) is None
    desk.deaf.clear()
    desk.recorded = DataProgress((), (Visited(1, 1, 64, 0, (Span(0, 0, 60),)),), 1)
    desk.passes(3.0)
    assert worker.last(Leased).span == Span(0, 60, 64)


def test_a_request_that_is_repeated_gets_the_same_split_and_an_older_answer_is_not_anothers():
    desk = Desk()
    _, worker = desk.running("worker")
    worker.say(lease(1))
    first = worker.last(Leased)
    again = desk.rejoins(worker.welcome).say(lease(1))
    assert again.last(Leased) == first
    second = again.say(lease(2)).last(Leased)
    assert second.number == 2
    assert second.span.start == first.span.stop


def test_what_a_dead_worker_was_leased_and_the_log_has_not_recorded_goes_to_the_others():
    desk = Desk(workers=2)
    _, first, second = desk.running("worker", "worker")
    spans = [first.say(lease(1)).last(Leased).span]
    number = 1
    while isinstance(second.say(lease(number)).last(), Leased):
        spans.append(second.last(Leased).span)
        number += 1
    waits = second.last(Unleased)
    assert not waits.over
    assert "worker 0 has samples 0–3 of epoch 0" in waits.reason
    desk.recorded = DataProgress((), (Visited(1, 1, 64, 0, (Span(0, 0, 2),)),), 1)
    first.hangs_up()
    assert second.last(Leased).span == Span(0, 2, 4)


def test_a_worker_that_gives_back_and_one_that_asks_for_the_impossible():
    desk = Desk(workers=2)
    _, first, second = desk.running("worker", "worker")
    given = first.say(lease(1)).last(Leased).span
    second.say(lease(1))
    first.say(Finish(1, given.stop - given.start, False))
    assert second.say(lease(2)).last(Leased).span == given
    refused = second.say(Lease(3, 1, 2, 64, False, 0, 4, 0)).last(Unleased)
    assert refused.failure.error == "ConfigurationError"


def test_what_a_worker_asked_for_before_it_died_is_forgotten():
    desk = Desk(workers=2)
    server, first, second = desk.running("worker", "worker")
    desk.deaf.add(server.member.id)
    first.say(lease(1))
    second.say(lease(1))
    first.hangs_up()
    desk.deaf.clear()
    desk.passes(3.0)
    assert second.last(Leased).span.start == 0


def test_what_a_dead_worker_leaves_of_its_own_part_is_logged():
    desk = Desk()
    desk.recorded = DataProgress((Position(0, 0, (StaticProgress(1, 1, 10, 0, 4),)),))
    _, worker = desk.running("worker")
    worker.hangs_up()
    assert "6 samples of worker 0's part wait for the next worker with that rank" in desk.notes


def test_what_a_worker_left_unread_is_told_by_answers_that_were_asked_for_after_it_left():
    """Others may be of before its last step."""
    desk = Desk()
    desk.recorded = DataProgress((Position(0, 0, (StaticProgress(1, 1, 10, 0, 4),)),))
    server, worker = desk.running("worker")
    desk.deaf.add(server.member.id)
    asked = desk.connect().say(Ask())
    worker.say(Departed(worker.member.id, finished=False))
    desk.deaf.clear()
    later = desk.connect().say(Ask())
    assert asked.last(ClusterStatistics).unvisited == ()
    assert later.last(ClusterStatistics).unvisited == (Unvisited(1, 0, 6),)


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


def test_all_have_finished_once_every_declared_worker_says_so():
    desk = Desk(workers=2)
    _, first, second = desk.running("worker", "worker")
    first.say(Finished(first.member.id))
    assert desk.told == []
    second.say(Departed(second.member.id, finished=True))
    assert desk.told == [AllFinished()]
    again = desk.joins("worker", 1)
    again.say(Finished(again.member.id))
    assert desk.told == [AllFinished(), AllFinished()]


def test_everybody_is_told_that_training_has_finished_and_so_is_whoever_comes_later():
    desk = Desk(enlists=True)
    server, worker = desk.running("worker")
    spare = desk.connect().say(RequestSlot(None, None))
    desk.does(lambda machine, now: machine.finish(Finished(), now))
    late = desk.joins("worker")
    for node in (server, worker, spare, late):
        assert node.said[-1] == Finished()
        assert node.closed
    assert desk.told[-1] == Ended(None)
    assert desk.kept[-1].ended == "training has finished"
    assert desk.connect().say(Ask()).last(ClusterStatistics) is not None


def test_the_end_waits_for_members_that_are_away_for_two_leases_and_not_for_observers():
    desk = Desk(lease=15.0)
    server, worker, _ = desk.running("worker", "observer")
    after = Desk(record=desk.record(), lease=15.0)
    again = after.rejoins(server.welcome)
    after.does(lambda machine, now: machine.finish(Finished(), now))
    assert after.machine.stage == "finishing"
    back = after.rejoins(worker.welcome)
    assert again.said[-1] == back.said[-1] == Finished()
    late = Desk(record=desk.record(), lease=15.0)
    late.rejoins(server.welcome)
    late.does(lambda machine, now: machine.finish(Refused("ClusterEndedError", "closed"), now))
    late.passes(29.0)
    assert late.machine.stage == "ended", "the worker's lease was over before"
    late.does(lambda machine, now: machine.finish(Finished(), now))
    assert late.kept[-1].ended == "closed"


def test_a_shard_that_is_lost_while_all_ends_changes_nothing():
    desk = Desk(rewinds=True)
    server, worker = desk.running("worker")
    after = Desk(record=desk.record(), rewinds=True)
    again = after.rejoins(server.welcome)
    after.does(lambda machine, now: machine.finish(Finished(), now))
    again.hangs_up()
    assert after.machine.stage == "finishing"
    assert after.rejoins(worker.welcome).said[-1] == Finished()


def test_an_owner_ends_it_once():
    desk = Desk()
    _, worker = desk.running("worker")
    for reason in ("the first", "the second"):
        desk.does(lambda machine, now, reason=reason: machine.end("EngineError", reason, now))
    assert refusal(worker) == ("EngineError", "the first")
    assert desk.told == [Ended(Refused("EngineError", "the first"))]
    assert not desk.machine.all_finished


def asks_for_a_checkpoint(desk):
    """Whoever asked, and the task that the owner does for it, where there is one."""
    node = desk.connect().say(TakeCheckpoint("somebody"))
    return node, next((one for one in desk.tasks if isinstance(one.task, WriteCheckpoint)), None)


def test_who_asks_for_a_checkpoint_hears_when_it_is_on_disk_however_long_that_takes():
    desk = Desk()
    desk.running("worker")
    node, task = asks_for_a_checkpoint(desk)
    desk.passes(100)
    assert (node.said, node.closed) == ([], False)
    desk.performs(task, "runs/a/g000-v000000007")
    assert (node.said, node.closed) == ([CheckpointTaken("runs/a/g000-v000000007")], True)
    assert "a checkpoint is written, as somebody asks" in desk.notes


def test_why_a_checkpoint_cannot_be_written_is_said():
    desk = Desk()
    node, task = asks_for_a_checkpoint(desk)
    assert (
        refusal(node)[1]
        == "no checkpoint of this cluster can be written now: its servers have not all joined"
    )
    assert task is None
    desk.running()
    node, task = asks_for_a_checkpoint(desk)
    desk.performs(task, CheckpointError("the disk is full"))
    assert refusal(node) == ("CheckpointError", "the disk is full")


def test_who_asked_for_a_checkpoint_of_a_cluster_that_ends_or_went_away_is_told_once_or_not_at_all():
    desk = Desk()
    desk.running()
    node, task = asks_for_a_checkpoint(desk)
    desk.does(lambda machine, now: machine.end("ClusterEndedError", "it is closed", now))
    desk.performs(task, "runs/a/g000-v000000007")
    assert len(node.said) == 1
    assert refusal(node) == ("ClusterEndedError", "it is closed")
    desk = Desk()
    desk.running()
    node, task = asks_for_a_checkpoint(desk)
    node.hangs_up()
    desk.performs(task, "runs/a/g000-v000000007")
    assert node.said == []


# ── a coordinator that is started again ─────────────────────────────────────────────────────────


def test_whoever_is_in_the_record_has_a_full_lease_and_comes_back():
    desk = Desk(lease=15.0)
    server, worker = desk.running("worker")
    after = Desk(record=desk.record(), lease=15.0)
    assert after.notes[0] == "the coordinator is back, with 2 members in term 2"
    assert after.roster(server.member.id) == desk.book.view()
    after.passes(14.0)
    assert after.rejoins(worker.welcome).member == worker.member
    after.passes(2.0)
    assert isinstance(after.told[0], Ended), "the server did not come back"


def test_a_host_at_whose_address_nobody_listens_is_dead_at_once():
    desk = Desk(replicas=1)
    server, standby, worker = desk.running("standby", "worker")
    server.say(CaughtUp(standby.member.id))
    after = Desk(record=desk.record(), replicas=1)
    after.does(lambda machine, now: machine.unreachable("host 1", "refused", now, nobody=True))
    (departure,) = after.told
    assert departure.heir.id == standby.member.id
    assert after.rejoins(worker.welcome).member == worker.member
    after.does(lambda machine, now: machine.unreachable("host 2", "timed out", now))
    assert after.told == [departure], "it may only be cut off"


def test_a_record_without_all_servers_is_of_a_lost_shard():
    desk = Desk(servers=2)
    desk.running()
    record = desk.record()
    roster = record.roster
    cut = type(roster)(roster.term, roster.since, 0, roster.next, roster.members[:1], (), {})
    after = Desk(servers=2, record=type(record)(cut))
    assert after.machine.stage == "ended"
    assert after.kept[-1].ended == "a server is gone, and nobody else has its shard"


def test_a_record_of_a_rewind_forms_the_next_generation():
    desk = Desk(rewinds=True, enlists=True)
    (server,) = desk.running()
    server.hangs_up()
    after = Desk(record=desk.record(), rewinds=True, enlists=True)
    after.connect().say(RequestSlot(None, None))
    (task,) = after.tasks
    assert (task.task.begun, task.task.first) == (True, 0)


# ── questions ───────────────────────────────────────────────────────────────────────────────────


def test_statistics_come_once_all_hosts_have_answered_or_have_not_in_time():
    desk = Desk(servers=2, replicas=1)
    first, second, worker = desk.running("worker")
    worker.say(Progress(worker.member.id, 0, 5, 3, 10, 20, 0.5, 1.0, {}, {}))
    told = desk.connect().say(Ask()).last(ClusterStatistics)
    assert [node.role for node in told.nodes] == ["coordinator", "server", "server", "worker"]
    assert (told.version, told.unreplicated, told.progress[0].steps) == (3, (0, 1), 5)
    desk.deaf.add(second.member.id)
    asker = desk.connect().say(Ask())
    assert asker.said == []
    desk.passes(2.1)
    late = asker.last(ClusterStatistics)
    assert asker.closed
    silent = next(node for node in late.nodes if node.role == "server" and node.index == 1)
    assert silent.waits_for.startswith("does not answer, last heard of")
    gone = desk.connect().say(Ask())
    gone.hangs_up()
    desk.passes(3.0)
    assert first.member.id in desk.hosts.values()


def test_who_has_not_come_back_is_said():
    desk = Desk()
    desk.running("worker")
    after = Desk(record=desk.record())
    told = after.connect().say(Ask()).last(ClusterStatistics)
    assert [node.waits_for for node in told.nodes[1:]] == ["has not come back to the coordinator yet"] * 2


# ── what breaks the protocol ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("message", [Heartbeat(), Acknowledged(), GetServers()])
def test_a_stranger_says_what_it_wants_first(message):
    desk = Desk()
    node = desk.connect()
    with pytest.raises(ProtocolError, match=r"a Stranger sent \w+, expected Ask, RequestSlot, Join, Rejoin"):
        node.say(message)


def test_who_waits_says_nothing_and_a_member_does_not_join_again():
    desk = Desk(enlists=True, servers=2)
    joining, spare = desk.joins("worker"), desk.connect().say(RequestSlot("standby", None))
    assert refusal(spare)[0] == "ConfigurationError"
    with pytest.raises(ProtocolError, match="a Joining sent Heartbeat, expected nothing"):
        joining.say(Heartbeat())
    server, _ = desk.running()
    with pytest.raises(ProtocolError, match="a Present sent Join, expected Heartbeat"):
        server.say(Join("server", 0, 1, "there"))


def test_a_host_that_answers_what_it_was_not_asked_breaks_the_protocol():
    desk = Desk()
    desk.running()
    ((conn, _),) = desk.hosts.items()
    with pytest.raises(ProtocolError, match="server 0 sent Acknowledged, expected nothing"):
        desk.does(lambda machine, now: machine.received(conn, Acknowledged(), None, now))
    desk.deaf.add(1)
    desk.connect().say(Ask())
    with pytest.raises(ProtocolError, match="server 0 sent Acknowledged, expected ServerStatistics"):
        desk.does(lambda machine, now: machine.received(conn, Acknowledged(), None, now))


def test_a_stranger_that_says_nothing_is_hung_up_on():
    desk = Desk()
    node = desk.connect()
    desk.passes(10.5)
    assert node.closed
    assert "a node that has not said what it wants in time is hung up on" in desk.notes


def test_a_connection_to_a_host_that_is_none_any_more_is_closed():
    desk = Desk(replicas=1)
    _, standby = desk.running("standby")
    (control,) = [conn for conn, id in desk.hosts.items() if id == standby.member.id]
    standby.hangs_up()
    desk.does(lambda machine, now: machine.opened(99, f"host {standby.member.id}", now))
    desk.does(lambda machine, now: machine.unreachable(f"host {standby.member.id}", "refused", now))
    closed = [action.conn for action in desk.done if type(action).__name__ == "Close"]
    assert {control, 99} <= set(closed)


def test_a_key_is_the_members_own_and_the_clusters():
    assert IDENTITY.is_key(IDENTITY.key_of(1), 1)
    assert not IDENTITY.is_key(IDENTITY.key_of(1), 2)
    assert not Identity("c2", b"another").is_key(IDENTITY.key_of(1), 1)


def test_what_a_host_answers_after_it_was_left_behind_counts_for_nobody():
    desk = Desk()
    (server,) = desk.running()
    desk.deaf.add(server.member.id)
    worker = desk.joins("worker")
    desk.passes(2.5)
    assert worker.welcome is None
    assert not isinstance(worker.last(), ServerStatistics | Welcome)
