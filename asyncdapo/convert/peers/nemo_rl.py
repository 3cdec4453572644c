"""NeMo RL's keys: rules, defaults, and keys without a counterpart."""

from __future__ import annotations

from asyncdapo.convert import data_files, gpus, turns
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.peers import nemo_rl_data as data
from asyncdapo.convert.peers import nemo_rl_values as its
from asyncdapo.convert.rules import Differs, Left, Made, Peer, Rank, Rule, chat_template, flag, number, same, text

PROMPTS, GROUP, UPDATE = (
    "grpo.num_prompts_per_step",
    "grpo.num_generations_per_prompt",
    "policy.train_global_batch_size",
)
STEP = (PROMPTS, GROUP, UPDATE)
SCALING, SHAPING, ASYNC = "grpo.reward_scaling.", "grpo.reward_shaping.", "grpo.async_grpo."
LENGTHS = ("policy.generation.max_new_tokens", "policy.max_total_sequence_length", "data.max_input_seq_length")
VLLM = "policy.generation.vllm_cfg."
TOGETHER = "policy.generation.colocated.enabled"
GPUS = ("cluster.num_nodes", "cluster.gpus_per_node", f"{VLLM}tensor_parallel_size", TOGETHER)
TIS = "loss_fn.truncated_importance_sampling_"
WEIGHTS = ("loss_fn.use_importance_sampling_correction", f"{TIS}type")
AHEAD, STALE = "async_rl.sampler.max_lookahead_versions", "async_rl.sampler.max_staleness_versions"
MEGATRON, DTENSOR = "policy.megatron_cfg.", "policy.dtensor_cfg."
ESTIMATOR = "grpo.adv_estimator."
TEMPLATE = ("data.train.prompt_file", "data.default.prompt_file")
THINKING = "policy.tokenizer.chat_template_kwargs.enable_thinking"
SYSTEM = ("data.train.system_prompt_file", "data.default.system_prompt_file")


OVERLONG = (f"{SHAPING}max_response_length", f"{SHAPING}stop_properly_penalty_coef", *LENGTHS)
SCALE = tuple(f"{SCALING}{key}" for key in ("enabled", "source_min", "source_max", "target_min", "target_max"))

