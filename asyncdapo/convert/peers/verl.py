"""verl's keys (and siiRL's, which descend from them): rules, defaults, and keys without a counterpart."""

from __future__ import annotations

from asyncdapo.convert import data_files, gpus, turns
from asyncdapo.convert import meanings as mean
from asyncdapo.convert.peers import verl_loss_values as its_loss
from asyncdapo.convert.peers import verl_values as its
from asyncdapo.convert.peers.verl_values import ACTOR, CORRECTION, ROLLOUT
from asyncdapo.convert.rules import Left, Made, Peer, Rank, Rule, flag, same, text, whole

TRAIN, GEN, MINI = "data.train_batch_size", "data.gen_batch_size", f"{ACTOR}ppo_mini_batch_size"
FSDP = f"{ACTOR}fsdp_config."
FILTER = "algorithm.filter_groups."
OVERLONG = "reward_model.overlong_buffer."
ASYNC = "async_training."
STEP = (TRAIN, GEN, f"{FILTER}enable", MINI, f"{ASYNC}trigger_parameter_sync_step", f"{ASYNC}require_batches")
GPUS = (
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    f"{ROLLOUT}tensor_model_parallel_size",
    "rollout.nnodes",
    "rollout.n_gpus_per_node",
)

OWN = ("custom_reward_function.path", "reward_manager.module.path", "reward_model.enable")
"""Keys that name a reward which isn't known here."""
VARIANTS = {
    "vanilla": "ppo",
    "gspo": "gspo",
    "cispo": "cispo",
    "geo_mean": "gmpo",
    "sapo": "sapo",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
}
ESTIMATORS = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


