"""Configuration of the run as a whole, of the controller, of evaluation, and of faults on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.faults import parse_kill
from asyncdapo.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare, Share


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run is called, where it lives, how long it goes on."""

    name: str = "run"
    """Name shown on the terminal and in W&B."""
    dir: Annotated[str, Meta(min_length=1)] = "runs/${run.name}"
    """Run directory: config, ledger, metrics, checkpoints, logs."""
    seed: int = 0
    """Seed of the prompt order, the sampling and the model's own randomness."""
    steps: PositiveInt = 100
    """Train steps after which the run ends."""
    stop_s: PositiveFloat = 20.0
    """Seconds that a run may take to finish its step and write a checkpoint after Ctrl-C or SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The driver: Ray, deadlines, reports."""

    ray_address: str | None = None
    """Address of a running Ray cluster; none starts a local one."""
    placement: Literal["auto", "separate", "shared"] = "auto"
    """GPUs: `separate` (every learner rank and engine has its own), `shared` (learner rank r and worker r are on the
    same one), `auto` (separate where there are enough, else in equal parts; without any, on the CPU)."""
    place_timeout_s: PositiveFloat = 30.0
    """Seconds an actor may wait for its resources before the run ends, naming them."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds an actor may take to load its model."""
    report_wait_s: PositiveFloat = 30.0
    """Seconds after which a wait for work says who waits for whom, again and again."""
    stall_s: PositiveFloat = 120.0
    """Seconds without any progress after which the process that all others wait for is killed and started again."""
    max_restarts: NonNegativeInt = 5
    """Deaths of one process within an hour after which it is started again; one more ends the run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out prompts, through the rollout workers of the run."""

    every: NonNegativeInt = 0
    """Train steps between evaluations; the first (step 0) and the last always run; 0 runs only those."""
    num_prompts: NonNegativeInt = 512
    """Held-out prompts sampled at `eval.temperature`; 0 leaves this out."""
    num_samples: PositiveInt = 1
    """Completions sampled of each of them: avg@k, pass@k and maj@k with k this number."""
    num_greedy_prompts: NonNegativeInt = 256
    """Held-out prompts decoded greedily in the first and the last evaluation; 0 leaves this out."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of `eval/accuracy`."""
    top_p: PositiveShare = 1.0
    """Nucleus of `eval/accuracy`."""
    top_k: NonNegativeInt = 0
    """Most likely tokens considered in `eval/accuracy`; 0 is all."""
    max_share: PositiveShare = 0.5
    """Largest share of the slots that an evaluation in the middle of the run may take."""
    keep_answers: bool = True
    """Write every answer with its verdict to RUN_DIR/eval/step-NNNNNN: answers.jsonl, and page.html to read them."""

    def __post_init__(self) -> None:
        if self.num_samples > 1 and self.temperature == 0:
            fix = "eval.temperature=1, or eval.num_samples=1"
            raise ConfigError(
                "eval.num_samples", "more than one are all the same at temperature 0", self.num_samples, fix
            )

    @property
    def num_held_out(self) -> int:
        """Held-out prompts that the evaluations of a run need."""
        return max(self.num_prompts, self.num_greedy_prompts)


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Faults on purpose, for tests of a whole run; at these defaults there are none."""

    seed: int = 0
    """Seed of all that is random here, so that a run that failed can be repeated."""
    drop: Share = 0.0
    """Share of the messages between workers, replay server and learner that are lost."""
    duplicate: Share = 0.0
    """Share of these messages that arrive twice."""
    reorder: Share = 0.0
    """Share of these messages that later ones overtake."""
    truncate: Share = 0.0
    """Share of these messages that lose the end of a frame."""
    delay_s: NonNegativeFloat = 0.0
    """Most seconds that a message is late, in the order of sending."""
    kill: tuple[str, ...] = ()
    """`process.point[:n]`: kill -9 of the process when it passes the point for the n-th time, once per run. The points
    are in asyncdapo/faults.py; learner.after_train:3 is one."""
    slow_worker_s: NonNegativeFloat = 0.0
    """Seconds that worker 0 takes longer over each group."""
    slow_disk_s: NonNegativeFloat = 0.0
    """Seconds that each ledger transaction and each checkpoint takes longer."""
    disk_full_after_mb: NonNegativeFloat = 0.0
    """MB that the replay server or the learner can write before the disk counts as full; 0 is no limit."""

    def __post_init__(self) -> None:
        for entry in self.kill:
            parse_kill(entry)
