# DAPO as ms-swift documents it (its table of parameters), with the batch of its example fipo.sh
# https://github.com/modelscope/ms-swift/blob/3602360a562313afbf2ef6065fdf61f271a2c5b9/docs/source_en/Instruction/GRPO/AdvancedResearch/DAPO.md
CUDA_VISIBLE_DEVICES=2 \
swift rollout \
    --model Qwen/Qwen2.5-1.5B-Instruct

NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
swift rlhf \
    --rlhf_type grpo \
    --model Qwen/Qwen2.5-1.5B-Instruct \
    --dataset 'AI-MO/NuminaMath-TIR#5000' \
    --system "Solve the problem step by step." \
    --reward_funcs accuracy soft_overlong \
    --soft_cache_length 1024 \
    --loss_type dapo --epsilon 0.2 --epsilon_high 0.28 --beta 0 \
    --dynamic_sample true --max_resample_times 3 --overlong_filter true \
    --use_vllm true --vllm_mode server --vllm_server_host 127.0.0.1 --tuner_type full --torch_dtype bfloat16 \
    --max_completion_length 4096 --num_generations 8 --num_iterations 1 --temperature 1.0 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 2 --steps_per_generation 8 \
    --learning_rate 1e-6 --max_steps 400 --warmup_ratio 0.05 --save_steps 100 --save_total_limit 3
