"""A job: one lease or evaluation request that the worker holds, and how far it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from asyncdapo.eval_messages import EvalRequest
from asyncdapo.messages import Lease, Phase, Progress
from asyncdapo.rollout.engine import Request, Sample, Sampled


@dataclass
class Part:
    """Samples of a job that are one request to the engine."""

    request: Request
    indices: Sequence[int]
    """Of its samples in the job."""
    samples: list[Sample] = field(default_factory=list)
    """Once they are complete."""


@dataclass
class Job:
    """A lease or an evaluation request, with its requests to the engine."""

    source: Lease | EvalRequest
    num_starting: int
    """Sequences not passed to the engine yet."""
    on_room: Callable[[], None]
    """Called whenever a sequence is complete, or an episode begins or ends to wait."""
    on_started: Callable[[int], None] = lambda _: None
    """Called with the version that sampled the job's first token."""
    begun: Sequence[Sampled] = ()
    """What another job has sampled of each of its samples; empty if it begins anew."""
    started_at: float = math.nan
    started_version: int | None = None
    all_sampled: bool = False
    scored: bool = False
    """Its group, with all of its tokens, is the answer."""
    num_unfinished: int = field(init=False)
    """Sequences, or episodes, that aren't complete."""
    num_in_environment: int = 0
    """Episodes that wait for an answer of their environment."""
    num_told_tokens: int = field(init=False)
    """Of its tokens, those that the server knows of."""
    requests: list[Request] = field(default_factory=list)
    parts: Sequence[Part] = ()
    """Requests that can be handed to another engine before they are complete."""
    saved_at: float = math.nan
    """When it was saved last, or else begun."""
    handed_back: bool = False

    def __post_init__(self) -> None:
        self.num_unfinished = self.num_starting
        self.num_told_tokens = self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Sampled so far, those included that it began with."""
        num_begun = sum(len(sampled.token_ids) for sampled in self.begun)
        return num_begun + sum(request.num_sampled for request in self.requests)

    @property
    def is_being_sampled(self) -> bool:
        """Some of its tokens are there, and some are missing."""
        return self.started_version is not None and not self.all_sampled

    def tell(self) -> Progress:
        """Its progress, for the heartbeat."""
        self.num_told_tokens = self.num_tokens
        return Progress(num_tokens=self.num_told_tokens, phase=self._phase, started_version=self.started_version)

    @property
    def _phase(self) -> Phase:
        if self.all_sampled:
            return "sampled"
        if any(request.num_running for request in self.requests):
            return "sampling"
        return "environment" if self.num_in_environment else "waiting"

    def send(self, request: Request) -> Request:
        """Count the request, which is passed to the engine now."""
        request.on_started, request.seeded = self._note_started, isinstance(self.source, EvalRequest)
        self.requests.append(request)
        return request

    @contextmanager
    def in_environment(self) -> Iterator[None]:
        """One of its episodes waits for its environment in the body."""
        self.num_in_environment += 1
        self.on_room()
        try:
            yield
        finally:
            self.num_in_environment -= 1
            self.on_room()

    def skip(self, num: int) -> None:
        """So many sequences were complete before it began."""
        self.num_starting -= num
        self.num_unfinished -= num

    def note_done(self) -> None:
        """One more sequence, or episode, is complete."""
        self.num_unfinished -= 1
        self.on_room()

    def _note_started(self, version: int) -> None:
        if self.started_version is None:
            self.started_at, self.started_version = time.monotonic(), version
            self.on_started(version)
