#!/usr/bin/env bash
# The brand-copy chain on Qwen2.5-7B-Instruct: LoRA r 64, alpha 128, dropout 0.05 on all seven projections, 1 epoch, batch 1 x 8, lr 1e-5
# cosine, packing, 2048 tokens. For a large GPU.
#   bash runs/copywriting_qwen2.5_7b.sh
#   WRITER=deepseek-chat JUDGE=deepseek-chat bash runs/copywriting_qwen2.5_7b.sh
# WRITER names a model at OPENAI_BASE_URL (key in OPENAI_API_KEY) that writes golden copy for all products, so that the 171 test prompts have
# something to be compared with, and half-hearted copy for the pairs; without it the shipped golden copy is used and judged on the 54
# prompts of the val products. JUDGE names the judge; without it the rules judge. MODEL, RUN and EPOCHS name another base, folder, length of
# training: with the shipped 135 golden rows one epoch is only a handful of steps (packed), so give EPOCHS=20 or a WRITER.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-vllm.txt

model="${MODEL:-Qwen/Qwen2.5-7B-Instruct}" run="${RUN:-copywriting_qwen2.5_7b}" epochs="${EPOCHS:-1}"
writer="${WRITER:-}" weak_writer="${WEAK_WRITER:-}" judge="${JUDGE:-rules}"
samples=1 splits="train val" split=val
if [ -n "$writer" ]; then samples=4 splits="train val test" split=test; fi
task="--task copywriting"
data=processed_data/$run models=checkpoints/$run texts=results/$run/generations
sft_files="--train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl"
pairs="--train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl"
lora="--lora-r 64 --lora-alpha 128 --lora-dropout 0.05"  # all seven projections are the default

python scripts/13_write_copy.py --model "$writer" --num-samples $samples --splits $splits --output-file $data/golden_raw.jsonl
python scripts/14_clean_copy.py --model "$writer" --copies-file $data/golden_raw.jsonl --output-file $data/golden_clean.jsonl
python scripts/15_write_rejected.py --model "$writer" --weak-model "$weak_writer" --golden-file $data/golden_clean.jsonl --output-file $data/rejected.jsonl
python scripts/16_prepare_copy.py --golden-file $data/golden_clean.jsonl --rejected-file $data/rejected.jsonl --output-dir $data
python scripts/19_check_data.py $task --model "$model" $sft_files --max-length 2048 --preview results/$run/mask_preview.html

python scripts/20_train_sft.py $task --model "$model" $sft_files $lora --epochs "$epochs" --lr 1e-5 --batch-size 1 --accumulation 8 \
  --packing --max-length 2048 --gradient-checkpointing --device-map auto --eval-steps 50 --probe-tokens 512 --output-dir $models/sft
python scripts/22_merge_adapter.py $task --adapter $models/sft --probe-file $data/sft_val.jsonl --greedy-tokens 256 --output-dir $models/sft_merged
python scripts/30_train_reward.py $task --model $models/sft_merged $pairs --max-length 2048 --lr 1e-4 --batch-size 2 --accumulation 8 \
  --gradient-checkpointing --output-dir $models/reward
python scripts/32_evaluate_reward.py $task --model $models/reward $pairs --max-length 2048 --output results/$run/reward_card
python scripts/40_train_dpo.py $task --model $models/sft_merged $pairs $lora --max-length 2048 --lr 5e-6 --batch-size 1 --accumulation 8 \
  --gradient-checkpointing --eval-steps 20 --probe-tokens 512 --output-dir $models/dpo
# rules that a policy can climb; the reward model weighs little, because rules made half of its pairs
python scripts/50_train_grpo.py $task --model $models/sft_merged --train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl $lora \
  --rewards facts:2 structure allowed length calm no_repeat:0.5 model=$models/reward:0.1 --max-length 2048 --max-new-tokens 512 \
  --lr 1e-5 --batch-size 8 --accumulation 4 --num-generations 8 --gradient-checkpointing --rollout vllm --max-steps 100 --output-dir $models/grpo

generate() {  # generate NAME MODEL-FLAGS...: 8 prompts of about 500 tokens with 512 new ones in a batch
  local name=$1; shift
  python scripts/60_generate.py $task "$@" --name "$name" --prompts-file $data/prompts_$split.jsonl --max-new-tokens 512 --temperature 0.1 \
    --top-k 50 --top-p 0.95 --batch-tokens 8192 --device-map auto --output-file $texts/"$name".jsonl
}
generate base --model "$model"
generate sft --model "$model" --adapter $models/sft
generate dpo --model $models/sft_merged --adapter $models/dpo
generate grpo --model $models/sft_merged --adapter $models/grpo

python scripts/70_score.py $task --generations $texts --output-dir results/$run/scores --nll-model "$model" --dtype auto
judge() {  # judge NAME: golden, that run and the base, under both versions of the judge prompts
  python scripts/71_judge.py $task --judge "$judge" --name "${judge//\//_}_$1" --prompt-versions v1 v2 \
    --candidates golden finetuned=$texts/"$1".jsonl base=$texts/base.jsonl --generations $texts \
    --request-log "results/$run/judgements/{name}.requests.jsonl" --output-file "results/$run/judgements/{name}.jsonl" --overwrite
}
judge sft
judge dpo
judge grpo
python scripts/72_compare.py $task --generations $texts --scores results/$run/scores --checkpoints $models --output results/$run/compare --overwrite
