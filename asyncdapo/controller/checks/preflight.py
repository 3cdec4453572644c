"""Finds every problem of a run that the user can fix, before any process starts.

In: the config's name and the overrides. Out: the effective `Config` (paths absolute, `max_staleness` the bound in
force), written to RUN_DIR/config.yaml, and where the run begins: a run directory that holds a run is resumed. Raises
UserError (exit code 2), and then no run directory was created and none changed but for its mode.

    RUN_DIR/launch.lock     held by the launch that works here, as long as its process lives; its pid
            identity.json   what the run is made of, from its first launch
            config.yaml     the latest launch's values, written last: the sign that the directory is taken
            config.1.yaml   the values of launches before it, oldest first

Invariant: one launch at a time works in a run directory. Does not own: what makes two runs the same (`identity`), where
a run resumes (`resume`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from asyncdapo.config.config import Config, load_config, to_dict, to_yaml
from asyncdapo.config.found import find_config
from asyncdapo.controller.checks.engine_check import check_installed, check_model
from asyncdapo.controller.checks.identity import IDENTITY_FILE, Identity, check_same_run, identify, to_json
from asyncdapo.controller.checks.resume import Resume, survey, unusable_ledger
from asyncdapo.controller.process.roster import end_survivors
from asyncdapo.controller.process.surroundings import check_surroundings
from asyncdapo.controller.roles.model_check import check_files, check_learnable
from asyncdapo.disk import LockedError, lock_file, replace_file
from asyncdapo.environment.trial import try_environment
from asyncdapo.errors import ConfigError, EpisodeError, RunError
from asyncdapo.learner.model.compiler import check_compiler
from asyncdapo.metrics.sinks.opening import check_sinks
from asyncdapo.model.location import check_model_path, check_tokenizer_path
from asyncdapo.plugins import absolute_plugin, is_plugin
from asyncdapo.prompts.registry import open_task
from asyncdapo.prompts.stream import PromptStream
from asyncdapo.prompts.task import Task
from asyncdapo.replay.ledger.audit import CONFIG_FILE, ledger_breach
from asyncdapo.replay.ledger.ledger import LEDGER_FILE
from asyncdapo.reward.registry import make_verifier
from asyncdapo.reward.wire import METRICS
from asyncdapo.rollout.own_engine import engine_class

LOCK_FILE = "launch.lock"
UNFINISHED_START = {LOCK_FILE, IDENTITY_FILE, f".{IDENTITY_FILE}.new", f".{CONFIG_FILE}.new"}
"""Files left by a launch that was killed before it had taken the directory."""
FEW_ROWS = 500
"""A launch makes the prompts of data with at most this many rows before it starts a process."""
NUM_TRIED_ROWS = 2
"""Rows on which an environment is tried."""
FORMER_LAUNCH_S = 15.0
"""Time for the processes of a launch whose driver was killed to end by themselves, which takes them up to 10 s."""


@contextmanager
def prepare_run(name_or_path: str, overrides: Sequence[str]) -> Iterator[tuple[Config, Resume]]:
    """Check configuration, model and data, take the run directory and look where it stands. It is this launch's as long
    as the context lasts. A finished run is left as it is."""
    path = find_config(name_or_path)
    config = effective(load_config(path, overrides), path.parent)
    check_config(config)
    with usable(config.run.dir):
        new = not holds_run(config.run.dir)
    if new:
        check_model(config)
        check_learnable(config)
    identity = identify(config)
    with lock_directory(config.run.dir):
        with usable(config.run.dir):
            resume = _open_run_dir(config, identity)
        yield config, resume


def check_config(config: Config) -> None:
    """What can be checked without the run directory, and without torch."""
    check_surroundings(config)
    check_installed(config)
    if config.learner.compile:  # null depends on what the learner finds, and is checked there
        check_compiler(config.learner.device, config.learner.compile)
    check_extensions(config)
    check_reward(config)
    check_reference(config)
    check_files(config)
    check_sinks(config.metrics)
    task = open_task(config.prompts, num_eval=config.eval.num_held_out, seed=config.run.seed)
    check_prompts(config, task)
    check_environment(config, task)


def check_extensions(config: Config) -> None:
    """Parts of the loss and an engine that are the user's: that they are there, and a trial on two rows. The task is
    tried when it is opened."""
    if is_plugin(config.rollout.engine):
        engine_class(config.rollout.engine)
    loss = config.loss
    if any(is_plugin(name) for name in (loss.variant, loss.advantage, loss.agg)):
        from asyncdapo.algorithm import extensions

        parts = (
            (loss.variant, extensions.try_variant),
            (loss.advantage, extensions.try_advantage),
            (loss.agg, extensions.try_aggregation),
        )
        for name, trial in parts:
            if is_plugin(name):
                trial(name)


def check_prompts(config: Config, task: Task) -> None:
    """Whether the tokenizer that `model.tokenizer` names, or the chat template of the model's own, makes prompts that
    the model can read, and whether any fits; where its files are here already. Data of many rows, and a model's own
    tokenizer without a chat template, are left to the process that uses them: that would make every launch slower."""
    few = task.parts is not None and sum(len(part.rows) for part in task.parts) <= FEW_ROWS
    if not (few or config.model.tokenizer or config.prompts.chat_template):
        return
    if config.model.tokenizer_files.here:
        from asyncdapo.model.tokenizer import load_tokenizer

        prompts, vocab_size = config.prompts, config.model.files.vocab_size
        tokenizer = load_tokenizer(config.model.tokenizer_files, prompts.template_arguments)
        encode = tokenizer.prompt_encoder(bool(prompts.chat_template), prompts.system_prompt, vocab_size)
        if few:
            PromptStream(prompts, task, encode, config.run.seed)


def check_environment(config: Config, task: Task) -> None:
    """Whether the environment can be loaded, and begins and answers as it has to, on two rows; whether what it says can
    be encoded, where the tokenizer's files are here already. A program that calls the model is loaded, and no more."""
    environment = config.environment
    if not environment.enabled:
        return
    num_tried = 0 if environment.is_agent else NUM_TRIED_ROWS
    tried = (task.parts[0].rows if task.parts else range(num_tried))[:num_tried]
    questions = [task.question_at(row) for row in tried]
    rows = [{"prompt": one.text, "answer": one.answer, "source": one.source, "row": one.row} for one in questions]
    try:
        said = try_environment(environment, config.max_context, rows)
        if config.model.tokenizer_files.here:
            from asyncdapo.model.tokenizer import load_tokenizer
            from asyncdapo.model.turn_encoder import turn_encoder

            prompts = config.prompts
            tokenizer = load_tokenizer(config.model.tokenizer_files, prompts.template_arguments)
            encoder = turn_encoder(tokenizer, bool(prompts.chat_template), prompts.system_prompt)
            for row, one in zip(rows, said, strict=True):
                encoder.begin(row["prompt"] if one.first is None else one.first, one.tools)
                for observation in one.observations:
                    encoder.observe(observation)
            role = "tool" if said and said[0].tools else "user"
            encoder.check(role)
            if warning := encoder.warning(role):
                print(warning)
    except (EpisodeError, RunError) as error:
        fix = "`asyncdapo env check` plays two episodes with it"
        raise ConfigError("environment.path", f"a trial failed: {error}", environment.path, fix) from error


