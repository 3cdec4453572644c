"""SkyRL's keys: rules, defaults, and keys without a counterpart."""

from __future__ import annotations

from asyncdapo.convert import data_files, gpus, turns
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.peers import skyrl_values as its
from asyncdapo.convert.peers.skyrl_values import ALGORITHM, POLICY, SAMPLING
from asyncdapo.convert.rules import Differs, Left, Made, Peer, Rank, Rule, flag, same, text, whole

OPTIMIZER = f"{POLICY}optimizer_config."
ENGINE = "generator.inference_engine."
EVALUATION = "generator.eval_sampling_params."
DYNAMIC = f"{ALGORITHM}dynamic_sampling."
CORRECTION = f"{ALGORITHM}off_policy_correction."
ASYNC = "trainer.fully_async."
TRAIN, MINI = "trainer.train_batch_size", "trainer.policy_mini_batch_size"
STEP = (TRAIN, MINI, f"{ASYNC}enabled")
GPUS = (
    "trainer.placement.policy_num_nodes",
    "trainer.placement.policy_num_gpus_per_node",
    f"{ENGINE}tensor_parallel_size",
    "trainer.placement.colocate_all",
    f"{ENGINE}num_engines",
)

FSDP, MEGATRON = f"{POLICY}fsdp_config.", f"{POLICY}megatron_config."

LOSSES = {"regular": "ppo", "dual_clip": "ppo", "gspo": "gspo", "cispo": "cispo", "sapo": "sapo"}
EVALUATED = tuple(f"{EVALUATION}{key}" for key in ("temperature", "top_p", "max_generate_length", "top_k", "min_p"))


