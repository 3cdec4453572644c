"""Configuration of the model, the loss and the learner."""

from __future__ import annotations

from dataclasses import dataclass

from asyncdapo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The causal language model to train."""

    path: str
    """Hugging Face id, or a directory with safetensors and tokenizer.json (relative to here or to the config file)."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model.path", "is empty", fix="a Hugging Face id or a directory")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The DAPO loss: clipped importance ratio on the rollout log-probs, token mean, no KL."""

    clip_low: float = 0.2
    """ε_low: the ratio is clipped below at 1 − ε_low."""
    clip_high: float = 0.28
    """ε_high: the ratio is clipped above at 1 + ε_high (clip-higher, DAPO §3.1)."""
    dual_clip: float | None = None
    """Upper bound of the loss, in units of |advantage|, where the advantage is negative; none by default."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ConfigError("loss.clip_low", "must be between 0 and 1", self.clip_low)
        if self.clip_high < 0:
            raise ConfigError("loss.clip_high", "must be at least 0", self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError("loss.dual_clip", "must be above 1 (or null)", self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Optimizer, micro-batches and checkpoints."""

    lr: float = 1e-6
    """Learning rate of AdamW after warm-up."""
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger ones are scaled down to it."""
    updates_per_step: int = 1
    """Optimizer updates in a train step, each on an equal share of the batch's groups."""
    tokens_per_microbatch: int = 4096
    """Padded tokens in one forward pass: the memory knob; results don't depend on it."""
    max_bad_updates: int = 3
    """Updates skipped for a NaN or Inf loss or gradient before the run ends."""
    checkpoint_every: int = 50
    """Train steps between checkpoints; the first (step 0) and the last are always written."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept besides the first; 0 keeps all."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu` or `cuda`."""
    threads: int = 1
    """CPU threads of the learner."""

    def __post_init__(self) -> None:
        for key in ("updates_per_step", "tokens_per_microbatch", "max_bad_updates", "checkpoint_every", "threads"):
            if getattr(self, key) < 1:
                raise ConfigError(f"learner.{key}", "must be at least 1", getattr(self, key))
        for key in ("warmup_steps", "weight_decay", "keep_checkpoints"):
            if getattr(self, key) < 0:
                raise ConfigError(f"learner.{key}", "must be at least 0", getattr(self, key))
        for key in ("lr", "grad_clip", "eps"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"learner.{key}", "must be above 0", getattr(self, key))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("learner.betas", "must both be at least 0 and below 1", self.betas)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError("learner.device", "must be auto, cpu or cuda", self.device)
