#!/usr/bin/env bash
# The style classifier on the embedded base, on a laptop's CPU: prepare, check, train twice (rows as they are, and with variants of them),
# report on validation and test beside simpler classifiers. Every stage says "already done" when run again; --overwrite makes all anew.
#   bash runs/styles_cpu.sh            the report is results/styles/classifiers.md
# The embedded base wants a higher rate and larger batches than the flags' defaults, which are for models of 0.5B and more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

again=()
for word in "$@"; do
  case "$word" in
    --overwrite) again=(--overwrite) ;;
    *) echo "error: unknown word $word; fix: --overwrite" >&2; exit 2 ;;
  esac
done

data=processed_data/styles models=checkpoints/styles
python scripts/12_prepare_styles.py ${again[@]+"${again[@]}"}
python scripts/12_prepare_styles.py --augment 2 --output-dir processed_data/styles_augmented ${again[@]+"${again[@]}"}
python scripts/19_check_data.py --task styles --train-file $data/style_train.jsonl --val-file $data/style_val.jsonl

train() {  # train NAME ROWS FLAGS...
  local name=$1 rows=$2; shift 2
  python scripts/31_train_style_classifier.py --train_file "$rows" --validation_file $data/style_val.jsonl --learning_rate 5e-4 \
    --per_device_train_batch_size 16 --per_device_eval_batch_size 32 --label_smoothing 0.1 --output_dir $models/"$name" "$@" ${again[@]+"${again[@]}"}
}
train classifier $data/style_train.jsonl --num_train_epochs 4 --demo_inference
train classifier_augmented processed_data/styles_augmented/style_train.jsonl --num_train_epochs 2

python scripts/61_classify_style.py --input-file $data/style_test.jsonl ${again[@]+"${again[@]}"}
# the report is made anew each time: it costs seconds, and any run above may have changed
python benchmarks/style_classifiers.py --classifiers $models/classifier $models/classifier_augmented --output results/styles/classifiers.md
