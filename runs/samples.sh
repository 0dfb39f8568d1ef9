#!/usr/bin/env bash
# Remakes processed_data/sample: the first rows of every file that the data stages write, so that the formats can be
# seen without running anything.
#   bash runs/samples.sh                       all jobs, into processed_data/sample
#   bash runs/samples.sh FOLDER chat styles    these jobs, into FOLDER (the tests compare them)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

into="${1:-processed_data/sample}" rows=2
shift $(( $# > 0 ? 1 : 0 ))
jobs=("$@")
if (( ${#jobs[@]} == 0 )); then jobs=(poems weibo styles copywriting chat text); fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

for job in "${jobs[@]}"; do
  case "$job" in
    poems) python scripts/10_prepare_poems.py --max-train 200 --max-pairs 50 --output-dir "$work/poems" ;;
    weibo) python scripts/11_prepare_weibo.py --held-out 15 --output-dir "$work/weibo" ;;
    styles) python scripts/12_prepare_styles.py --output-dir "$work/styles" ;;
    copywriting)
      golden="$work/copywriting/golden_clean.jsonl" rejected="$work/copywriting/rejected.jsonl"
      python scripts/13_write_copy.py --output-file "$work/copywriting/golden_raw.jsonl"
      python scripts/14_clean_copy.py --copies-file "$work/copywriting/golden_raw.jsonl" --output-file "$golden"
      python scripts/15_write_rejected.py --golden-file "$golden" --output-file "$rejected"
      python scripts/16_prepare_copy.py --golden-file "$golden" --rejected-file "$rejected" \
        --output-dir "$work/copywriting/rows" ;;
    chat) python scripts/17_prepare_chat.py --output-dir "$work/chat" ;;
    text) python scripts/18_prepare_text.py --files data/copywriting/brand_guide.md --document paragraphs \
            --output-dir "$work/text" ;;
    *) echo "error: no job $job; fix: poems, weibo, styles, copywriting, chat or text" >&2; exit 2 ;;
  esac >/dev/null
  mkdir -p "$into/$job"
  find "$work/$job" \( -name '*_train.jsonl' -o -name golden_clean.jsonl -o -name rejected.jsonl \) | sort |
    while IFS= read -r file; do head -n "$rows" "$file" > "$into/$job/$(basename "$file")"; done
done
echo "wrote $into"
