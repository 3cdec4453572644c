"""The commands. Parses first and imports after, so that `--help` and a typing error answer at once.

Exit codes: 0 done · 1 the run failed, or audit found a breach · 2 something that the user can fix · 130 interrupted
· 141 the reader of standard output is gone.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from asyncdapo.api import Run, __version__
from asyncdapo.errors import EXIT_INTERRUPTED, UserError

EXIT_READER_GONE = 141
"""As the shell reports a program that writes to `head` when it has read enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code."""
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["convert"]:
        from asyncdapo.convert.command import own_options_first

        argv = own_options_first(argv)
    args, others = parser.parse_known_args(argv)
    if others:  # overrides that stand behind an option
        if not hasattr(args, "overrides") or any(other.startswith("-") for other in others):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        args.overrides += others
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C

    try:
        code = args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return EXIT_READER_GONE
    except UserError as error:
        print(f"asyncdapo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("asyncdapo: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)  # an import, or a Ray, that was interrupted may crash at the end of the interpreter
    return code


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more. If so, the rest of the output is discarded silently."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not output.poll(0):  # POLLERR is reported unasked
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncdapo", description="Asynchronous off-policy reinforcement learning of language models with DAPO."
    )
    parser.add_argument("--version", action="version", version=f"asyncdapo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    launch = commands.add_parser("launch", help="train: start every process, run to the last step")
    config = commands.add_parser("config", help="print the resolved configuration with a line on every key")
    plan = commands.add_parser(
        "plan",
        help="print what a launch would start: processes, GPUs, weights, memory, sizes",
        description="Print what a launch would start, without GPU, network or model: processes and their GPUs, how "
        "weights travel, memory by formula, the size of a step, the bound on staleness.",
    )
    plan.add_argument(
        "--gpus", metavar="N[,N]", type=_gpus, help="GPUs of each node, such as 8,8; else as many as are asked for"
    )
    for command, function in ((launch, _launch), (config, _config), (plan, _plan)):
        command.add_argument("config", metavar="CONFIG", help="a YAML file, or a name in configs/")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: run.steps=10")
        command.set_defaults(command=function)
    audit = commands.add_parser("audit", help="check every promise of a run from its files alone")
    sync = commands.add_parser("sync", help="upload to W&B what a run without login or network has kept for it")
    report = commands.add_parser("report", help="make a report of a run at W&B: verdict, alarms, results, curves")
    scale = commands.add_parser("scale", help="say how many rollout workers a run should have, within its range")
    for command, function in ((audit, _audit), (sync, _sync), (report, _report), (scale, _scale)):
        command.add_argument("run_dir", metavar="RUN_DIR", type=Path)
        command.set_defaults(command=function)
    scale.add_argument("num_workers", metavar="N", type=int, help="those that are too many finish what they hold")
    _add_data(commands)
    _add_eval(commands)
    _add_env(commands)
    export = commands.add_parser("export", help="copy the model of a checkpoint to a directory of its own")
    export.add_argument("source", metavar="RUN", help="a run (its newest undamaged checkpoint), or a checkpoint of it")
    export.add_argument("--out", metavar="DIR", type=Path, required=True, help="new directory to write to")
    export.set_defaults(command=_export)
    _add_convert(commands)
    _add_looks(commands)
    return parser


def _add_looks(commands: argparse._SubParsersAction) -> None:
    """What shows a run from its files."""
    ps = commands.add_parser(
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
    ps.set_defaults(command=_ps)
    watch = commands.add_parser(
        "watch",
        help="show what a run does, what limits it, and what to change",
        description="Show what runs do, from their files alone: live ones until Ctrl-C, those that are over once.",
    )
    watch.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="several are compared, a row each")
    watch.add_argument("--web", action="store_true", help="a page on this machine instead: charts, groups, tokens")
    watch.add_argument("--port", type=int, default=0, help="of the page; else any free one")
    watch.set_defaults(command=_watch)
    trace = commands.add_parser("trace", help="write what all processes did when, to open in ui.perfetto.dev")
    trace.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    trace.add_argument("--steps", metavar="A:B", type=_steps, help="the first and the last; else all that are kept")
    trace.add_argument("-o", "--out", metavar="FILE", type=Path, default=Path("trace.json"), help="else trace.json")
    trace.set_defaults(command=_trace)


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="prepare a data set for a run")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    prepare = actions.add_parser(
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
    prepare.set_defaults(command=_data_prepare)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("eval", help="evaluate a checkpoint: avg@k, pass@k, maj@k, every answer to read")
    evaluate.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint of it, a model directory, or ORG/NAME on the hub"
    )
    evaluate.add_argument("--data", metavar="PATH", type=Path, help="data to evaluate on; else the run's held-out data")
    evaluate.add_argument("--samples", metavar="N", type=int, help="completions of each prompt (eval.num_samples)")
    evaluate.add_argument("--config", metavar="CONFIG", help="configuration; else that of the checkpoint's run")
    evaluate.add_argument("--out", metavar="DIR", type=Path, help="directory to write to")
    evaluate.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: eval.top_p=0.7")
    evaluate.set_defaults(command=_eval)


def _add_env(commands: argparse._SubParsersAction) -> None:
    env = commands.add_parser("env", help="check an environment for episodes of several turns")
    actions = env.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
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
    check.set_defaults(command=_env_check)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
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
    convert.set_defaults(command=_convert)


def _launch(args: argparse.Namespace) -> int:
    from asyncdapo.controller.checks.preflight import prepare_run

    with prepare_run(args.config, args.overrides) as (config, resume):
        if resume.finished:
            print(f"{config.run.dir} has its {resume.step} steps; raise run.steps to continue")
            return 0
        _hush_ray()
        from asyncdapo.controller.commands.launch import launch

        return launch(config, resume)


def _hush_ray() -> None:
    """Suppress Ray's own reports of deaths: ours say it in one line. Ray reads the variable when it is imported."""
    deaths = "A worker died or was killed|Raylet is terminated|has been marked dead"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", deaths)


