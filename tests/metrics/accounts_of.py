"""Lines of metrics.jsonl for a run of which only a few shares of time are given."""

from __future__ import annotations

from asyncdapo.accounting.names import WORKER_STATES
from asyncdapo.metrics.verdict.verdict import LIMITS
from asyncdapo.metrics.verdict.window import FATES, LOOP

STEP_S = 2.0


def lines_of(
    num_steps: int = 6,
    *,
    loop: dict[str, float],
    workers: dict[str, float],
    fates: dict[str, float] | None = None,
    num_workers: int = 1,
    **others: float,
) -> list[dict[str, float]]:
    """`loop`, `workers`, `fates`: shares. `others`: metrics of every line, `/` as `__`."""
    fates = fates or {"trained": 1.0}
    return [
        {
            "step": step,
            "time/step_s": STEP_S,
            "replay/workers": num_workers,
            **{f"controller/{state}_s": STEP_S * loop.get(state, 0.0) for state in LOOP},
            **{
                f"rollout/time/{state}_s": step * num_workers * STEP_S * workers.get(state, 0.0)
                for state in WORKER_STATES
            },
            "rollout/running_s": step * num_workers * STEP_S * workers.get("generate", 0.0) * 60,
            **{f"replay/tokens_{fate}": 1000 * step * fates.get(fate, 0.0) for fate in FATES},
            "replay/time/idle_s": 0.9 * STEP_S * step,
            "reward/time/busy_s": 0.1 * STEP_S * step,
            "reward/time/idle_s": 0.9 * STEP_S * step,
            **{name.replace("__", "/"): number for name, number in others.items()},
        }
        for step in range(1, num_steps + 2)
    ]


def lost_to(limit: str, share: float) -> dict[str, float]:
    """What a line has of a verdict."""
    return dict.fromkeys((f"verdict/{each}_ratio" for each in LIMITS), 0.0) | {f"verdict/{limit}_ratio": share}
