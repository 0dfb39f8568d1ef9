#!/usr/bin/env bash
# The poems chain on Qwen3-0.6B, on one GPU, with the classic SFT settings. Downloads the model from the hub on first use:
#   hf download Qwen/Qwen3-0.6B        (or set MODEL to a local folder)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

model="${MODEL:-Qwen/Qwen3-0.6B}"
run=poems_qwen3_0.6b
data=processed_data/$run models=checkpoints/$run texts=results/$run/generations

python scripts/10_prepare_poems.py --output-dir $data
files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
python scripts/19_check_data.py --model "$model" $files
python scripts/20_train_sft.py --model "$model" $files --lora-r 8 --lora-alpha 32 --lora-dropout 0.05 --lora-targets q_proj k_proj v_proj o_proj \
  --lr 2e-4 --batch-size 4 --accumulation 8 --epochs 3 --eval-steps 200 --probe-tokens 160 --output-dir $models/sft
python scripts/22_merge_adapter.py --adapter $models/sft --probe-file $data/sft_val.jsonl --output-dir $models/sft_merged --greedy-tokens 160

generate() {
  local name=$1; shift
  python scripts/60_generate.py "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --num-samples 3 --max-new-tokens 160 --output-file $texts/"$name".jsonl
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate sft_merged --model $models/sft_merged
python scripts/70_score.py --generations $texts --output-dir results/$run/scores --nll-model "$model" --dtype auto
python scripts/72_compare.py --generations $texts --scores results/$run/scores --checkpoints $models --output results/$run/compare --overwrite
