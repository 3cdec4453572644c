"""The first GPU hour before the hour has come: how checks are run, and every check as its stand-in without a GPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import first_gpu_hour
from benchmarks.first_gpu_hour import held, main
from benchmarks.gpu_hour.checks import CHECKS, Check

WITHOUT_VLLM = [
    *("environment", "attention", "gradient", "gpu_tests", "head"),
    *("mfu_0.5b", "memory", "memory_expandable", "gpu_tests_expandable"),
]
WITH_VLLM = ["parity", "weights_ipc", "weights_nccl", "whole_run", "restart"]

SCRIPTS = {
    "good": "write({'summary': 'all well', 'threads': os.environ['THREADS']})",
    "bad": "write({'half': 1}); print('before'); raise SystemExit('the words of the end')",
    "slow": """write({'half': 1})
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
write({'half': 1, 'child': child.pid}); time.sleep(600)""",
}
BEGINNING = """import json, os, pathlib, subprocess, sys, time
def write(figures): pathlib.Path(sys.argv[sys.argv.index('--figures') + 1]).write_text(json.dumps(figures))
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Hold one of the scripts in the place of a check."""
    folder = tmp_path / "benchmarks" / "gpu_hour"
    folder.mkdir(parents=True)
    for name, script in SCRIPTS.items():
        (folder / f"{name}.py").write_text(BEGINNING + script)
    monkeypatch.setattr(first_gpu_hour, "ROOT", tmp_path)

    def hold(module: str, *, left_s: float = 60.0, limit_s: int = 60, needs: tuple[str, ...] = ()) -> dict[str, Any]:
        one = Check(module, module, "", 5, limit_s, needs=needs, env={"THREADS": "1"})
        return held(one, tmp_path, cpu=False, left_s=left_s)

    return hold


def test_a_check_that_holds_has_its_figures_and_its_environment(check) -> None:
    line = check("good")
    assert (line["status"], line["figures"]["threads"], line["error"]) == ("ok", "1", [])


def test_a_check_that_fails_keeps_its_figures_and_its_last_words(check) -> None:
    line = check("bad")
    assert (line["status"], line["figures"]) == ("failed", {"half": 1})
    assert line["error"] == ["before", "the words of the end"]


@pytest.mark.soak  # half a minute
def test_a_check_that_takes_too_long_is_ended_with_all_that_it_started(check) -> None:
    line = check("slow", limit_s=2)
    assert line["status"] == "timeout"
    child = line["figures"]["child"]
    until_s = time.monotonic() + 10
    while _lives(child) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_check_that_no_longer_fits_or_lacks_a_package_is_skipped_with_the_reason(check) -> None:
    late, lacking = check("good", left_s=3.0), check("good", needs=("json", "no_such_package"))
    assert (late["status"], lacking["status"]) == ("skipped", "skipped")
    assert late["error"] == ["takes about 5 s, 3 are left of --minutes"]
    assert lacking["error"] == ["no_such_package is not installed"]


def test_every_check_has_a_name_of_its_own_and_a_module_and_is_in_one_of_these_tests(capsys) -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(names) - {"mfu_1.5b"} == {*WITHOUT_VLLM, *WITH_VLLM}
    folder = Path(first_gpu_hour.__file__).parent / "gpu_hour"
    assert all((folder / f"{check.module}.py").is_file() for check in CHECKS)
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.soak
def test_the_checks_without_vllm_hold_without_a_gpu(tmp_path: Path, capsys) -> None:
    assert_hold(WITHOUT_VLLM, tmp_path, capsys)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", WITH_VLLM)
def test_the_checks_with_vllm_hold_without_a_gpu(name: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("vllm")
    assert_hold([name], tmp_path, capsys)


def assert_hold(names: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--out", str(out), "--cpu", "--only", *names])
    printed = capsys.readouterr().out
    assert code == 0, printed + "".join((out / f"{name}.log").read_text()[-3000:] for name in names)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(names)
    assert all(line["status"] == "ok" and line["figures"]["summary"] in printed for line in lines), os.linesep + printed
