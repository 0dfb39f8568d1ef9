#!/usr/bin/env bash
# What does cleaning buy, and what does preference add? SFT on raw verse, SFT on cleaned verse, then DPO on its own ranked samples; all on
# the embedded base, judged on the same test prompts. Results in results/poems_ablation.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

rows=8000 prompts=512 seeds=3
data=processed_data/poems_ablation models=checkpoints/poems_ablation texts=results/poems_ablation/generations

for clean in none full; do
  python scripts/10_prepare_poems.py --clean $clean --max-train $rows --output-dir $data/$clean
  # validation and test rows come from the cleaned corpus whatever --clean says
  python scripts/20_train_sft.py --train-file $data/$clean/sft_train.jsonl --val-file $data/$clean/sft_val.jsonl --eval-steps 50 \
    --output-dir $models/sft_$clean
done
python scripts/22_merge_adapter.py --adapter $models/sft_full --probe-file $data/full/sft_val.jsonl --output-dir $models/sft_full_merged
python scripts/60_generate.py --model $models/sft_full_merged --prompts-file $data/full/prompts_train.jsonl --max-prompts 480 --num-samples 16 \
  --output-file results/poems_ablation/onpolicy/sft_full_merged.jsonl
python scripts/33_rank_samples.py --generations results/poems_ablation/onpolicy/sft_full_merged.jsonl --rewards rhyme meter --require form --output-dir $data/full
python scripts/40_train_dpo.py --model $models/sft_full_merged --train-file $data/full/pref_onpolicy_train.jsonl \
  --val-file $data/full/pref_onpolicy_val.jsonl --lr 1e-3 --output-dir $models/dpo

generate() {  # generate NAME MODEL-FLAGS...
  local name=$1; shift
  python scripts/60_generate.py "$@" --name "$name" --prompts-file $data/full/prompts_test.jsonl --max-prompts $prompts --num-samples $seeds \
    --output-file $texts/"$name".jsonl
}
generate sft_none --adapter $models/sft_none
generate sft_full --adapter $models/sft_full
generate dpo --model $models/sft_full_merged --adapter $models/dpo
python scripts/70_score.py --generations $texts --output-dir results/poems_ablation/scores
python scripts/72_compare.py --generations $texts --scores results/poems_ablation/scores --checkpoints $models --runs sft_none sft_full dpo \
  --output results/poems_ablation/compare --overwrite
