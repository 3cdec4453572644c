"""Submit a run to a Ray cluster: `python launchers/submit.py CONFIG [key=value …]`, as `ray job submit` would.

In: a config, overrides, the address of the cluster's dashboard, and a directory that all nodes see under the same path.
Out: a job that runs `asyncdapo launch` there, its id, and how to follow and stop it. Requirements are checked before
anything is submitted: exit code 2, with what is missing and where to get it.

Arguments reach the job unchanged. The command `ray job submit` puts them into double quotes, where a shell still
replaces `${run.name}`; so this uses Ray's Python interface.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from asyncdapo.config.config import Config, load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.commands.plan import plan
from asyncdapo.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RUNTIME_ENV = Path(__file__).with_name("runtime_env.yaml")
LOCAL_DASHBOARD = "http://127.0.0.1:8265"
CLUSTER = "controller.ray_address=auto"
"""The job joins the cluster that it runs on."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.runtime_env = _existing(args.runtime_env, "--runtime-env")  # from here; all else is from --dir
        os.chdir(_existing(args.dir, "--dir"))
        overrides = [CLUSTER, *args.overrides]
        config = load_config(find_config(args.config), overrides)
        print(plan(args.config, overrides))
        _check_data(config)
        _check_environment(args.python)
        job = _submit(_cluster(args.address), config, args, overrides)
    except (UserError, OSError) as error:
        print(f"submit: {error}", file=sys.stderr)
        return 2
    at = f"--address {args.address}"
    print(f"submitted {job}\n  ray job logs {at} --follow {job}\n  ray job stop {at} {job}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Submit `asyncdapo launch CONFIG` to a Ray cluster.")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a name in configs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change: run.steps=10")
    given = os.environ.get("RAY_ADDRESS", "")
    address = given if given.startswith("http") else LOCAL_DASHBOARD
    parser.add_argument("--address", default=address, help=f"the cluster's dashboard ({address}); or RAY_ADDRESS")
    parser.add_argument(
        "--dir", type=Path, default=Path.cwd(), help="where the run starts, the same path on every node (here)"
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="Python of the cluster's nodes, with asyncdapo (the one of this script)",
    )
    parser.add_argument(
        "--runtime-env", type=Path, default=RUNTIME_ENV, help="environment variables of the run (the file beside this)"
    )
    return parser


def _existing(path: Path, option: str) -> Path:
    if not path.exists():
        raise UserError(f"{option} {path}: doesn't exist here; it has to be the same path on every node")
    return path.absolute()


def _check_data(config: Config) -> None:
    prompts = config.prompts
    paths = [*(prompts.path if isinstance(prompts.path, dict) else [prompts.path]), prompts.eval_path]
    for path in paths:
        if path and not Path(path).exists():
            raise UserError(f"{path} isn't in {Path.cwd()}: the first lines of the config say how to prepare it")


def _check_environment(python: str) -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError("jobs need the whole of Ray: pip install -e '.[cluster]', here and on every node")
    _existing(Path(python), "--python")


def _cluster(address: str) -> JobSubmissionClient:
    """A client for the cluster at this address."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray at {address} asks for its token: RAY_AUTH_MODE=token, and the token of its nodes in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"no Ray dashboard answers at {address}: `ray start --head` starts one, at port 8265; give its address by "
            "--address or RAY_ADDRESS"
        ) from error


def _submit(cluster: JobSubmissionClient, config: Config, args: argparse.Namespace, overrides: Sequence[str]) -> str:
    words = [args.python, "-m", "asyncdapo.cli", "launch", args.config, *overrides]
    return cluster.submit_job(
        entrypoint=f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)}",
        submission_id=f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        runtime_env=OmegaConf.to_container(OmegaConf.load(args.runtime_env)),
    )


if __name__ == "__main__":
    sys.exit(main())
