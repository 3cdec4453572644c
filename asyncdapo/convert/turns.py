"""Episodes of several turns: each peer's keys for them, and what becomes of these.

In: values of theirs. Out: rules, and keys without a counterpart, for the peers' tables. Tools, schedulers and agent
loops are code of the user's or of theirs: in its place stands a placeholder, which a launch refuses. Does not own: the
contract (docs/environments.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from asyncdapo.convert.rules import Left, Made, Rank, Rule, flag, whole

OWN_CLASS = "path/to/file.py:Class"
"""Placeholder for an environment that the user has to name; a launch refuses it."""
PAGE = "docs/environments.md"
BY_ENVIRONMENT = "the environment gives the rewards of its episodes"
OFF = "there is one turn"
EXACT = "a token that was sampled is never tokenised again here"

Several = Callable[..., bool]
"""(values of a peer's keys for turns) -> whether its completions have several turns."""


def environment(what: str) -> Made:
    """In place of theirs, which the user has to write as a class."""
    why = f"YOUR {what} IS NOT CARRIED OVER: write it as a class with reset and step, which also gives the reward"
    return Made(OWN_CLASS, f"{why} ({PAGE})", loud=Rank.TASK)


def unless(several: Several, keys: tuple[str, ...], rule: Rule) -> Rule:
    """The rule of a verdict that an environment takes the place of."""

    def value(*theirs: Any) -> Any:
        own, turns = theirs[: len(rule.theirs)], theirs[len(rule.theirs) :]
        if several(*turns):
            return Left(BY_ENVIRONMENT) if rule.theirs else None
        return rule.value(*own)

    return replace(rule, theirs=(*rule.theirs, *keys), value=value)


def limit(several: Several, keys: tuple[str, ...], theirs: str) -> Rule:
    """Most turns of an episode."""

    def value(most: Any, *turns: Any) -> Any:
        if not several(*turns):
            return Left(OFF)
        return None if most is None or whole(most) < 1 else whole(most)

    return Rule("environment.max_turns", (theirs, *keys), value)


def of_all_turns(length: Any, most: Any, name: str) -> Any:
    """Sampled tokens of an episode, where theirs are those of each turn. Without a limit on turns the user decides."""
    if length is None:
        return None
    if most is None:
        return Made(whole(length), f"{name} bounds each turn there, and all turns together here", loud=Rank.SAMPLING)
    return Made(whole(length) * whole(most), f"{name} bounds each turn there, all turns together here")


# ---------------------------------------------------------------------------------------------------------------- verl

VERL = "actor_rollout_ref.rollout.multi_turn."
VERL_LOOP = "actor_rollout_ref.rollout.agent."
VERL_KEYS = (f"{VERL}enable", f"{VERL_LOOP}default_agent_loop", f"{VERL_LOOP}agent_loop_config_path")


def verl_several(enable: Any, loop: Any, loops: Any) -> bool:
    return flag(enable) or bool(loops) or loop not in (None, "single_turn_agent")


def _verl_environment(enable: Any, loop: Any, loops: Any, tools: Any, interaction: Any) -> Any:
    if not verl_several(enable, loop, loops):
        return None
    named = [
        f"{what} {path}"
        for what, path in (("TOOL CONFIG", tools), ("INTERACTION", interaction), ("AGENT LOOPS", loops))
        if path
    ]
    return environment(", ".join(named) or f"AGENT LOOP {loop or 'tool_agent'}")


VERL_RULES = (
    Rule(
        "environment.path", (*VERL_KEYS, f"{VERL}tool_config_path", f"{VERL}interaction_config_path"), _verl_environment
    ),
    limit(verl_several, VERL_KEYS, f"{VERL}max_assistant_turns"),
)
VERL_WITHOUT = (
    (f"{VERL}max_user_turns", "an observation follows each response here, so environment.max_turns bounds both"),
    (f"{VERL}max_parallel_calls", "all calls of a response are made here, in their order"),
    (f"{VERL}max_tool_response_length", "a tool cuts its own answers here; environment.max_context bounds all tokens"),
    (
        f"{VERL}tool_response_truncate_side",
        "a tool cuts its own answers here; environment.max_context bounds all tokens",
    ),
    (f"{VERL}use_inference_chat_template", EXACT),
    (f"{VERL}tokenization_sanity_check_mode", EXACT),
    (f"{VERL}*", f"belongs to their tools and interactions: see {PAGE}"),
    (f"{VERL_LOOP}num_workers", "environment.processes hosts of each rollout worker here"),
    (f"{VERL_LOOP}*", f"belongs to their agent loops: see {PAGE}"),
)

# --------------------------------------------------------------------------------------------------------------- SkyRL

SKYRL_KEYS = (SKYRL_TURNS, SKYRL_ENV) = ("generator.max_turns", "environment.env_class")
SKYRL_LENGTH = "generator.sampling_params.max_generate_length"
SKYRL_OF_ONE_TURN = ("gsm8k", "aime")


def skyrl_several(most: Any, name: Any) -> bool:
    return most is not None and whole(most) > 1 and name not in SKYRL_OF_ONE_TURN


def _skyrl_environment(most: Any, name: Any) -> Any:
    if not skyrl_several(most, name):
        return None
    why = f"name the class of their environment {name}: one with init, step and close works as it is ({PAGE})"
    return Made(OWN_CLASS, why, loud=Rank.TASK)


def _skyrl_context(longest: Any, length: Any, *turns: Any) -> Any:
    """They sample while the input is at most `max_input_length`, up to `max_generate_length` tokens."""
    if longest is None or not skyrl_several(*turns):
        return None
    return Made(whole(longest) + whole(length), "their longest input and one more response")


def _skyrl_length(length: Any, most: Any, name: Any) -> Any:
    return of_all_turns(length, most, "max_generate_length") if skyrl_several(most, name) else length


SKYRL_RULES = (
    Rule("environment.path", SKYRL_KEYS, _skyrl_environment),
    limit(skyrl_several, SKYRL_KEYS, SKYRL_TURNS),
    Rule("environment.max_context", ("generator.max_input_length", SKYRL_LENGTH, *SKYRL_KEYS), _skyrl_context),
    Rule(
        "environment.concurrency",
        ("environment.skyrl_gym.max_env_workers", *SKYRL_KEYS),
        lambda threads, *turns: whole(threads) if skyrl_several(*turns) and threads else None,
    ),
    Rule("rollout.max_response_length", (SKYRL_LENGTH, *SKYRL_KEYS), _skyrl_length),
)
SKYRL_WITHOUT = (
    ("generator.max_input_length", OFF),
    ("generator.use_conversation_multi_turn", "observations are messages with prompts.chat_template, else text"),
    ("generator.append_eos_token_after_stop_str_in_multi_turn", "a response ends with the model's own stop token here"),
    ("environment.skyrl_gym.*", "an environment's own settings belong to its class here"),
)

# ------------------------------------------------------------------------------------------------------------- NeMo RL

NEMO_TURNS, NEMO_GYM = "grpo.max_rollout_turns", "env.should_use_nemo_gym"
NEMO_NAMES = ("data.train.env_name", "data.default.env_name")
NEMO_KEYS = (NEMO_TURNS, NEMO_GYM, *NEMO_NAMES)


def nemo_several(most: Any, gym: Any, name: Any, default: Any) -> bool:
    """Their environment `math` ends every episode after one response, whatever the limit."""
    other = (name or default or "math") != "math"
    return flag(gym) or (other and most is not None and whole(most) > 1)


def _nemo_environment(most: Any, gym: Any, name: Any, default: Any) -> Any:
    if not nemo_several(most, gym, name, default):
        return None
    return environment("NEMO GYM" if flag(gym) else f"ENVIRONMENT {name or default}")


NEMO_RULES = (
    Rule("environment.path", NEMO_KEYS, _nemo_environment),
    limit(nemo_several, NEMO_KEYS, NEMO_TURNS),
    Rule(
        "environment.max_context",
        ("policy.max_total_sequence_length", *NEMO_KEYS),
        lambda longest, *turns: whole(longest) if longest and nemo_several(*turns) else None,
    ),
)

# ------------------------------------------------------------------------------------------------------------ ms-swift

SWIFT_KEYS = ("multi_turn_scheduler", "gym_env", "use_gym_env")


def swift_several(scheduler: Any, gym: Any, use_gym: Any) -> bool:
    return bool(scheduler or gym or flag(use_gym))


def _swift_environment(scheduler: Any, gym: Any, use_gym: Any) -> Any:
    if not swift_several(scheduler, gym, use_gym):
        return None
    return environment(f"ENVIRONMENT {gym}" if gym else f"SCHEDULER {scheduler or 'gym_scheduler'}")


def _swift_length(length: Any, scope: Any, most: Any, *turns: Any) -> Any:
    if not swift_several(*turns) or scope == "total":
        return None if length is None else whole(length)
    return of_all_turns(length, most, "max_completion_length")


SWIFT_RULES = (
    Rule("environment.path", SWIFT_KEYS, _swift_environment),
    limit(swift_several, SWIFT_KEYS, "max_turns"),
    Rule(
        "rollout.max_response_length",
        ("max_completion_length", "completion_length_limit_scope", "max_turns", *SWIFT_KEYS),
        _swift_length,
    ),
)
SWIFT_WITHOUT = (
    ("completion_length_limit_scope", "rollout.max_response_length bounds the sampled tokens of all turns here"),
    ("vllm_server_pass_dataset", "an environment's reset gets the row here"),
)
