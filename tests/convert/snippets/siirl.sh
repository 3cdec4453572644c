# DAPO of Qwen2.5-7B as siiRL documents it: the keys and values of examples/dapo_trainer/run_qwen2_5-7b.sh
# https://github.com/sii-research/siiRL/blob/af00a771817324f55f40c7b980d925cb008db6d8/examples/dapo_trainer/run_qwen2_5-7b.sh
export N_GPUS_PER_NODE=${N_GPUS_PER_NODE:-8}
export NNODES=${PET_NNODES:-1}
export PER_NODE=512
export TRAIN_BATCH_SIZE=$(($PER_NODE * $NNODES))
export MAX_PROMPT_LENGTH=2048
export MAX_RESPONSE_LENGTH=4096
export LOGFILE=siirl_$timestamp

TRAINING_CMD=(
    python3 -m siirl.main_dag
    algorithm.adv_estimator=grpo
    data.train_files=/data/dapo-math-17k.parquet
    data.val_files=/data/gsm8k/test.parquet
    data.train_batch_size=\$TRAIN_BATCH_SIZE
    data.gen_batch_size=$(($PER_NODE * 3))
    data.max_prompt_length=\$MAX_PROMPT_LENGTH
    data.max_response_length=\$MAX_RESPONSE_LENGTH
    data.shuffle=False
    actor_rollout_ref.model.path=/models/Qwen2.5-7B
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.weight_decay=0.1
    actor_rollout_ref.actor.ppo_mini_batch_size=256
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.kl_loss_coef=0.0
    actor_rollout_ref.actor.grad_clip=1.0
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.clip_ratio_c=10.0
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.gpu_memory_utilization=0.7
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    algorithm.workflow_type=dapo
    algorithm.filter_groups.enable=True
    algorithm.filter_groups.metric=acc
    algorithm.filter_groups.max_num_gen_batches=10
    reward_model.reward_manager=dapo
    reward_model.overlong_buffer.enable=True
    reward_model.overlong_buffer.len=512
    reward_model.overlong_buffer.penalty_factor=1.0
    trainer.logger=["console","tensorboard"]
    trainer.project_name=dapo
    trainer.experiment_name=qwen2.5-7b
    trainer.n_gpus_per_node=\$N_GPUS_PER_NODE
    trainer.nnodes=\$NNODES
    trainer.save_freq=30
    trainer.test_freq=10
    trainer.total_epochs=30
    trainer.max_actor_ckpt_to_keep=5
)

main() {
    ray stop --force
    if [ "$NODE_RANK" = "0" ]; then
        eval "${TRAINING_CMD[@]}" "$@"
    fi
}
main "$@"
