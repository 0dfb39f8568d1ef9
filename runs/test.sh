#!/usr/bin/env bash
# Lint and tests in .venv. --all adds what needs a browser (installed by it where apt-get can) and what needs vLLM (its CPU build, where pip
# can); without it such tests are skipped visibly. Further words go to pytest: bash runs/test.sh -k merge
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install requirements-dev.txt

words=()
for word in "$@"; do
  words+=("$word")
  if [ "$word" = --all ] && ! command -v chromium >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium fonts-noto-cjk; } >/dev/null ||
      echo "notice: Chromium could not be installed here, the test that needs it is skipped"
  fi
  if [ "$word" = --all ]; then
    bash runs/setup_vllm.sh || echo "notice: vLLM could not be installed here, the tests that need it are skipped"
  fi
done
ruff check .
ruff format --check .
# two files of tests at once, each on half of the cores: the tests start more processes than they use threads
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > 1 ? cores / 2 : 1 ))}"
python -m pytest -q -n 2 --dist loadfile ${words[@]+"${words[@]}"}
