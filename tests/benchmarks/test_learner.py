"""The learner's bench as a command, on sizes that take a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncdapo.model.shape import read_shape
from benchmarks.learner import main
from benchmarks.learner_step.bench import _flops, _wrong
from benchmarks.learner_step.lengths import GroupLengths
from benchmarks.learner_step.shapes import SHAPES
from benchmarks.learner_step.table import Measured, Peaks, table_lines
from benchmarks.learner_step.variants import Variant

COMMAND = str(Path(__file__).resolve().parents[2] / "benchmarks" / "learner.py")
SMALL = "--shape tiny --groups 2 --group-size 2 --threads 1 --repeats 1 --warmup 1 --device cpu".split()


def bench(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, COMMAND, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.soak  # a process of its own for each variant
def test_a_run_prints_its_batch_its_formula_and_a_row_for_each_variant(tmp_path: Path) -> None:
    done = bench(*SMALL, "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    for text in ("2 groups of 2", "MFU = operations / seconds / peak", "\nours ", "\npadded ", "results agree"):
        assert text in done.stdout
    assert "\ntrl" in done.stdout
    assert "pip install trl==1.16.0 datasets" in done.stdout, "the row says how to get it"
    figures = json.loads((tmp_path / "figures.json").read_text())
    ours, padded, *_ = figures["rows"]
    assert ours["seconds"]
    assert ours["loss"] == pytest.approx(padded["loss"], abs=1e-5)
    assert figures["check"]["gradient_apart"] < 1e-4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variants", "theirs"], "--variants: is unknown, got 'theirs'"),
        (["--lengths", "endless"], "--lengths: is unknown"),
        (["--shape", "gpt-5"], "--shape: must be tiny"),
        (["--trl-python", "/nowhere/python"], "--trl-python: no such file"),
        (["--group-size", "1"], "--group-size: must be at least 2"),
    ],
)
def test_a_wrong_option_is_told_with_code_2(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [COMMAND, *options])
    assert main() == 2
    out, err = capsys.readouterr()
    assert said in err
    assert not out


def row(kind: str, seconds: float, *, loss: float = 0.5, norm: float = 2.0, dtype: str = "float32") -> Measured:
    return Measured(Variant(kind, kind, dtype), 10**9, [seconds], peak_bytes=1 << 20, loss=loss, grad_norm=norm)


def test_ratios_are_against_the_fastest_row_of_the_others() -> None:
    slow = row("trl", 8.0)
    lines = table_lines(
        [row("ours", 1.0), row("padded", 2.0), slow, row("trl", 4.0)], Peaks({"float32": 1e10}, None, False), 100
    )
    assert lines.splitlines()[1].split()[:7] == ["ours", "100", "(100-100)", "4.00", "2.00", "10.0", "%"]


def test_on_a_cpu_mfu_is_against_the_fastest_products_and_on_a_gpu_against_those_of_the_dtype() -> None:
    rates = {"float32": 1e12, "bfloat16": 1e9}
    assert Peaks(rates, None, on_gpu=False).of("bfloat16") == 1e12
    assert Peaks(rates, None, on_gpu=True).of("bfloat16") == 1e9


def test_an_end_by_a_signal_leaves_no_folder_behind(tmp_path: Path) -> None:
    command = [sys.executable, COMMAND, "--shape", "tiny", "--groups", "1"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # the folder is there now
        assert list(tmp_path.iterdir())
        process.terminate()
        assert process.wait(20) == 130
    assert not list(tmp_path.iterdir())


def test_a_float32_row_with_another_loss_or_gradient_is_wrong_and_a_bfloat16_one_is_not() -> None:
    expected = {"gradient_apart": 1e-7, "worst": "norm", "loss": 0.5, "grad_norm": 2.0}
    assert not list(_wrong([row("ours", 1.0), row("trl", 1.0, loss=0.51, dtype="bfloat16")], expected))
    assert len(list(_wrong([row("ours", 1.0, loss=0.5001)], expected))) == 1
    assert len(list(_wrong([row("trl", 1.0, norm=2.001)], expected))) == 1
    assert len(list(_wrong([], {**expected, "gradient_apart": float("nan")}))) == 1


def test_a_shared_prompt_is_counted_once_a_group() -> None:
    shape, groups = read_shape(SHAPES["tiny"]), [GroupLengths(3, (2, 5))]
    shared, apart = (_flops(shape, groups, is_shared) for is_shared in (True, False))
    assert shared == shape.train_flops(3 + 1 + 4, 7, 6 + (1 * 3 + 1) + (4 * 3 + 10))
    assert apart == shape.train_flops(4 + 7, 7, 4 * 5 // 2 + 7 * 8 // 2)
