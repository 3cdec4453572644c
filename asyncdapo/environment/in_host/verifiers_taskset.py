"""A taskset of verifiers: `verifiers:TASKSET?renderer.name=qwen3` (verifiers 0.4).

    row ──▶ Task ──verifiers──▶ harness ──▶ its client ──token ids──▶ the worker's endpoint
                      └──▶ reward, metrics of the episode

In: rows whose answer is the data of a task as JSON (`examples/taskset_rows.py` writes them). Out: as of any program
that calls the model by itself. What stands behind the question mark are keys of verifiers' own configuration, as
`agent.max_turns=4`, and those of the renderer. Tokens are the endpoint's: the trace's id is the key of the episode. An
episode that verifiers calls failed has failed; one whose agent ran out of time is scored as verifiers does. Does not
own: contexts (the endpoint takes them from the tokens).
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import parse_qsl

from asyncdapo.environment.in_host.answers import UnusableError
from asyncdapo.environment.in_host.native import Run

HARNESS = "asyncdapo_inprocess"
"""Plugins are modules without a dot in their names."""
AGENT = {"runtime": {"type": "subprocess"}, "harness": {"id": HARNESS}}
DEFAULTS = {"renderer": {"thinking_retention": "all"}}
"""Of every agent, and of the rest. Theirs are a runtime elsewhere, a harness in a process of its own, and turns that
lose what was thought: the next prompt would not begin with what was read and written. Their `timeout.episode` stays
off: it counts the time in which the model works, too. The worker's clock doesn't."""


class TasksetError(Exception):
    """verifiers reports a failure."""


class Taskset:
    """What `verifiers:` names."""

    tools: tuple[()] = ()

    def __init__(self, name: str, tokenizer: str) -> None:
        """`tokenizer`: where the model's is. Raises UnusableError if verifiers isn't installed, or has no such taskset
        or configuration."""
        try:
            import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
            from verifiers.v1.utils.loaders import env_config_type  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            fix = "pip install 'asyncdapo[verifiers]', or environment.python of an environment that has it"
            raise UnusableError(f"needs the package verifiers ({error}): {fix}") from None
        from asyncdapo.environment.in_host import verifiers_harness

        sys.modules[HARNESS] = verifiers_harness
        identifier, _, query = name.partition("?")
        settings = merged(DEFAULTS, nested(query))
        renderer = settings.pop("renderer")
        if "name" not in renderer:
            problem = "which of verifiers' renderers writes the model's chat template?"
            raise UnusableError(f"{problem} Say so: verifiers:{identifier}?renderer.name=qwen3")
        settings["taskset"] = settings.get("taskset", {}) | {"id": identifier}
        try:
            kind = env_config_type(identifier, "")
            agents = [key for key, field in kind.model_fields.items() if isinstance(field.default, vf.AgentConfig)]
            self.environment = vf.load_environment(kind.model_validate(merged(dict.fromkeys(agents, AGENT), settings)))
            self._client = vf.TrainClientConfig(
                base_url="known when an episode begins",
                api_key_var="ASYNCDAPO_NO_KEY",
                renderer=renderer,
                renderer_model_name=tokenizer,
                timeout={"connect": None},  # as the harness's: a busy worker answers late
            )
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UnusableError(f"taskset {identifier!r}: {' '.join(str(error).split())}") from error
        self._context: Any = None
        self._starting = asyncio.Lock()
        self._serving = AsyncExitStack()
        """Open as long as the process lives."""

    def episode(self, run: Run) -> TasksetEpisode:
        return TasksetEpisode(self)

    def task(self, data: str) -> Any:
        """Raises ValueError for data of another taskset."""
        kind = type(self.environment.taskset).task_type()
        return kind(kind.data_type().model_validate_json(data), self.environment.config.taskset.task)

    async def context(self, base_url: str) -> Any:
        """The model, for all episodes: each client has tokenizers of its own. Returns when the taskset is served."""
        async with self._starting:
            if self._context is None:
                import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

                await self._serving.enter_async_context(self.environment.serving())
                client = self._client.model_copy(update={"base_url": base_url})
                self._context = vf.ModelContext(model="policy", client=client, sampling=vf.SamplingConfig())
        return self._context


class TasksetEpisode:
    """One episode."""

    def __init__(self, taskset: Taskset) -> None:
        self._taskset = taskset

    async def run(self, row: dict[str, Any], base_url: str, api_key: str) -> tuple[float, dict[str, float]]:
        """Reward and metrics."""
        taskset = self._taskset
        [slot] = taskset.environment.slots(taskset.task(row["answer"]))
        context = await taskset.context(base_url)

        def take_key(trace: Any) -> None:
            trace.id = api_key  # which its calls have as their session

        episode = await taskset.environment.run_slot(slot, context, on_trace=take_key)
        if not episode.ok:
            errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
            raise TasksetError("; ".join(f"{error.type}: {error.message}" for error in errors))
        if len(episode.traces) != 1:
            raise TasksetError(f"{len(episode.traces)} agents took part; one can be trained")
        [trace] = episode.traces
        return trace.reward, dict(trace.metrics)

    async def close(self) -> None:
        """It has ended, or its process is killed."""


def nested(query: str) -> dict[str, Any]:
    """`a.b=1&c=x` as {"a": {"b": 1}, "c": "x"}. Values are JSON, or texts."""
    settings: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        *above, last = key.split(".")
        place = settings
        for name in above:
            place = place.setdefault(name, {})
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return settings


def merged(defaults: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, with the defaults of keys that they leave out."""
    both = {
        name: merged(defaults[name], settings[name])
        for name in defaults.keys() & settings.keys()
        if isinstance(defaults[name], dict) and isinstance(settings[name], dict)
    }
    return defaults | settings | both