RULES = (
    text("run.name", "trainer.run_name"),
    text("run.dir", "trainer.ckpt_path"),
    same("run.seed", "trainer.seed"),
    same("run.steps", "trainer.max_training_steps"),
    Rule("run.steps", (), lambda: Made(mean.NO_LIMIT, "theirs ends with its data")),
    text("model.path", f"{POLICY}model.path"),
    Rule(
        "model.reference",
        ("trainer.ref.model.path", f"{ALGORITHM}use_kl_loss", f"{POLICY}model.path"),
        lambda path, use, own: path if flag(use) and path != own else None,
    ),
    *data_files.rules("data.train_data", "data.val_data", "generator.chat_template_kwargs"),
    same("prompts.max_prompt_length", "trainer.max_prompt_length"),
    Rule("prompts.epochs", ("trainer.epochs", "data.train_data"), data_files.epochs),
    Rule("rollout.engine", (f"{ENGINE}backend",), mean.engine),
    *gpus.rules(GPUS, its.gpus_of),
    same("rollout.tensor_parallel", f"{ENGINE}tensor_parallel_size"),
    same("rollout.memory_fraction", f"{ENGINE}gpu_memory_utilization"),
    *(
        same(f"rollout.engine_args.{key}", f"{ENGINE}{key}")
        for key in ("enforce_eager", "enable_chunked_prefill", "enable_prefix_caching", "max_num_batched_tokens")
    ),
    same("rollout.slots", f"{ENGINE}max_num_seqs"),
    Rule("rollout.group_size", ("generator.n_samples_per_prompt",), mean.group),
    same("rollout.temperature", f"{SAMPLING}temperature"),
    Rule("", (f"{SAMPLING}top_p",), mean.whole_distribution),
    Rule("", (f"{SAMPLING}top_k",), mean.whole_distribution),
    Rule(
        "rollout.on_update",
        (f"{ASYNC}clear_kv_cache_on_weight_sync",),
        lambda clear: "recompute" if flag(clear) else "keep",
    ),
    Rule("rollout.dtype", (f"{ENGINE}model_dtype",), mean.dtype),
    *turns.SKYRL_RULES,
    turns.unless(
        turns.skyrl_several, turns.SKYRL_KEYS, Rule("reward.verifier", ("environment.env_class",), its.verifier)
    ),
    turns.unless(turns.skyrl_several, turns.SKYRL_KEYS, Rule("", ("environment.env_class",), its.own_environment)),
    Rule("reward.incorrect", ("environment.env_class",), lambda name: 0.0 if name == "gsm8k" else None),
    same("reward.overlong_buffer", f"{ALGORITHM}overlong_buffer_len"),
    same("reward.overlong_penalty", f"{ALGORITHM}overlong_buffer_penalty_factor"),
    Rule("reward.overlong_filter", ("generator.apply_overlong_filtering",), flag),
    Rule("filter.enabled", (f"{DYNAMIC}type", f"{ASYNC}sample_full_batch"), its.dynamic),
    Rule("filter.mode", (f"{DYNAMIC}type",), lambda kind: "replace" if kind == "replace" else None),
    Rule(
        "filter.metric",
        (f"{DYNAMIC}type",),
        lambda kind: Made("score", "their reward, before its overlong punishment") if kind else None,
    ),
    Rule("filter.max_gen_batches", (f"{DYNAMIC}max_sample_batches", f"{DYNAMIC}type"), its.gen_batches),
    Rule("replay.prompts_per_step", STEP, its.prompts_per_step),
    Rule(
        "replay.run_ahead",
        (f"{ASYNC}max_staleness_steps", f"{ASYNC}enabled"),
        lambda steps, on: (
            float(whole(steps)) if flag(on) and steps is not None else Left("fully_async.enabled is false")
        ),
    ),
    Rule(
        "replay.max_staleness",
        (f"{ASYNC}max_staleness_steps", f"{ASYNC}enabled"),
        lambda steps, on: whole(steps) if flag(on) and steps is not None else None,
    ),
    Rule("loss.variant", (f"{ALGORITHM}policy_loss_type",), lambda loss: mean.known_loss(loss, LOSSES)),
    Rule("loss.anchor", (f"{CORRECTION}tis_ratio_type", f"{CORRECTION}sequence_mask_metric"), its.anchor),
    Rule("loss.correction", (f"{CORRECTION}tis_ratio_type", f"{CORRECTION}sequence_mask_metric"), its.correction),
    Rule("loss.correction_mode", (f"{CORRECTION}sequence_mask_metric", f"{CORRECTION}tis_ratio_type"), its.mask_too),
    *(
        Rule(
            "loss.correction_band",
            tuple(f"{CORRECTION}{key}" if key else "" for key in (high, low, kind, "tis_ratio_type")),
            lambda high, low, kind, tis, wanted=wanted: its.band(high, low, kind, tis, wanted),
        )
        for high, low, kind, wanted in (
            ("token_tis_ratio_clip_high", "", "tis_ratio_type", "token"),
            ("sequence_tis_ratio_clip_high", "", "tis_ratio_type", "sequence"),
            ("geo_mask_high", "geo_mask_low", "sequence_mask_metric", "geometric"),
            ("product_mask_high", "product_mask_low", "sequence_mask_metric", "product"),
        )
    ),
    Rule(
        "loss.outlier_band",
        (f"{CORRECTION}token_mask_is_threshold_low", f"{CORRECTION}token_mask_is_threshold_high"),
        its.outliers,
    ),
    Rule(
        "loss.outlier_band",
        (f"{CORRECTION}outlier_token_is_threshold_low", f"{CORRECTION}outlier_token_is_threshold_high"),
        its.outliers,
    ),
    Rule(
        "loss.outlier_scope",
        (
            f"{CORRECTION}outlier_token_is_threshold_low",
            f"{CORRECTION}outlier_token_is_threshold_high",
            f"{CORRECTION}token_mask_is_threshold_low",
            f"{CORRECTION}token_mask_is_threshold_high",
        ),
        lambda low, high, *tokens: "sequence" if (low, high) != (None, None) and not any(tokens) else None,
    ),
    Rule(
        "loss.clip_low",
        (f"{ALGORITHM}eps_clip_low", f"{ALGORITHM}policy_loss_type", f"{ALGORITHM}cispo.cispo_eps_clip_low"),
        its.clip,
    ),
    Rule(
        "loss.clip_high",
        (f"{ALGORITHM}eps_clip_high", f"{ALGORITHM}policy_loss_type", f"{ALGORITHM}cispo.cispo_eps_clip_high"),
        its.clip,
    ),
    Rule(
        "loss.sapo_tau",
        (f"{ALGORITHM}sapo.tau_pos", f"{ALGORITHM}sapo.tau_neg", f"{ALGORITHM}policy_loss_type"),
        mean.soft_gate,
    ),
    Rule("loss.dual_clip", (f"{ALGORITHM}clip_ratio_c", f"{ALGORITHM}policy_loss_type"), its.dual_clip),
    Rule("loss.agg", (f"{ALGORITHM}loss_reduction", f"{ALGORITHM}policy_loss_type"), its.reduction),
    Rule("loss.advantage", (f"{ALGORITHM}advantage_estimator", f"{ALGORITHM}grpo_norm_by_std"), its.advantage),
    Rule(
        "loss.kl_coef",
        (f"{ALGORITHM}kl_loss_coef", f"{ALGORITHM}use_kl_loss"),
        lambda coef, use: mean.kl_coef(use, coef),
    ),
    Rule(
        "loss.kl_estimator",
        (f"{ALGORITHM}kl_estimator_type", f"{ALGORITHM}use_kl_loss", f"{ALGORITHM}kl_loss_coef"),
        lambda name, use, coef: mean.estimator(name, use, coef, {"k1": "k1", "k2": "k2", "k3": "k3"}),
    ),
    *(mean.otherwise(*entry) for entry in its.OTHERWISE),
    Rule(
        "loss.entropy_coef",
        (f"{ALGORITHM}entropy_loss_coef", f"{ALGORITHM}use_entropy_loss"),
        lambda coef, use: mean.kl_coef(use, coef),
    ),
    same("learner.lr", f"{OPTIMIZER}lr"),
    same("learner.warmup_steps", f"{OPTIMIZER}num_warmup_steps"),
    Rule("learner.betas", (f"{OPTIMIZER}adam_betas",), list),
    same("learner.weight_decay", f"{OPTIMIZER}weight_decay"),
    same("learner.grad_clip", f"{OPTIMIZER}max_grad_norm"),
    Rule("learner.updates_per_step", STEP, its.updates_per_step),
    same("learner.epochs", "trainer.update_epochs_per_batch"),
    Rule(
        "learner.tokens_per_microbatch",
        ("trainer.max_tokens_per_microbatch",),
        lambda tokens: whole(tokens) if tokens > 0 else None,
    ),
    Rule(
        "learner.tokens_per_microbatch",
        ("trainer.micro_train_batch_size_per_gpu", "trainer.max_prompt_length", f"{SAMPLING}max_generate_length"),
        its.microbatch,
    ),
    Rule("learner.activation_checkpointing", ("trainer.gradient_checkpointing",), mean.checkpointing),
    gpus.shards_rule((f"{FSDP}fsdp_size",), GPUS, its.gpus_of),
    Rule("learner.reshard_after_forward", (f"{FSDP}reshard_after_forward",), mean.reshard),
    Rule("learner.offload", (f"{FSDP}cpu_offload",), mean.offload),
    Rule("learner.checkpoint_every", ("trainer.ckpt_interval",), mean.saves),
    Rule("learner.keep_checkpoints", ("trainer.max_ckpts_to_keep",), mean.kept_checkpoints),
    Rule("eval.every", ("trainer.eval_interval",), mean.every),
    Rule(
        "eval.num_samples",
        ("generator.eval_n_samples_per_prompt", "data.val_data", *EVALUATED),
        its.eval_samples,
    ),
    Rule("eval.num_prompts", ("data.val_data",), data_files.all_rows),
    Rule("eval.temperature", EVALUATED, its.eval_temperature),
    Rule("", (f"{EVALUATION}max_generate_length",), lambda tokens: Left("is rollout.max_response_length here too")),
    same("eval.top_p", f"{EVALUATION}top_p"),
    Rule("eval.top_k", (f"{EVALUATION}top_k",), mean.top_k),
    Rule("metrics.sinks", ("trainer.logger",), mean.sinks),
    text("metrics.wandb_project", "trainer.project_name"),
)

