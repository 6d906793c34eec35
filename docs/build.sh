#!/usr/bin/env bash
# Builds the documentation site into the folder OUT: `bash docs/build.sh OUT`. Needs the extra docs, and no network.
# Warnings are errors; what is built asks no other server for anything.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: bash docs/build.sh OUT" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT

export JAX_PLATFORMS=cpu PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python -m docs.site.stage "$source"
python -m sphinx -b html -W --keep-going -q -j 2 -d "$source/.doctrees" "$source" "$out"
python -m docs.site.check "$out"
