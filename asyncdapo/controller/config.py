"""Configuration of the run as a whole, of the controller, and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the run is called, where it lives, how long it goes on."""

    name: str = "run"
    """Name shown on the terminal and in W&B."""
    dir: str = "runs/${run.name}"
    """Run directory: config, ledger, metrics, checkpoints, logs."""
    seed: int = 0
    """Seed of the prompt order, the sampling and the model's own randomness."""
    steps: int = 100
    """Train steps after which the run ends."""

    def __post_init__(self) -> None:
        if not self.dir:
            raise ConfigError("run.dir", "is empty")
        if self.steps < 1:
            raise ConfigError("run.steps", "must be at least 1", self.steps)


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """The driver: Ray, deadlines, reports."""

    ray_address: str | None = None
    """Address of a running Ray cluster; none starts a local one."""
    place_timeout_s: float = 30.0
    """Seconds an actor may wait for its resources before the run ends, naming them."""
    start_timeout_s: float = 600.0
    """Seconds an actor may take to load its model."""
    report_wait_s: float = 30.0
    """Seconds after which a wait for work says who waits for whom, again and again."""

    def __post_init__(self) -> None:
        for key in ("place_timeout_s", "start_timeout_s", "report_wait_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"controller.{key}", "must be above 0", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out prompts, through the rollout workers of the run."""

    every: int = 0
    """Train steps between evaluations; the first (step 0) and the last always run; 0 runs only those."""
    num_prompts: int = 512
    """Held-out prompts sampled once each at `eval.temperature`; 0 leaves this out."""
    num_greedy_prompts: int = 256
    """Held-out prompts decoded greedily in the first and the last evaluation; 0 leaves this out."""
    temperature: float = 1.0
    """Sampling temperature of `eval/accuracy`."""
    top_p: float = 1.0
    """Nucleus of `eval/accuracy`."""
    top_k: int = 0
    """Most likely tokens considered in `eval/accuracy`; 0 is all."""
    max_share: float = 0.5
    """Largest share of the slots that an evaluation in the middle of the run may take."""

    def __post_init__(self) -> None:
        for key in ("every", "num_prompts", "num_greedy_prompts", "temperature", "top_k"):
            if getattr(self, key) < 0:
                raise ConfigError(f"eval.{key}", "must be at least 0", getattr(self, key))
        for key in ("top_p", "max_share"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"eval.{key}", "must be above 0 and at most 1", getattr(self, key))

    @property
    def num_held_out(self) -> int:
        """Held-out prompts that the evaluations of a run need."""
        return max(self.num_prompts, self.num_greedy_prompts)
