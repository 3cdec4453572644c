"""`python -m asyncdapo.bench NAME`: measurements of one stage, beside what others do with the same input."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from asyncdapo.bench import options
from asyncdapo.errors import RunError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, return the exit code: 1 for a wrong result, 2 for what can't be measured, 130
    when it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m asyncdapo.bench", description="Measure a stage of asyncdapo.")
    benches = parser.add_subparsers(required=True, metavar="NAME")
    options.add_to(
        benches.add_parser(
            "learner",
            help="a train step: ours, a plain padded Hugging Face one, TRL's",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    args = parser.parse_args(argv)
    try:
        checked = options.from_args(args)
        from asyncdapo.bench import learner  # imports torch, 2 s that --help and a wrong option needn't wait for

        return learner.run(checked)
    except UserError as error:
        print(f"asyncdapo.bench: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"asyncdapo.bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("asyncdapo.bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and files of the bench go
    sys.exit(main())