RULES = (
    text("run.name", "trainer.experiment_name"),
    text("run.dir", "trainer.default_local_dir"),
    Rule("run.seed", ("data.seed",), lambda seed: None if seed is None else whole(seed)),
    same("run.steps", "trainer.total_training_steps"),
    Rule("run.steps", ("rollout.total_rollout_steps", *STEP), its.steps_of_prompts),
    Rule("run.steps", (), lambda: Made(mean.NO_LIMIT, "theirs ends with its data")),
    text("model.path", "actor_rollout_ref.model.path"),
    *data_files.rules("data.train_files", "data.val_files", "data.apply_chat_template_kwargs"),
    same("prompts.max_prompt_length", "data.max_prompt_length"),
    Rule("prompts.epochs", ("trainer.total_epochs", "rollout.total_epochs", "data.train_files"), its.epochs),
    Rule("rollout.engine", (f"{ROLLOUT}name",), mean.engine),
    *gpus.rules(GPUS, its.gpus_of),
    same("rollout.tensor_parallel", f"{ROLLOUT}tensor_model_parallel_size"),
    same("rollout.memory_fraction", f"{ROLLOUT}gpu_memory_utilization"),
    *(
        same(f"rollout.engine_args.{key}", f"{ROLLOUT}{key}")
        for key in ("enforce_eager", "enable_chunked_prefill", "enable_prefix_caching", "max_num_batched_tokens")
    ),
    same("rollout.slots", f"{ROLLOUT}max_num_seqs"),
    Rule("rollout.group_size", (f"{ROLLOUT}n",), mean.group),
    same("rollout.max_response_length", "data.max_response_length"),
    same("rollout.temperature", f"{ROLLOUT}temperature"),
    Rule("", (f"{ROLLOUT}top_p",), mean.whole_distribution),
    Rule("", (f"{ROLLOUT}top_k",), mean.whole_distribution),
    Rule("rollout.dtype", (f"{ROLLOUT}dtype",), mean.dtype),
    *turns.VERL_RULES,
    turns.unless(
        turns.verl_several,
        turns.VERL_KEYS,
        Rule("reward.verifier", ("reward_model.reward_manager", "data.train_files", *OWN), its.verifier),
    ),
    *(
        turns.unless(turns.verl_several, turns.VERL_KEYS, Rule("", (key, name), mean.own_function))
        for key, name in ((OWN[0], "custom_reward_function.name"), (OWN[1], "reward_manager.name"))
    ),
    Rule("", (OWN[2],), lambda on: mean.not_carried_over("REWARD MODEL") if flag(on) else None),
    Rule("reward.incorrect", ("data.train_files", *OWN), its.incorrect),
    Rule(
        "reward.overlong_buffer",
        (f"{OVERLONG}len", f"{OVERLONG}enable"),
        lambda length, enable: whole(length or 0) if flag(enable) else 0,
    ),
    Rule(
        "reward.overlong_penalty",
        (f"{OVERLONG}penalty_factor", f"{OVERLONG}enable", f"{OVERLONG}len"),
        its.overlong_penalty,
    ),
    Rule("filter.enabled", (f"{FILTER}enable",), flag),
    Rule("filter.metric", (f"{FILTER}metric", f"{FILTER}enable"), its.when_filtering),
    Rule(
        "filter.max_gen_batches",
        (f"{FILTER}max_num_gen_batches", f"{FILTER}enable"),
        lambda limit, enable: its.when_filtering(max(0, whole(limit or 0)), enable),
    ),
    Rule(
        "filter.gen_batch_multiplier",
        (GEN, TRAIN, f"{FILTER}enable", f"{ASYNC}trigger_parameter_sync_step"),
        its.gen_multiplier,
    ),
    Rule("replay.prompts_per_step", STEP, its.prompts_per_step),
    Rule("replay.run_ahead", (f"{ASYNC}staleness_threshold", STEP[-2], GPUS[-1]), its_loss.run_ahead),
    Rule("replay.max_staleness", (f"{ASYNC}staleness_threshold", f"{ASYNC}partial_rollout"), its.staleness),
    Rule("loss.variant", (f"{ACTOR}policy_loss.loss_mode",), lambda mode: mean.known_loss(mode, VARIANTS)),
    Rule(
        "loss.anchor",
        (
            f"{CORRECTION}rollout_is",
            f"{CORRECTION}bypass_mode",
            f"{ASYNC}use_rollout_log_probs",
            f"{ASYNC}compute_prox_log_prob",
            f"{ACTOR}tis_imp_ratio_cap",
            f"{ASYNC}trigger_parameter_sync_step",
        ),
        its_loss.anchor,
    ),
    Rule(
        "loss.correction",
        (f"{CORRECTION}rollout_is", f"{CORRECTION}bypass_mode", f"{ACTOR}tis_imp_ratio_cap"),
        its_loss.correction,
    ),
    Rule(
        "loss.correction_mode",
        (f"{CORRECTION}rollout_is_threshold", f"{CORRECTION}rollout_is", f"{CORRECTION}bypass_mode"),
        its_loss.correction_mode,
    ),
    Rule(
        "loss.correction_band",
        (
            f"{CORRECTION}rollout_is_threshold",
            f"{CORRECTION}rollout_is",
            f"{CORRECTION}bypass_mode",
            f"{ACTOR}tis_imp_ratio_cap",
        ),
        its_loss.band,
    ),
    Rule("loss.clip_low", (f"{ACTOR}clip_ratio_low", f"{ACTOR}policy_loss.loss_mode"), its_loss.clip_low),
    Rule("loss.clip_high", (f"{ACTOR}clip_ratio_high", f"{ACTOR}policy_loss.loss_mode"), its_loss.clip_high),
    Rule("loss.dppo_ratio_cap", (f"{ACTOR}clip_ratio_c", f"{ACTOR}policy_loss.loss_mode"), its_loss.ratio_cap),
    Rule("loss.sapo_tau", (f"{ACTOR}tau_pos", f"{ACTOR}tau_neg", f"{ACTOR}policy_loss.loss_mode"), mean.soft_gate),
    Rule("loss.dual_clip", (f"{ACTOR}clip_ratio_c", f"{ACTOR}policy_loss.loss_mode"), its_loss.dual_clip),
    Rule("loss.agg", (f"{ACTOR}use_token_level_loss",), its_loss.old_aggregation),
    Rule("loss.agg", (f"{ACTOR}loss_agg_mode", f"{ACTOR}policy_loss.loss_mode"), its_loss.aggregation),
    Rule("loss.advantage", ("algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"), its_loss.advantage),
    Rule("loss.kl_coef", (f"{ACTOR}kl_loss_coef", f"{ACTOR}use_kl_loss"), lambda coef, use: mean.kl_coef(use, coef)),
    Rule(
        "loss.kl_estimator",
        (f"{ACTOR}kl_loss_type", f"{ACTOR}use_kl_loss", f"{ACTOR}kl_loss_coef"),
        lambda name, use, coef: mean.estimator(name, use, coef, ESTIMATORS),
    ),
    mean.otherwise("algorithm.use_kl_in_reward", mean.IN_LOSS, Rank.LOSS),
    Rule(
        "",
        ("algorithm.kl_ctrl.kl_coef", "algorithm.use_kl_in_reward"),
        lambda coef, use: Left(mean.IN_LOSS if flag(use) else "use_kl_in_reward is false"),
    ),
    same("loss.entropy_coef", f"{ACTOR}entropy_coeff"),
    same("learner.lr", f"{ACTOR}optim.lr"),
    Rule(
        "learner.warmup_steps",
        (
            f"{ACTOR}optim.lr_warmup_steps",
            f"{ACTOR}optim.lr_warmup_steps_ratio",
            "trainer.total_training_steps",
            f"{ACTOR}ppo_epochs",
            *STEP,
        ),
        its.warmup,
    ),
    Rule("learner.betas", (f"{ACTOR}optim.betas",), list),
    same("learner.weight_decay", f"{ACTOR}optim.weight_decay"),
    same("learner.grad_clip", f"{ACTOR}grad_clip"),
    Rule("learner.updates_per_step", STEP, its.updates_per_step),
    same("learner.epochs", f"{ACTOR}ppo_epochs"),
    Rule(
        "learner.tokens_per_microbatch",
        (
            f"{ACTOR}ppo_max_token_len_per_gpu",
            f"{ACTOR}use_dynamic_bsz",
            f"{ACTOR}ppo_micro_batch_size_per_gpu",
            "data.max_prompt_length",
            "data.max_response_length",
        ),
        its.microbatch,
    ),
    Rule(
        "learner.activation_checkpointing",
        ("actor_rollout_ref.model.enable_gradient_checkpointing",),
        mean.checkpointing,
    ),
    gpus.shards_rule((f"{FSDP}fsdp_size",), GPUS, its.gpus_of),
    Rule("learner.reshard_after_forward", (f"{FSDP}reshard_after_forward",), mean.reshard),
    Rule("learner.offload", (f"{FSDP}offload_policy",), mean.offload),
    Rule("learner.checkpoint_every", ("trainer.save_freq",), mean.saves),
    Rule("learner.keep_checkpoints", ("trainer.max_actor_ckpt_to_keep",), mean.kept_checkpoints),
    Rule("eval.every", ("rollout.test_freq",), mean.every),  # asynchronous training reads no other
    Rule("eval.every", ("trainer.test_freq",), mean.every),
    Rule("eval.num_prompts", ("data.val_max_samples",), lambda rows: whole(rows) if rows and rows > 0 else None),
    Rule("eval.num_prompts", ("data.val_files",), data_files.all_rows),
    Rule(
        "eval.num_samples",
        tuple(f"{ROLLOUT}val_kwargs.{key}" for key in ("n", "do_sample", "temperature")) + ("data.val_files",),
        its.eval_samples,
    ),
    Rule(
        "eval.temperature", (f"{ROLLOUT}val_kwargs.temperature", f"{ROLLOUT}val_kwargs.do_sample"), its.eval_temperature
    ),
    Rule("eval.top_p", (f"{ROLLOUT}val_kwargs.top_p", f"{ROLLOUT}val_kwargs.do_sample"), its.eval_sampling),
    Rule(
        "eval.top_k",
        (f"{ROLLOUT}val_kwargs.top_k", f"{ROLLOUT}val_kwargs.do_sample"),
        lambda k, sample: its.eval_sampling(mean.top_k(k), sample),
    ),
    Rule("metrics.sinks", ("trainer.logger",), mean.sinks),
    text("metrics.wandb_project", "trainer.project_name"),
    Rule("", ("data.truncation", "data.filter_overlong_prompts"), its.truncation),
    *(mean.otherwise(*entry) for entry in its.OTHERWISE),
)

