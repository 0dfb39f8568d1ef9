#!/usr/bin/env bash
# The Weibo commenter on Qwen3-4B, on one GPU of 80 GB or more. The shipped sample is not enough: name the full CommentR data (given by its
# authors on request, data/weibo/README.md):
#   POSTS='full/posts*.json' COMMENTS='full/comments*.json' USERS='full/users*.json' bash runs/weibo_qwen3_4b.sh
# MODEL names another base or a local folder (default Qwen/Qwen3-4B, downloaded from the hub on first use).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-vllm.txt

model="${MODEL:-Qwen/Qwen3-4B}"
posts="${POSTS:-data/weibo/sample_posts.json}" comments="${COMMENTS:-data/weibo/sample_comments.json}" users="${USERS:-data/weibo/sample_users.json}"
run=weibo_qwen3_4b
data=processed_data/$run models=checkpoints/$run results=results/weibo texts=results/weibo/generations
lora="--lora-r 16 --lora-alpha 32 --lora-dropout 0.05"
stage() {  # stage NAME FLAGS...
  local name=$1; shift
  python scripts/"$name".py --task weibo "$@"
}

# percent of the posts in val, and as many in test
held_out=5
if [ -z "${POSTS:-}" ]; then held_out=15; echo "notice: no POSTS given, this is the shipped sample: too little to judge a model by"; fi
stage 11_prepare_weibo --posts "$posts" --comments "$comments" --users "$users" --held-out $held_out --max-post 400 --max-thread 140 --output-dir $data
sft="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"
python scripts/19_check_data.py --task weibo --model "$model" --max-length 1024 $sft
python scripts/19_check_data.py --task weibo --model "$model" --max-length 1024 $pairs
stage 20_train_sft --model "$model" $sft $lora --max-length 1024 --lr 1e-4 --batch-size 16 --accumulation 4 --epochs 1 --eval-steps 200 --output-dir $models/sft
stage 22_merge_adapter --model "$model" --adapter $models/sft --probe-file $data/sft_val.jsonl --output-dir $models/sft_merged

stage 30_train_reward --model $models/sft_merged $pairs $lora --max-length 1024 --lr 5e-5 --batch-size 8 --accumulation 4 --output-dir $models/reward
stage 32_evaluate_reward --model $models/reward --train-file $data/pref_train.jsonl --val-file $data/pref_test.jsonl --max-length 1024 --output $results/reward_model
stage 40_train_dpo --model $models/sft_merged $pairs $lora --max-length 1024 --lr 2e-5 --batch-size 4 --accumulation 8 --eval-steps 100 --output-dir $models/dpo
stage 50_train_grpo --model $models/sft_merged --train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl $lora --max-length 1024 \
  --rewards length no_copy no_repeat clean no_assistant no_personal model=$models/reward:0.5 --rollout vllm --vllm-mode colocate \
  --lr 1e-5 --batch-size 32 --accumulation 4 --max-steps 300 --kl-budget 8 --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...
  local name=$1; shift
  stage 60_generate "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --max-prompts 512 --num-samples 3 --output-file $texts/"$name".jsonl
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate sft_merged --model $models/sft_merged
generate dpo --model $models/sft_merged --adapter $models/dpo
generate grpo --model $models/sft_merged --adapter $models/grpo

stage 70_score --generations $texts --output-dir $results/scores --nll-model "$model" --dtype auto
python runs/weibo_results.py --generations $texts --scores $results/scores --reward $models/reward --output $results/inference_comparison_results.jsonl
python scripts/72_compare.py --task weibo --generations $texts --scores $results/scores --checkpoints $models --output $results/compare --overwrite
