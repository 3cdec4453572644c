"""The plan: what a launch would start, before it starts anything.

In: a configuration and, if the user says so, the GPUs of each node; else as many as `controller.placement` asks for.
Out: lines of text. Needs neither GPU nor torch nor network: what depends on files that aren't here yet says so. Raises
the ConfigErrors of a launch, but for missing data, a model that isn't here, and an engine that isn't installed.
Does not own: the rule (`placement`), the formulas (`memory`), the choice of the backend (`weights.backend`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from asyncdapo.config.config import Config, load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.checks.engine_check import INSTALL, check_installed, check_model, installed_vllm
from asyncdapo.controller.checks.preflight import check_reward
from asyncdapo.controller.commands.fits import room_lines
from asyncdapo.controller.fleet.auto import dtype_lines, settle_placement, shards_line
from asyncdapo.controller.fleet.memory import (
    RESERVE_BYTES,
    RESERVE_SHARE,
    engine_bytes,
    flop,
    gib,
    host_bytes,
    learner_bytes,
    listed,
    step_flops,
)
from asyncdapo.controller.fleet.placement import (
    Bundle,
    Placement,
    count_gpus,
    gpus_asked,
    learner_names,
    place,
    worker_names,
)
from asyncdapo.controller.roles.model_check import check_rotations
from asyncdapo.errors import ConfigError
from asyncdapo.model.location import find_directory
from asyncdapo.prompts.mixture import whole_numbers
from asyncdapo.prompts.registry import open_task
from asyncdapo.transport.backend import CPU, name_device
from asyncdapo.weights.backend import choose_backend

RESERVED_FOR = "for CUDA, NCCL, cuBLAS and fragmentation, not measured yet"
INDENT = 11
"""Columns of the words on the left."""


def plan(name_or_path: str, overrides: Sequence[str], gpus_of_nodes: Sequence[int] | None = None) -> str:
    """The plan of this configuration, ready to be printed. Raises UserError."""
    path = find_config(name_or_path)
    config = _located(load_config(path, overrides), path.parent)
    check_reward(config)
    check_model(config)
    check_rotations(config)
    asked = config
    config, placement = settle_placement(asked, [gpus_asked(asked)] if gpus_of_nodes is None else gpus_of_nodes)
    dtypes = dtype_lines(asked, placement)
    backend, reason = choose_backend(config.weights, _devices(config, placement))
    sections = {
        "model": _model_lines(config),
        "data": _data_lines(config),
        "engine": [*_engine_lines(config), *dtypes],
        "placement": _placement_lines(config, placement, gpus_of_nodes),
        "weights": [f"by {backend}: {reason}"],
        "a step": _step_lines(config),
        "staleness": _staleness_lines(config),
        "memory": _memory_lines(config, placement),
    }
    lines = [f"{config.run.name} in {config.run.dir}"]
    for word, texts in sections.items():
        lines += [f"  {'' if index else word:{INDENT}}{text}" for index, text in enumerate(texts)]
    return "\n".join(lines)


def _located(config: Config, config_dir: Path) -> Config:
    """With the model's directory where it is here."""
    if _is_elsewhere(config.model.path):
        return config
    found = find_directory(config.model.path, [Path.cwd(), config_dir])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=found or config.model.path))


def _is_elsewhere(path: str) -> bool:
    """An absolute path may be another machine's; a relative one that leads nowhere is a mistake."""
    directory = Path(path).expanduser()
    return directory.is_absolute() and not directory.exists()


def _model_lines(config: Config) -> list[str]:
    shape, model = config.model.files.shape, config.model.files.config
    size = f"{shape.num_parameters:,} parameters, " if shape else ""
    if _is_elsewhere(config.model.path):
        return [f"{config.model.path}, which isn't here"]
    if model is None:
        return [f"{config.model.path} ({size}which isn't here yet: the launch downloads it)"]
    return [f"{config.model.path} ({size}{model.get('model_type')})"]


