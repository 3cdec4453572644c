"""Evaluation requests: a table of their own beside the leases. No sockets, no clock.

In: requests of the controller, workers with room, answers, lost workers. Out: the next request for a worker, and all
answers of an evaluation once they are there. Promises:

    in turn           while requests wait, their share of the credits goes to them, and the rest to leases
    behind leases     a credit for which there is no lease goes to a request, too, and isn't counted as its turn
    not listed        a request that its worker's heartbeats don't list was lost, and is sent again
    answered once     a request of a lost worker, or one without an answer for long, goes to another worker. The first
                      answer counts, later ones are dropped
    asked twice       a repeated call joins the evaluation that runs. An evaluation that nobody waits for is forgotten
    no endless loop   a request that was given out `MAX_ISSUES` times without an answer ends the run

Does not own: credits and sending (`server`), what is evaluated and when (the controller).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from asyncdapo.errors import RunError
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.replay.server.sessions import MAX_UNLISTED

MAX_ISSUES = 5


@dataclass(eq=False)
class Evaluation:
    """The requests of one `evaluate` call."""

    requests: dict[int, EvalRequest]
    answers: dict[int, list[EvalAnswer]] = field(default_factory=dict)
    num_callers: int = 0

    @property
    def done(self) -> bool:
        return len(self.answers) == len(self.requests)

    def all_answers(self) -> list[EvalAnswer]:
        """In the order of the requests."""
        return [answer for request_id in self.requests for answer in self.answers[request_id]]


@dataclass
class _UnderWay:
    worker: int
    since: int
    num_unlisted: int = 0
    """Heartbeats of its worker in a row that didn't list it."""