DEFAULTS = {
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    f"{ACTOR}clip_ratio_low": 0.2,
    f"{ACTOR}clip_ratio_high": 0.2,
    f"{ACTOR}clip_ratio_c": 3.0,
    f"{ACTOR}loss_agg_mode": "token-mean",
    f"{ACTOR}use_kl_loss": False,
    f"{ACTOR}kl_loss_coef": 0.001,
    f"{ACTOR}ppo_mini_batch_size": 256,
    f"{ACTOR}optim.lr": 1e-6,
    f"{ACTOR}optim.weight_decay": 0.01,
    f"{ROLLOUT}name": "vllm",  # the default of older versions; the current one requires the key
    f"{ROLLOUT}n": 1,
    f"{ROLLOUT}temperature": 1.0,
    f"{ROLLOUT}dtype": "bfloat16",
    f"{ROLLOUT}val_kwargs.do_sample": False,
    f"{ROLLOUT}val_kwargs.temperature": 0.0,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.train_batch_size": 1024,
    f"{FILTER}enable": False,
    f"{OVERLONG}enable": False,
    "algorithm.adv_estimator": "gae",
    "reward_model.reward_manager": "naive",
    "trainer.total_epochs": 30,
    "trainer.max_actor_ckpt_to_keep": None,
}

