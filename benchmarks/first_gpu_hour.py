"""The first hour on a GPU: everything that has not run there yet, the most valuable checks first.

    python benchmarks/first_gpu_hour.py --out DIR [--only NAME …] [--minutes 25] [--cpu] [--list]

Each check is a process of its own with a time limit. If one fails or its packages are missing, the others still run.
DIR/results.jsonl gets a line of JSON for each; DIR/NAME.log is its output. `--minutes` is for all of them together: a
check that no longer fits is skipped. `--cpu` runs small stand-ins without a GPU, to show that the checks themselves
work. Needs no network, and Ray only for the checks that are runs. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_hour.checks import CHECKS, Check  # noqa: E402

LINES_OF_ERROR, LETTERS_OF_LINE = 12, 400
WIND_UP_S = 10.0
"""Time for the processes of a check to end by themselves, and again after SIGTERM."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiles for the GPU when it is first used
    "WANDB_MODE": "disabled",
    "PYTHONUNBUFFERED": "1",
}
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def held(check: Check, out: Path, *, cpu: bool, left_s: float) -> dict[str, Any]:
    """Run the check and return its line of results."""
    began_s = time.monotonic()
    line: dict[str, Any] = {"name": check.name, "status": "skipped", "seconds": 0.0, "figures": {}, "error": []}
    if missing := [name for name in check.needs if find_spec(name) is None]:
        return line | {"error": [f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"]}
    if not cpu and left_s < check.usual_s:
        return line | {"error": [f"takes about {check.usual_s} s, {left_s:.0f} are left of --minutes"]}
    figures, log = out / f"{check.name}.json", out / f"{check.name}.log"
    figures.unlink(missing_ok=True)
    code = _run(check, figures, log, cpu=cpu, limit_s=min(check.limit_s, left_s))
    line["status"] = {None: "timeout", 0: "ok"}.get(code, "failed")
    line["seconds"] = round(time.monotonic() - began_s, 1)
    if figures.exists():
        line["figures"] = json.loads(figures.read_text())
    if code != 0:
        line["error"] = _last_lines(log)
    return line


def _run(check: Check, figures: Path, log: Path, *, cpu: bool, limit_s: float) -> int | None:
    """The exit code of the check's process, None if it took too long. No process of it is left."""
    command = [sys.executable, "-m", f"benchmarks.gpu_hour.{check.module}", "--figures", str(figures), *check.args]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, **OFFLINE, **check.env, **(ON_CPU if cpu else {}), "PYTHONPATH": path}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(["--cpu"] if cpu else [])],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            return None
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Wait until the check's process group has ended: a GPU has no room for what another check left running."""
    for sent in (0, signal.SIGTERM, signal.SIGKILL):
        until_s = time.monotonic() + WIND_UP_S
        while time.monotonic() < until_s:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        os.killpg(process.pid, sent or signal.SIGTERM)


def _last_lines(log: Path) -> list[str]:
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return [line[:LETTERS_OF_LINE] for line in lines[-LINES_OF_ERROR:]]


def _row(line: dict[str, Any]) -> str:
    said = line["figures"]["summary"] if line["status"] == "ok" else next(iter(reversed(line["error"])), "")
    return f"{line['name']:21} {line['status']:8} {line['seconds']:6.1f} s  {said}"


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for results.jsonl and a log of each check")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[check.name for check in CHECKS])
    parser.add_argument("--minutes", type=float, default=25.0, help="for all checks together")
    parser.add_argument("--cpu", action="store_true", help="small stand-ins without a GPU")
    parser.add_argument("--list", action="store_true", help="say what the checks are, and end")
    args = parser.parse_args(argv)
    if not args.out and not args.list:
        parser.error("--out DIR is missing")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _options(argv)
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    if args.list:
        print("\n".join(f"{check.name:21} {check.usual_s:4} s  {check.about}" for check in chosen))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    end_s, lines = time.monotonic() + 60 * args.minutes, []
    for check in chosen:
        lines.append(held(check, args.out.resolve(), cpu=args.cpu, left_s=end_s - time.monotonic()))
        with (args.out / "results.jsonl").open("a") as results:
            results.write(json.dumps(lines[-1]) + "\n")
        print(_row(lines[-1]), flush=True)
    counts = {status: sum(line["status"] == status for line in lines) for status in ("ok", "failed", "timeout")}
    counts["skipped"] = len(lines) - sum(counts.values())
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {args.out / 'results.jsonl'}")
    return 1 if counts["failed"] or counts["timeout"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the check under way is ended
    sys.exit(main())
