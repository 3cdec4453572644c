"""Configuration of the run as a whole, of the controller, and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, directory, seed and length of the run."""

    name: str = "run"
    """Name shown on the terminal and in W&B."""
    dir: Annotated[str, Meta(min_length=1)] = "runs/${run.name}"
    """Directory of the run: config, ledger, metrics, checkpoints and logs."""
    seed: int = 0
    """Seed of the prompt order, the sampling and the model's own randomness."""
    steps: PositiveInt = 100
    """Train steps after which the run ends."""
    stop_s: PositiveFloat = 20.0
    """Seconds that a run may take to finish its step and copy a checkpoint after Ctrl-C or SIGTERM, and again to write
    it."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The driver: where the processes of a run live, and their deadlines."""

    ray_address: str | None = None
    """Address of a running Ray cluster to join. null starts Ray on this machine."""
    placement: Literal["auto", "separate", "shared"] = "auto"
    """How GPUs are given out. `separate`: every learner rank and every engine has its own. `shared`: learner rank r and
    rollout worker r share one. `auto`: separate if there are enough GPUs, else equal parts; without a GPU, everything
    is on the CPU."""
    place_timeout_s: PositiveFloat = 30.0
    """Seconds that a process may wait for its CPUs and GPUs. After that the run ends and names what is missing."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds that a process may take to start and load its model."""
    report_wait_s: PositiveFloat = 30.0
    """Seconds between reports on a wait for work. A report says who waits for whom."""
    stall_s: PositiveFloat = 120.0
    """Seconds without any progress after which the process that all others wait for is killed and started again."""
    max_restarts: NonNegativeInt = 5
    """Deaths of one process within an hour after which it is started again. One more ends the run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out prompts, through the rollout workers of the run."""

    every: NonNegativeInt = 0
    """Train steps between evaluations. The initial and the final model are always evaluated; 0 evaluates only these
    two."""
    num_prompts: NonNegativeInt = 512
    """Held-out prompts that are sampled at `eval.temperature`; 0 leaves this part out."""
    num_samples: PositiveInt = 1
    """Completions of each of these prompts: the k of avg@k, pass@k and maj@k."""
    num_greedy_prompts: NonNegativeInt = 256
    """Held-out prompts that are decoded greedily, in the first and the last evaluation only; 0 leaves this part out."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature of `eval/accuracy`."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling (top-p) of `eval/accuracy`; 1 is off."""
    top_k: NonNegativeInt = 0
    """Number of most likely tokens that are considered for `eval/accuracy`; 0 is all of them."""
    max_share: PositiveShare = 0.5
    """Share of the sequences that begin while an evaluation has prompts left: so many are its own. The others are
    training's, and those that training doesn't want are the evaluation's, too."""
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
