#!/usr/bin/env bash
# Builds the documentation site into the folder OUT: `bash docs/build.sh OUT`. Needs the extra docs, and no network.
# Warnings are errors; what is built asks no other server for anything. NOTEBOOKS names a folder of executed notebooks
# (`MERGELAB_NOTEBOOKS=DIR pytest -m slow tests/test_notebooks.py` leaves them), whose pages then show their outputs.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: bash docs/build.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
[ -z "${NOTEBOOKS:-}" ] || NOTEBOOKS=$(cd "$NOTEBOOKS" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT

export JAX_PLATFORMS=cpu PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -m docs.site.stage "$source"
python -m sphinx -b html -W --keep-going -q -j 2 -d "$source/.doctrees" "$source" "$out"
python -m docs.site.check "$out"