RULES = (
    text("run.name", "logger.wandb.name"),
    text("run.dir", "checkpointing.checkpoint_dir"),
    same("run.seed", "grpo.seed"),
    same("run.steps", "grpo.max_num_steps"),
    text("model.path", "policy.model_name"),
    Rule("model.tokenizer", ("policy.tokenizer.name", "policy.model_name"), its.tokenizer),
    Rule("prompts.task", ("data.train.dataset_name",), lambda name: "file" if name in data.DATA_SETS else None),
    Rule("prompts.task", ("data.train.data_path",), lambda path: "file"),
    Rule("prompts.path", ("data.train.data_path",), data_files.train_data),
    Rule("prompts.path", ("data.train.dataset_name", *TEMPLATE, *SYSTEM), data.train_data),
    Rule("prompts.eval_path", ("data.validation.data_path",), data_files.held_out),
    Rule("prompts.eval_path", ("data.validation.dataset_name", *TEMPLATE, *SYSTEM), data.eval_data),
    Rule("prompts.chat_template", ("data.train.dataset_name", THINKING), chat_template),
    Rule("prompts.chat_template", ("data.train.data_path", THINKING), chat_template),
    Rule("prompts.template", TEMPLATE, data.template),
    Rule("prompts.system_prompt", SYSTEM, lambda *texts: next((text for text in texts if text), None)),
    same("prompts.max_prompt_length", "data.max_input_seq_length"),
    Rule("prompts.epochs", ("grpo.max_num_epochs", "data.train.dataset_name", "data.train.data_path"), data.epochs),
    Rule("rollout.engine", ("policy.generation.backend",), mean.engine),
    *gpus.rules(GPUS, its.gpus_of),
    same("rollout.tensor_parallel", f"{VLLM}tensor_parallel_size"),
    same("rollout.memory_fraction", f"{VLLM}gpu_memory_utilization"),
    same("rollout.engine_args.enforce_eager", f"{VLLM}enforce_eager"),
    Rule("rollout.group_size", (GROUP,), mean.group),
    Rule("rollout.max_response_length", LENGTHS, its.response_length),
    same("rollout.temperature", "policy.generation.temperature"),
    Rule("", ("policy.generation.top_p",), mean.whole_distribution),
    Rule("", ("policy.generation.top_k",), mean.whole_distribution),
    Rule(
        "rollout.on_update",
        (f"{ASYNC}recompute_kv_cache_after_weight_updates",),
        lambda recompute: "recompute" if flag(recompute) else "keep",
    ),
    Rule("rollout.dtype", ("policy.precision",), mean.dtype),
    *turns.NEMO_RULES,
    turns.unless(
        turns.nemo_several,
        turns.NEMO_KEYS,
        Rule(
            "reward.verifier",
            ("env.math.math_verify_impl", *turns.NEMO_NAMES, "data.train.dataset_name", "data.train.data_path"),
            its.verifier,
        ),
    ),
    *(
        turns.unless(turns.nemo_several, turns.NEMO_KEYS, Rule("", (key,), its.own_environment))
        for key in turns.NEMO_NAMES
    ),
    *(mean.otherwise(*entry) for entry in its.OTHERWISE),
    Rule("", (f"{SHAPING}stop_properly_penalty_coef", f"{SHAPING}enabled"), its.stop_properly),
    Rule("reward.correct", SCALE, lambda *scaling: its.scaled(1.0, *scaling)),
    Rule("reward.incorrect", SCALE, lambda *scaling: its.scaled(0.0, *scaling)),
    Rule(
        "reward.overlong_buffer",
        (f"{SHAPING}overlong_buffer_length", f"{SHAPING}enabled", f"{SHAPING}overlong_buffer_penalty", *OVERLONG),
        its.overlong_buffer,
    ),
    Rule(
        "reward.overlong_penalty",
        (f"{SHAPING}overlong_buffer_penalty", f"{SHAPING}enabled", f"{SHAPING}overlong_buffer_length", *OVERLONG),
        its.overlong_penalty,
    ),
    Rule("reward.overlong_filter", ("grpo.overlong_filtering",), flag),
    Rule("filter.enabled", ("grpo.use_dynamic_sampling",), flag),
    Rule(
        "filter.metric",
        ("grpo.use_dynamic_sampling",),
        lambda on: Made("score", "the scaled reward, before it is shaped") if flag(on) else None,
    ),
    Rule(
        "filter.max_gen_batches",
        ("grpo.dynamic_sampling_max_gen_batches", "grpo.use_dynamic_sampling"),
        its.gen_batches,
    ),
    Rule("filter.gen_batch_multiplier", ("grpo.batch_multiplier", "grpo.use_dynamic_sampling"), its.multiplier),
    same("replay.prompts_per_step", PROMPTS),
    Rule(
        "replay.run_ahead",
        (f"{ASYNC}max_trajectory_age_steps", f"{ASYNC}enabled"),
        lambda steps, on: float(steps) if flag(on) and steps is not None else Left("async_grpo.enabled is false"),
    ),
    Rule("replay.run_ahead", (AHEAD,), lambda versions: None if versions is None else float(versions)),
    Rule("replay.run_ahead", (STALE,), lambda versions: None if versions is None else float(versions)),
    same("replay.max_staleness", STALE),
    same("replay.max_staleness", AHEAD),
    Rule("replay.max_staleness", (f"{ASYNC}max_trajectory_age_steps", f"{ASYNC}enabled"), its.when_async),
    Rule("loss.variant", ("loss_fn.sequence_level_importance_ratios", "loss_fn.use_cispo"), its.variant),
    Rule("loss.anchor", WEIGHTS, lambda use, kind: "proximal" if flag(use) else None),
    Rule("loss.correction", WEIGHTS, its.correction),
    Rule("loss.correction_mode", (f"{TIS}type", WEIGHTS[0]), its.correction_mode),
    Rule("loss.correction_band", (f"{TIS}ratio", f"{TIS}ratio_min", *WEIGHTS), its.band),
    same("loss.clip_low", "loss_fn.ratio_clip_min"),
    same("loss.clip_high", "loss_fn.ratio_clip_max"),
    Rule("loss.dual_clip", ("loss_fn.ratio_clip_c",), mean.dual_clip),
    Rule(
        "loss.agg",
        ("loss_fn.token_level_loss",),
        lambda tokens: "token-mean" if flag(tokens) else "seq-mean-token-mean",
    ),
    Rule(
        "",
        (f"{ESTIMATOR}name",),
        lambda name: None if name in (None, "grpo") else mean.advantage_of(name, {}),
    ),
    Rule(
        "loss.advantage",
        (
            "grpo.normalize_rewards",
            "grpo.use_leave_one_out_baseline",
            f"{ESTIMATOR}name",
            f"{ESTIMATOR}normalize_rewards",
            f"{ESTIMATOR}use_leave_one_out_baseline",
        ),
        its.advantage,
    ),
    Rule("loss.kl_coef", ("loss_fn.reference_policy_kl_penalty",), number),
    Rule(
        "loss.kl_estimator",
        ("loss_fn.reference_policy_kl_type", "loss_fn.reference_policy_kl_penalty"),
        lambda name, coef: mean.estimator(name, True, coef, {"k1": "k1", "k2": "k2", "k3": "k3"}),
    ),
    *(
        Rule(f"learner.{ours}", (f"{MEGATRON}optimizer.{theirs}", f"{MEGATRON}enabled"), its.megatron)
        for ours, theirs in (("lr", "lr"), ("weight_decay", "weight_decay"), ("eps", "adam_eps"))
    ),
    same("learner.lr", "policy.optimizer.kwargs.lr"),
    Rule(
        "learner.warmup_steps",
        (f"{MEGATRON}scheduler.lr_warmup_iters", f"{MEGATRON}enabled", *STEP),
        lambda steps, on, *step: mean.warmup(steps, its._per_step(*step)) if flag(on) else None,
    ),
    Rule("learner.warmup_steps", ("policy.scheduler", *STEP), its.warmup),
    Rule("learner.betas", ("policy.optimizer.kwargs.betas",), list),
    same("learner.eps", "policy.optimizer.kwargs.eps"),
    same("learner.weight_decay", "policy.optimizer.kwargs.weight_decay"),
    same("learner.grad_clip", "policy.max_grad_norm"),
    Rule("learner.updates_per_step", STEP, its.updates_per_step),
    same("learner.epochs", "grpo.ppo_epochs"),
    Rule(
        "learner.tokens_per_microbatch",
        (
            "policy.train_micro_batch_size",
            "policy.max_total_sequence_length",
            "policy.sequence_packing.enabled",
            "policy.sequence_packing.train_mb_tokens",
        ),
        its.microbatch,
    ),
    Rule("learner.activation_checkpointing", (f"{DTENSOR}activation_checkpointing",), mean.checkpointing),
    Rule("learner.offload", (f"{DTENSOR}cpu_offload",), mean.offload),
    Rule("learner.offload", (f"{MEGATRON}optimizer.optimizer_cpu_offload", f"{MEGATRON}enabled"), its.offload),
    Rule("learner.checkpoint_every", ("checkpointing.save_period",), mean.saves),
    Rule(
        "learner.keep_checkpoints",
        ("checkpointing.keep_top_k",),
        lambda keep: Made(mean.kept_checkpoints(keep), "the newest here, the best there"),
    ),
    Rule("eval.every", ("grpo.val_period",), mean.every),
    Rule("eval.num_prompts", ("grpo.max_val_samples", "data.validation.dataset_name"), data.eval_prompts),
    Rule(
        "eval.num_samples",
        (
            "grpo.val_num_generations_per_prompt",
            "data.validation.dataset_name",
            "data.validation.repeat",
            "data.validation.data_path",
        ),
        data.eval_samples,
    ),
    Rule(
        "eval.num_greedy_prompts", ("grpo.max_val_samples",), lambda rows: Made(0, "they have one evaluation, not two")
    ),
    Rule("eval.temperature", ("policy.generation.val_temperature",), number),
    Rule("eval.temperature", ("policy.generation.temperature",), number),
    same("eval.top_p", "policy.generation.val_top_p"),
    Rule("eval.top_k", ("policy.generation.val_top_k",), mean.top_k),
    Rule(
        "metrics.sinks",
        ("logger.wandb_enabled", "logger.tensorboard_enabled"),
        lambda *enabled: [name for name, on in zip(("wandb", "tensorboard"), enabled, strict=True) if flag(on)],
    ),
    text("metrics.wandb_project", "logger.wandb.project"),
)

