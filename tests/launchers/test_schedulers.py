"""The files for Slurm, KubeRay and SkyPilot: their keys, their shell, their launches; in the soak the shell runs.

Nothing here has a scheduler. `srun` and `scontrol` are a few lines that run a command on this machine as a node with an
address of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from asyncdapo.config.config import load_config
from asyncdapo.config.found import find_config
from asyncdapo.controller.commands.arguments import parser
from asyncdapo.metrics.jsonl import read_metrics
from tests.controller.living import eventually
from tests.docs.blocks import ROOT

FOLDER = ROOT / "launchers"
SBATCH = "job-name nodes ntasks-per-node gpus-per-node exclusive time requeue signal open-mode output"
POD = {"containers", "volumes", "terminationGracePeriodSeconds"}
CONTAINER = {"name", "image", "resources", "volumeMounts", "lifecycle"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
RAY_JOB = {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "runtimeEnvYAML", "rayClusterSpec"}
RAY_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
"""Of `ray.io/v1`, from KubeRay's reference of its API."""
SKY = {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
"""Of a task of SkyPilot's, from its reference of the YAML."""


def kuberay() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "kuberay.yaml").read_text())


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "skypilot.yaml").read_text())


def parses(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def launched(words: list[str]) -> Any:
    """The config of this launch; what the shell would fill in is a name that serves."""
    filled = [re.sub(r"\$\{?\w+\}?", "quickstart", word) for word in words]
    args = parser().parse_args(filled[filled.index("launch") :])
    return load_config(find_config(args.config), args.overrides)


def test_the_script_for_slurm_is_bash_and_asks_for_what_the_page_says() -> None:
    script = (FOLDER / "slurm.sbatch").read_text()
    parses(script)
    assert re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE) == SBATCH.split()
    [launch] = re.findall(r"^asyncdapo (launch .*) &$", script, re.MULTILINE)
    words = shlex.split(launch.replace('"$@"', "quickstart run.steps=2"))
    assert launched(words).controller.ray_address


def test_the_ray_job_has_the_keys_of_kuberay_and_a_launch_that_works() -> None:
    job = kuberay()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec.keys() <= RAY_JOB
    assert cluster.keys() <= RAY_CLUSTER
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert group.keys() <= GROUP
        assert pod.keys() <= POD
        claimed = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container.keys() <= CONTAINER
            assert {mount["name"] for mount in container["volumeMounts"]} <= claimed
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    assert yaml.safe_load(spec["runtimeEnvYAML"]).keys() == {"env_vars"}

    config, rollout = launched(shlex.split(spec["entrypoint"])), groups[2]
    assert config.controller.ray_address == "auto"
    assert (config.rollout.min_workers, config.rollout.max_workers) == (rollout["minReplicas"], rollout["maxReplicas"])
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups]
    assert gpus == [None, str(config.learner.ranks), str(config.rollout.tensor_parallel)]
    leave = rollout["template"]["spec"]
    asks = leave["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    parses(asks[2])
    assert config.rollout.drain_s < float(asks[2].split()[-1]) < leave["terminationGracePeriodSeconds"]


def test_the_task_for_skypilot_has_its_keys_and_a_launch_that_works() -> None:
    task = skypilot()
    assert task.keys() <= SKY
    assert task["resources"].keys() <= {"accelerators", "use_spot"}
    assert all(isinstance(value, str) for value in task["envs"].values())
    parses(task["setup"])
    parses(task["run"])
    [launch] = re.findall(r"asyncdapo (launch .*) \|\|", task["run"])
    assert launched(shlex.split(launch)).run.dir == "/shared/runs/quickstart"


# ----------------------------------------------------------------------------------------------------- on stand-ins

SRUN = """\
#!{python}
import os, sys
node = next(word.partition("=")[2] for word in sys.argv if word.startswith("--nodelist="))
words = [word for word in sys.argv[1:] if not word.startswith("--") or sys.argv.index(word) > sys.argv.index("ray")]
local = [f"--node-ip-address={{node}}", "--num-cpus=2", "--min-worker-port=0", "--max-worker-port=0"]
os.environ["NCCL_HOSTID"] = node
os.execvp(words[0], words + local + ["--disable-usage-stats"])
"""
SCONTROL = """\
#!/bin/sh
if [ "$1" = show ]; then printf '127.0.0.2\\n127.0.0.3\\n'; else echo "$@" >> "$SLURM_SUBMIT_DIR/scontrol.said"; fi
"""
SMALL = ["run.steps=4", "eval.num_prompts=32", "eval.num_greedy_prompts=16", "metrics.wandb=disabled"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A clone as the script finds it, with the commands of Slurm."""
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f"PATH={commands}:$PATH\n")
    programs = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": SCONTROL,
        "ray": f'#!/bin/sh\nexec {sys.executable} -m ray.scripts.scripts "$@"\n',
        "asyncdapo": f'#!/bin/sh\nexec {sys.executable} -m asyncdapo.cli "$@"\n',
    }
    for name, text in programs.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return tmp_path


def submitted(place: Path) -> subprocess.Popen[str]:
    """The job's batch script, as Slurm starts it."""
    environment = {
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_NODELIST": "127.0.0.[2-3]",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
        "RAY_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
        "HOME": str(place),
    }
    return subprocess.Popen(
        ["bash", str(FOLDER / "slurm.sbatch"), "quickstart", "run.dir=run", *SMALL],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_a_job_of_slurm_that_is_stopped_is_queued_again_and_resumes(place: Path) -> None:
    metrics = place / "run" / "metrics.jsonl"
    job = submitted(place)
    try:
        eventually(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, 180)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=60)
        assert job.returncode == 130, output
        assert (place / "scontrol.said").read_text() == "requeue 7\n"
        job = submitted(place)
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 0, output
        assert "resumes after step" in output
        assert read_metrics(place / "run")[-1]["step"] == 4
    finally:
        os.killpg(job.pid, signal.SIGKILL) if job.poll() is None else None