def check_reward(config: Config) -> None:
    """Whether there is such a verifier, and whether the filter will see its metric."""
    make_verifier(config.reward.verifier)
    own = ":" in config.reward.verifier  # a function of the user's has numbers of its own: the filter will see them
    if config.filter.enabled and config.filter.metric not in METRICS and not own:
        fix = f"there are {', '.join(METRICS)}, or a number of a function of yours"
        raise ConfigError("filter.metric", "is not a metric of the scorer", config.filter.metric, fix)


def check_reference(config: Config) -> None:
    """Whether the reference model knows every token that is sampled, where the files of both are here already."""
    if config.model.reference_files is None:
        return
    known, sampled = config.model.reference_files.vocab_size, config.model.files.vocab_size
    if known is not None and sampled is not None and known < sampled:
        problem = f"has a vocabulary of {known}, model.path one of {sampled}: it can't say how likely all tokens are"
        raise ConfigError("model.reference", problem, config.model.reference, "a model with the same tokenizer")


def holds_run(run_dir: str) -> bool:
    """Whether the directory holds a run to resume; otherwise it can take a new one. Raises ConfigError for a directory
    of something else."""
    names = {path.name for path in Path(run_dir).iterdir()} if Path(run_dir).exists() else set()
    if CONFIG_FILE not in names and (others := sorted(names - UNFINISHED_START)):
        if LEDGER_FILE in names:
            fix = "put it back: config.1.yaml, if there is one, has the values of a launch before; or choose another"
            raise ConfigError("run.dir", f"holds a run without its {CONFIG_FILE}", run_dir, fix)
        raise ConfigError("run.dir", f"is in use: it holds {others[0]} but no run", run_dir, "choose another")
    return CONFIG_FILE in names


