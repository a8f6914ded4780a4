#!/usr/bin/env bash
# What is checked before a change is taken: lint, format, types, docs, tests. Arguments go to pytest.
#
#     bash tools/test.sh [-k name ...]           # the fast tests: some minutes
#     bash tools/test.sh --full [-k name ...]    # the slow ones too, as CI: compilers, drills with real processes
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit ;; esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/environment.sh" dev
cd "$root"
python="$root/.venv/bin/python"

export OMP_WAIT_POLICY=passive # as in training: threads that wait sleep, so that a busy machine is not slowed five-fold

took=()
step() {
    echo "== $*"
    local begun=$SECONDS
    local code=0
    "$python" -m "$@" || code=$?
    took+=("$((SECONDS - begun)) s $1 ${2:-}")
    return "$code"
}

finish() {
    rm -rf "$site"
    printf '== it took\n'
    printf '   %s\n' "${took[@]}"
}

site="$(mktemp -d)"
trap finish EXIT

step ruff check .
step ruff format --check .
step mypy
NO_MKDOCS_2_WARNING=1 step mkdocs build --strict --site-dir "$site" # not --quiet, which makes --strict blind
step pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" # a file stays in one process: its fixtures are made once
