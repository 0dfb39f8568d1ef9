#!/usr/bin/env bash
# Remakes results/reference/<job> from the recipes: runs each (a finished stage says "already done"), then keeps all
# generations, records, report and plots. Commit before: the records name the commit.
#   bash runs/reference.sh                  every job: poems on the embedded base, all on Gemma 3 270M (hours)
#   bash runs/reference.sh poems weibo      these
#   bash runs/reference.sh --quick poems    the short chains, kept as results/reference/poems_quick
#   SEEDS="43 44" bash runs/reference.sh poems    two trainings more, for the spread between trainings
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

quick="" jobs=()
for word in "$@"; do
  case "$word" in
    --quick) quick=--quick ;;
    poems | poems_small | weibo | copywriting | styles | chat) jobs+=("$word") ;;
    *)
      echo "error: unknown word $word; fix: poems, poems_small, weibo, copywriting, styles, chat or --quick" >&2
      exit 2 ;;
  esac
done
if (( ${#jobs[@]} == 0 )); then jobs=(poems poems_small weibo copywriting styles chat); fi

for kept in "${jobs[@]}"; do
  profile=small job=${kept%_small}
  if [ "$kept" = poems ]; then profile=tiny; fi
  words=(); if [ "$profile" != tiny ]; then words=("$profile"); fi
  run=$job; if [ "$profile" != tiny ]; then run=${job}_$profile; fi
  if [ -n "$quick" ]; then words+=("$quick") run=${run}_quick kept+=_quick; fi
  command="bash runs/$job.sh${words[*]:+ ${words[*]}}"
  $command
  trainings=()
  for seed in ${SEEDS:-}; do
    SEED=$seed $command
    trainings+=("${run}_seed$seed")
  done
  python runs/reference.py --job "$kept" --run "$run" --command "$command" \
    ${trainings[@]+--trainings "${trainings[@]}"}
  if [ "$job" = poems ]; then
    python runs/picture.py --report "results/reference/$kept/compare.run.json" \
      --output "results/reference/$kept/chain.png"
  fi
done
