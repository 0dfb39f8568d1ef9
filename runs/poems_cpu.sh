#!/usr/bin/env bash
# The poems chain on the embedded base model, on a laptop's CPU: prepare, check, SFT, merge, reward model, on-policy pairs, DPO, GRPO, PPO,
# generate, score, compare. DPO, GRPO and PPO each start from the merged SFT model; dpo_grpo is GRPO from the merged model of a second DPO round.
# After SFT two lanes run side by side, each on half of the cores: one thread each is worth more than two threads in one process.
# Every stage says "already done" when it is run again; --overwrite makes all of them anew.
#   bash runs/poems_cpu.sh            39 minutes were measured on two cores, see docs/RESULTS.md
#   bash runs/poems_cpu.sh --quick    fewer rows, steps and samples, results in results/poems_quick
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

quick=false again=()
for word in "$@"; do
  case "$word" in
    --quick) quick=true ;;
    --overwrite) again=(--overwrite) ;;
    *) echo "error: unknown word $word; fix: --quick, --overwrite" >&2; exit 2 ;;
  esac
done

folder=poems rows=13000 prompts=512 seeds=3 eval=68 preferred=1500 ranked=480 samples=12 grpo=108 after_dpo=72 ppo=42
if $quick; then folder=poems_quick rows=1500 prompts=128 seeds=1 eval=12 preferred=600 ranked=48 samples=8 grpo=12 after_dpo=8 ppo=4; fi
data=processed_data/$folder models=checkpoints/$folder texts=results/$folder/generations
stage() { echo "== $1"; python scripts/"$@" ${again[@]+"${again[@]}"}; }  # stage SCRIPT FLAGS...

stage 10_prepare_poems.py --max-train $rows --output-dir $data
python scripts/19_check_data.py --train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl
stage 20_train_sft.py --train-file $data/sft_train.jsonl --val-file $data/sft_val.jsonl --eval-steps $eval --output-dir $models/sft
stage 22_merge_adapter.py --adapter $models/sft --probe-file $data/sft_val.jsonl --output-dir $models/sft_merged

generate() {  # generate NAME MODEL-FLAGS...
  local name=$1; shift
  stage 60_generate.py "$@" --name "$name" --prompts-file $data/prompts_test.jsonl --max-prompts $prompts \
    --num-samples $seeds --output-file $texts/"$name".jsonl
}
score() {  # score NAME ...: in the lane that wrote them, so that both cores have work to the end
  local files=("${@/#/$texts/}")
  stage 70_score.py --generations "${files[@]/%/.jsonl}" --output-dir results/$folder/scores
}
# shares to climb by, the pass of all three as the goal, and a price on repeated characters, without which diversity is the first to go
rl="--train-file $data/prompts_train.jsonl --val-file $data/sft_val.jsonl --max-new-tokens 72 --eval-steps 24
  --rewards form:1 rhyme:2 meter all_three no_repeat:0.5"
# and a little for attested bigrams (fluency): obeying the rules alone makes the texts unlikely, much of it costs diversity.
# GRPO's batches of 64 answers: twice the steps of 128 for the same time.

