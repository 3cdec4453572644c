"""What heartbeats tell of leases: progress and its absence, lost messages, counters over several lives."""

import pytest

from asyncdapo.messages import SCHEMA_VERSION, Heartbeat, Hello, Progress
from asyncdapo.replay.core.recovery import KnownWorker
from asyncdapo.replay.server.sessions import ALWAYS, DESERTED_TICKS, HeldLease, Sessions
from tests.replay.small_run import prompt_at

STALL_TICKS = 4
LEASE = 7


def hello(worker=0, session="first", granted=0):
    return Hello(schema=SCHEMA_VERSION, worker=worker, session=session, loaded_version=0, branch=0, granted=granted)


def joined(totals=None):
    """Worker 0 with a lease."""
    sessions = Sessions(STALL_TICKS, totals)
    sessions.begin(b"peer", hello()).alive = True
    sessions.leases[LEASE] = HeldLease(prompt=prompt_at(0), worker=0, attempt=1, progress_tick=0)
    return sessions


def beat(sessions, progress, tokens=0.0, asked=0, **gauges):
    """One heartbeat interval with its heartbeat."""
    sessions.tick += 1
    session = sessions.of_worker(0)
    session.heard_tick = sessions.tick
    gauges["tokens"] = tokens
    heartbeat = Heartbeat(asked=asked, loaded_version=0, branch=0, progress=progress, evaluations=[], gauges=gauges)
    return sessions.note_heartbeat(session, heartbeat)


# ------------------------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize(
    ("phase", "lease_grows", "engine_moves", "stalls"),
    [
        ("sampling", True, True, False),
        ("sampling", False, True, True),
        ("sampling", False, False, True),
        ("waiting", False, True, False),
        ("waiting", False, False, True),
        ("sampled", False, False, False),
    ],
)
def test_a_lease_stalls_when_what_it_waits_for_does_not_move(phase, lease_grows, engine_moves, stalls):
    sessions = joined()
    for turn in range(1, 3 * STALL_TICKS):
        progress = Progress(num_tokens=turn if lease_grows else 1, phase=phase)
        beat(sessions, {LEASE: progress}, tokens=float(100 * turn if engine_moves else 100))
        if sessions.stalled():
            assert turn in (STALL_TICKS, STALL_TICKS + 1)  # the first token may count as progress
            break
    assert (sessions.stalled() == [LEASE]) == stalls


def test_a_lease_that_waited_long_for_its_slot_has_all_its_time_from_then_on():
    sessions = joined()
    for turn in range(1, 10 * STALL_TICKS):
        beat(sessions, {LEASE: Progress(num_tokens=0, phase="waiting")}, tokens=float(turn))
    for _ in range(STALL_TICKS - 1):
        beat(sessions, {LEASE: Progress(num_tokens=0, phase="sampling")}, tokens=float(turn))
        assert sessions.stalled() == []
    beat(sessions, {LEASE: Progress(num_tokens=0, phase="sampling")}, tokens=float(turn))
    assert sessions.stalled() == [LEASE]


def test_the_first_heartbeat_that_knows_the_version_of_the_first_token_says_so_until_it_is_noted():
    sessions = joined()
    assert beat(sessions, {LEASE: Progress(num_tokens=0, phase="waiting")}).started == []
    begun = {LEASE: Progress(num_tokens=1, phase="sampling", started_version=3)}
    assert beat(sessions, begun).started == [(LEASE, 3)]
    sessions.leases[LEASE].started = True
    assert beat(sessions, begun).started == []


# --------------------------------------------------------------------------------------------------------- what is held


def test_a_lease_that_two_heartbeats_in_a_row_do_not_list_is_due_again_and_then_every_two():
    sessions = joined()
    listed = {LEASE: Progress(num_tokens=0, phase="waiting")}
    beats = [{}, listed, {}, {}, {}, {}, listed, {}]
    unlisted = [beat(sessions, progress).unlisted for progress in beats]
    assert unlisted == [[], [], [], [LEASE], [], [LEASE], [], []]


def test_what_a_worker_holds_and_the_server_does_not_is_over():
    sessions = joined()
    sessions.leases[8] = HeldLease(prompt=prompt_at(1), worker=1, attempt=1, progress_tick=0)
    held = {lease_id: Progress(num_tokens=1, phase="sampling") for lease_id in (LEASE, 8, 9)}
    found = beat(sessions, held)
    assert (found.over, found.unlisted) == ([8, 9], [])


# ------------------------------------------------------------------------------------------------------------- counting


def test_counters_continue_from_the_last_line_and_count_a_new_worker_in_full():
    sessions = joined(totals={"rollout/tokens": 1000.0})
    beat(sessions, {}, tokens=30.0)
    sessions.begin(b"next", hello(session="second"))
    beat(sessions, {}, tokens=5.0)
    assert sessions.total("tokens") == 1035


