#!/usr/bin/env bash
# The dialogue style classifier: prepare, check, train twice, classify, report beside simpler classifiers.
#   bash runs/styles.sh            tiny: the embedded base on a CPU; the report is results/styles/classifiers.md
#   bash runs/styles.sh --quick    one epoch
#   bash runs/styles.sh small      Gemma 3 270M (package index), the flags' own defaults, the embedded base as pupil
# MODEL=Qwen/Qwen2.5-0.5B (or a folder) takes another base. --overwrite makes every stage anew, --print shows the
# commands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
start styles "tiny small" "$@"

# the embedded base wants a higher rate and larger batches than the defaults, which are for models of 0.5B and more
tiny="--learning_rate 5e-4 --per_device_train_batch_size 16 --per_device_eval_batch_size 32 --label_smoothing 0.1"
epochs=4
if $quick; then epochs=1; fi
rows="--train_file $data/style_train.jsonl --validation_file $data/style_val.jsonl"

stage 12_prepare_styles --output-dir $data
case "$profile" in
  tiny)
    model="${MODEL:-data/tiny_qwen3}" second=classifier_augmented
    check --model "$model" --train-file $data/style_train.jsonl --val-file $data/style_val.jsonl
    stage 12_prepare_styles --augment 2 --output-dir ${data}_augmented
    stage 31_train_style_classifier --model_name_or_path "$model" $rows $tiny --num_train_epochs $epochs \
      \
      --demo_inference --output_dir $models/classifier
    stage 31_train_style_classifier --model_name_or_path "$model" --train_file ${data}_augmented/style_train.jsonl \
      --validation_file $data/style_val.jsonl $tiny --num_train_epochs $(( (epochs + 1) / 2 )) \
      --output_dir $models/$second ;;
  small)
    gemma_base
    model="${MODEL:-$model}" second=classifier_pupil
    check --model "$model" --train-file $data/style_train.jsonl --val-file $data/style_val.jsonl
    stage 31_train_style_classifier --model_name_or_path "$model" $rows \
      --num_train_epochs $(( epochs < 3 ? epochs : 3 )) \
      --demo_inference --output_dir $models/classifier
    stage 31_train_style_classifier --model_name_or_path data/tiny_qwen3 $rows $tiny --num_train_epochs $epochs \
      --teacher $models/classifier \
      --output_dir $models/$second ;;
esac
stage 61_classify_style --model $models/classifier --input-file $data/style_test.jsonl \
  --output-file "$results/classified/{name}.jsonl"
# the report is made anew each time: it takes seconds, and any run above may have changed
run_python benchmarks/style_classifiers.py --base "$model" --data $data --classifiers $models/classifier \
  $models/$second --output $results/classifiers.md