DEFAULTS = {
    f"{ALGORITHM}policy_loss_type": "regular",
    f"{ALGORITHM}eps_clip_low": 0.2,
    f"{ALGORITHM}eps_clip_high": 0.2,
    f"{ALGORITHM}cispo.cispo_eps_clip_low": 1.0,
    f"{ALGORITHM}cispo.cispo_eps_clip_high": 4.0,
    f"{ALGORITHM}loss_reduction": "token_mean",
    f"{ALGORITHM}use_kl_loss": True,
    f"{ALGORITHM}kl_loss_coef": 0.001,
    f"{DYNAMIC}type": None,
    f"{DYNAMIC}max_sample_batches": 30,
    f"{OPTIMIZER}weight_decay": 0.01,
    f"{POLICY}model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    TRAIN: 1024,
    MINI: 256,
    "generator.n_samples_per_prompt": 5,
    f"{SAMPLING}max_generate_length": 1024,
    f"{ENGINE}backend": "vllm",
    f"{ENGINE}model_dtype": "bfloat16",
    f"{EVALUATION}temperature": None,
    f"{CORRECTION}token_tis_ratio_clip_high": 2.0,
    f"{CORRECTION}sequence_tis_ratio_clip_high": 5.0,
    f"{CORRECTION}geo_mask_high": 1.01,
    f"{CORRECTION}geo_mask_low": 0.99,
    f"{CORRECTION}product_mask_high": 2.0,
    f"{CORRECTION}product_mask_low": 0.5,
    f"{ALGORITHM}clip_ratio_c": 3.0,
    f"{ASYNC}max_staleness_steps": 4,
    f"{ASYNC}enabled": False,
    "trainer.gradient_checkpointing": True,
    "trainer.max_prompt_length": 512,
    "trainer.epochs": 1,
    "trainer.seed": 42,
    "trainer.eval_interval": 5,
    "trainer.ckpt_interval": 10,
    "trainer.max_ckpts_to_keep": -1,
    "trainer.placement.colocate_all": True,
    "environment.env_class": "gsm8k",
}

