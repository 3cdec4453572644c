"""What each command takes: its options, and their help. Imports nothing heavy, so that `--help` answers at once.

In: nothing. Out: a parser; `command` of its result names the command. Does not own: what a command does (`cli`).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from asyncdapo.api import __version__


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    made = argparse.ArgumentParser(
        prog="asyncdapo", description="Asynchronous off-policy reinforcement learning of language models with DAPO."
    )
    made.add_argument("--version", action="version", version=f"asyncdapo {__version__}")
    commands = made.add_subparsers(required=True, dest="command", metavar="COMMAND")
    launch = _command(commands, "launch", help="train: start every process, run to the last step")
    config = _command(commands, "config", help="print the resolved configuration with a line on every key")
    plan = _command(
        commands,
        "plan",
        help="print what a launch would start: processes, GPUs, weights, memory, sizes",
        description="Print what a launch would start, without GPU, network or model: processes and their GPUs, how "
        "weights travel, memory by formula, the size of a step, the bound on staleness.",
    )
    plan.add_argument(
        "--gpus", metavar="N[,N]", type=_gpus, help="GPUs of each node, such as 8,8; else as many as are asked for"
    )
    for command in (launch, config, plan):
        command.add_argument("config", metavar="CONFIG", help="a YAML file, or a name in configs/")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: run.steps=10")
    audit = _command(commands, "audit", help="check every promise of a run from its files alone")
    sync = _command(commands, "sync", help="upload to W&B what a run without login or network has kept for it")
    report = _command(commands, "report", help="make a report of a run at W&B: verdict, alarms, results, curves")
    scale = _command(commands, "scale", help="say how many rollout workers a run should have, within its range")
    for command in (audit, sync, report, scale):
        command.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    scale.add_argument("num_workers", metavar="N", type=int, help="those that are too many finish what they hold")
    _add_data(commands)
    _add_eval(commands)
    _add_env(commands)
    export = _command(commands, "export", help="copy the model of a checkpoint to a directory of its own")
    export.add_argument("source", metavar="RUN", help="a run (its newest undamaged checkpoint), or a checkpoint of it")
    export.add_argument("--out", metavar="DIR", type=Path, required=True, help="new directory to write to")
    _add_convert(commands)
    _add_looks(commands)
    return made


def _command(commands: argparse._SubParsersAction, name: str, *, help: str, **others: Any) -> argparse.ArgumentParser:
    """Its own help begins with what the list of commands says of it, where it has no more to say."""
    described = {"description": f"{help[0].upper()}{help[1:]}.", **others}
    return commands.add_parser(name, help=help, **described)


def _add_looks(commands: argparse._SubParsersAction) -> None:
    """What shows a run from its files."""
    ps = _command(
        commands,
        "ps",
        help="show every process of a run: state, lag, memory",
        description="Show every process of a run, asking none of them: also of one that hangs or is over.",
        epilog="state: running, stopped (SIGSTOP), zombie, gone, other host. lag: a rollout worker's loaded weights "
        "behind the newest published ones, in versions; kept groups that wait in replay for a batch; steps the "
        "learner has trained since its newest checkpoint. memory: resident. "
        "To end one: kill -9 PID; it is started again. To end the run: kill the PID of the controller.",
    )
    ps.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    ps.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    watch = _command(
        commands,
        "watch",
        help="show what a run does, what limits it, and what to change",
        description="Show what runs do, from their files alone: live ones until Ctrl-C, those that are over once.",
    )
    watch.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="several are compared, a row each")
    watch.add_argument("--web", action="store_true", help="a page on this machine instead: charts, groups, tokens")
    watch.add_argument("--port", type=int, default=0, help="of the page; else any free one")
    trace = _command(commands, "trace", help="write what all processes did when, to open in ui.perfetto.dev")
    trace.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    trace.add_argument("--steps", metavar="A:B", type=_steps, help="the first and the last; else all that are kept")
    trace.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("trace.json"), help="else trace.json")


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = _command(commands, "data", help="prepare a data set for a run")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    prepare = _command(
        actions,
        "prepare",
        help="read a data set, leave out what is repeated or can't be used, write parquet and a manifest",
    )
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="dapo-math-17k, aime-2024, gsm8k, a .jsonl or .parquet file, a directory of them, or ORG/NAME on the hub",
    )
    prepare.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory to write to")
    prepare.add_argument("--split", metavar="NAME", help="read this split only; of a file: what it is written as")
    prepare.add_argument("--hold-out", metavar="N", type=int, help="write N of the rows as the test split instead")
    prepare.add_argument("--subset", metavar="NAME", help="the folder to read, where a data set has several")
    prepare.add_argument("--prompt-column", metavar="NAME", help="the question, text or messages; a.b is b inside a")
    prepare.add_argument("--answer-column", metavar="NAME", help="the expected answer (reward_model.ground_truth)")
    prepare.add_argument("--template", help="what a question goes into, as {prompt}; else what the verifier needs")
    prepare.add_argument("--verifier", metavar="NAME", help="reward.verifier of the run; else that of the data set")
    prepare.add_argument("--model", metavar="MODEL", help="leave out prompts that are too long for this tokenizer")
    prepare.add_argument("--max-prompt-length", metavar="N", type=int, help="in tokens of --model")
    prepare.add_argument("--chat-template", action="store_true", help="count with the chat template of --model")
    prepare.add_argument("--system-prompt", metavar="TEXT", help="system message of every prompt")
    prepare.add_argument("--force", action="store_true", help="replace what an earlier `data prepare` wrote to DIR")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = _command(commands, "eval", help="evaluate a checkpoint: avg@k, pass@k, maj@k, every answer to read")
    evaluate.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint of it, a model directory, or ORG/NAME on the hub"
    )
    evaluate.add_argument("--data", metavar="PATH", type=Path, help="data to evaluate on; else the run's held-out data")
    evaluate.add_argument("--samples", metavar="N", type=int, help="completions of each prompt (eval.num_samples)")
    evaluate.add_argument("--config", metavar="CONFIG", help="configuration; else that of the checkpoint's run")
    evaluate.add_argument("--out", metavar="DIR", type=Path, help="directory to write to")
    evaluate.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: eval.top_p=0.7")


def _add_env(commands: argparse._SubParsersAction) -> None:
    env = _command(commands, "env", help="check an environment for episodes of several turns")
    actions = env.add_subparsers(required=True, metavar="ACTION")
    check = _command(
        actions,
        "check",
        help="play two episodes with scripted responses, print their tokens and the first thing that is wrong",
        description="Play two episodes with scripted responses in a real host, print what is sampled and what is "
        "observed, token by token, and the first thing that is wrong. Needs a tokenizer, and no weights.",
    )
    check.add_argument("path", metavar="PATH", help="a config, or an environment: path/to/file.py:Class, with --config")
    check.add_argument("--config", metavar="CONFIG", help="config for rows, tokenizer and limits, if PATH isn't one")
    check.add_argument(
        "--response",
        metavar="TEXT",
        dest="responses",
        action="append",
        help="what the model says, once for each turn; {answer} is the row's. Else: Answer: {answer}",
    )
    check.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: environment.max_turns=4")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = _command(
        commands,
        "convert",
        help="make a config of another framework's script, config or arguments",
        usage="asyncdapo convert --from PEER [--out FILE [--force]] (SCRIPT | CONFIG) [ARGUMENT ...]\n"
        "       asyncdapo convert --from PEER [--out FILE [--force]] ARGUMENT ...",
        description="Print a config made of another framework's shell script, YAML or arguments. Nothing of a script "
        "is run. Each line names the key it was made of; what has no counterpart is listed with the reason. Arguments "
        "behind a file win over it.",
    )
    peers = ("verl", "skyrl", "nemo-rl", "ms-swift", "siirl")
    convert.add_argument("--from", dest="peer", required=True, choices=peers, metavar="PEER", help=", ".join(peers))
    convert.add_argument("--out", metavar="FILE", type=Path, help="file to write to; else it is printed")
    convert.add_argument("--force", action="store_true", help="replace FILE where it says something else")
    convert.add_argument("source", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="a file, or arguments of theirs")


def _gpus(text: str) -> list[int]:
    """The type of `--gpus`."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be the GPUs of each node, such as 8,8, got {text!r}")
    return [int(part) for part in text.split(",")]


def _steps(text: str) -> tuple[int, int]:
    """The type of `--steps`."""
    if not (found := re.fullmatch(r"(\d+)(?::(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"must be steps, such as 10:20, got {text!r}")
    return int(found[1]), int(found[2] or found[1])
