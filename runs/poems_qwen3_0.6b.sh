#!/usr/bin/env bash
# The poems chain on Qwen3-0.6B, on one GPU. Downloads the model from the hub on first use:
#   hf download Qwen/Qwen3-0.6B        (or set MODEL to a local folder)
#   bash runs/poems_qwen3_0.6b.sh            the classic settings: LoRA r=8, alpha=32 on attention, 3 epochs; DPO 1 epoch at 1e-5
#   bash runs/poems_qwen3_0.6b.sh --tuned    wider LoRA on all projections, on-policy pairs at a higher rate, GRPO with more answers
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

model="${MODEL:-Qwen/Qwen3-0.6B}"
run=poems_qwen3_0.6b
attention="q_proj k_proj v_proj o_proj"
lora="--lora-r 8 --lora-alpha 32 --lora-dropout 0.05 --lora-targets $attention"
sft="--lr 2e-4 --batch-size 4 --accumulation 8 --epochs 3"
dpo="--lr 1e-5 --batch-size 2 --accumulation 8 --beta 0.1 --epochs 1"
grpo="--lr 1e-5 --batch-size 16 --accumulation 8 --num-generations 8 --max-steps 300"
if [ "${1:-}" = --tuned ]; then
  run=poems_qwen3_0.6b_tuned
  lora="--lora-r 64 --lora-alpha 128"
  sft="--lr 2e-4 --batch-size 32 --accumulation 2 --epochs 2"
  dpo="--lr 5e-5 --batch-size 16 --accumulation 2 --beta 0.1 --epochs 1"
  grpo="--lr 5e-5 --batch-size 64 --accumulation 4 --num-generations 16 --max-steps 300"
fi
data=processed_data/$run models=checkpoints/$run texts=results/$run/generations

python scripts/10_prepare_poems.py --output-dir $data
files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
python scripts/19_check_data.py --model "$model" $files
python scripts/20_train_sft.py --model "$model" $files $lora $sft --eval-steps 200 --probe-tokens 160 --output-dir $models/sft
python scripts/22_merge_adapter.py --adapter $models/sft --probe-file $data/sft_val.jsonl --output-dir $models/sft_merged --greedy-tokens 160

pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"
python scripts/30_train_reward.py --model $models/sft_merged $pairs $lora --lr 1e-4 --batch-size 8 --accumulation 4 --output-dir $models/reward
python scripts/32_evaluate_reward.py --model $models/reward $pairs --output results/$run/reward_card
python scripts/60_generate.py --model $models/sft_merged --prompts-file $data/prompts_train.jsonl --max-prompts 2000 --num-samples 16 \
  --max-new-tokens 160 --output-file results/$run/onpolicy/sft_merged.jsonl
python scripts/33_rank_samples.py --generations results/$run/onpolicy/sft_merged.jsonl --rewards rhyme meter --require form --output-dir $data
python scripts/40_train_dpo.py --model $models/sft_merged --train-file $data/pref_onpolicy_train.jsonl \
  --val-file $data/pref_onpolicy_val.jsonl $lora $dpo --probe-tokens 160 --output-dir $models/dpo
python scripts/22_merge_adapter.py --adapter $models/dpo --probe-file $data/sft_val.jsonl --output-dir $models/dpo_merged --greedy-tokens 160
rl="--train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl --max-new-tokens 160"
python scripts/50_train_grpo.py --model $models/sft_merged $rl $lora $grpo --output-dir $models/grpo
python scripts/50_train_grpo.py --model $models/dpo_merged $rl $lora $grpo --output-dir $models/dpo_grpo
python scripts/51_train_ppo.py --model $models/sft_merged $rl --lora-r 32 --lora-alpha 64 --lr 5e-5 --max-steps 300 --output-dir $models/ppo

generate() {
  local name=$1; shift
  python scripts/60_generate.py "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --num-samples 3 --max-new-tokens 160 --output-file $texts/"$name".jsonl
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate sft_merged --model $models/sft_merged
generate dpo --model $models/sft_merged --adapter $models/dpo
generate grpo --model $models/sft_merged --adapter $models/grpo
generate dpo_grpo --model $models/dpo_merged --adapter $models/dpo_grpo
generate ppo --model $models/sft_merged --adapter $models/ppo
python scripts/70_score.py --generations $texts --output-dir results/$run/scores --nll-model "$model" --dtype auto
python scripts/72_compare.py --generations $texts --scores results/$run/scores --checkpoints $models --output results/$run/compare --overwrite
