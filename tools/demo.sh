#!/usr/bin/env bash
# See it work: a small SparK pre-training from JPEG files to a reconstruction picture, on any machine with Python.
#
#     bash tools/demo.sh [--data_path FOLDER] [--out FOLDER] [any flag of spark-fast-train]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit ;; esac

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/tools/environment.sh"
exec "$root/.venv/bin/python" "$root/tools/demo.py" "$@"
