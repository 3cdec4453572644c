"""Configuration of the loss and the learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import check_name, is_plugin
from asyncdapo.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share

VARIANTS = ("ppo", "gspo", "cispo")
ADVANTAGES = ("grpo", "dr_grpo", "rloo")
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "prompt-mean",
)
"""The names that `algorithm/variants.py` has, here without torch."""
DUAL_CLIP = 10.0
"""Without this bound a single token at log ratio 12 outweighs 100,000 others. Healthy runs hardly ever reach it."""
Beta = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss. The defaults are DAPO: a clipped ratio to the rollout log-probs, a mean over tokens, no KL penalty."""

    variant: str = "ppo"
    """What is clipped: `ppo` the ratio of each token, `gspo` the ratio of the whole response, `cispo` a constant
    weight. Or a function of yours: `path/to/file.py:name`, `package.module:name`."""
    anchor: Literal["behavior", "proximal"] = "behavior"
    """Policy that the ratio is taken against. `behavior`: the one that sampled the tokens. `proximal`: the one at the
    start of the train step; the ratio between these two policies is then a weight (`loss.correction`)."""
    clip_low: Share | None = None
    """ε_low: the ratio is clipped below at 1 − ε_low. null is 0.2; `gspo` needs a value."""
    clip_high: NonNegativeFloat | None = None
    """ε_high: the ratio is clipped above at 1 + ε_high (clip-higher, DAPO §3.1). null is 0.28; `gspo` needs a value."""
    dual_clip: Annotated[float, Meta(gt=1, extra={"fix": "null is none"})] | None = DUAL_CLIP
    """Upper bound of a token's loss, in units of |advantage|, where the advantage is negative. Tokens with a larger
    ratio have no gradient. null is no bound, as in the paper and always for `cispo`."""
    agg: str = "token-mean"
    """How the losses of an update's tokens become one number: `token-mean` (DAPO §3.3), `token-sum`,
    `seq-mean-token-sum`, `seq-mean-token-mean`, `seq-mean-token-sum-norm`, `prompt-mean`. Or a function of yours."""
    advantage: str = "grpo"
    """Advantage of a completion in its group: `grpo` is centred and divided by the group's standard deviation,
    `dr_grpo` is centred, `rloo` compares with the mean of the others. Or a function of yours."""
    correction: Literal["none", "token", "sequence", "geometric"] | None = None
    """Weight π_proximal / μ under `anchor: proximal`: of each `token`, of the `sequence` as a product, as a `geometric`
    mean, or `none`. null is `token`. Under `anchor: behavior` it has to be `none`, since the ratio already contains
    it."""
    correction_mode: Literal["truncate", "mask"] = "truncate"
    """`truncate` cuts a weight above the band to the end of the band (TIS). `mask` masks what has a weight outside of
    the band (IcePop)."""
    correction_band: tuple[float, float] = (0.0, 2.0)
    """Smallest and largest weight, both included. With `truncate` the smallest has to be 0. IcePop's own values are 0.5
    and 5."""
    outlier_band: tuple[float, float] | None = None
    """Tokens whose π / μ at the start of the train step lies outside of this band are masked. null masks none."""
    outlier_scope: Literal["token", "sequence"] = "token"
    """What is masked because of such a token: the token, or its whole response."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty against `model.reference`. At 0 no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence at each token (Schulman, 2020)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        check_name("loss.variant", self.variant, VARIANTS)
        check_name("loss.advantage", self.advantage, ADVANTAGES)
        check_name("loss.agg", self.agg, AGGREGATIONS)
        self._settle_defaults()
        if self.dual_clip is not None and self.variant not in ("ppo", "gspo"):
            problem = f"has no meaning for loss.variant {self.variant}"
            raise ConfigError("loss.dual_clip", problem, self.dual_clip, "use null")
        if self.anchor == "behavior" and self.correction != "none":
            problem = "would weigh by the ratio that loss.anchor behavior clips already"
            raise ConfigError("loss.correction", problem, self.correction, "use none, or loss.anchor=proximal")
        self._check_that_all_keys_act()
        if self.correction_mode == "truncate" and self.correction_band[0] != 0:
            fix = "begin it with 0, or loss.correction_mode=mask"
            raise ConfigError(
                "loss.correction_band", "has no lower end where weights are cut", self.correction_band, fix
            )
        for key in ("correction_band", "outlier_band"):
            band = getattr(self, key)
            if band is not None and not 0 <= band[0] < band[1]:
                raise ConfigError(f"loss.{key}", "must be two rising numbers, at least 0", band)
            if band is not None and not band[0] <= 1 <= band[1]:
                problem = "must hold 1, the ratio of tokens that nothing is wrong with"
                raise ConfigError(f"loss.{key}", problem, band)

    def _settle_defaults(self) -> None:
        """Fill in defaults that depend on other keys of this section, so that the effective values are on record."""
        for key, default in (("clip_low", 0.2), ("clip_high", 0.28)):
            if getattr(self, key) is None:
                if self.variant == "gspo":
                    fix = "its ratio moves far less than a token's: 3e-4 and 4e-4 in its paper"
                    raise ConfigError(f"loss.{key}", "must be given for loss.variant gspo", fix=fix)
                object.__setattr__(self, key, default)
        if self.variant not in ("ppo", "gspo") and self.dual_clip == DUAL_CLIP:
            object.__setattr__(self, "dual_clip", None)
        if self.correction is None:
            object.__setattr__(self, "correction", "token" if self.anchor == "proximal" else "none")

    def _check_that_all_keys_act(self) -> None:
        """A key that does nothing is refused: whoever set it expects another run."""
        acting = {
            "correction_mode": ("truncate", self.correction != "none", "loss.correction", "loss.anchor=proximal"),
            "correction_band": ((0.0, 2.0), self.correction != "none", "loss.correction", "loss.anchor=proximal"),
            "outlier_scope": ("token", self.outlier_band is not None, "loss.outlier_band", ""),
            "kl_estimator": ("k3", self.kl_coef > 0, "loss.kl_coef", ""),
        }
        for key, (default, acts, needed, fix) in acting.items():
            if getattr(self, key) != default and not acts:
                raise ConfigError(f"loss.{key}", f"does nothing without {needed}", getattr(self, key), fix)

    @property
    def needs_all_completions(self) -> bool:
        """Whether completions of advantage 0 have to be computed, too: for a loss term without an advantage, for a
        variant of the user's, which may have such a term, or for masks, which change the denominators."""
        return is_plugin(self.variant) or self.kl_coef > 0 or self.entropy_coef > 0 or self.masks_by_policy

    @property
    def masks_by_policy(self) -> bool:
        """Whether some masks depend on the learner's log-probs at the start of the train step."""
        return self.outlier_band is not None or (self.correction != "none" and self.correction_mode == "mask")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Optimizer, micro-batches and checkpoints."""

    lr: PositiveFloat = 1e-6
    """Learning rate of AdamW after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates over which the learning rate rises linearly."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm; larger ones are scaled down to it."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates in one pass over the batch. Each has an equal share of the batch's groups."""
    epochs: PositiveInt = 1
    """Passes over the batch in a train step."""
    ranks: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Processes that share the completions of every update. Each group of `shards` of them has one copy of the
    weights."""
    shards: PositiveInt | Literal["auto"] = "auto"
    """Consecutive ranks that divide one copy of the weights, gradients and optimizer states among them. With 1 every
    rank has a copy of its own. `auto` is the smallest number with which a rank fits a GPU of 80 GB by formula, and 1 on
    a CPU."""
    reshard_after_forward: bool = True
    """Whether a block's gathered weights are freed after its forward pass, and gathered again for the backward pass.
    That takes less memory and sends more bytes. With one shard there is nothing to gather."""
    offload: Literal["none", "optimizer"] = "none"
    """`optimizer` keeps the float32 weights and the optimizer states of a GPU's rank in host memory, and makes the
    updates there."""
    tokens_per_microbatch: PositiveInt = 4096
    """Tokens computed in one forward pass. This sets the memory; results don't depend on it."""
    max_bad_updates: PositiveInt = 3
    """Updates among the last 100 that may be skipped for a NaN or Inf in loss or gradient. One more ends the run."""
    checkpoint_every: PositiveInt = 50
    """Train steps between checkpoints; the first (step 0) and the last are always written."""
    keep_checkpoints: NonNegativeInt = 2
    """Newest checkpoints that are kept besides the first; 0 keeps all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes. `auto` is a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of forward and backward passes. `auto` is float32 on a CPU; on a GPU it is the engine's
    (`rollout.dtype`), so that both round alike. Weights, gradients and optimizer states are always float32."""
    compile: bool | None = None
    """Whether each block of the model goes through torch.compile. null: on a GPU it does."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping it: nothing, the MLP of each block (two thirds of the
    activations, 10 to 28 % more operations), or the whole block (nearly all activations, some 30 % more operations)."""
    threads: PositiveInt = 1
    """CPU threads of each rank."""
    profile_steps: tuple[int, int] | None = None
    """The first and the last of the train steps over which torch's profiler runs in every rank. Its trace, which may
    take 100 MB a step, goes to RUN_DIR/profile. null is none."""

    def __post_init__(self) -> None:
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            problem = "must be the first and the last step"
            raise ConfigError("learner.profile_steps", problem, list(self.profile_steps), "such as [10,12]")
        if self.num_shards > self.ranks:
            problem = f"must be at most learner.ranks, which is {self.ranks}"
            raise ConfigError("learner.shards", problem, self.shards, f"learner.ranks={self.shards}")
        if self.ranks % self.num_shards:
            fix = f"learner.ranks={self.ranks - self.ranks % self.num_shards}, or another learner.shards"
            raise ConfigError("learner.shards", f"must divide learner.ranks, which is {self.ranks}", self.shards, fix)
        if self.offload != "none" and self.device == "cpu":
            problem = "needs GPUs: on a CPU everything is in host memory already"
            raise ConfigError("learner.offload", problem, self.offload, "none")

    @property
    def num_shards(self) -> int:
        """1 until it is settled what `auto` stands for."""
        return 1 if self.shards == "auto" else self.shards
