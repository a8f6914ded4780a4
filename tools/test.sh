#!/usr/bin/env bash
# Everything that is checked before a change is taken: lint, format, types, docs, tests. Arguments go to pytest.
#
#     bash tools/test.sh [-k name ...]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/environment.sh" dev
cd "$root"
python="$root/.venv/bin/python"

export OMP_WAIT_POLICY=passive # as in training: threads that wait sleep, so that a busy machine is not slowed five-fold

step() {
    echo "== $*"
    "$python" -m "$@"
}

step ruff check .
step ruff format --check .
step mypy
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
NO_MKDOCS_2_WARNING=1 step mkdocs build --strict --site-dir "$site" # not --quiet, which makes --strict blind
step pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" # a file stays in one process: its fixtures are made once
