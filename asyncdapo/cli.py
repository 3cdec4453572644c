"""The commands. Parses first and imports after, so that `--help` and a typing error answer at once.

Exit codes: 0 done · 1 the run failed, or audit found a breach · 2 something the user can mend · 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code."""
    parser = _parser()
    args, others = parser.parse_known_args(argv)
    if others:  # overrides that stand behind an option
        if not hasattr(args, "overrides") or any(other.startswith("-") for other in others):
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        args.overrides += others
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    from asyncdapo.errors import UserError

    try:
        code = args.command(args)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncdapo", description="Asynchronous off-policy reinforcement learning of language models with DAPO."
    )
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
    audit.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    audit.set_defaults(command=_audit)
    ps = commands.add_parser(
        "ps",
        help="show every process of a run: state, lag, memory",
        description="Show every process of a run, from its files and /proc alone: also of one that hangs or is over.",
        epilog="state: running, stopped (SIGSTOP), zombie, gone, other host. lag: a rollout worker's loaded weights "
        "behind the newest published ones, in versions; kept groups that wait in replay for a batch; steps the "
        "learner has trained since its newest checkpoint. memory: resident. "
        "To end one: kill -9 PID; it is started again. To end the run: kill the PID of the controller.",
    )
    ps.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    ps.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    ps.set_defaults(command=_ps)
    return parser


def _launch(args: argparse.Namespace) -> int:
    from asyncdapo.controller.preflight import prepare_run

    with prepare_run(args.config, args.overrides) as (config, resume):
        if resume.finished:
            print(f"{config.run.dir} has its {resume.step} steps; raise run.steps to go on")
            return 0
        # Ray's own report of a death, which ours says in a line; read when Ray is imported.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
        from asyncdapo.controller.run import launch

        return launch(config, resume)


def _config(args: argparse.Namespace) -> int:
    from asyncdapo.config import find_config, load_config, to_yaml

    print(to_yaml(load_config(find_config(args.config), args.overrides)), end="")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from asyncdapo.controller.plan import plan

    print(plan(args.config, args.overrides, args.gpus))
    return 0


def _gpus(text: str) -> list[int]:
    """The type of `--gpus`."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be the GPUs of each node, such as 8,8, got {text!r}")
    return [int(part) for part in text.split(",")]


def _audit(args: argparse.Namespace) -> int:
    from asyncdapo.replay.audit import run_audit

    return run_audit(args.run_dir)


def _ps(args: argparse.Namespace) -> int:
    from asyncdapo.controller.ps import show

    return show(args.run_dir, args.json)


if __name__ == "__main__":
    sys.exit(main())
