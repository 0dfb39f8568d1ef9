#!/usr/bin/env bash
# Your own data on the embedded base model, on a laptop's CPU: rows of any format -> SFT on every turn -> merge -> reward model -> PPO and
# GRPO -> inference with each adapter. To see every stage work, and as a template: 145 rows teach a model of 5M parameters no chat.
# Every stage says "already done" when it is run again; --overwrite makes all of them anew.
#   bash runs/chat_cpu.sh                                the shipped set, data/chat
#   FILES="mine.json pairs.jsonl prompts.csv" bash runs/chat_cpu.sh     your rows, pairs and prompts for RL (see docs/SFT.md)
#   REWARDS="length no_repeat:0.5" FILES=...             other rewards than the reward model and the shape of the answer
#   bash runs/chat_cpu.sh --quick                        fewer steps and prompts, results in results/chat_quick
set -euo pipefail
from="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

quick=false again=()
for word in "$@"; do
  case "$word" in
    --quick) quick=true ;;
    --overwrite) again=(--overwrite) ;;
    *) echo "error: unknown word $word; fix: --quick, --overwrite" >&2; exit 2 ;;
  esac
done

folder=chat epochs=6 probe=32 pairs=8 ppo=30 grpo=30 rollout=64 samples=3 prompts=0
if $quick; then folder=chat_quick epochs=1 probe=8 pairs=1 ppo=2 grpo=2 rollout=16 samples=1 prompts=4; fi
data=processed_data/$folder models=checkpoints/$folder texts=results/$folder/generations
stage() { echo "== $1"; python scripts/"$1" --task chat "${@:2}" ${again[@]+"${again[@]}"}; }  # stage SCRIPT FLAGS...

files=()
for file in ${FILES:-}; do case "$file" in /*) files+=("$file") ;; *) files+=("$from/$file") ;; esac; done
stage 17_prepare_chat.py ${files[@]+--files "${files[@]}"} --output-dir $data
sft="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
pref="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"
rl="--train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl"
for checked in "$sft" "$pref" "--train-file $data/prompts_train.jsonl --val-file $data/prompts_val.jsonl"; do
  python scripts/19_check_data.py --task chat $checked
done

stage 20_train_sft.py $sft --row-style messages --epochs $epochs --lr 1e-3 --batch-size 16 --accumulation 1 --eval-steps 9 \
  --probe-count $probe --output-dir $models/sft
stage 22_merge_adapter.py --adapter $models/sft --probe-file $data/sft_val.jsonl --probe-rows $probe --output-dir $models/sft_merged

stage 30_train_reward.py --model $models/sft_merged $pref --epochs $pairs --lr 5e-4 --batch-size 16 --eval-steps 5 --output-dir $models/reward
# follows needs what the prompts of data/chat say in meta (a length, words, sentences); other files may have none of it
follows=follows:1
if [ -n "${FILES:-}" ]; then follows=""; fi
rewards="${REWARDS:-$follows no_repeat:0.5 closed:0.5 model=$models/reward:0.2}"
stage 51_train_ppo.py --model $models/sft_merged $rl --rewards $rewards --watch length chinese --max-steps $ppo --batch-size $rollout \
  --probe-count $probe --output-dir $models/ppo
stage 50_train_grpo.py --model $models/sft_merged $rl --rewards $rewards --max-steps $grpo --batch-size $rollout --probe-count $probe \
  --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...
  local name=$1; shift
  stage 60_generate.py "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --max-prompts $prompts --num-samples $samples \
    --output-file $texts/"$name".jsonl
}
generate base
generate sft --adapter $models/sft
generate sft_merged --model $models/sft_merged
generate ppo --model $models/sft_merged --adapter $models/ppo
generate grpo --model $models/sft_merged --adapter $models/grpo

stage 70_score.py --generations $texts --output-dir results/$folder/scores
# the report is made anew each time: it costs seconds, and any run above may have changed
python scripts/72_compare.py --task chat --generations $texts --scores results/$folder/scores --checkpoints $models \
  --output results/$folder/compare --overwrite
