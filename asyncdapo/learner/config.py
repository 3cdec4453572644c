"""Configuration of the loss and the learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.plugins import check_name, is_plugin
from asyncdapo.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share

DUAL_CLIP = 10.0
"""Without this bound a single token at log ratio 12 outweighs 100,000 others. Healthy runs hardly ever reach it."""
_CLIPS = {"clip_low": 0.2, "clip_high": 0.28}
Numbers = Mapping[str, float | tuple[float, float] | None]
VARIANTS: dict[str, Numbers] = {
    "ppo": {**_CLIPS, "dual_clip": DUAL_CLIP},
    "gspo": {"clip_low": None, "clip_high": None, "dual_clip": DUAL_CLIP},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4},
    "cispo": _CLIPS,
    "m2po": {"m2po_threshold": 0.04},
    "dppo_tv": {"clip_low": 0.15, "clip_high": 0.15, "dppo_ratio_cap": 20.0},
    "dppo_kl": {"clip_low": 0.05, "clip_high": 0.05, "dppo_ratio_cap": 20.0},
    "estr": {"estr_threshold": None, **_CLIPS, "dual_clip": DUAL_CLIP},
    "sapo": {"sapo_tau": (1.0, 1.05)},
    "vespo": {"vespo_k": (2.0, 3.0), "vespo_lambda": (3.0, 2.0)},
}
"""The losses of `algorithm/policy_loss.py`, here without torch: the keys that each has, with their defaults. None: it
has to be given."""
OWN_ANCHOR = ("m2po", "estr", "vespo")
"""Variants whose trust region is about the policy that sampled."""
MUST_BE_GIVEN = {
    "gspo": "its ratio moves far less than a token's: 3e-4 and 4e-4 in its paper",
    "estr": "largest (log ratio)² for each nat of entropy, such as 1",
}
ADVANTAGES = ("grpo", "dr_grpo", "rloo", "maxrl", "grpo_batch_std", "reinforce_pp", "reinforce_pp_baseline")
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "prompt-mean",
)
"""The names that `algorithm/advantages.py` and `averages.py` have, here without torch."""
Beta = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss. The defaults are DAPO: a clipped ratio to the rollout log-probs, a mean over tokens, no KL penalty."""

    variant: str = "ppo"
    """How far a token may move. Clipped: `ppo` the ratio of each token, `gspo` the ratio of the whole response, `gmpo`
    each token's before their geometric mean, `cispo` a constant weight. Masked: `m2po` by the second moment of an
    update, `dppo_tv` and `dppo_kl` by a divergence, `estr` by the ratio in units of the entropy. Gated: `sapo` the
    ratio of each token, `vespo` that of the whole response. Or a function of yours: `path/to/file.py:name`,
    `package.module:name`."""
    anchor: Literal["behavior", "proximal", "loglinear"] = "behavior"
    """Policy that the ratio is taken against. `behavior`: the one that sampled the tokens. `proximal`: the one at the
    start of the train step; the ratio between these two policies is then a weight (`loss.correction`). `loglinear`:
    as `proximal`, approximated from each token's staleness without a forward pass (A-3PO)."""
    clip_low: Share | None = None
    """ε_low: the ratio is clipped below at 1 − ε_low. `gmpo` clips log ratios at −ε_low; for `dppo_…` it is the largest
    divergence of a token that falls. null is 0.2; 0.4 for `gmpo`, 0.15 for `dppo_tv`, 0.05 for `dppo_kl`; `gspo` needs
    a value."""
    clip_high: NonNegativeFloat | None = None
    """ε_high: the ratio is clipped above at 1 + ε_high (clip-higher, DAPO §3.1). `gmpo` clips log ratios at ε_high; for
    `dppo_…` it is the largest divergence of a token that rises. null is 0.28, and as with `loss.clip_low`."""
    dual_clip: Annotated[float, Meta(gt=1, extra={"fix": "null is none"})] | None = DUAL_CLIP
    """Upper bound of a token's loss, in units of |advantage|, where the advantage is negative. Tokens with a larger
    ratio have no gradient. null is no bound, as in the paper and always but for `ppo`, `gspo` and `estr`."""
    dppo_ratio_cap: Annotated[float, Meta(gt=1)] | None = None
    """Largest ratio of a token under `dppo_…`; larger ones are truncated and keep their gradient. null is 20."""
    m2po_threshold: PositiveFloat | None = None
    """Under `m2po` the largest mean of (log ratio)² over the tokens of an update that are left. null is 0.04."""
    estr_threshold: PositiveFloat | None = None
    """Under `estr` the largest (log ratio)² / (entropy + 0.01) of a token; it has to be given."""
    sapo_tau: tuple[PositiveFloat, PositiveFloat] | None = None
    """Temperatures of `sapo`'s gate, for positive and for negative advantages. null is 1 and 1.05: negative ones are
    attenuated sooner."""
    vespo_k: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """k of `vespo`'s gate W^k e^(λ (1 − W)), for positive and for negative advantages. null is 2 and 3."""
    vespo_lambda: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """λ of that gate, for positive and for negative advantages. null is 3 and 2."""
    agg: str = "token-mean"
    """How the losses of an update's tokens become one number: `token-mean` (DAPO §3.3), `token-sum`,
    `seq-mean-token-sum`, `seq-mean-token-mean`, `seq-mean-token-sum-norm`, `prompt-mean`. Or a function of yours."""
    advantage: str = "grpo"
    """Advantage of a completion. In its group: `grpo` is centred and divided by the group's standard deviation,
    `dr_grpo` is centred, `rloo` compares with the mean of the others, `maxrl` is centred and divided by the mean. In
    the batch: `grpo_batch_std` is centred in the group and divided by the batch's standard deviation, `reinforce_pp`
    is centred in the batch, too, `reinforce_pp_baseline` first in the group. Or a function of yours, of a group."""
    correction: Literal["none", "token", "sequence", "geometric"] | None = None
    """Weight π_proximal / μ under the other anchors: of each `token`, of the `sequence` as a product, as a `geometric`
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
        self._settle_variant()
        if self.correction is None:
            object.__setattr__(self, "correction", "none" if self.anchor == "behavior" else "token")
        if self.anchor == "behavior" and self.correction != "none":
            problem = "would weigh by the ratio that loss.anchor behavior clips already"
            raise ConfigError("loss.correction", problem, self.correction, "use none, or loss.anchor=proximal")
        self._check_anchor()
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

    def _settle_variant(self) -> None:
        """Fill in what the variant has as defaults, so that the effective values are on record."""
        own = self._own_keys
        if "dual_clip" not in own and self.dual_clip == DUAL_CLIP:
            object.__setattr__(self, "dual_clip", None)
        for key in {key: None for keys in VARIANTS.values() for key in keys}:
            value = getattr(self, key)
            if key not in own and value is not None:
                fix = "use null, or loss.variant=" + next(name for name, keys in VARIANTS.items() if key in keys)
                raise ConfigError(f"loss.{key}", f"has no meaning for loss.variant {self.variant}", value, fix)
            if key in own and key != "dual_clip" and value is None:  # of a dual clip, null is none
                if own[key] is None:
                    fix = MUST_BE_GIVEN[self.variant]
                    raise ConfigError(f"loss.{key}", f"must be given for loss.variant {self.variant}", fix=fix)
                object.__setattr__(self, key, own[key])

    def _check_anchor(self) -> None:
        if self.anchor != "behavior" and self.variant in OWN_ANCHOR:
            problem = f"has no meaning for loss.variant {self.variant}, whose ratio is against what sampled"
            raise ConfigError("loss.anchor", problem, self.anchor, "use behavior")
        if self.anchor == "loglinear" and self.masks_by_policy:
            key = "correction_mode" if self.outlier_band is None else "outlier_band"
            problem = "needs the forward pass that loss.anchor loglinear saves"
            raise ConfigError(f"loss.{key}", problem, getattr(self, key), "loss.anchor=proximal")

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
    def _own_keys(self) -> Numbers:
        """The variant's, with their defaults; a function of the user's is given the clips."""
        return _CLIPS if is_plugin(self.variant) else VARIANTS[self.variant]

    @property
    def numbers(self) -> dict[str, Any]:
        """What the variant's loss is called with. M2PO's threshold is of an update, not of a token."""
        return {key: getattr(self, key) for key in self._own_keys if key != "m2po_threshold"}

    @property
    def needs_all_completions(self) -> bool:
        """Whether completions of advantage 0 have to be computed, too: for a loss term without an advantage, for a
        variant of the user's, which may have such a term, for masks, which change the denominators, or for a mean over
        all tokens of an update."""
        by_all = is_plugin(self.variant) or self.m2po_threshold is not None or self.masks_by_policy
        return by_all or self.kl_coef > 0 or self.entropy_coef > 0

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
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after warm-up: `constant`, or falling to 0 over the updates of `run.steps`, in a line or along
    half a cosine. It follows the updates made, so that a resumed run continues where it was; with other `run.steps` on
    the curve of that number."""
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of forward and backward passes. `auto` is float32 on a CPU; on a GPU it is the engine's
    (`rollout.dtype`), so that both round alike. Under `float16` the loss is scaled. Weights, gradients and optimizer
    states are always float32."""
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

    def num_updates(self, steps: int) -> int:
        """Optimizer updates of so many train steps."""
        return steps * self.updates_per_step * self.epochs

    @property
    def num_shards(self) -> int:
        """1 until it is settled what `auto` stands for."""
        return 1 if self.shards == "auto" else self.shards
