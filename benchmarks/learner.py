"""The learner's train step against a plain padded Hugging Face one and TRL's: speed, MFU, memory, and equal results.

    python benchmarks/learner.py [--threads 2] [--trl-python TRL/bin/python] …

Exit code 1 for a wrong result, 2 if something can't be measured, 130 if interrupted. `learner_step/` has the parts.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from asyncdapo.errors import RunError, UserError  # noqa: E402
from benchmarks.learner_step import options  # noqa: E402


def main() -> int:
    """Parse the command line, measure, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_to(parser)
    args = parser.parse_args()
    try:
        checked = options.from_args(args)
        from benchmarks.learner_step import bench  # imports torch, 2 s that --help and a wrong option needn't wait for

        return bench.run(checked)
    except (UserError, RunError) as error:
        print(f"learner.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("learner.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and files of the bench go
    sys.exit(main())
