"""The learner's bench: our step, a plain padded step and TRL's step train the same model on the same batch.

    lengths ─▶ batch file ─▶ prepare: μ, our gradient against the padded one ─▶ each variant in a process of its own
                                                                                 │ turns, one variant after the other
                                                                                 ▼
                                                        medians, ratios, MFU, peak memory; do the results agree?

On a CPU all processes exist at once and take turns, so that other work on the machine affects all alike. On a GPU,
whose memory they would share, they are measured one after the other. Invariant: the first step starts from the same
weights everywhere; if the loss or gradient of a float32 variant differs from the padded step's, the bench ends with
code 1. Does not own: what a step is (`worker`, `padded`, `trl_step`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from asyncdapo.errors import ConfigError, RunError
from asyncdapo.model.shape import Shape, peak_flops, read_shape
from benchmarks.learner_step import batch
from benchmarks.learner_step.lengths import GroupLengths, draw_lengths
from benchmarks.learner_step.options import Options, quickstart_model
from benchmarks.learner_step.processes import TurnProcess
from benchmarks.learner_step.shapes import SHAPES
from benchmarks.learner_step.table import FORMULA, HOW_TO_GET_TRL, Measured, Peaks, batch_lines, peak_lines, table_lines
from benchmarks.learner_step.variants import Variant, parse_variants

GRADIENT_TOLERANCE = 1e-4
"""Largest difference to the padded gradient, relative to the largest entry of a parameter; also of norms."""
LOSS_TOLERANCE = 1e-5
"""Of losses, which are means of numbers around 1 and may be near 0 themselves."""
WORKER = [sys.executable, "-m", "benchmarks.learner_step.worker"]
PRODUCT_SIZES = {"cpu": 1024, "cuda": 8192}
PRODUCTS_S = 0.3
TRL_SCRIPT = Path(__file__).with_name("trl_step.py")


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    options: Options
    folder: Path
    """For this bench alone; gone at its end."""
    model: Path
    device: str
    gpu: str | None
    groups: list[GroupLengths]

    def spec(self, task: str, **more: object) -> dict[str, Any]:
        """What a process needs to know."""
        shared = {name: getattr(self.options, name) for name in ("tokens_per_microbatch", "threads", "lr", "seed")}
        shared["padded_tokens"] = self.options.padded_tokens or self.options.tokens_per_microbatch
        batch_file = str(self.folder / "batch.npz")
        return {"task": task, "model": str(self.model), "batch": batch_file, "device": self.device, **shared, **more}

    def process(self, variant: Variant) -> TurnProcess:
        command = [self.options.trl_python, str(TRL_SCRIPT)] if variant.kind == "trl" else WORKER
        spec = self.spec(variant.kind, **{k: v for k, v in asdict(variant).items() if k not in ("name", "kind")})
        return TurnProcess(variant.name, command, spec, self.folder)

    def prepare(self) -> dict[str, Any]:
        """The model, where it has to be built, and the whole batch file; returns what the check came to."""
        model = SHAPES[self.options.shape] if self.options.shape else None
        more = {"config": model, "tokenizer": str(quickstart_model())} if model else {"config": None}
        spec = self.spec("prepare", shared=True, compile=False, checkpointing="none", **more)
        with TurnProcess("prepare", WORKER, spec, self.folder) as process:
            return process.heard()


def run(options: Options) -> int:
    """Measure and print; returns the exit code. Raises ConfigError for options that can't work, RunError when a result
    can't be had."""
    groups = draw_lengths(options.lengths, options.groups, options.group_size, options.seed)
    device, gpu = _device(options)
    dtype = {"auto": "bfloat16" if device == "cuda" else "float32"}.get(options.dtype, options.dtype)
    base = Variant("", "", dtype, options.compile, options.activation_checkpointing)
    variants = parse_variants(options.variants, base, options.groups * options.group_size)
    with tempfile.TemporaryDirectory(prefix="asyncdapo-bench-") as name:
        model = Path(name) / "model" if options.shape else options.model_directory
        bench = Bench(options, Path(name), model, device, gpu, groups)
        return _run(bench, variants)


