#!/usr/bin/env bash
# What does cleaning give, and what does preference add? SFT on raw verse, on cleaned verse, on verse that keeps every
# rule; DPO and RFT on the cleaned one's own ranked samples. All on the embedded base, judged on the same test prompts.
# Results in results/poems_ablation.
#   bash runs/poems_ablation.sh [--quick] [--overwrite] [--print]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start poems tiny "$@"

rows=8000 prompts=512 seeds=3 ranked=480 samples=16 eval=50 folder=poems_ablation
if $quick; then rows=800 prompts=32 seeds=1 ranked=24 samples=8 eval=10 folder=poems_ablation_quick; fi
data=processed_data/$folder models=checkpoints/$folder results=results/$folder texts=results/$folder/generations

for clean in none full strict; do
  stage 10_prepare_poems --clean $clean --max-train $rows --output-dir $data/$clean
  # validation and test rows come from the cleaned corpus whatever --clean says
  stage 20_train_sft --train-file $data/$clean/sft_train.jsonl --val-file $data/$clean/sft_val.jsonl \
    --eval-steps $eval --output-dir $models/sft_$clean
done
stage 22_merge_adapter --adapter $models/sft_full --probe-file $data/full/sft_val.jsonl \
  --output-dir $models/sft_full_merged
stage 60_generate --model $models/sft_full_merged --prompts-file $data/full/prompts_train.jsonl \
  --max-prompts $ranked --num-samples $samples --output-file $results/onpolicy/sft_full_merged.jsonl
stage 33_rank_samples --generations $results/onpolicy/sft_full_merged.jsonl --rewards rhyme meter --require form \
  --write both --output-dir $data/full
stage 40_train_dpo --model $models/sft_full_merged --train-file $data/full/pref_onpolicy_train.jsonl \
  --val-file $data/full/pref_onpolicy_val.jsonl --lr 1e-3 --output-dir $models/dpo
stage 20_train_sft --model $models/sft_full_merged --train-file $data/full/sft_best_train.jsonl \
  --val-file $data/full/sft_best_val.jsonl --output-dir $models/rft

generate() {  # generate NAME MODEL-FLAGS...
  stage 60_generate "${@:2}" --name "$1" --prompts-file $data/full/prompts_test.jsonl --max-prompts $prompts \
    --num-samples $seeds --output-file "$texts/$1.jsonl"
}
generate sft_none --adapter $models/sft_none
generate sft_full --adapter $models/sft_full
generate sft_strict --adapter $models/sft_strict
generate rft --model $models/sft_full_merged --adapter $models/rft
generate dpo --model $models/sft_full_merged --adapter $models/dpo
stage 70_score --generations $texts --output-dir $results/scores
compare --runs sft_none sft_full sft_strict rft dpo