def _config(args: argparse.Namespace) -> int:
    from asyncdapo.config.config import load_config, to_yaml
    from asyncdapo.config.found import find_config

    print(to_yaml(load_config(find_config(args.config), args.overrides)), end="")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.plan import plan

    print(plan(args.config, args.overrides, args.gpus))
    return 0


def _gpus(text: str) -> list[int]:
    """The type of `--gpus`."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be the GPUs of each node, such as 8,8, got {text!r}")
    return [int(part) for part in text.split(",")]


def _audit(args: argparse.Namespace) -> int:
    from asyncdapo.replay.ledger.audit import run_audit

    return run_audit(args.run_dir)


def _data_prepare(args: argparse.Namespace) -> int:
    from asyncdapo.prompts.prepare.command import command

    return command(args)


def _eval(args: argparse.Namespace) -> int:
    _hush_ray()
    from asyncdapo.controller.eval.command import command

    return command(args)


def _env_check(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.env_check import command

    return command(args)


def _export(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.export import command

    return command(args)


def _convert(args: argparse.Namespace) -> int:
    from asyncdapo.convert.command import command

    return command(args)


def _ps(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.ps import show

    return show(args.run_dir, args.json)


def _steps(text: str) -> tuple[int, int]:
    """The type of `--steps`."""
    if not (found := re.fullmatch(r"(\d+)(?::(\d+))?", text)):
        raise argparse.ArgumentTypeError(f"must be steps, such as 10:20, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _trace(args: argparse.Namespace) -> int:
    from asyncdapo.controller.watch.trace import write_trace

    return write_trace(Run(args.run_dir).dir, args.steps, args.out)


def _scale(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.scale import command

    return command(args.run_dir, args.num_workers)


def _watch(args: argparse.Namespace) -> int:
    if args.web:
        from asyncdapo.controller.watch.web import serve

        return serve(args.run_dirs, args.port)
    if args.port:
        raise UserError(f"--port {args.port}: is of the page (add --web)")
    from asyncdapo.controller.watch.watch import watch

    return watch(args.run_dirs)


def _sync(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.sync import sync

    return sync(args.run_dir)


def _report(args: argparse.Namespace) -> int:
    from asyncdapo.controller.commands.report import report

    return report(args.run_dir)


if __name__ == "__main__":
    sys.exit(main())
