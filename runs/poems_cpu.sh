#!/usr/bin/env bash
# The poems chain on the embedded base model, on a laptop's CPU: prepare, check, SFT, merge, generate, score, compare.
# Every stage says "already done" when it is run again; --overwrite makes all of them anew.
#   bash runs/poems_cpu.sh            about 15 minutes on two cores
#   bash runs/poems_cpu.sh --quick    about 3 minutes: fewer rows and samples, results in results/poems_quick
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

quick=false again=()
for word in "$@"; do
  case "$word" in
    --quick) quick=true ;;
    --overwrite) again=(--overwrite) ;;
    *) echo "error: unknown word $word; mend: --quick, --overwrite" >&2; exit 2 ;;
  esac
done

rows=16000 prompts=512 seeds=3 eval=50
folder=poems
if $quick; then rows=1500 prompts=128 seeds=1 eval=12 folder=poems_quick; fi
data=processed_data/$folder models=checkpoints/$folder texts=results/$folder/generations

python scripts/10_prepare_poems.py --max-train $rows --output-dir $data ${again[@]+"${again[@]}"}
python scripts/19_check_data.py --train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl
python scripts/20_train_sft.py --train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl \
  --eval-steps $eval --output-dir $models/sft ${again[@]+"${again[@]}"}
python scripts/22_merge_adapter.py --adapter $models/sft --probe-file $data/sft_val.jsonl --output-dir $models/sft_merged ${again[@]+"${again[@]}"}

generate() {  # generate NAME MODEL-FLAGS...
  local name=$1; shift
  python scripts/60_generate.py "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --max-prompts $prompts \
    --num-samples $seeds --output-file $texts/"$name".jsonl ${again[@]+"${again[@]}"}
}
generate base
generate sft --adapter $models/sft
generate sft_merged --model $models/sft_merged

python scripts/70_score.py --generations $texts --output-dir results/$folder/scores ${again[@]+"${again[@]}"}
# the report is made anew each time: it costs seconds, and any run above may have changed
python scripts/72_compare.py --generations $texts --scores results/$folder/scores --checkpoints $models \
  --output results/$folder/compare --overwrite