class Evaluations:
    """Which requests wait, which run, and at which worker."""

    def __init__(self, share: float) -> None:
        """`share`: of the credits that requests and leases both want, so many are for requests."""
        self._share = share
        self._num_turns = self._num_leased = 0
        """Of the credits used while requests waited: those that it was the requests' turn to have, and the leases'."""
        self._evaluations: list[Evaluation] = []
        self._waiting: deque[int] = deque()
        self._under_way: dict[int, _UnderWay] = {}
        self._issues: dict[int, int] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def start(self, requests: Sequence[EvalRequest]) -> Evaluation:
        """Queue the requests, or join the evaluation of the same requests. Raises ValueError for a request id that
        another evaluation uses."""
        wanted = {request.request_id: request for request in requests}
        evaluation = next((evaluation for evaluation in self._evaluations if evaluation.requests == wanted), None)
        if evaluation is None:
            evaluation = Evaluation(wanted)
            taken = [request_id for request_id in wanted if self._evaluation_of(request_id)]
            if taken or len(wanted) != len(requests):
                raise ValueError(f"evaluation request ids must be new, each used once; in use: {taken}")
            self._evaluations.append(evaluation)
            self._waiting.extend(wanted)
        evaluation.num_callers += 1
        return evaluation

    def leave(self, evaluation: Evaluation) -> None:
        """One who waited for it does no longer. The last one's leaving ends it, answered or not."""
        evaluation.num_callers -= 1
        if evaluation.num_callers:
            return
        self._evaluations.remove(evaluation)
        self._waiting = deque(request_id for request_id in self._waiting if request_id not in evaluation.requests)
        for request_id in evaluation.requests:
            self._under_way.pop(request_id, None)
            self._issues.pop(request_id, None)

    def next_in_turn(self, worker: int, tick: int, num_credits: int) -> EvalRequest | None:
        """The request that this worker shall run now, if it is a request's turn to use one of the worker's credits."""
        if self._num_turns >= self._share * (self._num_turns + self._num_leased + num_credits):
            return None
        request = self.next_for(worker, tick)
        self._num_turns += request is not None
        return request

    def next_for(self, worker: int, tick: int) -> EvalRequest | None:
        """The request that this worker shall run now, if one waits."""
        if not self._waiting:
            return None
        request_id = self._waiting.popleft()
        evaluation = self._evaluation_of(request_id)
        assert evaluation is not None, "what waits belongs to an evaluation"
        self._under_way[request_id] = _UnderWay(worker, tick)
        self._count_issue(request_id)
        return evaluation.requests[request_id]

    def note_leases(self, num: int) -> None:
        """So many credits were used for leases."""
        if self._waiting:
            self._num_leased += num

    def note_listed(self, worker: int, listed: Collection[int]) -> list[EvalRequest]:
        """A heartbeat lists the requests that this worker holds. Returns those to send again. Raises RunError after
        `MAX_ISSUES`."""
        lost = []
        for request_id, under_way in self._under_way.items():
            if under_way.worker == worker:
                under_way.num_unlisted = 0 if request_id in listed else under_way.num_unlisted + 1
                if under_way.num_unlisted == MAX_UNLISTED:
                    under_way.num_unlisted = 0
                    self._check_issues(request_id)
                    self._count_issue(request_id)
                    evaluation = self._evaluation_of(request_id)
                    assert evaluation is not None, "what is under way belongs to an evaluation"
                    lost.append(evaluation.requests[request_id])
        return lost

    def answer(self, request_id: int, answers: list[EvalAnswer]) -> Evaluation | None:
        """Store the answers to a request. Returns its evaluation; None if it has answers to the request already, or is
        over. Raises ValueError if prompts or samples are not those of the request, or a number is out of range."""
        evaluation = self._evaluation_of(request_id)
        if evaluation is None or request_id in evaluation.answers:
            return None
        request = evaluation.requests[request_id]
        wanted = [(prompt.prompt_id, sample) for prompt in request.prompts for sample in request.samples]
        if [(answer.prompt_id, answer.sample) for answer in answers] != wanted:
            raise ValueError(f"evaluation request {request_id} has other prompts or samples than its answer")
        if not all(math.isfinite(answer.acc) and answer.num_tokens >= 0 for answer in answers):
            raise ValueError(f"evaluation request {request_id} has a verdict or a length that can't be")
        evaluation.answers[request_id] = answers
        if self._under_way.pop(request_id, None) is None:
            self._waiting.remove(request_id)
        return evaluation

    def start_again(self) -> None:
        """The run was rolled back. Earlier answers may be of weights that were undone, so everything is asked again."""
        self._under_way.clear()
        self._issues.clear()
        for evaluation in self._evaluations:
            evaluation.answers.clear()
        self._waiting = deque(request_id for evaluation in self._evaluations for request_id in evaluation.requests)

    def lose_worker(self, worker: int) -> None:
        """Its requests go to the next worker with room. Raises RunError after `MAX_ISSUES`."""
        self._reissue([request_id for request_id, at in self._under_way.items() if at.worker == worker])

    def lose_silent(self, since: float) -> None:
        """Requests given out before tick `since` go to the next worker with room: their message or answer may be lost.
        Raises RunError after `MAX_ISSUES`."""
        self._reissue([request_id for request_id, at in self._under_way.items() if at.since < since])

    def held_by(self, worker: int) -> bool:
        """Whether it works on a request."""
        return any(at.worker == worker for at in self._under_way.values())

    def _reissue(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self._check_issues(request_id)
            del self._under_way[request_id]
            self._waiting.appendleft(request_id)

    def _count_issue(self, request_id: int) -> None:
        self._issues[request_id] = self._issues.get(request_id, 0) + 1

    def _check_issues(self, request_id: int) -> None:
        if self._issues[request_id] >= MAX_ISSUES:
            raise RunError(f"evaluation request {request_id} was given out {MAX_ISSUES} times and never answered")

    def _evaluation_of(self, request_id: int) -> Evaluation | None:
        return next((evaluation for evaluation in self._evaluations if request_id in evaluation.requests), None)
