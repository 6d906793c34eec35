#!/usr/bin/env bash
# A recipe merged, judged on text that no parent was trained on, and asked something: bash merge_from_the_shell.sh A B HELD_OUT.txt
set -euo pipefail

cat >recipe.yaml <<RECIPE
merge_method: linear
models:
  - {model: $1, parameters: {weight: 0.5}}
  - {model: $2, parameters: {weight: 0.5}}
RECIPE

mergelab check recipe.yaml || true # what would make the merge meaningless, each with its remedy
mergelab merge recipe.yaml --out merged --judge "$3"
mergelab evaluate "$1" "$2" merged --text "$3"
mergelab generate merged --prompt "The" --max-new-tokens 8
