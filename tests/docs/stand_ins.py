"""What stands in for the commands of a page: `asyncdapo`, `python`, `pip`, `ray` and a few more, found first on PATH.

In: the words of a command, `DOCS_RUNS`. Out: its exit code and output. Whatever a table here doesn't name ends with an
error, so that a new command on a page is a decision. Run as a program, by `scratch`.

    DOCS_RUNS   asyncdapo launch
    preflight   as printed, up to the moment at which processes would start; `asyncdapo env check` is only read
    short       runs, with `SMALL`
    whole       runs as printed

What is for GPUs takes the quickstart's model (`ON_A_CPU`) in all three.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREFLIGHT, SHORT, WHOLE = "preflight", "short", "whole"
MODEL = ROOT / "configs" / "models" / "chain_start"

NOT_RUN = {
    "pip install": "installs packages: .ci/run does that with the README's three commands, in a fresh environment",
    "python3 -m venv": "as pip",
    "python -m pytest": "is these tests",
    "python benchmarks/learner.py": "takes minutes: tests/benchmarks runs it on small sizes",
    "ray start": "tests/launchers does it, on ports and in a directory of its own",
    "ray stop": "would end every Ray of this machine",
    "ray job": "tests/launchers does it",
    "python launchers/submit.py": "tests/launchers does it",
    "sbatch": "tests/launchers/test_schedulers.py runs the script with stand-ins of Slurm's commands",
    "kubectl apply": "tests/launchers/test_schedulers.py reads the file",
    "sky jobs": "tests/launchers/test_schedulers.py reads the file, its shell and its launch",
    "python examples/taskset_rows.py": "needs verifiers: tests/environment/test_verifiers.py does it",
    "asyncdapo env check qwen3_0.6b_wordle_1gpu": "as above",
    "python examples/openenv_server.py": "needs openenv-core: tests/environment/test_launches.py does it",
    "asyncdapo env check openenv:": "as above",
    "asyncdapo launch qwen3_0.6b_wordle_1gpu": "needs verifiers and what the command above writes",
    "asyncdapo launch qwen2.5_0.5b_gsm8k_python_1gpu": "its tool needs a chat template: test_launches.py",
}
"""Commands by their first words, and why they are not run."""

SMALL = [
    "run.steps=2",
    "eval.num_prompts=4",
    "eval.num_greedy_prompts=4",
    "replay.prompts_per_step=4",
    "metrics.wandb=disabled",
    "filter.enabled=false",  # two steps, whatever the model knows
]
"""Of every short run."""
ON_A_CPU = [
    f"model.path={MODEL}",
    "prompts.chat_template=false",
    "prompts.max_prompt_length=160",
    "rollout.engine=torch",
    "rollout.dtype=float32",
    "rollout.num_workers=1",
    "rollout.tensor_parallel=1",
    "rollout.slots=16",
    "rollout.group_size=4",
    "rollout.max_response_length=32",
    "reward.overlong_buffer=8",
    "learner.ranks=1",
    "learner.updates_per_step=2",
    "eval.num_samples=2",
    "controller.placement=auto",
    "weights.backend=auto",
]
"""Of a run that the page has on GPUs: the same config and data, with the quickstart's model."""


def main(words: list[str]) -> int:
    name = Path(words[0]).name
    listed = next((why for start, why in NOT_RUN.items() if " ".join([name, *words[1:]]).startswith(start)), None)
    if listed is not None:
        print(f"not run: {words}: {listed}")
        return 0
    if name in ("python", "python3"):
        os.execv(sys.executable, [sys.executable, *words[1:]])
    if name == "asyncdapo":
        return _asyncdapo(words[1:])
    print(f"{words}: no stand-in for this command; give it one, or a line in NOT_RUN", file=sys.stderr)
    return 97


def _asyncdapo(words: list[str]) -> int:
    runs = os.environ["DOCS_RUNS"]
    if words[0] == "launch":
        small = SMALL if runs == SHORT else []
        words = [*words, *small, *(ON_A_CPU if _is_for_gpus(words[1]) else [])]
        if runs == PREFLIGHT:
            return _preflight(words[1], words[2:])
    elif words[0] in ("eval", "audit", "ps", "watch") and runs == PREFLIGHT:
        print(f"not run: {words}: there is no run where nothing has run")
        return 0
    elif words[:2] == ["env", "check"] and runs == PREFLIGHT:
        return _read_check(words)
    from asyncdapo.cli import main as asyncdapo

    return asyncdapo(words)


def _read_check(words: list[str]) -> int:
    """Whether a command `env check` can be read, and its config. The tokenizer and the host would take seconds each."""
    from asyncdapo.config.config import load_config
    from asyncdapo.config.found import find_config
    from asyncdapo.controller.commands.arguments import parser

    args = parser().parse_args(words)
    load_config(find_config(args.config or args.path), args.overrides)
    print(f"not run: {args.path}: two episodes would be played now")
    return 0


def _preflight(config: str, overrides: list[str]) -> int:
    """Everything that a launch does before it starts a process. The run directory is left to the next command."""
    from asyncdapo.controller.checks.preflight import prepare_run
    from asyncdapo.errors import UserError

    try:
        with prepare_run(config, overrides) as (effective, _):
            print(f"not run: {config}: would start now")
            shutil.rmtree(effective.run.dir)
    except UserError as error:
        print(f"asyncdapo: {error}", file=sys.stderr)
        return 2
    return 0


def _is_for_gpus(config: str) -> bool:
    """Whether it names a config of ours that wants another model than the shipped one."""
    from asyncdapo.config.config import load_config
    from asyncdapo.config.found import find_config

    path = find_config(config)
    return path.is_relative_to("configs") and not load_config(path).model.path.startswith("models/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
