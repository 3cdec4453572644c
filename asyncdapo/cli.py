"""The commands. Parses first and imports after, so that `--help` and a typing error answer at once.

Exit codes: 0 done · 1 the run failed, or audit found a breach · 2 something that the user can fix · 130 interrupted
· 141 the reader of standard output is gone.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from asyncdapo.api import Run
from asyncdapo.controller.commands import arguments
from asyncdapo.errors import EXIT_INTERRUPTED, UserError

EXIT_READER_GONE = 141
"""As the shell reports a program that writes to `head` when it has read enough."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the command, return its exit code."""
    parser = arguments.parser()
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
        code = COMMANDS[args.command](args)
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


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "launch": _launch,
    "config": _config,
    "plan": _plan,
    "audit": _audit,
    "data": _data_prepare,
    "eval": _eval,
    "env": _env_check,
    "export": _export,
    "convert": _convert,
    "ps": _ps,
    "trace": _trace,
    "scale": _scale,
    "watch": _watch,
    "sync": _sync,
    "report": _report,
}
"""What each command does. Every function returns the exit code."""

if __name__ == "__main__":
    sys.exit(main())
