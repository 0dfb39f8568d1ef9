#!/usr/bin/env bash
# The Weibo chain on the embedded base model and the shipped sample, on a laptop's CPU: to see every stage work, not to get a commenter.
# 795 posts and some dozens of pairs teach a model of 5M parameters little; results/weibo/reward_model.md says how little is known.
# Every stage says "already done" when it is run again; --overwrite makes all of them anew.
#   bash runs/weibo_cpu.sh
#   bash runs/weibo_cpu.sh --quick    fewer steps and prompts, results in results/weibo_quick
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

epochs=8 probe=32 dpo=4 steps=40 prompts=0 samples=3 folder=weibo
if $quick; then epochs=1 probe=8 dpo=1 steps=2 prompts=16 samples=1 folder=weibo_quick; fi
data=processed_data/$folder models=checkpoints/$folder results=results/$folder texts=results/$folder/generations
stage() {  # stage NAME FLAGS...
  local name=$1; shift
  python scripts/"$name".py --task weibo "$@" ${again[@]+"${again[@]}"}
}

# of a small corpus 15 of 100 posts are val and 15 test, not 5
stage 11_prepare_weibo --held-out 15 --output-dir $data
sft="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"
python scripts/19_check_data.py --task weibo $sft
python scripts/19_check_data.py --task weibo $pairs
stage 20_train_sft $sft --epochs $epochs --lr 1e-3 --eval-steps 10 --probe-count $probe --output-dir $models/sft
stage 22_merge_adapter --adapter $models/sft --probe-file $data/sft_val.jsonl --probe-rows $probe --output-dir $models/sft_merged

stage 30_train_reward --model $models/sft_merged $pairs --epochs $dpo --lr 5e-4 --batch-size 8 --eval-steps 5 --output-dir $models/reward
stage 32_evaluate_reward --model $models/reward --train-file $data/pref_train.jsonl --val-file $data/pref_test.jsonl --output $results/reward_model
stage 40_train_dpo --model $models/sft_merged $pairs --epochs $dpo --lr 2e-4 --batch-size 8 --eval-steps 5 --probe-count $probe --output-dir $models/dpo
stage 50_train_grpo --model $models/sft_merged --train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl --max-steps $steps \
  --rewards length no_copy no_repeat clean no_assistant no_personal model=$models/reward:0.2 --batch-size 64 --eval-steps 10 \
  --probe-count $probe --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...
  local name=$1; shift
  stage 60_generate "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --max-prompts $prompts --num-samples $samples \
    --output-file $texts/"$name".jsonl
}
generate base
generate sft --adapter $models/sft
generate sft_merged --model $models/sft_merged
generate dpo --model $models/sft_merged --adapter $models/dpo
generate grpo --model $models/sft_merged --adapter $models/grpo

stage 70_score --generations $texts --output-dir $results/scores
# made anew each time: they cost seconds, and any run above may have changed
python runs/weibo_results.py --generations $texts --scores $results/scores --reward $models/reward --output $results/inference_comparison_results.jsonl
python scripts/72_compare.py --task weibo --generations $texts --scores $results/scores --checkpoints $models --output $results/compare --overwrite