def _data_lines(config: Config) -> list[str]:
    prompts = config.prompts
    paths = [*prompts.weights, *([prompts.eval_path] if prompts.eval_path else [])]
    if missing := [path for path in paths if not Path(path).exists()]:
        columns = f"{prompts.prompt_column!r} and {prompts.answer_column!r}"
        return [f"{path}, which isn't here yet: a file with the columns {columns}" for path in missing]
    task = open_task(prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
    environment = config.environment.path
    judge = f"environment {environment}" if environment else f"verifier {config.reward.verifier}"
    if task.parts is None:
        return [f"{prompts.task} (endless), {judge}"]
    counts = [f"{len(part.rows):,} questions" for part in task.parts]
    if len(counts) == 1:
        return [f"{next(iter(prompts.weights), prompts.task)} ({counts[0]}), {judge}"]
    shares = whole_numbers([part.weight for part in task.parts])
    names = prompts.weights if prompts.task == "file" else [part.name for part in task.parts]
    lines = [
        f"{name} ({count}), {share} of every {sum(shares):,} prompts"
        for name, count, share in zip(names, counts, shares, strict=True)
    ]
    return [*lines, judge]


def _engine_lines(config: Config) -> list[str]:
    engine = config.rollout.engine
    if engine == "vllm" and (installed := installed_vllm()):
        check_installed(config)
        engine = f"vllm {installed}"
    elif engine == "vllm":
        return ["vllm, which isn't installed here", INSTALL]
    return [engine]


# ----------------------------------------------------------------------------------------------------------- placement


def _placement_lines(config: Config, placement: Placement, gpus_of_nodes: Sequence[int] | None) -> list[str]:
    """`gpus_of_nodes`: None where the GPUs are those that the configuration asks for."""
    supposed, num_gpus = gpus_of_nodes is None, sum(gpus_of_nodes or ())
    lines = [f"{count_gpus(placement.num_gpus)}, {placement.reason}"]
    bundles = [one for bundle in placement.bundles for one in bundle.parts]
    for _, alike in groupby(bundles, key=lambda bundle: (_roles(bundle), bundle.num_gpus)):
        lines.append(_bundle_line(config, placement, list(alike)))
    if newcomers := config.rollout.max_workers - config.rollout.min_workers:
        needs = count_gpus(placement.gpus_of_newcomer) if placement.gpus_of_newcomer else "CPU"
        each = " each" if newcomers > 1 and placement.gpus_of_newcomer else ""
        lines.append(f"up to {newcomers} more, while there is room: {needs}{each}")
    if config.learner.ranks > 1:
        lines.append(shards_line(config, None if supposed else placement))
    if supposed and config.controller.placement == "auto" and placement.num_gpus:
        lines.append(f"as many as it asks for{_without_gpus(config)} (--gpus N: what it does with others)")
    if idle := 0 if supposed else num_gpus - placement.num_gpus:
        lines.append(f"{idle} of {count_gpus(num_gpus)} {'stays' if idle == 1 else 'stay'} idle")
    return lines


def _without_gpus(config: Config) -> str:
    """What becomes of the run where there is none."""
    try:
        place(config, [0])
    except ConfigError:
        return ", and it needs one"
    return "; with none, everything is on the CPU"


def _bundle_line(config: Config, placement: Placement, alike: Sequence[Bundle]) -> str:
    """Bundles that differ only in the numbers of their processes."""
    first, last = (" + ".join(bundle.processes) for bundle in (alike[0], alike[-1]))
    who = first if first == last else f"{first} … {last}"
    if not alike[0].num_gpus:
        return f"{who}: CPU"
    each = " each" if len(alike) > 1 else ""
    line = f"{who}: {count_gpus(alike[0].num_gpus)}{each}"
    engines = [name for name in alike[0].processes if name.startswith("rollout")]
    if engines and config.rollout.engine == "vllm":
        fraction = placement.memory_fraction(engines[0], config.rollout.memory_fraction)
        line += f", of whose memory vLLM takes {fraction:g}"
    return line


def _roles(bundle: Bundle) -> tuple[str, ...]:
    return tuple(name.partition("-")[0] for name in bundle.processes)


def _devices(config: Config, placement: Placement) -> dict[str, str]:
    """Of every end of the weight group, an engine's first; rank 0 of the learner comes first. All are on one machine,
    for all a plan knows."""
    devices = {}
    for name in [learner_names(config)[0], *worker_names(config)]:
        bundle = placement.bundle(name)
        gpus = [f"cuda {placement.bundles.index(bundle)}.{gpu}" for gpu in bundle.gpus_of(name)]
        devices[name] = name_device(gpus[0] if gpus else CPU, "this machine")
    return devices


# --------------------------------------------------------------------------------------------------------------- sizes


def _step_lines(config: Config) -> list[str]:
    rollout, replay = config.rollout, config.replay
    num_completions = replay.prompts_per_step * rollout.group_size
    num_updates = config.learner.updates_per_step * config.learner.epochs
    lines = [
        f"{replay.prompts_per_step:,} groups of {rollout.group_size} completions: {num_completions:,}, "
        f"at most {num_completions * rollout.max_response_length:,} sampled tokens; {num_updates:,} "
        f"{'update' if num_updates == 1 else 'updates'}",
        f"{rollout.min_workers * rollout.slots:,} sequences at once, of at most {_lengths(config)}",
    ]
    if config.environment.enabled:
        lines += _turns_lines(config)
    if shape := config.model.files.shape:
        lines.append(f"at most {flop(step_flops(shape, config))} in the learner, if all are of that length")
    return lines


def _lengths(config: Config) -> str:
    if config.environment.enabled:
        return f"{config.max_context:,} tokens, observations included"
    return f"{config.prompts.max_prompt_length:,} + {config.rollout.max_response_length:,} tokens"


def _turns_lines(config: Config) -> list[str]:
    """How the context of an episode grows, and what that costs the engine, which reads it at each turn."""
    most, sampled, rollout = config.environment.max_turns, config.rollout.max_response_length, config.rollout
    under_way = int(rollout.min_workers * rollout.slots * config.environment.oversubscribe)
    observed = max(0, config.max_context - config.prompts.max_prompt_length - sampled)
    beside = f", beside {observed:,} observed ones behind the longest prompt" if observed else ""
    return [
        f"{under_way:,} episodes under way, each of at most {most:,} {'turn' if most == 1 else 'turns'} and "
        f"{sampled:,} sampled tokens{beside}",
        f"each turn reads what came before: at most {most * (config.max_context - 1):,} tokens of an episode, "
        "less what the engine has cached",
    ]


def _staleness_lines(config: Config) -> list[str]:
    replay = config.replay
    if replay.synchronous:
        return ["0: nothing is sampled while the learner trains (replay.run_ahead is 0)"]
    ahead = (replay.most_ahead + 1) * replay.prompts_per_step
    return [f"at most {replay.staleness_bound} train steps; up to {ahead:,.0f} kept groups are ahead of the learner"]


def _memory_lines(config: Config, placement: Placement) -> list[str]:
    shape = config.model.files.shape
    if shape is None:
        known = config.model.files.config is not None
        return ["not known " + ("for this kind of model" if known else "until the model is here")]
    of_learner = learner_bytes(shape, config, on_gpu=placement.on_gpus("learner"))
    parts = {"learner": of_learner, "rollout": engine_bytes(shape, config)}
    words = {"learner": "a rank of the learner", "rollout": "an engine"}
    totals = {role: sum(of_role.values()) for role, of_role in parts.items()}
    lines = [
        f"by formula, in GiB; on a GPU with a reserve of {gib(RESERVE_BYTES)} and {RESERVE_SHARE:.0%} {RESERVED_FOR}"
    ]
    for role, of_role in parts.items():
        lines.append(f"{words[role]}: {gib(totals[role])} ({listed(of_role)})")
    of_host = host_bytes(shape, config)
    lines.append(f"on the host for each rank: {gib(sum(of_host.values()))} ({listed(of_host)})")
    for roles in sorted({_roles(bundle) for bundle in placement.bundles if bundle.shares_gpu}):
        lines.append(f"{' + '.join(roles)} on one GPU: {gib(sum(totals[role] for role in roles))}")
    return lines + room_lines(config, shape, placement)
