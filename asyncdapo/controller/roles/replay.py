"""The replay process: prompt stream + replay server (core, journal, sockets). Imports no torch.

In: where to begin (`Start`), commands of the controller. Out: what the others need to know of it (`Opened`), answers.
Does not own: what is granted, cut and dropped (`replay/core`), the sockets (`replay/server`).
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from asyncdapo.config.config import Config
from asyncdapo.controller.process.health import Filling, Health
from asyncdapo.controller.process.waits import replay_wait
from asyncdapo.controller.roles.base import ProcessBase, ProcessSpec
from asyncdapo.controller.roles.opening import NUM_PROBE_PROMPTS, Opened, Start
from asyncdapo.controller.roles.samples import read_samples
from asyncdapo.eval_messages import EvalAnswer, EvalRequest
from asyncdapo.metrics.samples import Sample
from asyncdapo.model.tokenizer import TextTokenizer, load_tokenizer
from asyncdapo.native.malloc import keep_freed_memory
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.replay.core.recovery import Recovered
from asyncdapo.replay.core.state import ReplayState
from asyncdapo.replay.core.stream import AnswerLengths, SolvedRows
from asyncdapo.replay.ledger.journal import Journal
from asyncdapo.replay.ledger.kept import keep_samples
from asyncdapo.replay.server.server import ReplayServer
from asyncdapo.replay.server.sessions import LOST_TICKS
from asyncdapo.replay.server.settings import COLLECT_AFTER, ServerSettings
from asyncdapo.replay.workers_file import WorkerRow, write_rows
from asyncdapo.shares import Dealer

EXCERPT = 60
"""Characters of a prompt, around what the tokenizer doesn't know."""
MAX_STALLED = 3
"""Leases in a row that may stall at a worker before its engine is taken for hung."""


class ReplayProcess(ProcessBase):
    """Prompts in, batches out: the process that decides what is sampled and what is trained on."""

    def __init__(self, spec: ProcessSpec, stream: PromptStream, tokenizer: TextTokenizer, server: ReplayServer) -> None:
        super().__init__(spec)
        self.stream, self.tokenizer, self.server = stream, tokenizer, server

    @classmethod
    async def start(cls, spec: ProcessSpec, start: Start) -> ReplayProcess:
        """Open stream, journal and sockets, and resume from what the ledger says."""
        keep_freed_memory()
        gc.set_threshold(COLLECT_AFTER)
        config = spec.config
        task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
        tokenizer = load_tokenizer(config.model.tokenizer_files, config.prompts.template_arguments)
        chat_template, system_prompt = bool(config.prompts.chat_template), config.prompts.system_prompt
        encode = tokenizer.prompt_encoder(chat_template, system_prompt, config.model.files.vocab_size)
        stream = PromptStream(
            config.prompts,
            task,
            encode,
            config.run.seed,
            tokenizer.unknown_id,
            with_text=config.environment.enabled,
        )
        journal, lengths = _open_journal(config, start), None
        if config.replay.order == "longest_first":
            lengths = AnswerLengths(journal.answer_lengths(), stream.row_at)
        server = ReplayServer(
            _server_settings(config, start),
            partial(_make_state, config, stream, journal, lengths),
            journal,
            stream.prompt_at,
            lengths=lengths,
            host=spec.host(),
            ports=start.ports,
            curve=spec.keys.server,
        )
        return cls(spec, stream, tokenizer, server)

    async def opened(self) -> Opened:
        """What the others need to know of it."""
        eval_prompts = self.stream.eval_prompts(self.config.eval.num_held_out)
        first = map(self.stream.prompt_at, range(NUM_PROBE_PROMPTS))
        return Opened(
            branch=self.server.branch,
            rollout_address=self.server.rollout_address,
            learner_address=self.server.learner_address,
            ports=self.server.ports,
            data_ends=self.stream.num_prompts is not None,
            num_left_out=self.stream.num_left_out,
            num_eval_left_out=self.stream.num_eval_left_out,
            unknown=said_of_unknown(self.stream, self.tokenizer),
            eval_prompts=eval_prompts,
            eval_texts=[self.tokenizer.spell(prompt.token_ids) for prompt in eval_prompts],
            probe_prompts=[prompt.token_ids for prompt in first if prompt],
        )

    async def serve(self) -> None:
        """Serve both sockets; raises what ends the run."""
        await self.server.run()

    async def health(self) -> Health:
        status = self.server.status()
        self.waits.stand(*replay_wait(status["why_waiting"]))
        silence_s, workers = LOST_TICKS * self.config.replay.heartbeat_s, status["known_workers"]
        write_rows(Path(self.config.run.dir), [_row(index, worker) for index, worker in workers.items()])
        return Health(
            entries=[self.spec.entry()],
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
                for index, worker in workers.items()
                if worker["silent_s"] > silence_s or worker["stalled"] > MAX_STALLED
            ],
        )

    async def begin(self) -> None:
        """Grant leases from now on."""
        await self.server.begin()

    async def pause(self) -> None:
        """Grant none from now on."""
        await self.server.pause()

    async def recall(self) -> None:
        """Grant none from now on, and have all that are granted handed back with what is sampled."""
        await self.server.recall()

    async def roll_back(self, step: int, reason: str) -> int:
        """Go back to the checkpoint of `step`. Returns the new branch."""
        return await self.server.roll_back(step, reason)

    async def lose_worker(self, index: int, cause: str) -> None:
        """The worker's process is gone: its leases are lost."""
        await self.server.lose_worker(index, cause)

    async def drain_worker(self, index: int, within_s: float, cause: str) -> int:
        """The worker is to leave: it finishes what it holds, at most for `within_s`. Returns the leases handed back."""
        return await self.server.drain_worker(index, within_s, cause)

    async def trained(self, step: int, summary: dict[str, float]) -> dict[str, float]:
        """Batch `step` is trained on. Returns replay's metrics of the step."""
        metrics = await self.server.trained(step, summary)
        self.span_file.write(states=self.server.take_spans())
        num_samples = 0 if self.config.replay.keep_payloads else self.config.metrics.keep_samples
        if num_samples:
            await asyncio.to_thread(keep_samples, Path(self.config.run.dir), step, num_samples)
        return metrics

    async def samples(self, step: int) -> list[Sample]:
        """Completions of the batch of `step` to look at. Ask before a checkpoint covers the step."""
        return await asyncio.to_thread(read_samples, Path(self.config.run.dir), step, self.tokenizer)

    async def published(self, version: int) -> None:
        """The send of `version` is over."""
        await self.server.published(version)

    async def covered(self, step: int) -> None:
        """The oldest checkpoint that the run may go back to is that of `step`: payloads up to it may go."""
        await self.server.covered(step)

    async def evaluate(self, requests: list[EvalRequest]) -> list[EvalAnswer]:
        """Answers to all requests, in their order."""
        return await self.server.evaluate(requests)

    async def finish(self) -> None:
        """No further step: leases are withdrawn, open prompts end `unused`."""
        await self.server.finish()


