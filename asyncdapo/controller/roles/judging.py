"""What samples and judges the completions of a worker: the one place that knows which parts belong together.

Without an environment a completion is a response, and verifiers judge it. With one it is an episode, and its rewards
are the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from asyncdapo.config.config import Config
from asyncdapo.environment.hosts import Hosts
from asyncdapo.model.tokenizer import TextTokenizer
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.reward.pool import ScorerPool
from asyncdapo.reward.scorer import Scale, Scorer
from asyncdapo.rollout.endpoint.chat import Chat
from asyncdapo.rollout.endpoint.endpoint import Endpoint
from asyncdapo.rollout.engine import Engine
from asyncdapo.rollout.episodes import Rollouts, SingleTurn
from asyncdapo.rollout.several_turns.agents import Agents
from asyncdapo.rollout.several_turns.attempt import TurnLimits
from asyncdapo.rollout.several_turns.several_turns import Player, SeveralTurns
from asyncdapo.rollout.several_turns.steps import Steps


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Samples and scores, in processes that aren't started yet."""

    rollouts: Rollouts
    processes: Scorer | Hosts
    role: str
    """Of the processes."""
    most: int
    """Processes at a time."""
    num_judged: Callable[[], int]
    """Answers of the processes so far. While it rises, they make progress."""
    endpoint: Endpoint | None = None
    """For programs that call the model by themselves."""

    async def start(self) -> None:
        """Raises RunError if a process can't be started."""
        if self.endpoint is not None:
            await self.endpoint.start()
        await self.processes.start()

    async def stop(self) -> None:
        """End the processes; returns when they are gone."""
        await self.processes.stop()
        if self.endpoint is not None:
            await self.endpoint.stop()

    def ends(self) -> list[Awaitable[None]]:
        """What never ends, unless it fails."""
        return [] if self.endpoint is None else [self.endpoint.failed()]


def make_judging(config: Config, engine: Engine, tokenizer: TextTokenizer) -> Judging:
    """What `environment.path` or `reward.verifier` names."""
    filter_metric = config.filter.metric if config.filter.enabled else None
    scale = Scale(config.reward, config.rollout.max_response_length, filter_metric=filter_metric)
    if config.environment.enabled:
        return _in_environments(config, engine, tokenizer, scale)
    reward = config.reward
    pool = ScorerPool(
        reward.verifier,
        reward.processes,
        reward.timeout_s,
        concurrency=reward.concurrency,
        retries=reward.retries,
    )
    scorer = Scorer(reward.verifier, pool, tokenizer.decode, scale)
    return Judging(
        rollouts=SingleTurn(
            engine,
            scorer,
            one_at_a_time=config.rollout.deterministic,
            continues=config.rollout.continues,
            account=scorer.account,
        ),
        processes=scorer,
        role="scorer",
        most=reward.processes,
        num_judged=lambda: scorer.num_judged,
    )


def _in_environments(config: Config, engine: Engine, tokenizer: TextTokenizer, scale: Scale) -> Judging:
    environment, prompts, endpoint = config.environment, config.prompts, None
    encoder = turn_encoder(tokenizer, bool(prompts.chat_template), prompts.system_prompt, joins=environment.is_agent)
    player: Player = Steps(encoder, tokenizer.decode)
    if environment.is_agent:
        num_seats = math.ceil(config.rollout.slots * environment.oversubscribe / environment.processes)
        environment = replace(environment, concurrency=environment.concurrency or num_seats)
        endpoint = Endpoint(config.max_context, lambda: Chat(encoder, tokenizer))
        player = Agents(endpoint)
    hosts = Hosts(environment, config.max_context, config.model.tokenizer_files.path)
    limits = TurnLimits(max_turns=environment.max_turns, max_context=config.max_context)
    return Judging(
        rollouts=SeveralTurns(engine, hosts, player, scale.rate, limits, environment.oversubscribe),
        processes=hosts,
        role="host",
        most=environment.processes + 1,  # one for an episode that is alone
        num_judged=lambda: hosts.num_calls,
        endpoint=endpoint,
    )
