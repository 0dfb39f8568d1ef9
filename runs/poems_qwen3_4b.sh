#!/usr/bin/env bash
# The poems chain on Qwen3-4B in bf16, on one GPU of 80 GB: SFT, merge, GRPO with vLLM writing the rollouts in the same process, compare.
# Needs requirements-vllm.txt. Downloads the model from the hub on first use, or set MODEL to a local folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-vllm.txt

model="${MODEL:-Qwen/Qwen3-4B}"
run=poems_qwen3_4b
lora="--lora-r 32 --lora-alpha 64 --dtype bfloat16"
data=processed_data/$run models=checkpoints/$run texts=results/$run/generations

python scripts/10_prepare_poems.py --output-dir $data
files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
python scripts/19_check_data.py --model "$model" $files
python scripts/20_train_sft.py --model "$model" $files $lora --lr 1e-4 --batch-size 16 --accumulation 4 --epochs 2 --eval-steps 200 \
  --probe-tokens 160 --output-dir $models/sft
python scripts/22_merge_adapter.py --adapter $models/sft --dtype bfloat16 --probe-file $data/sft_val.jsonl --greedy-tokens 160 \
  --output-dir $models/sft_merged
python scripts/50_train_grpo.py --model $models/sft_merged --train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl $lora \
  --rollout vllm --vllm-mode colocate --num-generations 16 --batch-size 32 --accumulation 8 --lr 2e-5 --max-steps 300 --max-new-tokens 160 \
  --gradient-checkpointing --output-dir $models/grpo

generate() {
  local name=$1; shift
  python scripts/60_generate.py "$@" --backend vllm --name "$name" --prompts-file $data/prompts_test.jsonl --num-samples 3 --max-new-tokens 160 \
    --output-file $texts/"$name".jsonl
}
generate base --model "$model"
generate sft_merged --model $models/sft_merged
generate grpo --model $models/sft_merged --adapter $models/grpo
python scripts/70_score.py --generations $texts --output-dir results/$run/scores --nll-model "$model" --dtype bfloat16
python scripts/72_compare.py --generations $texts --scores results/$run/scores --checkpoints $models --output results/$run/compare --overwrite
