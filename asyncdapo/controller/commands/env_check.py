"""`asyncdapo env check`: two episodes with scripted responses, as a rollout worker would play them, and their tokens.

    PATH ─▶ config ─▶ rows, tokenizer ─▶ host ◀──▶ scripted engine ─▶ transcript ─▶ the first thing that is wrong
                                            (roles/judging)

In: a config, or an environment and a config for everything else; responses. Out: a transcript on standard output; what
was sampled and what was observed differ in colour and in the word before it. Raises UserError, one line, with the first
thing that is wrong. Needs a tokenizer and no weights. Does not own: hosts, turns, tokens, scores: they are those of a
run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from asyncdapo.config.config import Config, load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.roles.judging import Judging, make_judging
from asyncdapo.environment.hosts import Hosts
from asyncdapo.environment.trial import check_interpreter, told_once
from asyncdapo.errors import ConfigError, RunError, UserError
from asyncdapo.eval_messages import EvalRequest, Sampling
from asyncdapo.messages import Prompt, Score
from asyncdapo.model.location import check_tokenizer_path
from asyncdapo.model.tokenizer import TextTokenizer, load_tokenizer
from asyncdapo.model.turn_encoder import turn_encoder
from asyncdapo.plugins import is_plugin
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.rollout.engine import LoadTimes, Request, Sample
from asyncdapo.rollout.episodes import Episode, Rollouts
from asyncdapo.rollout.job import Job
from asyncdapo.seeds import sample_seed

NUM_EPISODES = 2
DEFAULT_RESPONSES = ("Answer: {answer}",)
STYLES = {"observed": "yellow", "sampled": "bold cyan"}


class ScriptedEngine:
    """Says the responses of a script, one a turn, and the last one again and again. Implements `Engine`."""

    num_slots = 1
    num_outstanding = 0
    loaded_version = 0
    stops_to_load = False

    def __init__(self, tokenizer: TextTokenizer, responses: Sequence[str]) -> None:
        self._tokenizer, self._responses = tokenizer, responses
        self._answer, self._seed = "", 0

    def begin(self, answer: str, seed: int) -> None:
        """The next episode: what stands for {answer}, and its seed, of which those of its turns are made."""
        self._answer, self._seed = answer, seed

    async def generate(self, request: Request) -> list[Sample]:
        [seed] = request.seeds
        turn = next(number for number in itertools.count() if sample_seed(self._seed, number) == seed)
        text = self._responses[min(turn, len(self._responses) - 1)].replace("{answer}", self._answer)
        token_ids = self._tokenizer.encode_more(text + self._tokenizer.end_of_turn)
        longest = request.sampling.max_tokens
        cut = np.array(token_ids[:longest], np.int32)
        sample = Sample(
            token_ids=cut,
            logprobs=np.zeros(len(cut), np.float32),
            versions=[(0, len(cut))],
            finish_reason="length" if len(token_ids) > longest else "stop",
        )
        return [sample]

    async def start(self) -> None: ...

    async def load_weights(self, version: int, weights: object) -> LoadTimes:
        raise AssertionError("a script has no weights")

    async def ended(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None: ...

    def gauges(self) -> dict[str, float]:
        return {}


def command(args: argparse.Namespace) -> int:
    """Returns the exit code. Raises UserError."""
    config = make_config(args.path, args.config, args.overrides)
    check(config, args.responses or DEFAULT_RESPONSES, Console(highlight=False, soft_wrap=True))
    return 0


def make_config(path: str, config_name: str | None, overrides: Sequence[str]) -> Config:
    """`path` is a config, or names an environment for the config `config_name`. Raises UserError."""
    own = is_plugin(path) and not Path(path).is_file()
    if own and config_name is None:
        fix = "--config CONFIG, such as --config quickstart_tools"
        raise UserError(f"{path}: an environment needs the rows and the tokenizer of a config ({fix})")
    if not own and config_name is not None:
        raise UserError(f"--config: {path} is a config itself (give the environment as path/to/file.py:Class)")
    file = find_config(config_name if own and config_name else path)
    config = load_config(file, [*([f"environment.path={json.dumps(path)}"] if own else []), *overrides])
    if not config.environment.enabled:
        fix = "environment.path=path/to/file.py:Class"
        raise ConfigError("environment.path", "names no environment to check", None, fix)
    tokenizer = check_tokenizer_path(config.model.tokenizer or config.model.path, [Path.cwd(), file.parent])
    return replace(
        config,
        model=replace(config.model, tokenizer=tokenizer),
        environment=replace(config.environment, processes=1, retries=0),  # the first error is told
    )


def check(config: Config, responses: Sequence[str], console: Console) -> None:
    """Print the episodes. Raises UserError with the first thing that is wrong."""
    name = config.environment.path
    check_interpreter(config.environment.python)
    tokenizer = load_tokenizer(config.model.tokenizer_files, config.prompts.template_arguments)
    prompts = _prompts(config, tokenizer)
    engine = ScriptedEngine(tokenizer, responses)

    async def play_all() -> None:
        judging = make_judging(config, engine, tokenizer)
        await judging.start()
        try:
            for prompt in prompts:
                engine.begin(prompt.answer, seed=prompt.prompt_id)
                episode, score = await _play(judging.rollouts, prompt, config.rollout.max_response_length)
                _print(console, tokenizer, prompt, episode, score)
                _check_episode(config, tokenizer, episode)
            if warning := _template_warning(config, tokenizer, judging):
                console.print(f"{warning}\n", markup=False)
        finally:
            await judging.stop()

    try:
        with told_once():
            asyncio.run(play_all())
    except RunError as error:
        raise UserError(f"{name}: {error}") from error
    console.print(f"{name}: nothing is wrong in {len(prompts)} episodes", markup=False)


def _prompts(config: Config, tokenizer: TextTokenizer) -> list[Prompt]:
    prompts = config.prompts
    task = open_task(prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
    encode = tokenizer.prompt_encoder(bool(prompts.chat_template), prompts.system_prompt)
    stream = PromptStream(prompts, task, encode, config.run.seed, with_text=True)
    found = map(stream.prompt_at, range(NUM_EPISODES))
    return [prompt for prompt in found if prompt is not None]


async def _play(rollouts: Rollouts, prompt: Prompt, max_tokens: int) -> tuple[Episode, Score]:
    sampling = Sampling(temperature=1.0, max_tokens=max_tokens)
    asked = EvalRequest(request_id=prompt.prompt_id, seed=0, sampling=sampling, prompts=[prompt])
    job = Job(asked, num_starting=1, on_room=lambda: None)
    episodes = await rollouts.sample(job, prompt, [prompt.prompt_id], sampling)
    [score] = await rollouts.score(prompt, episodes, seed=0)
    return episodes[0], score


def _template_warning(config: Config, tokenizer: TextTokenizer, judging: Judging) -> str:
    """What the chat template does with earlier turns; empty if it keeps them as they were."""
    assert isinstance(judging.processes, Hosts), "there is an environment"
    encoder = turn_encoder(tokenizer, bool(config.prompts.chat_template), config.prompts.system_prompt)
    return encoder.warning("tool" if judging.processes.tools else "user")


def _check_episode(config: Config, tokenizer: TextTokenizer, episode: Episode) -> None:
    """Raises UserError for what a run would put up with."""
    name, unknown = config.environment.path, tokenizer.unknown_id
    for turn in episode.turns:
        if unknown in turn.observed:
            text = tokenizer.spell(turn.observed)
            raise UserError(f"{name}: the tokenizer doesn't know all of an observation; the model reads {text!r}")
    if episode.finish_reason == "length":
        limits = f"rollout.max_response_length ({config.rollout.max_response_length}) bounds the sampled tokens of all"
        problem, shorter = f"{limits} turns, environment.max_context ({config.max_context}) all tokens", "responses"
        if episode.turns[-1].sample.finish_reason == "stop":  # what would have come next found no room
            shorter = "observations"
        raise UserError(f"{name}: an episode was cut off: {problem}; raise one, or give shorter {shorter}")
    if episode.finish_reason == "time":
        limit = f"environment.step_timeout_s ({config.environment.step_timeout_s:g})"
        raise UserError(f"{name}: a step took longer than {limit}, twice: such an episode counts as wrong")


# ---------------------------------------------------------------------------------------------------------- transcript


def _print(console: Console, tokenizer: TextTokenizer, prompt: Prompt, episode: Episode, score: Score) -> None:
    answer = f", answer {printable(prompt.answer)}" if prompt.answer else ""
    console.print(f"episode {prompt.prompt_id + 1}: {prompt.source} row {prompt.row}{answer}", markup=False)
    for number, context in enumerate(episode.contexts):
        if number:
            console.print("  a context that doesn't continue those before:")
        if context.rooted:
            _print_part(console, "observed", prompt.token_ids, tokenizer)
        for turn in context.turns:
            _print_part(console, "observed", turn.observed, tokenizer)
            _print_part(console, "sampled", turn.sample.token_ids.tolist(), tokenizer)
    own = [f"{name} {value:g}" for name, value in sorted(episode.metrics.items())]
    given = f"reward {episode.reward:g}"
    if not math.isclose(score.reward, episode.reward):
        given += f", which counts as {score.reward:g}"
    turns = len(episode.turns)
    ended = f"{episode.finish_reason} after {turns} {'turn' if turns == 1 else 'turns'}"
    console.print(f"  {'; '.join((ended, given, *own))}\n", markup=False)


def _print_part(console: Console, word: str, token_ids: Sequence[int], tokenizer: TextTokenizer) -> None:
    """The number of tokens and their text, special ones written out."""
    if not len(token_ids):
        return
    indent = f"  {word:9}{len(token_ids):5}  "
    console.print(
        Text(indent), Text(printable(tokenizer.spell(token_ids), len(indent)), STYLES[word]), sep="", markup=False
    )


def printable(text: str, indent: int = 0) -> str:
    """With the ends of lines shown, and other characters that would move the cursor escaped."""
    lines = text.split("\n")
    shown = ["".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in lines]
    if len(lines) > 1 and not lines[-1]:
        shown = [*shown[:-2], f"{shown[-2]}⏎"]
    return f"⏎\n{' ' * indent}".join(shown)
