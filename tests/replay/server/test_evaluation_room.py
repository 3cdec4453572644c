"""Who gets a free slot while a run evaluates: leases or the evaluation. The server's own parts, without sockets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Ask, GroupDone, Lease, Loaded
from asyncdapo.replay.core import events as core
from asyncdapo.replay.server.arrivals import Arrivals
from asyncdapo.replay.server.evaluations import Evaluations
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.replay.server.workers import Workers
from asyncdapo.shares import CutWanted
from asyncdapo.transport.payload import pack_answers
from tests.replay.serving import eval_answers, eval_request
from tests.replay.small_run import GROUP_SIZE, SmallRun, make_group

SLOTS, SHARE = 12, 0.5
PEER = b"peer-0-first"
ACTIONS = ("answer a lease", "answer a request", "train")


class Engine:
    """One worker that asks for work for every free slot, and a learner that trains when it is told to."""

    def __init__(self, run_dir: Path, **replay: Any) -> None:
        self.run = SmallRun(run_dir, **replay)
        server = ServerSettings(replay=self.run.config, group_size=GROUP_SIZE, seed=1, eval_share=SHARE)
        run = self.run
        arrivals = Arrivals(server, run.dispatch, run.sessions, run.journal, None)
        self.workers = Workers(server, run.dispatch, run.sessions, arrivals)
        self.run.join(0)
        session = self.run.sessions.of_peer(PEER)
        assert session
        session.alive, self.session = True, session
        self.leases: list[Lease] = []
        self.requests: list[EvalRequest] = []
        self.num_given = Counter[str]()
        """Leases and requests, from the beginning."""
        self.step = 0
        self.want()
        self.workers.leasing = True
        self.fill()

    @property
    def num_waiting(self) -> int:
        return self.workers.evaluations.num_waiting

    @property
    def admits(self) -> bool:
        return self.run.state.admits()

    @property
    def evaluated_slots(self) -> int:
        return sum(request.num_sequences for request in self.requests)

    def fill(self) -> None:
        """Take what is sent, and ask for as much again as there is room for."""
        while True:
            while not self.run.dispatch.outgoing.empty():
                match self.run.dispatch.outgoing.get_nowait().message:
                    case Lease() as lease:
                        self.leases.append(lease)
                        self.num_given["leases"] += 1
                    case EvalRequest() as request:
                        self.requests.append(request)
                        self.num_given["requests"] += 1
            free = SLOTS // GROUP_SIZE - len(self.leases) - len(self.requests)
            if self.session.owed >= free:
                return
            self.workers.hear(PEER, Ask(asked=self.session.granted + free), ())

    def want(self) -> None:
        self.run.dispatch.want_batch(b"learner", CutWanted(step=self.step + 1))

    def do(self, action: str) -> None:
        match action:
            case "answer a lease" if self.leases:
                group, payload = make_group(self.leases.pop(0), versions=((self.step, 4),))
                frames = [memoryview(frame) for frame in payload.frames()]
                self.workers.hear(PEER, GroupDone(group=group), frames)
            case "answer a request" if self.requests:
                done, frames = pack_answers(self.requests[0].request_id, eval_answers(self.requests.pop(0)))
                self.workers.hear(PEER, done, [memoryview(frame) for frame in frames])
            case "train" if self.step + 1 in self.run.state.cut_batches.untrained:
                self.step += 1
                self.run.dispatch.trained(self.step, {})
                self.workers.hear(PEER, Loaded(version=self.step, branch=0), ())
                self.run.dispatch.published(self.step)
                self.want()
        self.fill()


@contextmanager
def engine(**replay: Any) -> Iterator[Engine]:
    with TemporaryDirectory() as run_dir:
        one = Engine(Path(run_dir), **replay)
        try:
            yield one
        finally:
            one.run.journal.close()


async def begin(one: Engine, num: int) -> asyncio.Task:
    """Evaluate: so many requests of as many sequences as a group."""
    evaluating = asyncio.create_task(one.workers.evaluate([eval_request(number + 1) for number in range(num)]))
    await asyncio.sleep(0)
    one.fill()
    return evaluating


async def end(one: Engine, evaluating: asyncio.Task) -> None:
    while not evaluating.done():
        for action in ACTIONS:
            one.do(action)
        await asyncio.sleep(0)


def in_turn(table: Evaluations, num_credits: int = 1) -> EvalRequest | None:
    return table.next_in_turn(0, 0, num_credits)


@given(st.floats(0.01, 1), st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_of_the_credits_that_leases_want_too_requests_have_their_share_rounded_up(
    share: float, offers: list[int]
) -> None:
    table, total, num_requests = Evaluations(share), 0, 0
    table.start([eval_request(i) for i in range(sum(offers) + 1)])
    for num_credits in offers:
        left = num_credits
        while left and in_turn(table, left):
            left -= 1
        table.note_leases(left)
        total, num_requests = total + num_credits, num_requests + num_credits - left
        assert num_requests - 1 < share * total <= num_requests


def test_leases_that_no_request_waits_beside_and_requests_behind_leases_dont_count_as_turns() -> None:
    table = Evaluations(share=0.5)
    table.note_leases(100)
    table.start([eval_request(i) for i in range(100)])
    for _ in range(50):
        table.next_for(0, 0)
    turns = [in_turn(table) is not None for _ in range(2)]
    table.note_leases(1)
    turns.append(in_turn(table) is not None)
    assert turns == [True, False, True]


def test_requests_and_leases_take_turns_while_both_want_every_slot() -> None:
    async def run() -> None:
        with engine(run_ahead=20.0, max_staleness=20) as one:
            evaluating = await begin(one, 8)
            before = one.num_given["leases"]
            for action in ("answer a lease", "answer a lease", "answer a request", "answer a lease") * 2:
                one.do(action)
            assert one.num_given["requests"] == one.num_given["leases"] - before == 4
            assert one.admits
            await end(one, evaluating)

    asyncio.run(run())


def test_an_evaluation_has_all_slots_for_which_there_is_no_lease_and_then_takes_turns_with_leases() -> None:
    async def run() -> None:
        with engine(run_ahead=1.0) as one:
            while one.leases:
                one.do("answer a lease")
            evaluating = await begin(one, 20)
            assert one.evaluated_slots == SLOTS, "the learner has all that it may have"
            one.do("train")
            assert one.admits
            before = one.num_given.copy()
            while one.admits:
                one.do("answer a request")
            given = one.num_given - before
            assert given["leases"] >= given["requests"]
            await end(one, evaluating)

    asyncio.run(run())


def test_all_slots_are_an_evaluations_before_the_first_lease_and_after_the_last() -> None:
    async def run() -> None:
        with engine() as one:
            one.workers.pause()
            while one.leases:
                one.do("answer a lease")
            evaluating = await begin(one, 8)
            assert one.evaluated_slots == SLOTS
            await end(one, evaluating)

    asyncio.run(run())


@settings(max_examples=6)
@given(
    st.sampled_from([(0.0, 0), (0.5, 1), (1.0, 2), (2.0, 2)]),
    st.integers(1, 4),
    st.lists(st.sampled_from(ACTIONS), min_size=10, max_size=40),
)
def test_no_slot_is_free_while_it_waits_and_it_has_more_than_its_share_only_of_credits_without_a_lease(
    ahead: tuple[float, int], size: int, actions: list[str]
) -> None:
    async def run() -> None:
        run_ahead, max_staleness = ahead
        with engine(run_ahead=run_ahead, max_staleness=max_staleness, prompts_per_step=size) as one:
            evaluating = await begin(one, 12)
            for action in actions:
                before = one.num_given.copy()
                one.do(action)
                assert one.session.owed == 0 or not one.num_waiting
                given = one.num_given - before
                if one.admits:
                    assert given["requests"] <= SHARE * given.total() + 1, "a lease was due instead"
            await end(one, evaluating)
            assert len(evaluating.result()) == 12 * GROUP_SIZE

    asyncio.run(run())


def test_the_event_that_ends_the_run_leaves_the_slots_to_the_evaluation() -> None:
    async def run() -> None:
        with engine() as one:
            evaluating = await begin(one, 8)
            one.run.dispatch.apply(core.RunEnded())
            one.leases.clear()
            one.fill()
            assert one.evaluated_slots == SLOTS
            await end(one, evaluating)

    asyncio.run(run())
