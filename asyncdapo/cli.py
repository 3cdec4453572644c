"""The commands. Parses first and imports after, so that `--help` and a typing error answer at once.

Exit codes: 0 done · 1 the run failed, or audit found a breach · 2 something the user can mend · 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code."""
    args = _parser().parse_args(argv)
    from asyncdapo.errors import UserError

    try:
        return args.command(args)
    except UserError as error:
        print(f"asyncdapo: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncdapo", description="Asynchronous off-policy reinforcement learning of language models with DAPO."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    launch = commands.add_parser("launch", help="train: start every process, run to the last step")
    config = commands.add_parser("config", help="print the resolved configuration with a line on every key")
    for command, function in ((launch, _launch), (config, _config)):
        command.add_argument("config", metavar="CONFIG", help="a YAML file, or a name in configs/")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: run.steps=10")
        command.set_defaults(command=function)
    audit = commands.add_parser("audit", help="check every promise of a run from its files alone")
    audit.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    audit.set_defaults(command=_audit)
    return parser


def _launch(args: argparse.Namespace) -> int:
    from asyncdapo.controller.preflight import prepare_run

    config = prepare_run(args.config, args.overrides)
    from asyncdapo.controller.run import launch

    return launch(config)


def _config(args: argparse.Namespace) -> int:
    from asyncdapo.config import find_config, load_config, to_yaml

    print(to_yaml(load_config(find_config(args.config), args.overrides)), end="")
    return 0


def _audit(args: argparse.Namespace) -> int:
    from asyncdapo.replay.audit import run_audit

    return run_audit(args.run_dir)


if __name__ == "__main__":
    sys.exit(main())
