# Sourced by the other files here: goes to the repo's root and puts .venv with requirements.txt on the path.
# PYTHON names the interpreter (3.11 or newer). TORCH_INDEX_URL names an index to take torch from, so that a laptop
# without a GPU does not download CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

trap 'exit 130' INT  # a stage that has just ended would swallow a Ctrl-C, and the next one would begin
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is older than Python 3.11; fix: PYTHON=python3.12 bash runs/..." >&2; exit 2; }
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
export PATH="$PWD/.venv/bin:$PATH"

# install FILE: pip install -r FILE, once for each content of it. Python compiles what it imports; pip would compile all
# of torch and transformers, which is half of its time.
install() {
  local stamp=".venv/installed-$(basename "$1")"
  cmp -s "$1" "$stamp" && return
  echo "installing $1"
  python -m pip install --quiet --disable-pip-version-check --no-compile -r "$1"
  cp "$1" "$stamp"
}

if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
  echo "installing torch"
  python -m pip install --quiet --disable-pip-version-check --no-compile \
    "$(grep '^torch==' requirements.txt)" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
fi
install requirements.txt
export TOKENIZERS_PARALLELISM=false
# Many container images set it. As pip compiles nothing above, each start of a stage would compile all that it imports.
unset PYTHONDONTWRITEBYTECODE