WITHOUT = (
    ("trainer.critic.*", mean.CRITIC),
    ("trainer.critic*", mean.CRITIC),
    (f"{ALGORITHM}lambd", mean.CRITIC),
    (f"{ALGORITHM}gamma", mean.CRITIC),
    (f"{ALGORITHM}value*", mean.CRITIC),
    (f"{ALGORITHM}kl_ctrl.*", mean.IN_LOSS),
    (f"{ALGORITHM}max_seq_len", "the norm is rollout.max_response_length here"),
    (f"{ALGORITHM}zero_variance_filter*", "they mask such groups; filter.enabled samples others instead"),
    (f"{ALGORITHM}temperature", "is rollout.temperature"),
    (f"{DYNAMIC}min_replace_ratio", "a batch with few groups to copy is sampled again there, but trained on here"),
    (f"{ALGORITHM}*", "no such method here"),
    (f"{OPTIMIZER}offload_after_step", mean.BETWEEN),
    (f"{OPTIMIZER}*", mean.SPEED),
    (f"{POLICY}sequence_parallel_size", mean.SEQUENCE),
    (f"{MEGATRON}context_parallel_size", mean.SEQUENCE),
    (f"{MEGATRON}*parallel*", mean.PARALLEL),
    (f"{POLICY}model.lora.*", "all weights are trained here"),
    (f"{POLICY}*", mean.SPEED),
    ("trainer.ref.*", "the reference model is model.reference; there is one only with loss.kl_coef"),
    ("trainer.placement.*", mean.OWN_GPUS),
    (f"{ASYNC}num_parallel_generation_workers", "they count groups; here rollout.slots sequences of each worker"),
    (f"{ASYNC}*", "belongs to their way of running ahead; see replay.run_ahead, replay.max_staleness"),
    ("trainer.eval_before_train", "the first and the last evaluation always run here"),
    ("trainer.eval_batch_size", "evaluation fills whatever slots are free here"),
    ("trainer.resume_*", "a launch into the same run.dir always resumes here"),
    ("trainer.hf_save_interval", "every checkpoint has the model's own files here"),
    ("trainer.export_path", "every checkpoint has the model's own files here"),
    ("trainer.strategy", mean.SPEED),
    ("trainer.*", "belongs to their trainer"),
    (f"{EVALUATION}*", "no such parameter of evaluation here"),
    (f"{SAMPLING}*", "training samples from the whole distribution here"),
    (f"{ENGINE}weight_sync_backend", "chosen automatically here: weights.backend"),
    (f"{ENGINE}*", mean.ENGINE),
    ("generator.zero_reward_on_non_stop", "reward.overlong_filter or reward.overlong_buffer instead"),
    ("generator.batched", "sequences are always batched continuously here"),
    *turns.SKYRL_WITHOUT,
    ("generator.*", "belongs to their generator; see rollout.* and environment.*"),
    ("environment.*", f"no such environment here: see docs/reward.md, and {turns.PAGE} for several turns"),
    ("data.*", "belongs to their data loader"),
    ("[A-Z]*", "a shell variable"),
)

PEER = Peer(
    title="SkyRL",
    source="NovaSky-AI/SkyRL a9564572",
    rules=RULES,
    defaults=DEFAULTS,
    without=WITHOUT,
    differs=(
        *mean.SYNCHRONOUS,
        mean.SURPLUS,
        data_files.WHOLE_FILES,
        Differs(
            "Its overlong punishment needs the trainer of its example (main_dapo.py); here the key is enough",
            Rank.DETAIL,
            lambda made: bool(made.get("reward.overlong_buffer")),
        ),
    ),
    others=("train_dataset*", "num_steps=*", "dataset_name=*", "max_length=*"),
    aliases=(
        (f"{ALGORITHM}overlong_buffer.len", f"{ALGORITHM}overlong_buffer_len"),
        (f"{ALGORITHM}overlong_buffer.penalty_factor", f"{ALGORITHM}overlong_buffer_penalty_factor"),
        ("generator.num_inference_engines", f"{ENGINE}num_engines"),
        ("generator.inference_engine_tensor_parallel_size", f"{ENGINE}tensor_parallel_size"),
        *(
            (f"generator.{key}", f"{ENGINE}{key}")
            for key in (
                "backend",
                "gpu_memory_utilization",
                "enforce_eager",
                "max_num_seqs",
                "max_num_batched_tokens",
                "enable_prefix_caching",
                "enable_chunked_prefill",
                "model_dtype",
                "weight_sync_backend",
                "run_engines_locally",
            )
        ),
    ),
)
