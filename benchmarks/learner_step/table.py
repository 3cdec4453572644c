"""The printed output: the batch, how MFU is computed, a row for each variant, and whether the results agree. Pure.

Does not own: measuring, what counts as a failure.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.learner_step.lengths import GroupLengths
from benchmarks.learner_step.variants import Variant

MIB = 1 << 20
FORMULA = (
    "MFU = operations / seconds / peak; operations = 3 x (2 x parameters of block matrices x tokens\n"
    "  + 2 x hidden size x vocabulary x response tokens + 4 x layers x heads x head size x (query, key) pairs);\n"
    "  tokens: those that have to go through the blocks, without padding and without recomputation; a prompt once a\n"
    "  group where it is shared, once a response elsewhere"
)
HOW_TO_GET_TRL = (
    "python -m venv TRL && TRL/bin/pip install trl==1.16.0 datasets (and a CPU build of torch first, where there is no "
    "GPU), then --trl-python TRL/bin/python"
)


@dataclass
class Measured:
    """One row."""

    variant: Variant
    flops: int | None
    """Of a step; None where the formula isn't known for the model."""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loss: float | None = None
    """As `grad_norm`: of the first step, from the model as it was loaded."""
    grad_norm: float | None = None
    versions: str = ""
    failure: str = ""
    """Why there are no figures."""

    @property
    def step_s(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def works(self) -> bool:
        return bool(self.seconds)


@dataclass(frozen=True)
class Peaks:
    """Operations a second of the hardware."""

    measured: dict[str, float]
    """Best product of large matrices, for each dtype."""
    data_sheet: float | None
    """Of a GPU that is known: dense, bfloat16."""
    on_gpu: bool

    def of(self, dtype: str) -> float:
        """What MFU is measured against: on a GPU the dtype's own; on a CPU the best of all, since one without bfloat16
        instructions multiplies such matrices far slower than a model in it is trained."""
        return self.measured[dtype] if self.on_gpu else max(self.measured.values())


def batch_lines(name: str, groups: Sequence[GroupLengths]) -> str:
    """What the batch is."""
    sequences = sorted(num for group in groups for num in group.sequences)
    prompts = [group.num_prompt for group in groups]
    responses = [num for group in groups for num in group.num_responses_G]
    return (
        f"batch ({name}): {len(groups)} groups of {len(groups[0].num_responses_G)}, {sum(sequences):,} tokens "
        f"({sum(responses):,} of responses)\n"
        f"  tokens a sequence: median {statistics.median(sequences):,.0f}, mean {statistics.mean(sequences):,.1f}, max "
        f"{sequences[-1]:,}; a prompt: mean {statistics.mean(prompts):,.1f}, max {max(prompts):,}; a response: mean "
        f"{statistics.mean(responses):,.1f}, max {max(responses):,}"
    )


def peak_lines(peaks: Peaks, threads: int, gpu: str | None) -> str:
    """What MFU is measured against."""
    where = gpu or f"{threads} CPU threads"
    rates = ", ".join(f"{dtype} {rate / 1e12:,.3g}" for dtype, rate in peaks.measured.items())
    sheet = f"; data sheet, dense bfloat16: {peaks.data_sheet / 1e12:,.0f}" if peaks.data_sheet else ""
    best = "" if peaks.on_gpu or len(peaks.measured) == 1 else " (the fastest counts)"
    return f"peak, TFLOP/s: products of large matrices on {where} in this run: {rates}{best}{sheet}"


def table_lines(rows: Sequence[Measured], peaks: Peaks, num_tokens: int) -> str:
    """A header and a line for each variant."""
    best_trl, padded = (best_of(rows, kind) for kind in ("trl", "padded"))
    headers = ["variant", "tok/s", "(lowest-highest)", "x TRL", "x padded", "MFU"]
    headers += ["MFU (sheet)"] if peaks.data_sheet else []
    headers += ["peak MiB", "loss", "gradient norm"]
    lines = [headers]
    for row in rows:
        if not row.works:
            lines.append([row.variant.name, row.failure])
            continue
        rates = [num_tokens / seconds for seconds in row.seconds]
        line = [row.variant.name, f"{num_tokens / row.step_s:,.0f}", f"({min(rates):,.0f}-{max(rates):,.0f})"]
        line += [f"{other.step_s / row.step_s:.2f}" if other else "-" for other in (best_trl, padded)]
        line += [_share(row, peaks.of(row.variant.dtype))]
        line += [_share(row, peaks.data_sheet)] if peaks.data_sheet else []
        lines.append([*line, f"{row.peak_bytes / MIB:,.0f}", f"{row.loss:.6f}", f"{row.grad_norm:.6f}"])
    return _aligned(lines)


def best_of(rows: Sequence[Measured], kind: str) -> Measured | None:
    """The fastest row of a kind; none where none has figures."""
    return min((row for row in rows if row.works and row.variant.kind == kind), key=lambda r: r.step_s, default=None)


def _share(row: Measured, peak: float) -> str:
    return f"{100 * row.flops / row.step_s / peak:.1f} %" if row.flops else "-"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; a short line is a sentence behind its name."""
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[column]) for line in full) for column in range(len(lines[0]))]
    widths[0] = max(len(line[0]) for line in lines)
    aligned = []
    for line in lines:
        first, *others = line
        if len(line) == len(lines[0]):
            others = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join([first.ljust(widths[0]), *others]).rstrip())
    return "\n".join(aligned)