WITHOUT = (
    ("critic.*", mean.CRITIC),
    ("trainer.critic_warmup", mean.CRITIC),
    ("algorithm.gamma", mean.CRITIC),
    ("algorithm.lam", mean.CRITIC),
    ("algorithm.kl_penalty", mean.IN_LOSS),
    ("algorithm.kl_ctrl.*", mean.IN_LOSS),
    (f"{CORRECTION}rollout_rs*", "no such rejection here; loss.outlier_band masks tokens or responses"),
    ("data.filter_overlong_prompts*", "longer prompts are always left out and counted here"),
    ("data.prompt_key", "asyncdapo data prepare finds the column; its --prompt-column names another"),
    ("data.reward_fn_key", "one reward.verifier for all rows here; data prepare keeps the source of a row"),
    ("data.shuffle", "prompts are always shuffled here, by run.seed"),
    ("data.return_raw_*", "prompts are kept as text here"),
    ("data.*", "belongs to their data loader"),
    ("custom_reward_function.*", "reward.verifier may be your own function, with other arguments (docs/reward.md)"),
    ("reward_manager.*", "reward.verifier may be your own function, with other arguments (docs/reward.md)"),
    (f"{ACTOR}clip_ratio", "clip_ratio_low and clip_ratio_high override it there, since they have defaults"),
    (f"{ACTOR}optim.*", "the optimizer is AdamW at a constant learning rate here"),
    (f"{ACTOR}shuffle", "mini-batches are assigned to ranks by number of tokens here"),
    *((f"{ACTOR}*.{what}_offload", mean.BETWEEN) for what in ("param", "grad", "optimizer")),
    (f"{ACTOR}*context_parallel_size", mean.SEQUENCE),
    (f"{ACTOR}*sequence_parallel_size", mean.SEQUENCE),
    (f"{ACTOR}megatron.*parallel*", mean.PARALLEL),
    (f"{ACTOR}ppo_m*", mean.SPEED),
    (f"{ACTOR}*", mean.SPEED),
    ("actor_rollout_ref.ref.*", "the reference model is model.reference; there is one only with loss.kl_coef"),
    ("actor_rollout_ref.model.override_config.*", "the model's own config.json counts here: change it there"),
    ("actor_rollout_ref.model.*lora*", "all weights are trained here"),
    ("actor_rollout_ref.model.*", mean.SPEED),
    ("actor_rollout_ref.hybrid_engine", mean.OWN_GPUS),
    ("actor_rollout_ref.nccl_timeout", mean.SPEED),
    (f"{ROLLOUT}calculate_log_probs", "the engine always records them here"),
    (f"{ROLLOUT}max_model_len", "is prompts.max_prompt_length + rollout.max_response_length here"),
    (f"{ROLLOUT}prompt_length", "is prompts.max_prompt_length"),
    (f"{ROLLOUT}response_length", "is rollout.max_response_length"),
    *turns.VERL_WITHOUT,
    (f"{ROLLOUT}*", mean.ENGINE),
    (f"{OVERLONG}log", "metrics always hold it here"),
    ("reward_model.max_resp_len", "is rollout.max_response_length"),
    ("reward_model.*", "no reward models here; reward.verifier may be a function that calls one"),
    ("trainer.val_before_train", "the first and the last evaluation always run here"),
    ("trainer.val_only", "asyncdapo eval does it here"),
    ("trainer.resume_*", "a launch into the same run.dir always resumes here"),
    ("trainer.nnodes", mean.OWN_GPUS),
    ("trainer.n_gpus_per_node", mean.OWN_GPUS),
    ("trainer.*", "belongs to their trainer"),
    (f"{ASYNC}*", "belongs to their way of running ahead; see replay.run_ahead, replay.max_staleness"),
    ("rollout.*", "belongs to their way of running ahead; see replay.run_ahead, replay.max_staleness"),
    ("distillation.*", "no distillation here"),
    ("model_engine", mean.SPEED),
    ("async_resources.*", mean.OWN_GPUS),
    ("transfer_queue.*", mean.SPEED),
    ("[A-Z]*", "a shell variable"),
    ("global_profiler.*", "no profiler here"),
    ("ray_kwargs.*", "controller.ray_address joins a cluster, which must be running"),
    ("critic*", mean.CRITIC),
    ("--config-*", "their own configuration file"),
)