def _run(bench: Bench, variants: Sequence[Variant]) -> int:
    options = bench.options
    config = SHAPES[options.shape] if options.shape else json.loads((bench.model / "config.json").read_text())
    batch.make(bench.groups, config["vocab_size"], options.seed).save(bench.folder / "batch.npz")
    print(f"model {options.shape or bench.model.name}; {bench.gpu or 'CPU'}, {options.threads} threads a process")
    print(batch_lines(options.lengths, bench.groups), flush=True)
    prepared = bench.prepare()
    shape = read_shape(config)
    rows = [
        Measured(variant, _flops(shape, bench.groups, variant.kind == "ours" and variant.shared))
        for variant in variants
    ]
    peaks = Peaks(_measure(bench, rows), peak_flops(bench.gpu) if bench.gpu else None, bench.gpu is not None)
    num_tokens = sum(group.num_tokens for group in bench.groups)
    print(f"{peak_lines(peaks, options.threads, bench.gpu)}\n{FORMULA}\n")
    print(table_lines(rows, peaks, num_tokens), end="\n\n")
    print(_about_rows(bench, rows))
    wrong = list(_wrong(rows, prepared))
    print(
        f"our gradient and the padded one, float32: {prepared['gradient_apart']:.1e} apart at most, relative to the "
        f"largest entry of each\n  parameter ({prepared['worst']})"
    )
    print("\n".join(["the results are NOT the same:", *wrong] if wrong else ["the results agree"]))
    if options.json:
        _write_json(Path(options.json), bench, rows, peaks, prepared, wrong)
    return 1 if wrong or any(row.failure and row.failure != HOW_TO_GET_TRL for row in rows) else 0


# ----------------------------------------------------------------------------------------------------------- measuring


def _measure(bench: Bench, rows: Sequence[Measured]) -> dict[str, float]:
    """Fill in the rows; returns the rate of matrix products for each dtype, on a CPU always for float32 too."""
    for row in rows:
        if row.variant.kind == "trl" and not bench.options.trl_python:
            row.failure = HOW_TO_GET_TRL
    to_run = [row for row in rows if not row.failure]
    dtypes = [row.variant.dtype for row in rows] + ["float32"] * (bench.device == "cpu")
    best = dict.fromkeys(dtypes, 0.0)
    for together in [to_run] if bench.device == "cpu" else [[row] for row in to_run]:
        for _ in _rounds(bench, together):
            for dtype in best:
                best[dtype] = max(best[dtype], Products(bench.device, dtype).flops_per_s())
    return best


def _rounds(bench: Bench, rows: Sequence[Measured]) -> Iterator[None]:
    """A turn for each row, again and again, in changing order, so that no variant always follows the same one."""
    kinds = ["warm"] * bench.options.warmup + ["step"] * bench.options.repeats
    with ExitStack() as stack:
        processes = {row.variant.name: _start(bench, row, stack) for row in rows}
        for number, kind in enumerate(kinds):
            start = number % max(1, len(rows))
            for row in [*rows[start:], *rows[:start]]:
                _step(row, processes[row.variant.name], kind)
            yield


def _start(bench: Bench, row: Measured, stack: ExitStack) -> TurnProcess:
    process = stack.enter_context(bench.process(row.variant))
    try:
        row.versions = process.heard()["versions"]
    except RunError as error:
        row.failure = str(error)
    return process


def _step(row: Measured, process: TurnProcess, kind: str) -> None:
    """One turn of a variant. If it fails, for example because memory runs out, the others are still measured."""
    if row.failure:
        return
    try:
        said = process.turn(kind)
    except RunError as error:
        row.failure, row.seconds = str(error), []
        return
    if row.loss is None:
        row.loss, row.grad_norm = said["loss"], said["grad_norm"]
    if kind == "step":
        row.seconds.append(said["seconds"])
        row.peak_bytes = max(row.peak_bytes, said["peak_bytes"])