pairs() {  # the reward model and DPO: everything that learns from pairs
  stage 30_train_reward.py --model $models/sft_merged --train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl \
    --max-train $preferred --output-dir $models/reward
  stage 60_generate.py --model $models/sft_merged --prompts-file $data/prompts_val.jsonl --max-prompts $prompts \
    --output-file results/$folder/onpolicy/val.jsonl
  stage 32_evaluate_reward.py --model $models/reward --train-file $data/pref_train.jsonl --val-file $data/pref_val.jsonl \
    --generations results/$folder/onpolicy/val.jsonl --output results/$folder/reward_card
  stage 60_generate.py --model $models/sft_merged --prompts-file $data/prompts_train.jsonl --max-prompts $ranked --num-samples $samples \
    --output-file results/$folder/onpolicy/sft_merged.jsonl
  stage 33_rank_samples.py --generations results/$folder/onpolicy/sft_merged.jsonl --rewards rhyme meter --require form --output-dir $data
  stage 40_train_dpo.py --model $models/sft_merged --train-file $data/pref_onpolicy_train.jsonl --val-file $data/pref_onpolicy_val.jsonl \
    --lr 1e-3 --output-dir $models/dpo
  generate dpo --model $models/sft_merged --adapter $models/dpo
  stage 22_merge_adapter.py --adapter $models/dpo --probe-file $data/sft_val.jsonl --output-dir $models/dpo_merged
  # once more: pairs of what the model writes now
  stage 60_generate.py --model $models/dpo_merged --prompts-file $data/prompts_train.jsonl --max-prompts $ranked --num-samples $samples \
    --seed 1042 --output-file results/$folder/onpolicy/dpo_merged.jsonl
  stage 33_rank_samples.py --generations results/$folder/onpolicy/dpo_merged.jsonl --rewards rhyme meter --require form --output-dir $data/round2
  stage 40_train_dpo.py --model $models/dpo_merged --train-file $data/round2/pref_onpolicy_train.jsonl \
    --val-file $data/round2/pref_onpolicy_val.jsonl --lr 1e-3 --output-dir $models/dpo_round2
  generate dpo_round2 --model $models/dpo_merged --adapter $models/dpo_round2
  stage 22_merge_adapter.py --adapter $models/dpo_round2 --probe-file $data/sft_val.jsonl --output-dir $models/dpo_round2_merged
  stage 50_train_grpo.py --model $models/dpo_round2_merged $rl fluency:0.05 --beta 0 --batch-size 64 --lr 1.5e-3 \
    --max-steps $after_dpo --output-dir $models/dpo_grpo
  generate dpo_grpo --model $models/dpo_round2_merged --adapter $models/dpo_grpo
  generate base
  score dpo dpo_round2 dpo_grpo base
}
rules() {  # GRPO and PPO from the merged SFT model: what learns from rewards
  generate sft --adapter $models/sft
  generate sft_merged --model $models/sft_merged
  stage 50_train_grpo.py --model $models/sft_merged $rl fluency:0.1 --beta 0 --batch-size 64 --max-steps $grpo \
    --output-dir $models/grpo
  generate grpo --model $models/sft_merged --adapter $models/grpo
  stage 51_train_ppo.py --model $models/sft_merged $rl fluency:0.2 --max-steps $ppo --epochs 2 --kl-coef 0.003 \
    --output-dir $models/ppo
  generate ppo --model $models/sft_merged --adapter $models/ppo
  score sft sft_merged grpo ppo
}
# lane NAME FUNCTION: runs FUNCTION beside what follows, on half of the cores, its lines marked with NAME.
# wait_lanes: returns when all have ended, and fails if one has failed. Ctrl-C and TERM end them too.
lanes=()
lane() {
  local cores; cores="$(getconf _NPROCESSORS_ONLN)"
  set -m  # a process group of its own, so that the whole lane can be ended
  ( export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > 1 ? cores / 2 : 1 ))}"
    "$2" 2>&1 | while IFS= read -r line; do echo "[$1] $line"; done ) &
  lanes+=($!)
  set +m
  trap 'for job in "${lanes[@]}"; do kill -- "-$job" 2>/dev/null || true; done; exit 130' INT TERM
}
wait_lanes() {
  local job failed=0
  for job in "${lanes[@]}"; do wait "$job" || failed=1; done
  (( failed == 0 )) || { echo "error: a lane has failed, its lines say why; the same command goes on where it ended" >&2; return 1; }
}

lane pairs pairs
lane rules rules
wait_lanes

# the report is made anew each time: it costs seconds, and any run above may have changed
python scripts/72_compare.py --generations $texts --scores results/$folder/scores --checkpoints $models \
  --output results/$folder/compare --overwrite