DEFAULTS = {
    "data.train.dataset_name": "OpenMathInstruct-2",
    "policy.model_name": "Qwen/Qwen2.5-1.5B",
    PROMPTS: 32,
    GROUP: 16,
    UPDATE: 512,
    "grpo.normalize_rewards": True,
    "grpo.use_leave_one_out_baseline": True,
    "grpo.use_dynamic_sampling": False,
    "grpo.dynamic_sampling_max_gen_batches": 10,
    "grpo.max_num_epochs": 1,
    "grpo.max_num_steps": 1_000_000,
    "grpo.seed": 42,
    "grpo.val_period": 10,
    "grpo.max_val_samples": 256,
    f"{SCALING}enabled": False,
    f"{SHAPING}overlong_buffer_penalty": 1.0,
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.2,
    "loss_fn.ratio_clip_c": None,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "loss_fn.token_level_loss": True,
    "policy.max_total_sequence_length": 512,
    "policy.precision": "bfloat16",
    "policy.optimizer.kwargs.lr": 5e-6,
    "policy.optimizer.kwargs.weight_decay": 0.01,
    "policy.max_grad_norm": 1.0,
    "policy.scheduler": [{"name": "torch.optim.lr_scheduler.LinearLR", "kwargs": {"total_iters": 50}}],
    "policy.generation.backend": "vllm",
    "checkpointing.save_period": 10,
    "checkpointing.keep_top_k": 3,
    TOGETHER: True,
}