def effective(config: Config, config_dir: Path) -> Config:
    """The configuration with absolute paths and the staleness bound that is in force."""
    replace, where, reference = dataclasses.replace, [Path.cwd(), config_dir], config.model.reference
    bound = config.replay.staleness_bound
    if bound != config.replay.max_staleness:
        print(f"replay.run_ahead is 0: training is synchronous, replay.max_staleness is {bound} in force")
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir).absolute())),
        model=replace(
            config.model,
            path=check_model_path(config.model.path, where),
            reference=reference and check_model_path(reference, where, "model.reference"),
            tokenizer=config.model.tokenizer and check_tokenizer_path(config.model.tokenizer, where),
        ),
        prompts=replace(
            config.prompts,
            task=absolute_plugin(config.prompts.task),
            path=_absolute_data(config.prompts.path),
            eval_path=_absolute(config.prompts.eval_path),
        ),
        environment=replace(
            config.environment,
            path=config.environment.path and absolute_plugin(config.environment.path),
            python=_absolute_program(config.environment.python),
        ),
        rollout=replace(config.rollout, engine=absolute_plugin(config.rollout.engine)),
        reward=replace(config.reward, verifier=absolute_plugin(config.reward.verifier)),
        loss=replace(
            config.loss,
            variant=absolute_plugin(config.loss.variant),
            advantage=absolute_plugin(config.loss.advantage),
            agg=absolute_plugin(config.loss.agg),
        ),
        replay=replace(config.replay, max_staleness=bound),
    )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _absolute_program(name: str | None) -> str | None:
    """A name without a folder is looked up in PATH."""
    return _absolute(name) if name and "/" in name else name


def _absolute_data(path: str | dict[str, float] | None) -> str | dict[str, float] | None:
    if isinstance(path, dict):
        return {str(Path(file).absolute()): weight for file, weight in path.items()}
    return _absolute(path)


# ------------------------------------------------------------------------------------------------------- run directory


@contextmanager
def usable(run_dir: str, key: str = "run.dir") -> Iterator[None]:
    """Turns an OSError into a ConfigError for `key`: the user can fix it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(key, f"can't be used ({error.strerror})", run_dir) from error


def lock_directory(run_dir: str, key: str = "run.dir") -> IO[str]:
    """Make the directory if it is missing, and hold it until the returned file is closed or this process ends. Raises
    ConfigError, for `key`, while another launch holds it, or if it can't be used."""
    try:
        with usable(run_dir, key):
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            Path(run_dir).chmod(0o700)
            return lock_file(Path(run_dir) / LOCK_FILE)
    except LockedError as holder:
        problem = f"is in use by another launch that is running, process {holder}"
        raise ConfigError(key, problem, run_dir, "end that one, or choose another") from None


def _open_run_dir(config: Config, identity: Identity) -> Resume:
    """Begin a run in the directory, or find out where the run in it resumes. This process holds the directory."""
    run_dir = Path(config.run.dir)
    if not holds_run(config.run.dir):
        replace_file(run_dir / IDENTITY_FILE, to_json(identity))
        replace_file(run_dir / CONFIG_FILE, to_yaml(config).encode())
        return Resume(new=True)
    recorded = check_same_run(run_dir, config, identity)
    end_survivors(run_dir, FORMER_LAUNCH_S)
    resume = survey(run_dir, config)
    if not resume.finished and (breach := ledger_breach(run_dir, to_dict(config))):
        raise unusable_ledger(run_dir, breach)
    if recorded != config and not resume.finished:
        _keep_config(run_dir)
        replace_file(run_dir / CONFIG_FILE, to_yaml(config).encode())
    return resume


def _keep_config(run_dir: Path) -> None:
    """The values until now stay as config.1.yaml, config.2.yaml, …"""
    names = (f"config.{number}.yaml" for number in itertools.count(1))
    free = next(run_dir / name for name in names if not (run_dir / name).exists())
    replace_file(free, (run_dir / CONFIG_FILE).read_bytes())
