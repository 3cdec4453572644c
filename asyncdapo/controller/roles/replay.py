"""The replay process: prompt stream + replay server (core, journal, sockets). Imports no torch."""

from __future__ import annotations

from pathlib import Path

from asyncdapo.controller.process.health import Filling, Pulse
from asyncdapo.controller.process.waits import replay_wait
from asyncdapo.controller.roles.actors import NUM_PROBE_PROMPTS, Opened, Start
from asyncdapo.controller.roles.base import Member
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.model.tokenizer import TextTokenizer, load_tokenizer
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.sessions import LOST_TICKS
from asyncdapo.replay.server.settings import ServerSettings
from asyncdapo.shares import Dealer

EXCERPT = 60
"""Characters of a prompt, around what the tokenizer doesn't know."""
MAX_STALLED = 3
"""Leases in a row that may stall at a worker before its engine is taken for hung."""


class Main(Member):
    """Prompts in, batches out: the process that decides what is sampled and what is trained on."""

    role = "replay"

    async def start(self, start: Start) -> Opened:
        """Open stream, journal and sockets, and go on from what the ledger says."""
        config = self.config
        task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
        tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.tokenizer_key)
        chat_template, system_prompt = config.prompts.chat_template, config.prompts.system_prompt
        encode = tokenizer.prompt_encoder(chat_template, system_prompt, config.model.files.vocab_size)
        self.stream = PromptStream(config.prompts, task, encode, config.run.seed, tokenizer.unknown_id)
        self.server = ReplayServer(
            ServerSettings(
                replay=config.replay,
                group_size=config.rollout.group_size,
                seed=config.run.seed,
                total_slots=config.rollout.num_workers * config.rollout.slots,
                dealer=self._dealer(),
                max_failure_ratio=config.reward.max_failure_ratio,
                vocab_size=config.model.files.vocab_size,
                totals=start.totals,
            ),
            self._make_state,
            self._open_journal(start),
            self.stream.prompt_at,
            host=self.host(),
            ports=start.ports,
            curve=self.keys.server,
        )
        eval_prompts = self.stream.eval_prompts(config.eval.num_held_out)
        return Opened(
            branch=self.server.branch,
            rollout_address=self.server.rollout_address,
            learner_address=self.server.learner_address,
            ports=self.server.ports,
            data_ends=self.stream.num_prompts is not None,
            num_left_out=self.stream.num_left_out,
            num_eval_left_out=self.stream.num_eval_left_out,
            unknown=said_of_unknown(self.stream, tokenizer),
            eval_prompts=eval_prompts,
            eval_texts=[tokenizer.spell(prompt.token_ids) for prompt in eval_prompts],
            probe_prompts=self._probe_prompts(),
        )

    def _probe_prompts(self) -> list[list[int]]:
        first = map(self.stream.prompt_at, range(NUM_PROBE_PROMPTS))
        return [prompt.token_ids for prompt in first if prompt]

    def _open_journal(self, start: Start) -> Journal:
        journal = Journal(Path(self.config.run.dir), keep_payloads=self.config.replay.keep_payloads)
        if start.roll_back_to is not None:
            config = self.config
            journal.roll_back(start.roll_back_to, start.reason, config.replay, replaces=config.filter.replaces)
        return journal

    def _dealer(self) -> Dealer:
        """Of a model whose shape isn't known here, attention counts nothing."""
        learner, shape = self.config.learner, self.config.model.files.shape
        return Dealer(learner.ranks, learner.updates_per_step, shape.pair_cost if shape else 0.0)

    def _make_state(self, recovered: Recovered) -> ReplayState:
        return ReplayState(
            self.config.replay,
            self.config.filter,
            max_attempts=self.config.prompts.max_attempts,
            num_prompts=self.stream.num_prompts,
            recovered=recovered,
        )

    async def serve(self) -> None:
        """Serve both sockets; raises what ends the run."""
        await self.server.run()

    async def pulse(self) -> Pulse:
        status = self.server.status()
        self.waits.stand(*replay_wait(status["why_waiting"]))
        patience_s = LOST_TICKS * self.config.replay.heartbeat_s
        return Pulse(
            entries=[await self.entry()],
            waits=self.waits.open(),
            progress={key: status[key] for key in ("sampled_tokens", "filling_step", "branch")},
            filling=Filling(
                step=status["filling_step"],
                num_ready=status["ready"],
                num_failed=status["failed"],
                last_failure=status["last_failure"],
            ),
            lost=[
                index
                for index, worker in status["known_workers"].items()
                if worker["silent_s"] > patience_s or worker["stalled"] > MAX_STALLED
            ],
        )

    async def begin(self) -> None:
        """Grant leases from now on."""
        await self.server.begin()

    async def pause(self) -> None:
        """Grant none from now on."""
        await self.server.pause()

    async def roll_back(self, step: int, reason: str) -> int:
        """Go back to the checkpoint of `step`. Returns the new branch."""
        return await self.server.roll_back(step, reason)

    async def lose_worker(self, index: int) -> None:
        """The worker's process is dead: its leases are lost."""
        await self.server.lose_worker(index)

    async def trained(self, step: int, summary: dict[str, float]) -> dict[str, float]:
        """Batch `step` is trained on. Returns replay's metrics of the step."""
        return await self.server.trained(step, summary)

    async def published(self, version: int) -> None:
        """The send of `version` is over."""
        await self.server.published(version)

    async def covered(self, step: int) -> None:
        """The oldest checkpoint that the run may go back to is that of `step`: payloads up to it may go."""
        await self.server.covered(step)

    async def evaluate(self, requests: list[EvalRequest], share: float) -> list[EvalAnswer]:
        """Answers to all requests, in their order."""
        return await self.server.evaluate(requests, share)

    async def finish(self) -> None:
        """No further step: leases are withdrawn, open prompts end `unused`."""
        await self.server.finish()


def said_of_unknown(stream: PromptStream, tokenizer: TextTokenizer) -> str:
    """A line with an example of what the model reads in its place; empty where all prompts are known."""
    if not stream.num_unknown:
        return ""
    word, text = tokenizer.spell([tokenizer.unknown_id]), tokenizer.spell(stream.first_unknown)
    begin = max(0, text.index(word) - EXCERPT // 2)
    num, excerpt = stream.num_unknown, text[begin : begin + EXCERPT]
    return f"prompts: {num:,} hold text that the tokenizer doesn't know, the model reads {word}: …{excerpt!r}…"
