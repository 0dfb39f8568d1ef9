#!/usr/bin/env bash
# The style classifier on Qwen2.5-0.5B, on one GPU, with the flags' own defaults. Downloads the model from the hub on first use:
#   hf download Qwen/Qwen2.5-0.5B        (or set MODEL to a local folder)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

model="${MODEL:-Qwen/Qwen2.5-0.5B}"
run=styles_qwen2.5_0.5b
data=processed_data/$run models=checkpoints/$run

python scripts/12_prepare_styles.py --output-dir $data
python scripts/19_check_data.py --task styles --model "$model" --train-file $data/style_train.jsonl --val-file $data/style_val.jsonl
python scripts/31_train_style_classifier.py --model_name_or_path "$model" --train_file $data/style_train.jsonl \
  --validation_file $data/style_val.jsonl --output_dir $models/classifier --max_length 512 --num_train_epochs 3 --learning_rate 2e-5 \
  --per_device_train_batch_size 4 --per_device_eval_batch_size 8 --weight_decay 0.01 --seed 42 --demo_inference
# the small one again, as the larger one's pupil
python scripts/31_train_style_classifier.py --train_file $data/style_train.jsonl --validation_file $data/style_val.jsonl \
  --teacher $models/classifier --learning_rate 5e-4 --num_train_epochs 4 --per_device_train_batch_size 16 --output_dir $models/classifier_small
python benchmarks/style_classifiers.py --base "$model" --data $data --classifiers $models/classifier $models/classifier_small \
  --output results/$run/classifiers.md
