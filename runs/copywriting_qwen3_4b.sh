#!/usr/bin/env bash
# The brand-copy chain of runs/copywriting_qwen2.5_7b.sh, with the same settings, on Qwen3-4B, on a GPU.
set -euo pipefail
MODEL="${MODEL:-Qwen/Qwen3-4B}" RUN="${RUN:-copywriting_qwen3_4b}" exec bash "$(dirname "${BASH_SOURCE[0]}")/copywriting_qwen2.5_7b.sh" "$@"