def _server_settings(config: Config, start: Start) -> ServerSettings:
    """Attention of a model whose shape isn't known here costs nothing in the deal of a batch."""
    learner, files = config.learner, config.model.files
    return ServerSettings(
        replay=config.replay,
        group_size=config.rollout.group_size,
        seed=config.run.seed,
        eval_share=config.eval.max_share,
        dealer=Dealer(learner.ranks, learner.updates_per_step, files.shape.pair_cost if files.shape else 0.0),
        max_failure_ratio=config.reward.max_failure_ratio,
        vocab_size=files.vocab_size,
        totals=start.totals,
    )


def _row(index: int, worker: Mapping[str, float]) -> WorkerRow:
    """From what the server says of a worker."""
    return WorkerRow(
        worker=index,
        heard_at_s=time.time() - worker["silent_s"],
        leases=int(worker["leases"]),
        tokens_per_s=worker["tokens_per_s"],
        running=worker["running"],
        waiting=worker["waiting"],
    )


def _open_journal(config: Config, start: Start) -> Journal:
    journal = Journal(Path(config.run.dir), keep_payloads=config.replay.keep_payloads)
    if start.roll_back_to is not None:
        journal.roll_back(start.roll_back_to, start.reason, config.replay, replaces=config.filter.replaces)
    return journal


def _make_state(
    config: Config, stream: PromptStream, journal: Journal, lengths: AnswerLengths | None, recovered: Recovered
) -> ReplayState:
    """`recovered` is what the journal has now, after a rollback too."""
    solved = None
    if config.prompts.retire_above is not None and stream.num_rows is not None:
        solved = SolvedRows(config.prompts.retire_above, stream.num_rows, stream.row_at)
        for prompt_id, right in journal.solved_shares():
            solved.note(prompt_id, right)
    return ReplayState(
        config.replay,
        config.filter,
        max_attempts=config.prompts.max_attempts,
        num_prompts=stream.num_prompts,
        recovered=recovered,
        expected_tokens=lengths.expected if lengths else None,
        solved=solved,
    )


def said_of_unknown(stream: PromptStream, tokenizer: TextTokenizer) -> str:
    """A line with an example of what the model reads in its place; empty where all prompts are known."""
    if not stream.num_unknown:
        return ""
    assert tokenizer.unknown_id is not None, "it stands for what isn't known"
    word, text = tokenizer.spell([tokenizer.unknown_id]), tokenizer.spell(stream.first_unknown)
    begin = max(0, text.index(word) - EXCERPT // 2)
    num, excerpt = stream.num_unknown, text[begin : begin + EXCERPT]
    return f"prompts: {num:,} hold text that the tokenizer doesn't know, the model reads {word}: …{excerpt!r}…"