def test_what_a_worker_did_under_an_earlier_server_is_in_the_last_line_and_counts_once():
    sessions = Sessions(STALL_TICKS, {"rollout/tokens": 1000.0})
    sessions.recover(0, KnownWorker(session="first", loaded_version=0), branch=0)
    beat(sessions, {}, tokens=800.0)
    assert sessions.total("tokens") == 1000
    beat(sessions, {}, tokens=820.0)
    assert sessions.total("tokens") == 1020


def test_a_session_that_the_ledger_did_not_know_but_that_has_a_past_counts_from_now_on():
    sessions = Sessions(STALL_TICKS, {"rollout/tokens": 1000.0})
    sessions.begin(b"peer", hello(granted=12))
    beat(sessions, {}, tokens=800.0)
    beat(sessions, {}, tokens=801.0)
    assert sessions.total("tokens") == 1001
    assert sessions.of_worker(0).granted == 12


def test_counters_of_environments_are_metrics_once_a_worker_has_them_and_stay_so():
    sessions = joined()
    beat(sessions, {}, tokens=30.0)
    assert sessions.totals() == dict.fromkeys(ALWAYS, 0.0) | {"rollout/tokens": 30.0}
    beat(sessions, {}, tokens=40.0, host_restarts=2.0)
    sessions.begin(b"next", hello(session="second"))
    assert sessions.totals()["environment/host_restarts"] == 2.0
    resumed = Sessions(STALL_TICKS, {"environment/host_restarts": 2.0})
    assert resumed.totals()["environment/host_restarts"] == 2.0


def test_a_counter_that_isnt_a_number_is_left_out():
    sessions = joined()
    beat(sessions, {}, tokens=float("nan"))
    beat(sessions, {}, tokens=30.0)
    assert sessions.total("tokens") == 30


def test_both_ends_continue_from_the_higher_count_of_grants():
    sessions = joined()
    sessions.of_worker(0).granted = 5
    assert sessions.recognise(b"again", hello(granted=3)).granted == 5
    assert sessions.recognise(b"again", hello(granted=8)).granted == 8


# -------------------------------------------------------------------------------------------------------------- silence


def test_all_are_gone_only_when_all_have_been_silent_for_long_joined_or_not():
    sessions = joined()
    sessions.begin(b"other", hello(worker=1))
    sessions.tick = DESERTED_TICKS + 1
    sessions.of_worker(1).heard_tick = 5
    assert not sessions.deserted
    sessions.tick += 5
    assert sessions.deserted


def test_a_worker_whose_process_is_known_to_be_dead_is_not_missed():
    sessions = joined()
    beat(sessions, {}, tokens=30.0)
    sessions.forget(sessions.of_worker(0))
    sessions.tick += 2 * DESERTED_TICKS
    assert not sessions.deserted
    assert sessions.of_peer(b"peer") is None
    assert sessions.total("tokens") == 30


# --------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_of_an_answer_count_at_once_and_only_once():
    sessions = joined()
    beat(sessions, {LEASE: Progress(num_tokens=40, phase="sampling")}, tokens=40.0)
    sessions.note_answer(sessions.of_worker(0), 25)  # the group has 65
    assert sessions.total("tokens") == 65
    beat(sessions, {}, tokens=40.0)  # sent before the answer, and arrived after it
    assert sessions.total("tokens") == 65
    beat(sessions, {}, tokens=80.0)
    assert sessions.total("tokens") == 80


def test_tokens_of_a_worker_that_dies_behind_its_answer_stay():
    sessions = joined()
    beat(sessions, {LEASE: Progress(num_tokens=40, phase="sampling")}, tokens=40.0)
    session = sessions.of_worker(0)
    sessions.note_answer(session, 25)
    sessions.forget(session)
    assert sessions.total("tokens") == 65


def test_a_server_that_is_started_again_counts_on_from_its_accounts_and_what_is_running():
    sessions = Sessions(STALL_TICKS)
    sessions.count_tokens_from(1000)
    sessions.recover(0, KnownWorker(session="first", loaded_version=0), branch=0)
    sessions.recognise(b"peer", hello())
    sessions.note_answer(sessions.of_worker(0), 30)
    beat(sessions, {LEASE: Progress(num_tokens=40, phase="sampling")}, tokens=5000.0)
    assert sessions.total("tokens") == 1000 + 30 + 40
    beat(sessions, {LEASE: Progress(num_tokens=50, phase="sampling")}, tokens=5010.0)
    assert sessions.total("tokens") == 1000 + 30 + 50
