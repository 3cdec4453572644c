# DAPO of Qwen2.5-1.5B on GSM8K as SkyRL documents it: the keys and values of its guide and of run_dapo_gsm8k.sh
# https://github.com/NovaSky-AI/SkyRL/blob/a9564572eb8e91076be43c1bd5e4615e3de17265/docs/content/docs/algorithms/dapo.mdx
DATA_DIR="/data/gsm8k"
uv run --isolated --extra fsdp -m examples.train.algorithms.dapo.main_dapo \
  data.train_data="['$DATA_DIR/train.parquet']" data.val_data="['$DATA_DIR/validation.parquet']" \
  trainer.algorithm.advantage_estimator="grpo" trainer.algorithm.policy_loss_type="dual_clip" \
  trainer.algorithm.overlong_buffer.len=512 trainer.algorithm.overlong_buffer.penalty_factor=1.0 \
  trainer.algorithm.eps_clip_low=0.2 trainer.algorithm.eps_clip_high=0.28 \
  trainer.algorithm.dynamic_sampling.type=filter trainer.algorithm.dynamic_sampling.max_sample_batches=30 \
  trainer.algorithm.loss_reduction="token_mean" generator.apply_overlong_filtering=true \
  generator.sampling_params.temperature=1.0 generator.sampling_params.top_p=1.0 \
  generator.eval_sampling_params.top_p=0.7 generator.eval_sampling_params.max_generate_length=1024 \
  trainer.algorithm.use_kl_loss=false trainer.algorithm.clip_ratio_c=10.0 \
  trainer.policy.model.path="Qwen/Qwen2.5-1.5B-Instruct" trainer.placement.colocate_all=true \
  trainer.strategy=fsdp trainer.placement.policy_num_gpus_per_node=4 \
  generator.inference_engine.num_engines=4 generator.inference_engine.tensor_parallel_size=1 \
  trainer.epochs=20 trainer.eval_interval=5 trainer.update_epochs_per_batch=1 \
  trainer.train_batch_size=1024 trainer.policy_mini_batch_size=256 trainer.micro_train_batch_size_per_gpu=64 \
  trainer.ckpt_interval=10 trainer.max_prompt_length=512 generator.sampling_params.max_generate_length=1024 \
  trainer.policy.optimizer_config.lr=1.0e-6 trainer.policy.optimizer_config.weight_decay=0.1 \
  trainer.policy.optimizer_config.max_grad_norm=1.0 \
  generator.inference_engine.backend=vllm generator.inference_engine.enforce_eager=true \
  generator.inference_engine.gpu_memory_utilization=0.8 \
  environment.env_class=gsm8k generator.n_samples_per_prompt=5 \
  trainer.logger="wandb" trainer.project_name="gsm8k" trainer.run_name="gsm8k_dapo" trainer.resume_mode=null