WITHOUT = (
    (f"{SHAPING}*", "reward_shaping has no length punishment"),
    (f"{ASYNC}*", "weights are always updated while sequences run here; see replay.run_ahead, replay.max_staleness"),
    ("grpo.val_batch_size", "evaluation fills whatever slots are free here"),
    ("grpo.val_at_*", "the first and the last evaluation always run here"),
    ("grpo.val_start_at", "the first and the last evaluation always run here"),
    (f"{ESTIMATOR}*", "loss.advantage: grpo, dr_grpo, rloo"),
    ("grpo.*", "no such method here"),
    ("loss_fn.*", "no such part of the loss here"),
    ("policy.hf_config_overrides.*", "the model's own config.json counts here: change it there"),
    ("policy.tokenizer.*", "the tokenizer is used unchanged here"),
    ("policy.optimizer.name", "AdamW here"),
    (
        "policy.generation.vllm_cfg.*",
        mean.ENGINE,
    ),
    ("policy.generation.*", mean.ENGINE),
    (f"{DTENSOR}context_parallel_size", mean.SEQUENCE),
    (f"{DTENSOR}*parallel*", mean.PARALLEL),
    (f"{MEGATRON}context_parallel_size", mean.SEQUENCE),
    (f"{MEGATRON}*parallel*", mean.PARALLEL),
    ("policy.offload_optimizer_for_logprob", mean.BETWEEN),
    (f"{MEGATRON}*", "belongs to their Megatron trainer, and is off or has no counterpart"),
    ("policy.*", mean.SPEED),
    ("checkpointing.*", "checkpoints hold the model's own files and all of the optimizer here"),
    ("data.*", "asyncdapo data prepare and prompts.* here"),
    ("env.*", f"reward.* here; for their environments see docs/reward.md, and {turns.PAGE} for several turns"),
    ("logger.*", "RUN_DIR/metrics.jsonl and metrics.sinks here"),
    ("cluster.*", "controller.ray_address joins a cluster, which must be running"),
    ("reward_penalties.*", "reward.verifier may be your own function (docs/reward.md)"),
    ("async_rl.*", "belongs to their way of running ahead; see replay.run_ahead, replay.max_staleness"),
    ("value.*", mean.CRITIC),
    ("value_loss_fn.*", mean.CRITIC),
    ("data_plane.*", mean.SPEED),
    ("on_policy_distillation*", "no distillation here"),
)

PEER = Peer(
    title="NeMo RL",
    source="NVIDIA-NeMo/RL 7ea279ab",
    rules=RULES,
    defaults=DEFAULTS,
    without=WITHOUT,
    differs=(
        *mean.SYNCHRONOUS,
        mean.SURPLUS,
        Differs(
            "Its k3 is clamped at 10, and its log ratio at 20; here only the latter",
            Rank.DETAIL,
            lambda made: bool(made.get("loss.kl_coef")),
        ),
    ),
    others=("sft.*", "dpo.*", "rm.*", "distillation.*"),
    texts=(*TEMPLATE, *SYSTEM),
    aliases=(
        ("ppo.async_ppo.", ASYNC),
        ("ppo.", "grpo."),
        ("grpo.dapo_batch_multiplier", "grpo.batch_multiplier"),
        ("grpo.max_num_gen_batches", "grpo.dynamic_sampling_max_gen_batches"),
    ),
)