class Products:
    """The rate of large matrix products, the fastest work on this machine with these threads or this GPU.

    On a CPU MFU is relative to it, since no data sheet gives the clock rate or the other load. On a GPU MFU is shown
    relative to it and to the data sheet.
    """

    def __init__(self, device: str, dtype: str) -> None:
        self._size = PRODUCT_SIZES[device]
        self._left, self._right = torch.randn(2, self._size, self._size, device=device, dtype=getattr(torch, dtype))

    def flops_per_s(self) -> float:
        """Measured over some tenths of a second, each product waited for."""
        began_s, num_products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began_s) < PRODUCTS_S or not num_products:
            (self._left @ self._right)[0, 0].item()
            num_products += 1
        return 2 * self._size**3 * num_products / seconds


def _flops(shape: Shape | None, groups: Sequence[GroupLengths], shared: bool) -> int | None:
    """Operations of a train step. The last token of a response predicts nothing, so it needn't be computed."""
    if shape is None:
        return None
    num_tokens = num_pairs = 0
    for group in groups:
        prompt, behind = group.num_prompt, [num - 1 for num in group.num_responses_G]
        num_prompts = 1 if shared else len(behind)
        num_tokens += num_prompts * prompt + sum(behind)
        num_pairs += num_prompts * (prompt * (prompt + 1) // 2)
        num_pairs += sum(num * prompt + num * (num + 1) // 2 for num in behind)
    return shape.train_flops(num_tokens, sum(sum(group.num_responses_G) for group in groups), num_pairs)


def _device(options: Options) -> tuple[str, str | None]:
    """Where it is measured, and the GPU's name. Sets this process's threads, since it multiplies matrices."""
    torch.set_num_threads(options.threads)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ConfigError("--device", "there is no GPU here", "cuda", "use auto or cpu")
    return ("cuda", torch.cuda.get_device_name(0)) if has_gpu and options.device != "cpu" else ("cpu", None)


# ------------------------------------------------------------------------------------------------------------- results


def _wrong(rows: Sequence[Measured], prepared: dict[str, Any]) -> Iterator[str]:
    """What isn't as the padded step has it."""
    if not prepared["gradient_apart"] <= GRADIENT_TOLERANCE:
        yield f"  our gradient is {prepared['gradient_apart']:.1e} from the padded one at {prepared['worst']}"
    for row in rows:
        if not row.works or row.variant.dtype != "float32":
            continue
        if not abs(row.loss - prepared["loss"]) <= LOSS_TOLERANCE:
            yield f"  {row.variant.name}: loss {row.loss:.7f}, the padded step has {prepared['loss']:.7f}"
        if not abs(row.grad_norm - prepared["grad_norm"]) <= GRADIENT_TOLERANCE * prepared["grad_norm"]:
            yield f"  {row.variant.name}: gradient norm {row.grad_norm:.7f}, it has {prepared['grad_norm']:.7f}"


def _about_rows(bench: Bench, rows: Sequence[Measured]) -> str:
    """What the columns mean."""
    memory = "what torch allocated" if bench.device == "cuda" else "growth of resident memory over the loaded model"
    order = "one after the other" if bench.device == "cuda" else "taking turns"
    versions = dict.fromkeys(row.versions for row in rows if row.versions)
    return (
        f"tok/s: prompt and response tokens of all sequences over the median of {bench.options.repeats} steps, "
        f"variants\n  {order}; x TRL, x padded: against the fastest such row; peak MiB: {memory};\n"
        f"  loss and gradient norm: of the first step. {'; '.join(versions)}"
    )


def _write_json(
    path: Path, bench: Bench, rows: Sequence[Measured], peaks: Peaks, prepared: dict[str, Any], wrong: list[str]
) -> None:
    figures = {
        "options": asdict(bench.options),
        "device": bench.gpu or "cpu",
        "num_tokens": sum(group.num_tokens for group in bench.groups),
        "groups": [asdict(group) for group in bench.groups],
        "peaks": asdict(peaks),
        "check": prepared,
        "wrong": wrong,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(figures, indent=2) + "\n")
