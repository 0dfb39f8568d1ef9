#!/usr/bin/env bash
# Lint and tests in .venv: tests/unit and tests/stages. --all adds tests/slow (kills, several processes, servers) with
# what a browser, llama.cpp and vLLM need, installed here where apt-get and pip can; without them such tests are
# skipped visibly. Further words go to pytest: bash runs/test.sh -k merge
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-dev.txt

get_chromium() {
  if command -v chromium >/dev/null; then return; fi
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq chromium fonts-noto-cjk; } >/dev/null ||
    echo "notice: Chromium could not be installed here, the test that needs it is skipped"
}

tests=(tests/stages tests/unit) words=()
for word in "$@"; do
  words+=("$word")
  if [ "$word" != --all ]; then continue; fi
  tests=(tests/slow "${tests[@]}")
  get_chromium &
  install requirements-gguf.txt
  bash runs/setup_vllm.sh || echo "notice: vLLM could not be installed here, the tests that need it are skipped"
done
wait
ruff check .
ruff format --check .
# Two files of tests at once, each on half of the cores: the tests start more processes than they use threads. In the
# order named, the long ones first, so that neither half waits long for the other at the end.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > 1 ? cores / 2 : 1 ))}"
python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 25 "${tests[@]}" ${words[@]+"${words[@]}"}