PEER = Peer(
    title="verl",
    source="volcengine/verl b178a3cd, its recipe/dapo of 246cac4c",
    rules=RULES,
    defaults=DEFAULTS,
    without=WITHOUT,
    differs=(
        *mean.SYNCHRONOUS,
        mean.SURPLUS,
        data_files.WHOLE_FILES,
    ),
    others=("optim=*", "optim.*", "engine=*", "engine.*", "model.partial_pretrain*"),
    aliases=(
        ("reward_model.reward_kwargs.overlong_buffer_cfg.", OVERLONG),
        ("reward.reward_kwargs.overlong_buffer_cfg.", OVERLONG),
        ("reward_model.reward_kwargs.max_resp_len", "reward_model.max_resp_len"),
        ("reward.reward_kwargs.max_resp_len", "reward_model.max_resp_len"),
        ("reward.custom_reward_function.", "custom_reward_function."),
        ("reward.reward_manager.name", "reward_model.reward_manager"),
        ("reward.reward_manager.", "reward_manager."),
        ("reward.reward_model.", "reward_model."),
        (f"{turns.VERL}max_turns", f"{turns.VERL}max_assistant_turns"),
        ("algorithm.rollout_is_threshold", f"{CORRECTION}rollout_is_threshold"),
        ("algorithm.rollout_is", f"{CORRECTION}rollout_is"),
        (f"{ACTOR}optim.clip_grad", f"{ACTOR}grad_clip"),
    ),
)
