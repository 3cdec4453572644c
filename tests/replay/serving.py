"""A replay server on real sockets, and peers for it that do only what a test tells them."""

import asyncio
from contextlib import asynccontextmanager, closing, suppress
from functools import partial

from asyncdapo.eval_messages import EvalAck, EvalAnswer, EvalRequest, Sampling
from asyncdapo.learner.batches.feed import located_share, read_share
from asyncdapo.messages import (
    SCHEMA_VERSION,
    Ack,
    Ask,
    GroupDone,
    Heartbeat,
    Hello,
    Lease,
    Progress,
    Recall,
    Reject,
    Welcome,
    Withdraw,
)
from asyncdapo.replay.config import FilterConfig, ReplayConfig
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.ledger import open_ledger
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.shares import Batch, CutWanted, NoBatch
from asyncdapo.transport.payload import pack_answers
from asyncdapo.transport.sockets import Client
from tests.replay.small_run import GROUP_SIZE, make_group, make_partial, prompt_at

TICK_S = 0.03
"""Heartbeat interval of tests in which time matters: a worker is lost after 15 of them."""
ToWorker = Welcome | Lease | Ack | Reject | Withdraw | Recall | EvalRequest | EvalAck


def rows(run_dir, query):
    with closing(open_ledger(run_dir)) as ledger:
        return [tuple(row) for row in ledger.execute(query)]


async def until(true, server):
    """Wait for what the server does by itself; its failure ends the wait."""
    while not true():
        assert not server.serving.done(), server.serving.exception()
        await asyncio.sleep(0.005)


def tokens_of(run_dir, batch, rank=0):
    """What a rank reads of the batch."""
    return read_share(run_dir, batch.step, located_share(batch, rank))


def eval_request(request_id, num_prompts=2, samples=(0,)):
    prompts = [prompt_at(1000 * request_id + i) for i in range(num_prompts)]
    return EvalRequest(request_id=request_id, seed=1, sampling=Sampling(), prompts=prompts, samples=list(samples))


def eval_answers(request, **fields):
    """An answer to each prompt and sample of the request."""
    fields = {"acc": 1.0, "num_tokens": 3, "finish_reason": "stop", "version_min": 0, "version_max": 0} | fields
    return [
        EvalAnswer(prompt_id=prompt.prompt_id, sample=sample, **fields)
        for prompt in request.prompts
        for sample in request.samples
    ]


@asynccontextmanager
async def serving(
    run_dir,
    *,
    filter=None,
    num_prompts=None,
    make_journal=Journal,
    server_settings=None,
    ports=(0, 0),
    curve=None,
    lengths=None,
    **replay,
):
    """A server of batches of 2 groups of 2, at the end of the run's ledger; `server.serving` is the task that serves.
    At the end it is gone as if it had been killed: nothing is told to its peers, nothing is written."""
    settings = {"prompts_per_step": 2, "run_ahead": 1.0, "max_staleness": 1, "heartbeat_s": 30.0} | replay
    config = ReplayConfig(**settings)
    journal = make_journal(run_dir)
    make_state = partial(ReplayState, config, filter or FilterConfig(), max_attempts=3, num_prompts=num_prompts)
    server = ReplayServer(
        ServerSettings(replay=config, group_size=GROUP_SIZE, seed=1, **(server_settings or {})),
        lambda recovered: make_state(recovered=recovered),
        journal,
        prompt_at,
        lengths=lengths,
        ports=ports,
        curve=curve,
    )
    server.serving = asyncio.create_task(server.run())
    await asyncio.sleep(0)  # a task that never ran has no end in which it closes its sockets
    try:
        yield server
    finally:
        server.serving.cancel()
        with suppress(asyncio.CancelledError):
            await server.serving
        journal.close()


class FakeWorker:
    """A rollout worker's end of the wire. `take(kind)` waits for a message of that kind and passes over others, which a
    later `take` finds."""

    def __init__(self, server, index=0, session="first", *, continues=False):
        self.continues, self.begun = continues, {}
        """By lease: the frames of what is sampled of it."""
        self.index, self.session, self.asked, self.version, self.branch = index, session, 0, 0, 0
        self.granted = 0
        self.client = Client(server.rollout_address, ToWorker, f"rollout-{index}-{session}".encode())
        self.passed_over = []

    def hello(self, version=None, schema=SCHEMA_VERSION):
        version = self.version if version is None else version
        return Hello(
            schema=schema,
            worker=self.index,
            session=self.session,
            loaded_version=version,
            branch=self.branch,
            granted=self.granted,
            continues=self.continues,
        )

    async def join(self, **hello):
        await self.client.send(self.hello(**hello))
        return await self.take(Welcome)

    async def load(self, version, branch):
        """New weights, told with a heartbeat."""
        self.version, self.branch = version, branch
        await self.beat()

    async def ask(self, more):
        self.asked += more
        await self.client.send(Ask(asked=self.asked))

    async def leases(self, num):
        """Ask for leases and take them."""
        await self.ask(num)
        return [await self.take(Lease) for _ in range(num)]

    async def answer(self, lease, **group):
        header, payload = make_group(lease, worker=self.index, **group)
        await self.send_group(header, payload)

    async def work_off(self, num, **group):
        """Ask for leases, and see each of them answered and acknowledged."""
        for lease in await self.leases(num):
            await self.answer(lease, **group)
            await self.take(Ack)

    async def save(self, lease_id, completions, *, handed_back=False):
        """`completions`: (versions, finish reason) of each; its tokens are numbered, its log-probs -0.25."""
        group, frames = make_partial(lease_id, completions, handed_back=handed_back)
        await self.client.send(group, frames)

    async def send_group(self, header, payload):
        await self.client.send(GroupDone(group=header), payload.frames())

    async def beat(self, progress=None, tokens=0.0, phase="sampling", started_version=None, evaluations=()):
        """`progress`: sampled tokens by lease."""
        held = {
            lease_id: Progress(num_tokens=num_tokens, phase=phase, started_version=started_version)
            for lease_id, num_tokens in (progress or {}).items()
        }
        await self.client.send(
            Heartbeat(
                asked=self.asked,
                loaded_version=self.version,
                branch=self.branch,
                progress=held,
                evaluations=evaluations,
                gauges={"tokens": tokens},
            )
        )

    async def evaluate(self, request, acc=1.0, response="Answer: 6"):
        done, frames = pack_answers(request.request_id, eval_answers(request, acc=acc, response=response))
        await self.client.send(done, frames)

    async def take(self, kind):
        for message in self.passed_over:
            if isinstance(message, kind):
                self.passed_over.remove(message)
                return message
        while True:
            message, frames = await self.client.receive()
            if isinstance(message, Lease):
                self.begun[message.lease_id] = frames
            if isinstance(message, Lease | EvalRequest):
                self.granted = max(self.granted, message.number)
            if isinstance(message, kind):
                return message
            self.passed_over.append(message)

    async def unread(self):
        """All that was sent to this worker and not taken. A repeated hello is answered, behind everything else."""
        await self.join()
        return self.passed_over

    def close(self):
        self.client.close()


class FakeLearner:
    """The learner's end of the wire."""

    def __init__(self, server, name=b"learner"):
        self.client = Client(server.learner_address, Batch | NoBatch, name)

    async def want(self, step, **question):
        await self.client.send(CutWanted(step=step, **question))

    async def receive(self):
        answer, _ = await self.client.receive()
        return answer

    def close(self):
        self.client.close()
