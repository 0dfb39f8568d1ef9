#!/usr/bin/env bash
# The brand-copy chain of runs/copywriting_qwen2.5_7b.sh, with the same settings, on Qwen2.5-0.5B-Instruct, on a GPU.
set -euo pipefail
MODEL="${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}" RUN="${RUN:-copywriting_qwen2.5_0.5b}" exec bash "$(dirname "${BASH_SOURCE[0]}")/copywriting_qwen2.5_7b.sh" "$@"
