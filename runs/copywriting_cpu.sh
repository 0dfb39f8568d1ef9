#!/usr/bin/env bash
# The brand-copy chain on the embedded base model, on a laptop's CPU and with no API: shipped golden copy, rejected copy by rule, SFT, reward
# model, DPO, GRPO with rule rewards and the reward model, and a judge by rule. With a few million parameters the copy is not good, and
# the report says so: golden stands far ahead. runs/copywriting_qwen2.5_7b.sh is the same chain on a real model.
#   bash runs/copywriting_cpu.sh
#   bash runs/copywriting_cpu.sh --quick    fewer steps and prompts, results in results/copywriting_quick
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

quick=false again=()
for word in "$@"; do
  case "$word" in
    --quick) quick=true ;;
    --overwrite) again=(--overwrite) ;;
    *) echo "error: unknown word $word; fix: --quick, --overwrite" >&2; exit 2 ;;
  esac
done

# 135 golden rows: a step takes 8 of them, an epoch 17 steps
epochs=10 dpo_epochs=2 reward_epochs=2 grpo=20 prompts=54 tokens=512
run=copywriting
if $quick; then epochs=2 dpo_epochs=1 reward_epochs=1 grpo=2 prompts=18 tokens=256 run=copywriting_quick; fi
task="--task copywriting"
data=processed_data/$run models=checkpoints/$run texts=results/$run/generations
sft_files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"

python scripts/13_write_copy.py --output-file $data/golden_raw.jsonl ${again[@]+"${again[@]}"}
python scripts/14_clean_copy.py --copies-file $data/golden_raw.jsonl --output-file $data/golden_clean.jsonl ${again[@]+"${again[@]}"}
python scripts/15_write_rejected.py --golden-file $data/golden_clean.jsonl --output-file $data/rejected.jsonl ${again[@]+"${again[@]}"}
python scripts/16_prepare_copy.py --golden-file $data/golden_clean.jsonl --rejected-file $data/rejected.jsonl --output-dir $data ${again[@]+"${again[@]}"}
python scripts/19_check_data.py $task $sft_files --max-length 1024 --preview results/$run/mask_preview.html

python scripts/20_train_sft.py $task $sft_files --max-length 1024 --epochs $epochs --batch-size 8 --accumulation 1 --eval-steps 34 \
  --probe-count 8 --probe-tokens $tokens --output-dir $models/sft ${again[@]+"${again[@]}"}
python scripts/22_merge_adapter.py $task --adapter $models/sft --probe-file $data/sft_val.jsonl --probe-rows 16 --greedy-rows 4 \
  --output-dir $models/sft_merged ${again[@]+"${again[@]}"}
python scripts/30_train_reward.py $task --model $models/sft_merged $pairs --max-length 1024 --epochs $reward_epochs --batch-size 8 \
  --eval-steps 17 --output-dir $models/reward ${again[@]+"${again[@]}"}
python scripts/32_evaluate_reward.py $task --model $models/reward $pairs --max-length 1024 --output results/$run/reward_card ${again[@]+"${again[@]}"}
python scripts/40_train_dpo.py $task --model $models/sft_merged $pairs --max-length 1024 --epochs $dpo_epochs --batch-size 8 \
  --accumulation 1 --eval-steps 17 --probe-count 8 --probe-tokens $tokens --output-dir $models/dpo ${again[@]+"${again[@]}"}
python scripts/50_train_grpo.py $task --model $models/sft_merged --train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl \
  --rewards facts:2 structure allowed length calm no_repeat:0.5 model=$models/reward:0.1 --max-length 1024 --max-new-tokens $tokens \
  --max-steps $grpo --batch-size 32 --num-generations 8 --eval-steps 5 --probe-count 8 --output-dir $models/grpo ${again[@]+"${again[@]}"}

generate() {  # generate NAME MODEL-FLAGS...: the val products, which have golden copy to compare with
  local name=$1; shift
  python scripts/60_generate.py $task "$@" --name "$name" --prompts-file $data/prompts_val.jsonl --max-prompts $prompts \
    --max-new-tokens $tokens --temperature 0.1 --top-k 50 --top-p 0.95 --output-file $texts/"$name".jsonl ${again[@]+"${again[@]}"}
}
generate base
generate sft --adapter $models/sft
generate dpo --model $models/sft_merged --adapter $models/dpo
generate grpo --model $models/sft_merged --adapter $models/grpo

python scripts/70_score.py $task --generations $texts --output-dir results/$run/scores ${again[@]+"${again[@]}"}
judge() {  # judge NAME: golden, that run and the base; --overwrite: the stop rates are those of all runs that are there now
  python scripts/71_judge.py $task --judge rules --name "rules_$1" --candidates golden finetuned=$texts/"$1".jsonl base=$texts/base.jsonl \
    --generations $texts --output-file "results/$run/judgements/{name}.jsonl" --overwrite
}
judge sft
judge dpo
judge grpo
python scripts/72_compare.py $task --generations $texts --scores results/$run/scores --checkpoints $models --output results/$run/compare --overwrite
